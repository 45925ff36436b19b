/* A process in an instance.  Who the instance is, a directory of /proc tells: it stands for one
 * process, whatever becomes of its number.  Namespaces are opened below it, looked at, and entered
 * by descriptor; a path or number of the caller's decides nothing. */
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/magic.h>
#include <linux/nsfs.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include "starter.h"

enum { SPACE_COUNT = 7, USER = 0, MNT = 1, PIDS = 2 };
enum { HIDDEN = -1 }; /* no code of an answer: /proc does not show it, and it need not */

/* In the order of struct identity's; the one of mounts is entered last. */
static const struct {
    const char *path;
    int kind;
} kinds[SPACE_COUNT] = {
    {"ns/user", CLONE_NEWUSER}, {"ns/mnt", CLONE_NEWNS},   {"ns/pid", CLONE_NEWPID},
    {"ns/ipc", CLONE_NEWIPC},   {"ns/uts", CLONE_NEWUTS},  {"ns/net", CLONE_NEWNET},
    {"ns/cgroup", CLONE_NEWCGROUP},
};

struct instance {
    int fd;                    /* its directory of /proc */
    int spaces[SPACE_COUNT];   /* -1: the same as ours */
    struct stat root;          /* inode 0: whatever it is */
};

/* What the kernel says about a process. */
struct status {
    char name[32];
    unsigned long parent, uid[4], gid[4];
    unsigned long numbers[3];  /* its pid in each pid namespace, outermost first */
    size_t depth;
    uint64_t permitted;
    bool no_new_privs;
};

