/* Undoes what outlives the processes of a launch of root's: control groups and CNI networks.  What
 * is registered is undone once the container has ended and master's end of the socket is closed,
 * whoever else was killed.  There is none where nothing is registered, and none for a user. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include "starter.h"

enum { GROUPS_MAX = 32, NETWORKS_MAX = 32, NAME_BYTES = 64, ARGS_BYTES = 1024 };
enum { SOCKET_FD = 3, CONTAINER_FD = 4, SPACE_FD = 5, FIRST_FREE_FD = 6 };
enum { DEPTH_MAX = 16, REMOVE_TRIES = 200, REMOVE_WAIT_MS = 5 };
enum janitor_phase { WATCH };

static struct network {
    uint64_t container, interface;     /* numbers: CNI's names are made of them */
    char plugin[NAME_BYTES], args[ARGS_BYTES];
    int config_fd;
} networks[NETWORKS_MAX];
static size_t network_count;

static char groups[GROUPS_MAX][LIMIT_PATH_BYTES];
static size_t group_count;
static const struct launch *janitor_launch;

/* ---- what is registered ---- */

/* CLEAN_GROUP: a directory of a control group that is about to be made. */
static int clean_group(const struct op_request *q, int passed) {
    const char *path = wire_string(q, 0);
    if (passed >= 0 || !path || path[0] != '/' || q->length[1] || group_count == GROUPS_MAX)
        return ERR_MALFORMED;
    memcpy(groups[group_count++], path, q->length[0]);
    return ERR_OK;
}

static bool only_of(const char *text, const char *alphabet) {
    return text[strspn(text, alphabet)] == '\0';
}

#define LETTERS "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"

/* CLEAN_NETWORK(container, interface): plugin, CNI_ARGS and, as a file, what it reads. */
static int clean_network(const struct op_request *q, int passed) {
    const char *plugin = wire_string(q, 0), *args = wire_string(q, 1);
    if (passed < 0 || !plugin || !args || network_count == NETWORKS_MAX ||
        q->length[0] > NAME_BYTES || q->length[1] > ARGS_BYTES || !only_of(plugin, LETTERS "_-") ||
        *plugin == '\0' || !only_of(args, LETTERS "_-=;.:/"))
        return ERR_MALFORMED;
    int fd = fcntl(passed, F_DUPFD_CLOEXEC, FIRST_FREE_FD);
    if (fd < 0)
        return ERR_SETUP;
    struct network *n = &networks[network_count++];
    *n = (struct network){.container = q->num[0], .interface = q->num[1], .config_fd = fd};
    append_text(n->plugin, sizeof(n->plugin), plugin);
    append_text(n->args, sizeof(n->args), args);
    return ERR_OK;
}

#define ROW_INIT(name, phase, next, times, function)
#define ROW_KEEPER(name, phase, next, times, function)
#define ROW_RPC(name, phase, next, times, function)
#define ROW_JANITOR(name, phase, next, times, function) {OP_##name, phase, next, times, function},

/* The rows of protocol.def that are registered here. */
static const struct {
    uint32_t op;
    enum janitor_phase phase, next_phase;
    uint32_t times;
    int (*run)(const struct op_request *, int);
} table[] = {
#define OP(name, number, server, phase, next, times, function)                                     \
    ROW_##server(name, phase, next, times, function)
#include "rows.h"
};

static int register_one(const struct op_request *q, size_t size, int passed) {
    static uint32_t uses[ARRAY_SIZE(table)];
    if (wire_check_request(q, size) < 0 || q->flags)
        return ERR_MALFORMED;
    for (size_t i = 0; i < ARRAY_SIZE(table); i++)
        if (table[i].op == q->op)
            return uses[i]++ < table[i].times ? table[i].run(q, passed) : ERR_TIMES;
    return ERR_MALFORMED;
}

/* Until master has ended, or says that it has nothing more to register. */
static void listen_to_master(void) {
    static struct op_request q;
    int passed;
    ssize_t got;
    while ((got = wire_receive(SOCKET_FD, &q, sizeof(q), &passed)) > 0) {
        struct op_reply a = {.op = q.op};
        a.code = register_one(&q, (size_t)got, passed);
        if (passed >= 0)
            close(passed);
        if (wire_send(SOCKET_FD, &a, sizeof(a), -1) < 0)
            return;
    }
}

