/* Makes and undoes what outlives the processes of a launch: CNI networks, and root's control
 * groups.  What is registered is undone once the container has ended and master's end of the socket
 * is closed, whoever was killed: should it be the janitor, then its twin does it.  There is none
 * where nothing is registered; for a user there is one where the administrator allows a network,
 * and it does nothing else.  What both have left, because somebody killed both, the next janitor
 * undoes (network_record.c). */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/magic.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include "janitor_group.h"
#include "networks.h"

enum { GROUPS_MAX = 32 };
enum { SOCKET_FD = 3, CONTAINER_FD = 4, SPACE_FD = 5, FIRST_FREE_FD = 6 };
enum { DEPTH_MAX = 16, REMOVE_TRIES = 200, REMOVE_WAIT_MS = 5 };
enum { STACK_BYTES = 8 << 20, TIMER_SLACK_NS = 50000, IO_OF_PROCESS = 1 };
enum janitor_phase { WATCH };

/* In memory that the twin shares. */
struct groups {
    size_t count;
    char at[GROUPS_MAX][LIMIT_PATH_BYTES];
};
static struct groups *groups;
static const struct launch *janitor_launch;

/* ---- what is registered ---- */

/* CLEAN_GROUP: a directory of a control group that is about to be made. */
static int clean_group(const struct op_request *q, struct op_reply *a) {
    (void)a;
    const char *path = wire_string(q, 0);
    if (janitor_launch->flow != FLOW_ROOT || !path || path[0] != '/' || q->length[1] ||
        groups->count == GROUPS_MAX)
        return ERR_MALFORMED;
    memcpy(groups->at[groups->count], path, q->length[0]);
    groups->count++; /* once the path is whole */
    return ERR_OK;
}

static int network_said = -1;          /* where the container is, or why a plugin has failed */
static int record_error;               /* why none can be made: an errno */

/* ADD_NETWORKS: those that keeper has judged.  The value tells which plugin has failed. */
static int add_networks(const struct op_request *q, struct op_reply *a) {
    if (q->length[0] || q->length[1] || networks.count == 0)
        return ERR_MALFORMED;
    record_sweep(janitor_launch); /* who has too many has perhaps fewer the next time */
    if (record_error == EUSERS)
        return ERR_NETWORKS_MANY;
    a->error = record_error;
    if (record_error != 0)
        return ERR_NETWORKS_RECORD;
    int error = networks_connect(janitor_launch, SPACE_FD, &a->value, &network_said);
    a->error = error > 0 ? error : 0;
    return error == 0 ? ERR_OK : ERR_PLUGIN;
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
    int (*run)(const struct op_request *, struct op_reply *);
} table[] = {
#define OP(name, number, server, phase, next, times, function)                                     \
    ROW_##server(name, phase, next, times, function)
#include "rows.h"
};

static int register_one(const struct op_request *q, size_t size, struct op_reply *a) {
    static uint32_t uses[ARRAY_SIZE(table)];
    if (wire_check_request(q, size) < 0 || q->flags)
        return ERR_MALFORMED;
    for (size_t i = 0; i < ARRAY_SIZE(table); i++)
        if (table[i].op == q->op)
            return uses[i]++ < table[i].times ? table[i].run(q, a) : ERR_TIMES;
    return ERR_MALFORMED;
}

/* False: there is nothing more to come.  The socket may be anybody's: no descriptor is taken from
 * it, and nobody is waited for who does not read. */
static bool serve_master(void) {
    static struct op_request q;
    ssize_t got = recv(SOCKET_FD, &q, sizeof(q), MSG_DONTWAIT | MSG_TRUNC);
    if (got < 0 && (errno == EINTR || errno == EAGAIN))
        return true;
    if (got < (ssize_t)sizeof(q.op))
        return false;
    struct op_reply a = {.op = q.op};
    step_operation(q.op, false);
    a.code = register_one(&q, (size_t)got, &a);
    step_operation(q.op, true);
    int sent = wire_send_now(SOCKET_FD, &a, sizeof(a), network_said);
    if (network_said >= 0)
        close(network_said);
    network_said = -1;
    return sent == 0 && a.code != ERR_MALFORMED && a.code != ERR_TIMES;
}