static void close_fd(int *fd) {
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

/* ---- what is it? ---- */

/* A line of /proc/PID/status; the kernel escapes the one text in it that a user has chosen. */
static const char *field(const char *text, const char *key) {
    size_t length = strlen(key);
    for (const char *line = text; line; line = strchr(line, '\n')) {
        line += *line == '\n';
        if (strncmp(line, key, length) == 0)
            return line + length;
    }
    return NULL;
}

static size_t numbers(const char *at, unsigned long *out, size_t most) {
    size_t count = 0;
    while (at && *at == '\t' && count < most) {
        char *end;
        out[count++] = strtoul(at + 1, &end, 10);
        at = end;
    }
    return at && *at == '\n' ? count : 0;
}

static int read_status(int process_fd, struct status *s) {
    static char text[8192];
    unsigned long one;
    memset(s, 0, sizeof(*s));
    int fd = openat(process_fd, "status", O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    ssize_t got = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);
    close_fd(&fd);
    if (got <= 0)
        return -1;
    text[got] = '\0';
    const char *name = field(text, "Name:\t"), *caps = field(text, "CapPrm:\t");
    size_t length = name ? strcspn(name, "\n") : 0;
    if (length == 0 || length >= sizeof(s->name) || !caps ||
        numbers(field(text, "PPid:"), &s->parent, 1) != 1 ||
        numbers(field(text, "Uid:"), s->uid, 4) != 4 ||
        numbers(field(text, "Gid:"), s->gid, 4) != 4 ||
        numbers(field(text, "NoNewPrivs:"), &one, 1) != 1)
        return -1;
    memcpy(s->name, name, length);
    s->depth = numbers(field(text, "NSpid:"), s->numbers, ARRAY_SIZE(s->numbers));
    s->permitted = strtoull(caps, NULL, 16);
    s->no_new_privs = one == 1;
    return 0;
}

static bool all_are(const unsigned long ids[4], unsigned long id) {
    return ids[0] == id && ids[1] == id && ids[2] == id && ids[3] == id;
}

/* The /proc that keeper sees, where a caller can put nothing over a file. */
static bool in_our_proc(int fd) {
    struct statfs fs;
    struct statx theirs, ours;
    return fstatfs(fd, &fs) == 0 && fs.f_type == PROC_SUPER_MAGIC &&
           statx(fd, "", AT_EMPTY_PATH, STATX_MNT_ID, &theirs) == 0 &&
           statx(AT_FDCWD, "/proc", 0, STATX_MNT_ID, &ours) == 0 &&
           theirs.stx_mask & ours.stx_mask & STATX_MNT_ID &&
           theirs.stx_mnt_id == ours.stx_mnt_id;
}

static bool is_our_program(const struct launch *l, int process_fd) {
    struct stat theirs, ours;
    if (fstatat(process_fd, "exe", &theirs, 0) < 0)
        return false;
    /* The setuid starter's instances with --fakeroot are entered by the plain one too. */
    const char *const programs[] = {"/proc/self/exe", APY_STARTER_SUID};
    size_t count = l->flow == FLOW_USERNS && fakeroot_wanted(l) ? 2 : 1;
    for (size_t i = 0; i < count; i++)
        if (stat(programs[i], &ours) == 0 && theirs.st_dev == ours.st_dev &&
            theirs.st_ino == ours.st_ino)
            return true;
    return false;
}

/* Its files in /proc are root's: the caller has no hand on it, and never had. */
static bool is_closed(int process_fd) {
    struct stat st;
    return fstatat(process_fd, "stat", &st, AT_SYMLINK_NOFOLLOW) == 0 && st.st_uid == 0;
}

/* Where /proc hides what is closed to its user (hidepid), CAP_SYS_PTRACE sees it, which nobody has
 * in the user-namespace flow.  There is no right to win there either: that it lives is enough. */
static int hidden_or_gone(const struct launch *l, unsigned long parent) {
    bool lives = l->flow == FLOW_USERNS && parent > 1 && kill((pid_t)parent, 0) == 0;
    return lives ? HIDDEN : ERR_INSTANCE_GONE;
}

/* Once the shim runs for good, its parent holds nothing; the caller's own in every id. */
static int judge_keeper(const struct launch *l, const struct status *shim) {
    struct status keeper;
    char path[32] = "/proc/";
    append_number(path, sizeof(path), shim->parent);
    int fd = open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
    int code = fd < 0 || read_status(fd, &keeper) < 0 ? hidden_or_gone(l, shim->parent)
               /* In a user namespace there is no right to look, nor one that could be won. */
               : l->flow != FLOW_USERNS && !is_our_program(l, fd) ? ERR_INSTANCE_FOREIGN
                                                               : ERR_OK;
    close_fd(&fd);
    if (code != ERR_OK)
        return code == HIDDEN ? ERR_OK : code;
    if (keeper.uid[0] != l->uid)
        return ERR_INSTANCE_FOREIGN;
    bool finished = all_are(keeper.uid, l->uid) && (keeper.permitted == 0 || l->flow == FLOW_ROOT);
    return finished ? ERR_OK : ERR_INSTANCE_EARLY;
}

static int judge_process(const struct launch *l, int fd) {
    struct status shim, again;
    if (read_status(fd, &shim) < 0)
        return ERR_INSTANCE_GONE;
    if (shim.depth != 2 || shim.numbers[1] != 1)
        return ERR_INSTANCE_FOREIGN;
    /* Only root's may be the image's own init (policy.c); whose it is, its parent tells. */
    bool booted = (l->plan.flags & PLAN_BOOTED) != 0;
    if (!booted && (strcmp(shim.name, "appinit") != 0 || !is_our_program(l, fd)))
        return ERR_INSTANCE_FOREIGN;
    if (l->flow != FLOW_ROOT && !all_are(shim.uid, l->uid))
        return ERR_INSTANCE_FOREIGN;
    if (l->flow == FLOW_SETUID && (shim.permitted != 0 || !shim.no_new_privs || !is_closed(fd)))
        return ERR_INSTANCE_FOREIGN;
    if ((l->flow == FLOW_USERNS || fakeroot_wanted(l)) && !all_are(shim.gid, l->gid))
        return ERR_INSTANCE_FOREIGN; /* no other group of the caller's is mapped there */
    int code = judge_keeper(l, &shim);
    if (code != ERR_OK)
        return code;
    /* The number of a parent that had ended in between would have become another one. */
    return read_status(fd, &again) == 0 && again.parent == shim.parent ? ERR_OK : ERR_INSTANCE_GONE;
}

/* ---- its namespaces ---- */

static bool belongs_to(int space_fd, uint64_t userns) {
    struct stat st;
    int fd = ioctl(space_fd, NS_GET_USERNS);
    bool same = fd >= 0 && fstat(fd, &st) == 0 && st.st_ino == userns;
    close_fd(&fd);
    return same;
}

/* A user namespace right below ours, of which the caller is the owner, with every right there. */
static bool is_owned(const struct launch *l, int userns_fd) {
    struct stat st;
    uid_t owner;
    int fd = ioctl(userns_fd, NS_GET_PARENT);
    bool right_below = fd >= 0 && fstat(fd, &st) == 0 && st.st_ino == l->host_spaces[USER];
    close_fd(&fd);
    return right_below && ioctl(userns_fd, NS_GET_OWNER_UID, &owner) == 0 && owner == l->uid;
}

/* Below the directory; those that are ours too need no entering. */
static int open_spaces(const struct launch *l, struct instance *in) {
    struct stat st;
    uint64_t userns = l->host_spaces[USER];
    for (int i = 0; i < SPACE_COUNT; i++) {
        in->spaces[i] = openat(in->fd, kinds[i].path, O_RDONLY | O_CLOEXEC);
        if (in->spaces[i] < 0 || fstat(in->spaces[i], &st) < 0 ||
            ioctl(in->spaces[i], NS_GET_NSTYPE) != kinds[i].kind)
            return errno == ENOENT || errno == ESRCH ? ERR_INSTANCE_GONE : ERR_INSTANCE_JOIN;
        if (i == USER)
            userns = st.st_ino;
        if (st.st_ino == l->host_spaces[i])
            close_fd(&in->spaces[i]);
    }
    bool has_userns = l->flow == FLOW_USERNS || fakeroot_wanted(l);
    if ((in->spaces[USER] >= 0) != has_userns || in->spaces[MNT] < 0 || in->spaces[PIDS] < 0 ||
        !belongs_to(in->spaces[MNT], userns) || !belongs_to(in->spaces[PIDS], userns) ||
        (has_userns && !is_owned(l, in->spaces[USER])))
        return ERR_INSTANCE_FOREIGN;
    return fstatat(in->fd, "root", &in->root, 0) < 0 ? ERR_INSTANCE_GONE : ERR_OK;
}

/* Judged before its namespaces are opened, and after: all that while it was the same process. */
static int open_instance(const struct launch *l, struct instance *in) {
    const struct raised *raised = NULL;
    if (!in_our_proc(in->fd))
        return ERR_INSTANCE_FOREIGN;
    /* SAFE: only to look at a process of which the kernel has said that it is the caller's own. */
    if (l->flow != FLOW_USERNS && !(raised = privs_raise(CAP_BIT(CAP_SYS_PTRACE))))
        return ERR_INSTANCE_JOIN;
    int code = judge_process(l, in->fd);
    if (code == ERR_OK)
        code = open_spaces(l, in);
    if (code == ERR_OK)
        code = judge_process(l, in->fd);
    privs_lower(raised);
    return code;
}

/* ---- in ---- */

static int enter_spaces(const struct instance *in) {
    static const int order[] = {3, 4, 5, 6, MNT};
    struct stat st;
    for (size_t i = 0; i < ARRAY_SIZE(order); i++)
        /* SAFE: namespaces that open_instance() has looked at, by descriptor. */
        if (in->spaces[order[i]] >= 0 && setns(in->spaces[order[i]], kinds[order[i]].kind) < 0)
            return -1;
    bool arrived = stat("/", &st) == 0 && st.st_dev == in->root.st_dev &&
                   st.st_ino == in->root.st_ino;
    return (arrived || in->root.st_ino == 0) && chdir("/") == 0 ? 0 : -1;
}

/* No Python: it becomes the payload that master describes, as bearer does. */
NO_RETURN static void joiner_main(struct launch *l, struct instance *in) {
    struct target_identity target;
    trace_set_role(ROLE_BEARER);
    (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
    container_close_outer_ends(l);
    step_begin(STEP_JOIN_SPACES);
    label_open(l);
    if (enter_spaces(in) < 0)
        fail("the namespaces of the instance cannot be entered", errno);
    /* SAFE: root of a namespace that is the caller's own, as its first process became it. */
    if (fakeroot_wanted(l) && privs_become_inner_root() < 0)
        fail("the identity of the instance cannot be taken", errno);
    step_end(STEP_JOIN_SPACES);
    step_begin(STEP_DROP_JOINER);
    stage_target(l, ROLE_BEARER, &target);
    /* SAFE: the payload's own identity, as policy_plan() found it permitted; verified. */
    if (privs_drop(&target) < 0)
        fail("cannot give up privileges", errno);
    if (stage_die_with_keeper(l) < 0)
        _exit(255);
    step_end(STEP_DROP_JOINER);
    trace_process();
    for (int i = 0; i < SPACE_COUNT; i++)
        close_fd(&in->spaces[i]);
    close_fd(&in->fd);
    close_fd(&l->request_fd);
    close_fd(&l->config_fd);
    close_fd(&l->trace_file);
    close_fd(&l->rpc_socket[0]);
    if (write(l->ready_pipe[1], "R", 1) != 1)
        _exit(255);
    close_fd(&l->ready_pipe[1]);
    if (stage_wait_for_go(l) < 0)
        _exit(255);
    bearer_serve(l, l->start_socket[0]);
}

/* Keeper's children are born in the instance for one fork. */
static pid_t fork_inside(struct launch *l, struct instance *in, int *error) {
    if (in->spaces[USER] >= 0 && setns(in->spaces[USER], CLONE_NEWUSER) < 0) {
        *error = errno;
        return -1;
    }
    (void)prctl(PR_SET_DUMPABLE, 0); /* entering a user namespace sets it to fs.suid_dumpable */
    int own = open("/proc/self/ns/pid", O_RDONLY | O_CLOEXEC);
    const struct raised *raised = privs_raise(CAP_BIT(CAP_SYS_ADMIN) | CAP_BIT(CAP_SYS_CHROOT));
    pid_t pid = -1;
    /* SAFE: a pid namespace that open_instance() has looked at, by descriptor. */
    if (own >= 0 && raised &&
        (in->spaces[PIDS] < 0 || setns(in->spaces[PIDS], CLONE_NEWPID) == 0)) {
        step_begin(STEP_FORK_JOINER);
        pid = fork();
        if (pid == 0)
            joiner_main(l, in);
        *error = errno;
        step_end(STEP_FORK_JOINER);
        /* In a user namespace there is no way back, nor anything more to fork. */
        if (l->flow != FLOW_USERNS && setns(own, CLONE_NEWPID) < 0)
            fail("cannot leave the instance's pid namespace", errno);
    } else {
        *error = errno;
    }
    privs_lower(raised);
    close_fd(&own);
    return pid;
}

struct born {
    pid_t pid;
    int error;
};

/* Its child is keeper's, and is born in the instance. */
NO_RETURN static void go_between(struct launch *l, struct instance *in, int answer_fd) {
    struct born born = {.pid = -1};
    const unsigned long flags = (unsigned long)CLONE_PARENT | SIGCHLD;
    /* SAFE: a namespace that open_instance() has looked at; what this process has holds there alone
     * from then on, and who enters is its owner, or root. */
    if (l->flow == FLOW_ROOT && !privs_raise(CAP_BIT(CAP_SYS_ADMIN)))
        fail("the namespaces of the instance cannot be entered", EPERM);
    bool there = setns(in->spaces[USER], CLONE_NEWUSER) == 0;
    (void)prctl(PR_SET_DUMPABLE, 0);
    if (there && setns(in->spaces[PIDS], CLONE_NEWPID) == 0)
        born.pid = (pid_t)syscall(SYS_clone, flags, NULL, NULL, NULL, NULL);
    if (born.pid == 0) {
        close_fd(&answer_fd);
        joiner_main(l, in);
    }
    born.error = errno;
    _exit(write(answer_fd, &born, sizeof(born)) == (ssize_t)sizeof(born) ? 0 : 255);
}

/* With --fakeroot keeper stays outside, as it does when such an instance starts. */
static pid_t fork_through(struct launch *l, struct instance *in, int *error) {
    struct born born = {.pid = -1, .error = EIO};
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) < 0) {
        *error = errno;
        return -1;
    }
    step_begin(STEP_FORK_JOINER);
    pid_t between = fork();
    if (between == 0) {
        close_fd(&ends[0]);
        go_between(l, in, ends[1]);
    }
    step_end(STEP_FORK_JOINER);
    close_fd(&ends[1]);
    ssize_t got = between < 0 ? -1 : read(ends[0], &born, sizeof(born));
    while (between > 0 && waitpid(between, NULL, 0) < 0 && errno == EINTR)
        ;
    close_fd(&ends[0]);
    *error = born.error;
    return got == (ssize_t)sizeof(born) ? born.pid : -1;
}

int join_start(struct launch *l, int process_fd, pid_t *pid, int *error) {
    struct instance in = {.fd = process_fd};
    for (int i = 0; i < SPACE_COUNT; i++)
        in.spaces[i] = -1;
    int code = process_fd < 0                  ? ERR_MALFORMED
               : l->plan.flags & PLAN_SHARED ? share_open(l, in.fd, &in.spaces[USER],
                                                          &in.spaces[MNT])
                                             : open_instance(l, &in);
    if (code == ERR_OK) {
        *pid = fakeroot_wanted(l) ? fork_through(l, &in, error) : fork_inside(l, &in, error);
        code = *pid < 0 ? ERR_INSTANCE_JOIN : ERR_OK;
    }
    if (code == ERR_OK)
        *error = 0;
    for (int i = 0; i < SPACE_COUNT; i++)
        close_fd(&in.spaces[i]);
    return code;
}
