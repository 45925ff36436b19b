/* The first rows that init serves: its ids, what belongs to them, and its keyring. */
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/keyctl.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "init.h"

#ifndef CLONE_NEWTIME
#define CLONE_NEWTIME 0x80
#endif

enum mapped_flag {
    MAPPED_ROOT = 1,
    MAPPED_NO_GROUPS = 2,
    MAPPED_CGROUP = 4,
    MAPPED_SESSION = 8,
    MAPPED_LOOPBACK = 16,
    MAPPED_ALL = 31
};

static void append_offset(char *out, size_t size, const char *clock, const int64_t *offset) {
    append_text(out, size, clock);
    for (int i = 0; i < 2; i++) {
        append_text(out, size, offset[i] < 0 ? " -" : " ");
        append_number(out, size, offset[i] < 0 ? 0 - (uint64_t)offset[i] : (uint64_t)offset[i]);
    }
    append_text(out, size, "\n");
}

/* The file is root's while we are not dumpable.  The user namespace is new, so nobody who could
 * trace us is in it. */
static int write_offsets(const struct init *s) {
    char text[128] = "";
    append_offset(text, sizeof(text), "monotonic", &s->offsets[0]);
    append_offset(text, sizeof(text), "boottime", &s->offsets[2]);
    (void)prctl(PR_SET_DUMPABLE, 1);
    int fd = openat(s->host_proc_fd, "self/timens_offsets", O_WRONLY | O_CLOEXEC);
    init_shield(s);
    if (fd < 0)
        return -1;
    ssize_t wrote = write(fd, text, strlen(text));
    int error = errno;
    close(fd);
    errno = error;
    return wrote == (ssize_t)strlen(text) ? 0 : -1;
}

/* unshare(2) makes it for children only; setns(2) moves init itself, once its clocks are set. */
static int make_time_space(const struct init *s) {
    if (unshare(CLONE_NEWTIME) < 0 || (s->offsets_given && write_offsets(s) < 0))
        return -1;
    int fd = openat(s->host_proc_fd, "self/ns/time_for_children", O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    int result = setns(fd, CLONE_NEWTIME), error = errno;
    close(fd);
    errno = error;
    return result;
}

static int take_ids(uint32_t flags) {
    if (flags & MAPPED_NO_GROUPS && setgroups(0, NULL) < 0)
        return -1;
    return flags & MAPPED_ROOT && (setresgid(0, 0, 0) < 0 || setresuid(0, 0, 0) < 0) ? -1 : 0;
}

int init_mapped(struct init *s, const struct op_request *q, struct op_reply *a) {
    if (q->flags & ~(uint32_t)MAPPED_ALL)
        return ERR_MALFORMED;
    s->phase = SETUP; /* nothing keeps it dumpable any more */
    if (q->flags & MAPPED_SESSION && setsid() < 0)
        return init_failed_at(a, MAPPED_SESSION);
    if (take_ids(q->flags) < 0)
        return init_failed_at(a, MAPPED_ROOT);
    init_shield(s);
    if ((q->flags & MAPPED_CGROUP || s->late_spaces & CLONE_NEWCGROUP) &&
        unshare(CLONE_NEWCGROUP) < 0)
        return init_failed_at(a, MAPPED_CGROUP);
    if (s->late_spaces & CLONE_NEWTIME && make_time_space(s) < 0)
        return init_failed_at(a, CLONE_NEWTIME);
    if (q->flags & MAPPED_LOOPBACK && init_link_up("lo") < 0)
        return init_failed_at(a, MAPPED_LOOPBACK);
    return ERR_OK;
}

int init_tenant(struct init *s, const struct op_request *q, struct op_reply *a) {
    (void)a;
    if (q->flags != 0)
        return ERR_MALFORMED;
    s->tenant = true;
    return ERR_OK;
}

/* "keyring;UID;GID;PERMISSIONS;NAME", the third number in hexadecimal. */
static long permissions_of(long keyring) {
    char text[512];
    long got = syscall(SYS_keyctl, KEYCTL_DESCRIBE, keyring, text, sizeof(text) - 1, 0);
    if (got < 0 || got >= (long)sizeof(text))
        return -1;
    text[got] = '\0';
    const char *at = text;
    for (int field = 0; field < 3; field++) {
        at = strchr(at, ';');
        if (at == NULL)
            return -1;
        at++;
    }
    return (long)strtoul(at, NULL, 16);
}

/* Kernels and filters without keyrings are served all the same, as runc does. */
int init_keyring(struct init *s, const struct op_request *q, struct op_reply *a) {
    const char *name = wire_string(q, 0);
    (void)s;
    if (name == NULL || q->flags != 0 || q->num[0] > UINT32_MAX)
        return ERR_MALFORMED;
    long keyring = syscall(SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, name, 0, 0, 0);
    if (keyring < 0)
        return errno == ENOSYS ? ERR_OK : init_failed(a);
    long permissions = permissions_of(keyring);
    if (permissions < 0 || syscall(SYS_keyctl, KEYCTL_SETPERM, keyring,
                                   (unsigned long)permissions | q->num[0], 0, 0) < 0)
        return init_failed(a);
    return ERR_OK;
}