/* Until master has ended, or says that it has nothing more to register.  A user could have the
 * socket stay open: there it is enough that the container has ended.  Root's master could still
 * make a group after that. */
static void listen_to_master(void) {
    struct pollfd fds[] = {{.fd = SOCKET_FD, .events = POLLIN},
                           {.fd = CONTAINER_FD, .events = POLLIN}};
    nfds_t count = janitor_launch->flow == FLOW_ROOT ? 1 : 2;
    do {
        if (poll(fds, count, -1) < 0 && errno != EINTR)
            return;
    } while (!fds[1].revents && (!fds[0].revents || serve_master()));
}

static void wait_for(int fd) {
    struct pollfd one = {.fd = fd, .events = POLLIN};
    while (poll(&one, 1, -1) < 0 && errno == EINTR)
        ;
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
    for (size_t i = 0; i < groups->count; i++)
        if (groups->at[i][0] != '\0' && remove_group(groups->at[i], wait))
            groups->at[i][0] = '\0';
}

/* ---- the process ---- */

/* In keeper, whose child the container is: only while that has not been reaped is its number its
 * own.  With networks it is the one that was made for it, or none. */
static int open_space(const struct launch *l, pid_t container) {
    char path[64] = "/proc/";
    append_number(path, sizeof(path), (uint64_t)container);
    append_text(path, sizeof(path), "/ns/net");
    /* SAFE: a child that has not been reaped; the file is a namespace, or nothing. */
    const struct raised *raised = privs_raise(CAP_BIT(CAP_SYS_PTRACE));
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    privs_lower(raised);
    if (fd >= 0 && networks.count > 0 && !policy_made_for_it(l, fd)) {
        close(fd);
        errno = EPERM;
        fd = -1;
    }
    return fd;
}

/* Ports that are held stay, behind our own numbers; all that is the caller's goes. */
static int arrange_ports(void) {
    int next = FIRST_FREE_FD;
    for (size_t i = 0; i < networks.count; i++)
        for (size_t k = 0; k < networks.at[i].port_count; k++) {
            int *fd = &networks.at[i].ports[k].fd;
            if (*fd >= 0 && (*fd = fcntl(*fd, F_DUPFD_CLOEXEC, 64)) < 0)
                return -1;
        }
    for (size_t i = 0; i < networks.count; i++)
        for (size_t k = 0; k < networks.at[i].port_count; k++) {
            int *fd = &networks.at[i].ports[k].fd;
            if (*fd >= 0 && (*fd = dup3(*fd, next++, O_CLOEXEC)) < 0)
                return -1;
        }
    return close_range((unsigned)next, ~0U, 0);
}

/* The container, its network, and where requests come from. */
struct watched {
    pid_t pid;
    int process, space, socket;
};

/* Our own descriptors at fixed numbers; of the caller's streams the one for warnings alone, and not
 * even that where the caller goes and the instance stays, or is no root. */
static int arrange(const struct launch *l, const struct watched *w) {
    int null = open("/dev/null", O_RDWR | O_CLOEXEC), from = fcntl(w->socket, F_DUPFD_CLOEXEC, 64);
    int process = fcntl(w->process, F_DUPFD_CLOEXEC, 64);
    int net = fcntl(w->space, F_DUPFD_CLOEXEC, 64);
    if (null < 0 || (null = fcntl(null, F_DUPFD_CLOEXEC, 64)) < 0)
        return -1;
    bool quiet = l->plan.flags & PLAN_INSTANCE || l->flow != FLOW_ROOT;
    if (dup2(null, 0) < 0 || dup2(null, 1) < 0 || (quiet && dup2(null, 2) < 0) ||
        dup3(from, SOCKET_FD, O_CLOEXEC) < 0 || dup3(process, CONTAINER_FD, O_CLOEXEC) < 0 ||
        dup3(net, SPACE_FD, O_CLOEXEC) < 0)
        return -1;
    trace_fd = -1;
    return arrange_ports();
}