static void wait_for(int fd) {
    struct pollfd one = {.fd = fd, .events = POLLIN};
    while (poll(&one, 1, -1) < 0 && errno == EINTR)
        ;
}

/* ---- CNI ---- */

NO_RETURN static void run_plugin(const struct network *n) {
    const char *directory = config_string(&janitor_launch->config, CONFIG_CNI_PLUGIN_PATH);
    static char program[LIMIT_PATH_BYTES], path[LIMIT_PATH_BYTES + 16] = "CNI_PATH=";
    char id[64] = "CNI_CONTAINERID=apptainer-py-";
    char space[64] = "CNI_NETNS=/proc/", name[32] = "CNI_IFNAME=eth";
    char args[ARGS_BYTES + 16] = "CNI_ARGS=";
    static char command[] = "CNI_COMMAND=DEL", search[] = "PATH=/usr/sbin:/usr/bin:/sbin:/bin";
    append_text(program, sizeof(program), directory);
    append_text(program, sizeof(program), "/");
    append_text(program, sizeof(program), n->plugin);
    append_number(id, sizeof(id), n->container);
    append_number(space, sizeof(space), (uint64_t)getppid());
    append_text(space, sizeof(space), "/fd/");
    append_number(space, sizeof(space), SPACE_FD);
    append_number(name, sizeof(name), n->interface);
    append_text(path, sizeof(path), directory);
    append_text(args, sizeof(args), n->args);
    char *const argv[] = {program, NULL};
    char *const envp[] = {command, id, space, name, path, args, search, NULL};
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    if (lseek(n->config_fd, 0, SEEK_SET) < 0 || dup2(n->config_fd, 0) < 0)
        _exit(127);
    /* SAFE: root's own launch: the administrator's program, a clean environment, data on stdin. */
    execve(program, argv, envp);
    _exit(127);
}

static void remove_network(const struct network *n) {
    int status = -1;
    pid_t pid = fork();
    if (pid == 0)
        run_plugin(n);
    while (pid > 0 && waitpid(pid, &status, 0) < 0 && errno == EINTR)
        ;
    if (status != 0)
        report("WARNING: ", "a CNI plugin could not undo its part of the container's network");
}

/* ---- control groups ---- */

static bool on_cgroup(int fd) {
    struct statfs fs;
    return fstatfs(fd, &fs) == 0 &&
           (fs.f_type == CGROUP_SUPER_MAGIC || fs.f_type == CGROUP2_SUPER_MAGIC);
}

/* Some process of the group, or 0. */
static pid_t any_process(int group) {
    char text[32] = "";
    int fd = openat(group, "cgroup.procs", O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0)
        return 0;
    ssize_t got = read(fd, text, sizeof(text) - 1);
    close(fd);
    return got > 0 ? (pid_t)strtol(text, NULL, 10) : 0;
}

/* What the payload left in the background ends in its own time; the group goes after it. */
static void wait_for_processes(int group) {
    pid_t pid;
    while ((pid = any_process(group)) > 0) {
        int fd = (int)syscall(SYS_pidfd_open, pid, 0);
        if (fd >= 0) {
            wait_for(fd);
            close(fd);
        }
        (void)poll(NULL, 0, REMOVE_WAIT_MS); /* until it has been taken off the group's list */
    }
}

static void empty_group(int group, bool wait, int depth);

static void remove_below(int group, const char *name, bool wait, int depth) {
    int fd = openat(group, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0)
        return;
    if (on_cgroup(fd))
        empty_group(fd, wait, depth + 1);
    close(fd);
    (void)unlinkat(group, name, AT_REMOVEDIR);
}

