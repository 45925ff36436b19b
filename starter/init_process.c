/* PROCESS: the sealed frame is checked, and what comes before the limits is done. */
#include <errno.h>
#include <fcntl.h>
#include <linux/sched/types.h>
#include <string.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "init.h"

#define IOPRIO_WHO_PROCESS 1

static int set_scheduler(const struct process_header *h) {
    struct sched_attr attr = {.size = sizeof(attr),
                              .sched_policy = h->sched_policy,
                              .sched_flags = h->sched_flags,
                              .sched_nice = h->sched_nice,
                              .sched_priority = h->sched_priority,
                              .sched_runtime = h->sched_runtime,
                              .sched_deadline = h->sched_deadline,
                              .sched_period = h->sched_period};
    return (int)syscall(SYS_sched_setattr, 0, &attr, 0);
}

static int set_memory_policy(const struct process_header *h) {
    uint64_t any = 0;
    for (size_t i = 0; i < ARRAY_SIZE(h->policy_nodes); i++)
        any |= h->policy_nodes[i];
    /* The kernel counts one bit less than it is told; a policy without nodes wants no mask. */
    return (int)syscall(SYS_set_mempolicy, h->policy_mode, any ? h->policy_nodes : NULL,
                        any ? PROCESS_NODES + 1 : 0);
}

static int prepare(const struct process_header *h, enum go_step *step) {
    *step = GOSTEP_NO_NEW_PRIVS;
    if (h->flags & PROCESS_NO_NEW_PRIVS && prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
        return -1;
    *step = GOSTEP_SCHEDULER;
    if (h->flags & PROCESS_SET_SCHEDULER && set_scheduler(h) < 0)
        return -1;
    *step = GOSTEP_IO_PRIORITY;
    if (h->flags & PROCESS_SET_IO_PRIORITY &&
        syscall(SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, h->io_priority) < 0)
        return -1;
    *step = GOSTEP_PERSONALITY;
    if (h->flags & PROCESS_SET_PERSONALITY && personality(h->personality) < 0)
        return -1;
    *step = GOSTEP_MEMORY_POLICY;
    return h->flags & PROCESS_SET_MEMORY_POLICY && set_memory_policy(h) < 0 ? -1 : 0;
}

int init_process(struct init *s, const struct op_request *q, struct op_reply *a) {
    enum go_step step = GOSTEP_FRAME;
    if (s->passed < 0 || q->flags != 0)
        return ERR_MALFORMED;
    if (process_map(s->passed, &s->process) < 0 || prepare(&s->process.header, &step) < 0)
        return init_failed_at(a, step);
    return ERR_OK;
}

/* Takes effect with execve.  The file is looked up in a procfs of our own: a container that shares
 * a mount with another could put anything at /proc (CVE-2019-16884, CVE-2025-52881). */
int init_apparmor(struct init *s, const struct op_request *q, struct op_reply *a) {
    const char *profile = wire_string(q, 0);
    char text[512] = "exec ";
    if (profile == NULL || q->flags != 0 || strlen(profile) + 6 > sizeof(text))
        return ERR_MALFORMED;
    append_text(text, sizeof(text), profile);
    int proc = init_proc(s);
    int fd = openat(proc, "self/attr/apparmor/exec", O_WRONLY | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0 && errno == ENOENT)
        fd = openat(proc, "self/attr/exec", O_WRONLY | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0)
        return init_failed(a);
    ssize_t wrote = write(fd, text, strlen(text));
    int error = errno;
    close(fd);
    errno = error;
    return wrote == (ssize_t)strlen(text) ? ERR_OK : init_failed(a);
}
