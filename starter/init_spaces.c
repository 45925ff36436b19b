/* Namespaces and cgroups: what the forerunner does on the host's side, up to the clone of init. */
#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <linux/sched.h>
#include <sched.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "init.h"

/* Made by the clone itself; the others belong to what init does once it has its ids. */
#define SPACES_OF_CLONE                                                                            \
    (CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET)
#define SPACES_OF_INIT (CLONE_NEWCGROUP | CLONE_NEWTIME)

#define AFFINITY_BITS 65536
static unsigned char affinity[AFFINITY_BITS / 8];

/* A path below /proc is looked up in what was /proc when nothing foreign could be mounted yet. */
static int pin_proc(struct init *s) {
    struct statfs fs;
    if (s->host_proc_fd >= 0)
        return 0;
    s->host_proc_fd = open("/proc", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (s->host_proc_fd >= 0 && fstatfs(s->host_proc_fd, &fs) == 0 &&
        fs.f_type == PROC_SUPER_MAGIC)
        return 0;
    init_close(&s->host_proc_fd);
    errno = ENOSYS;
    return -1;
}

static int write_file(int directory, const char *path, const char *text) {
    int fd = openat(directory, path, O_WRONLY | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0)
        return -1;
    ssize_t wrote = write(fd, text, strlen(text));
    int error = errno;
    close(fd);
    errno = error;
    return wrote == (ssize_t)strlen(text) ? 0 : -1;
}

/* Kept for SPACES: a namespace that belongs to the user namespace which is joined last. */
static int keep_join(struct init *s, int kind) {
    if (s->join_count == INIT_JOINS)
        return ERR_MALFORMED;
    s->joins[s->join_count] = s->passed;
    s->join_kinds[s->join_count++] = kind;
    s->passed = -1;
    return ERR_OK;
}

/* Before master has read what is wanted: nothing else here takes the kernel as long. */
void init_network_ahead(struct init *s) {
    s->own_net_fd = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
    if (s->own_net_fd >= 0 && unshare(CLONE_NEWNET) < 0)
        init_close(&s->own_net_fd);
}

/* It serves where one is asked for that belongs to this user namespace; *kinds lacks it then. */
static int settle_network(struct init *s, uint64_t *kinds) {
    bool serves = (*kinds & CLONE_NEWNET) && !(*kinds & CLONE_NEWUSER) && s->join_count == 0;
    if (s->own_net_fd < 0)
        return 0;
    if (!serves && setns(s->own_net_fd, CLONE_NEWNET) < 0)
        return -1;
    if (serves)
        *kinds &= ~(uint64_t)CLONE_NEWNET;
    init_close(&s->own_net_fd);
    return 0;
}

int init_join(struct init *s, const struct op_request *q, struct op_reply *a) {
    const uint64_t known = SPACES_OF_CLONE | SPACES_OF_INIT;
    int kind = (int)q->num[0];
    if (s->passed < 0 || q->flags != 0 || q->num[0] == 0 || (q->num[0] & ~known) != 0)
        return ERR_MALFORMED;
    uint64_t none = 0;
    if (pin_proc(s) < 0 || settle_network(s, &none) < 0)
        return init_failed_at(a, (uint32_t)kind);
    if (kind == CLONE_NEWUSER)
        return keep_join(s, kind);
    /* The container's root has every right over who is in its user namespace, were that one
     * dumpable; an ordinary caller's still is.  CVE-2016-9962. */
    if (kind & CLONE_NEWUSER && prctl(PR_SET_DUMPABLE, 0) < 0)
        return init_failed_at(a, (uint32_t)kind);
    if (setns(s->passed, kind) == 0)
        return ERR_OK;
    return errno == EPERM ? keep_join(s, kind) : init_failed_at(a, (uint32_t)kind);
}

/* The user namespace first: it gives the rights over the others.  From here its root could trace
 * us, were we dumpable. */
static int join_the_rest(struct init *s, uint32_t *kind) {
    for (int pass = 0; pass < 2; pass++)
        for (size_t i = 0; i < s->join_count; i++) {
            if ((s->join_kinds[i] == CLONE_NEWUSER) != (pass == 0))
                continue;
            *kind = (uint32_t)s->join_kinds[i];
            init_shield(s);
            if (setns(s->joins[i], s->join_kinds[i]) < 0)
                return -1;
            init_shield(s);
            init_close(&s->joins[i]);
        }
    return 0;
}

int init_cgroup(struct init *s, const struct op_request *q, struct op_reply *a) {
    const char *path = wire_string(q, 0);
    (void)s;
    if (path == NULL || path[0] != '/' || q->flags != 0)
        return ERR_MALFORMED;
    return write_file(AT_FDCWD, path, "0") < 0 ? init_failed(a) : ERR_OK;
}

/* "0-3,8": one number or range, up to its comma; NULL if it is none. */
static const char *parse_range(const char *at, unsigned long *first, unsigned long *last) {
    unsigned long *number = first;
    *first = *last = 0;
    for (bool digit = false;; at++) {
        if (*at >= '0' && *at <= '9') {
            *number = *number * 10 + (unsigned long)(*at - '0');
            if (*number >= AFFINITY_BITS)
                return NULL;
            digit = true;
        } else if (*at == '-' && number == first && digit) {
            number = last;
            digit = false;
        } else if (digit && (*at == ',' || *at == '\0')) {
            break;
        } else {
            return NULL;
        }
    }
    if (number == first)
        *last = *first;
    return *last < *first ? NULL : at;
}

static int set_affinity(const char *list) {
    unsigned long first, last;
    memset(affinity, 0, sizeof(affinity));
    for (const char *at = list; at != NULL;) {
        at = parse_range(at, &first, &last);
        if (at == NULL) {
            errno = EINVAL;
            return -1;
        }
        for (unsigned long bit = first; bit <= last; bit++)
            affinity[bit / 8] |= (unsigned char)(1u << (bit % 8));
        at = *at == ',' ? at + 1 : NULL;
    }
    return (int)syscall(SYS_sched_setaffinity, 0, sizeof(affinity), affinity);
}

static int set_oom_score(int64_t score) {
    char text[32] = "";
    if (score < 0)
        append_text(text, sizeof(text), "-");
    append_number(text, sizeof(text), (uint64_t)(score < 0 ? -score : score));
    return write_file(AT_FDCWD, "/proc/self/oom_score_adj", text);
}

int init_prep(struct init *s, const struct op_request *q, struct op_reply *a) {
    enum { OOM = 1, RESET = 2, LIST = 4 };
    int64_t score = (int64_t)q->num[0];
    const char *list = wire_string(q, 0);
    (void)s;
    if (q->flags & ~7u || (list != NULL) != ((q->flags & LIST) != 0) || score < -1000 ||
        score > 1000)
        return ERR_MALFORMED;
    if (q->flags & OOM && set_oom_score(score) < 0)
        return init_failed_at(a, OOM);
    if (q->flags & RESET) {
        /* As runc: a cpuset may forbid it, and then that is what counts. */
        memset(affinity, 0xff, sizeof(affinity));
        (void)syscall(SYS_sched_setaffinity, 0, sizeof(affinity), affinity);
    }
    return q->flags & LIST && set_affinity(list) < 0 ? init_failed_at(a, LIST) : ERR_OK;
}

/* As fork(2), but the child is master's.  Older kernels and filters lack clone3(2). */
static pid_t clone_init(uint64_t flags, int cgroup_fd) {
    struct clone_args how = {.flags = flags | CLONE_PARENT};
    if (cgroup_fd >= 0) {
        how.flags |= CLONE_INTO_CGROUP;
        how.cgroup = (uint32_t)cgroup_fd;
    }
    long pid = syscall(SYS_clone3, &how, sizeof(how));
    if (pid < 0 && errno == ENOSYS && cgroup_fd < 0)
        pid = syscall(SYS_clone, flags | CLONE_PARENT, NULL, NULL, NULL, NULL);
    return (pid_t)pid;
}

/* Master waits for the forerunner's answer; were that one killed before, it would wait for us, and
 * we for it. */
static void wait_until_known(struct init *s) {
    char byte;
    init_close(&s->born_pipe[1]);
    if (read(s->born_pipe[0], &byte, 1) != 1)
        _exit(255);
    init_close(&s->born_pipe[0]);
}

int init_spaces(struct init *s, const struct op_request *q, struct op_reply *a) {
    const uint64_t known = SPACES_OF_CLONE | SPACES_OF_INIT;
    if (q->flags & ~1u || (q->num[0] & ~known) != 0)
        return ERR_MALFORMED;
    s->offsets_given = (q->flags & 1) != 0;
    memcpy(s->offsets, &q->num[1], sizeof(s->offsets));
    s->late_spaces = (int)(q->num[0] & SPACES_OF_INIT);
    if (s->offsets_given && !(s->late_spaces & CLONE_NEWTIME))
        return ERR_MALFORMED;
    uint64_t kinds = q->num[0] & SPACES_OF_CLONE;
    if (pin_proc(s) < 0 || settle_network(s, &kinds) < 0)
        return init_failed(a);
    if (join_the_rest(s, &a->value) < 0)
        return init_failed(a);
    a->value = 0;
    if (pipe2(s->born_pipe, O_CLOEXEC) < 0)
        return init_failed(a);
    pid_t pid = clone_init(kinds, s->passed);
    if (pid < 0)
        return init_failed(a);
    if (pid == 0) {
        init_shield(s);
        trace_set_role(ROLE_INIT);
        s->silent = true;
        wait_until_known(s);
        return ERR_OK;
    }
    a->value = (uint32_t)pid;
    s->forerunner_ends = true;
    return ERR_OK;
}