/* A payload that may make groups has perhaps made some below its own. */
static void empty_group(int group, bool wait, int depth) {
    _Alignas(struct dirent64) char space[2048];
    ssize_t got;
    if (lseek(group, 0, SEEK_SET) < 0 || depth > DEPTH_MAX)
        return;
    while ((got = syscall(SYS_getdents64, group, space, sizeof(space))) > 0)
        for (ssize_t at = 0; at < got;) {
            const struct dirent64 *entry = (const void *)(space + at);
            at += entry->d_reclen;
            if (entry->d_type == DT_DIR && strcmp(entry->d_name, ".") != 0 &&
                strcmp(entry->d_name, "..") != 0)
                remove_below(group, entry->d_name, wait, depth);
        }
    if (wait)
        wait_for_processes(group);
}

/* True once it is gone.  cgroup v1 keeps a group busy for a moment after its last process. */
static bool remove_group(const char *path, bool wait) {
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0 || !on_cgroup(fd)) {
        if (fd >= 0)
            close(fd);
        return true;
    }
    bool gone = false;
    for (int i = 0; i < REMOVE_TRIES && !gone; i++) {
        empty_group(fd, wait, 0);
        gone = rmdir(path) == 0 || errno == ENOENT;
        if (!gone && !wait && any_process(fd) > 0)
            break;
        if (!gone)
            (void)poll(NULL, 0, REMOVE_WAIT_MS);
    }
    close(fd);
    return gone;
}

static void remove_groups(bool wait) {
    for (size_t i = 0; i < group_count; i++)
        if (groups[i][0] != '\0' && remove_group(groups[i], wait))
            groups[i][0] = '\0';
}

/* ---- the process ---- */

/* Our own descriptors at fixed numbers; of the caller's streams the one for warnings alone, and not
 * even that where the caller goes and the instance stays. */
static int arrange(const struct launch *l, pid_t container, int socket) {
    char space[64] = "/proc/";
    append_number(space, sizeof(space), (uint64_t)container);
    append_text(space, sizeof(space), "/ns/net");
    int from = fcntl(socket, F_DUPFD_CLOEXEC, 64);
    int process = (int)syscall(SYS_pidfd_open, container, 0);
    int net = open(space, O_RDONLY | O_CLOEXEC), null = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (from < 0 || process < 0 || net < 0 || null < 0)
        return -1;
    process = fcntl(process, F_DUPFD_CLOEXEC, 64);
    net = fcntl(net, F_DUPFD_CLOEXEC, 64);
    null = fcntl(null, F_DUPFD_CLOEXEC, 64);
    bool stays = (l->plan.flags & PLAN_INSTANCE) != 0;
    if (dup2(null, 0) < 0 || dup2(null, 1) < 0 || (stays && dup2(null, 2) < 0) ||
        dup3(from, SOCKET_FD, O_CLOEXEC) < 0 || dup3(process, CONTAINER_FD, O_CLOEXEC) < 0 ||
        dup3(net, SPACE_FD, O_CLOEXEC) < 0)
        return -1;
    trace_fd = -1;
    return close_range(FIRST_FREE_FD, ~0U, 0);
}

NO_RETURN static void janitor_main(struct launch *l, pid_t container, int socket) {
    struct target_identity target;
    trace_set_role(ROLE_HOST_HELPER);
    janitor_launch = l;
    step_begin(STEP_DROP_JANITOR);
    stage_target(l, ROLE_HOST_HELPER, &target);
    /* SAFE: root's own rights, for root's own launch; no other flow gets here. */
    if (privs_drop(&target) < 0 || setsid() < 0 || chdir("/") < 0)
        _exit(255);
    step_end(STEP_DROP_JANITOR);
    trace_process();
    if (arrange(l, container, socket) < 0)
        _exit(255);
    listen_to_master();
    wait_for(CONTAINER_FD);
    while (network_count > 0)
        remove_network(&networks[--network_count]);
    close(SPACE_FD);
    remove_groups(false);
    /* Master waits for this; nobody waits for what is left in the background. */
    close(SOCKET_FD);
    (void)dup2(0, 2);
    remove_groups(true);
    _exit(0);
}

pid_t janitor_start(struct launch *l, pid_t container, int socket, int signals) {
    step_begin(STEP_FORK_JANITOR);
    pid_t pid = fork();
    if (pid == 0) {
        close(signals);
        janitor_main(l, container, socket);
    }
    step_end(STEP_FORK_JANITOR);
    return pid;
}