/* A user's limits would end a plugin in the middle, or keep it from undoing.  Where hard limits
 * cannot be lifted, keeper has refused those that matter. */
static void lift_limits(void) {
    static const int lifted[] = {RLIMIT_CPU, RLIMIT_FSIZE, RLIMIT_DATA, RLIMIT_AS, RLIMIT_RTTIME};
    const struct rlimit none = {RLIM_INFINITY, RLIM_INFINITY};
    struct rlimit stack = {.rlim_max = RLIM_INFINITY};
    const struct raised *raised = privs_raise(CAP_BIT(CAP_SYS_RESOURCE));
    for (size_t i = 0; i < ARRAY_SIZE(lifted); i++)
        /* SAFE: of this process alone, which runs nothing of the caller's. */
        (void)setrlimit((__rlimit_resource_t)lifted[i], &none);
    if (!raised)
        (void)getrlimit(RLIMIT_STACK, &stack);
    stack.rlim_cur = stack.rlim_max < STACK_BYTES ? stack.rlim_max : STACK_BYTES;
    /* SAFE: as above; without the right, below the hard limit, which is 1 MiB at least. */
    (void)setrlimit(RLIMIT_STACK, &stack);
    privs_lower(raised);
}

/* Behind all others on a processor that its user keeps busy, a plugin would not end in its time,
 * and what it has taken from a range of addresses that all share would stay taken. */
static void take_fair_share(void) {
    const struct sched_param none = {.sched_priority = 0};
    cpu_set_t all;
    memset(&all, 0xff, sizeof(all)); /* of those that the control group has */
    const struct raised *raised = privs_raise(CAP_BIT(CAP_SYS_NICE));
    /* SAFE: of this process alone, and what every process of root's has. */
    (void)sched_setscheduler(0, SCHED_OTHER, &none);
    /* SAFE: as above. */
    (void)setpriority(PRIO_PROCESS, 0, 0);
    /* SAFE: as above. */
    (void)sched_setaffinity(0, sizeof(all), &all);
    /* SAFE: as above. */
    (void)syscall(SYS_ioprio_set, IO_OF_PROCESS, 0, 0); /* by its niceness */
    privs_lower(raised);
}

/* What else of the caller's would reach a plugin: timers that are late at will, and whom the kernel
 * ends first where memory is short. */
static void forget_caller(void) {
    (void)prctl(PR_SET_TIMERSLACK, TIMER_SLACK_NS);
    /* SAFE: a file of this process's own, with a word of ours. */
    int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
    ssize_t ignored = fd < 0 ? 0 : write(fd, "0", 1); /* refused to who may not have it lower */
    (void)ignored;
    if (fd >= 0)
        close(fd);
}

/* Root for plugins, with the rights that making and undoing networks takes, and no others. */
static void find_target(const struct launch *l, struct target_identity *target) {
    const uint64_t caps = CAP_BIT(CAP_CHOWN) | CAP_BIT(CAP_DAC_OVERRIDE) | CAP_BIT(CAP_FOWNER) |
                          CAP_BIT(CAP_NET_ADMIN) | CAP_BIT(CAP_NET_RAW) |
                          CAP_BIT(CAP_NET_BIND_SERVICE) | CAP_BIT(CAP_SYS_ADMIN) |
                          CAP_BIT(CAP_SYS_PTRACE);
    if (l->flow == FLOW_ROOT) {
        stage_target(l, ROLE_HOST_HELPER, target);
        return;
    }
    *target = (struct target_identity){.set_groups = true, .no_new_privs = true};
    target->caps[CAP_SET_PERMITTED] = target->caps[CAP_SET_EFFECTIVE] =
        target->caps[CAP_SET_BOUNDING] = caps;
}

/* ---- the twin: a janitor's parent, which gets what a killed one leaves ---- */

static void undo(const struct launch *l) {
    wait_for(CONTAINER_FD);
    networks_disconnect(l, SPACE_FD);
    close(SPACE_FD);
    remove_groups(false);
}

/* Does nothing but wait, and is killed once there is nothing to undo.  Of a janitor that is killed
 * a plugin may still have children. */
NO_RETURN static void twin_main(const struct launch *l, pid_t janitor) {
    int status;
    close(SOCKET_FD);
    (void)dup2(0, 2); /* it may outlive its caller, as a process in the background does */
    while (waitpid(janitor, &status, 0) < 0 && errno == EINTR)
        ;
    if (network_record)
        networks_end_group(network_record->running);
    undo(l);
    remove_groups(true);
    _exit(0);
}

static void end_twin(int twin) {
    /* SAFE: the very process that has forked this one. */
    (void)syscall(SYS_pidfd_send_signal, twin, SIGKILL, NULL, 0);
    wait_for(twin);
}

static bool share_memory(const struct launch *l, pid_t container) {
    groups = mmap(NULL, sizeof(*groups), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (networks.count > 0)
        record_error = -record_open(l, container);
    return groups != MAP_FAILED;
}

/* What is orphaned below either of them becomes its child. */
static bool adopt_orphans(void) {
    return prctl(PR_SET_CHILD_SUBREAPER, 1) == 0;
}

NO_RETURN static void watch(const struct launch *l, int twin) {
    listen_to_master();
    undo(l);
    /* It holds the ports, too, which the next launch may have at once. */
    if (networks.count > 0)
        end_twin(twin);
    /* Master waits for this; nobody waits for what is left in the background. */
    close(SOCKET_FD);
    (void)dup2(0, 2);
    remove_groups(true);
    if (networks.count == 0)
        end_twin(twin);
    _exit(0);
}

NO_RETURN static void janitor_main(struct launch *l, const struct watched *w) {
    struct target_identity target;
    trace_set_role(ROLE_HOST_HELPER);
    janitor_launch = l;
    step_begin(STEP_DROP_JANITOR);
    find_target(l, &target);
    /* SAFE: root's own rights for root's own launch; for a user's, root without most of them: what
     * it reads has no field, and what it runs is the administrator's.  The user cannot end it. */
    if (l->flow != FLOW_ROOT) {
        lift_limits();
        take_fair_share();
    }
    if (privs_drop(&target) < 0 || setsid() < 0 || chdir("/") < 0)
        _exit(255);
    step_end(STEP_DROP_JANITOR);
    trace_process();
    if (l->flow != FLOW_ROOT)
        forget_caller();
    leave_control_groups();
    if (arrange(l, w) < 0 || !share_memory(l, w->pid) || !adopt_orphans())
        _exit(255);
    int self = (int)syscall(SYS_pidfd_open, getpid(), 0);
    pid_t pid = self < 0 ? -1 : fork();
    if (pid > 0)
        twin_main(l, pid);
    if (pid < 0 || !adopt_orphans())
        _exit(255);
    watch(l, self);
}

/* Stopped by its user, and the container killed meanwhile, the janitor would find another process
 * by that number: what it watches is found before there is one. */
pid_t janitor_start(struct launch *l, pid_t container, int socket, int signals) {
    struct watched w = {.pid = container, .process = -1, .space = -1, .socket = socket};
    pid_t pid = -1;
    errno = ESRCH;
    step_begin(STEP_FORK_JANITOR);
    if (container > 0 && (w.space = open_space(l, container)) >= 0 &&
        (w.process = (int)syscall(SYS_pidfd_open, container, 0)) >= 0)
        pid = fork();
    int error = errno;
    if (pid == 0) {
        close(signals);
        janitor_main(l, &w);
    }
    if (w.space >= 0)
        close(w.space);
    if (w.process >= 0)
        close(w.process);
    networks_close();
    step_end(STEP_FORK_JANITOR);
    errno = error;
    return pid;
}
