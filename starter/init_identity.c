/* Becomes what the payload is to be; runc's finalizeNamespace, in its order. */
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "init.h"

#define NULL_DEVICE makedev(1, 3)

/* Before the identity changes and, where that was not allowed, after it: either may have the right
 * to enter a directory that the other has not. */
int identity_enter_cwd(const struct process *p, bool again, enum go_step *step) {
    const char *cwd = process_string(p, PROCESS_CWD);
    *step = GOSTEP_CHDIR;
    if (cwd == NULL || chdir(cwd) == 0)
        return 0;
    return !again && (errno == EACCES || errno == EPERM) ? 1 : -1;
}

/* CVE-2024-21626: a directory of the host, reached by a descriptor, has no path from our root. */
static int check_cwd(enum go_step *step) {
    static char path[LIMIT_PATH_BYTES];
    *step = GOSTEP_CWD_OUTSIDE;
    long got = syscall(SYS_getcwd, path, sizeof(path));
    if (got < 0)
        return -1;
    if (path[0] == '/')
        return 0;
    errno = ENOENT;
    return -1;
}

static int drop_bounding(const struct process_header *h, enum go_step *step) {
    *step = GOSTEP_BOUNDING;
    for (int cap = 0; cap < 64; cap++) {
        int has = prctl(PR_CAPBSET_READ, cap);
        if (has < 0)
            break;
        if (has && !(h->caps[CAP_SET_BOUNDING] & CAP_BIT(cap)) && prctl(PR_CAPBSET_DROP, cap) < 0)
            return -1;
    }
    return 0;
}

/* The payload may open /dev/stdout, which opens the stream anew.  What is not ours to give (another
 * namespace's file, a read-only one) stays as it is. */
static int give_streams(uid_t uid, enum go_step *step) {
    struct stat st;
    *step = GOSTEP_STREAMS;
    for (int fd = 0; fd < 3; fd++) {
        if (fstat(fd, &st) < 0 || st.st_uid == uid ||
            (S_ISCHR(st.st_mode) && st.st_rdev == NULL_DEVICE))
            continue;
        if (fchown(fd, uid, (gid_t)-1) < 0 && errno != EINVAL && errno != EPERM && errno != EROFS)
            return -1;
    }
    return 0;
}

static int take_groups(const struct process *p, enum go_step *step) {
    size_t size;
    const char *groups = process_bytes(p, PROCESS_GROUPS, &size);
    *step = GOSTEP_GROUPS;
    if (!(p->header.flags & PROCESS_SET_GROUPS))
        return 0;
    return (int)syscall(SYS_setgroups, (int)p->header.count[PROCESS_GROUPS], groups);
}

static int take_ids(const struct process_header *h, enum go_step *step) {
    *step = GOSTEP_GID;
    if (setresgid(h->gid, h->gid, h->gid) < 0)
        return -1;
    *step = GOSTEP_UID;
    return setresuid(h->uid, h->uid, h->uid);
}

static int set_caps(const struct process_header *h, enum go_step *step) {
    struct __user_cap_header_struct head = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2];
    *step = GOSTEP_CAPABILITIES;
    for (int half = 0; half < 2; half++) {
        data[half].effective = (uint32_t)(h->caps[CAP_SET_EFFECTIVE] >> (32 * half));
        data[half].permitted = (uint32_t)(h->caps[CAP_SET_PERMITTED] >> (32 * half));
        data[half].inheritable = (uint32_t)(h->caps[CAP_SET_INHERITABLE] >> (32 * half));
    }
    if (syscall(SYS_capset, &head, data) < 0)
        return -1;
    /* As runc: an ambient capability that cannot be had is no error. */
    (void)prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
    for (int cap = 0; cap < 64; cap++)
        if (h->caps[CAP_SET_AMBIENT] & CAP_BIT(cap))
            (void)prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, cap, 0, 0);
    return 0;
}

int identity_take(const struct init *s, enum go_step *step) {
    const struct process *p = &s->process;
    const struct process_header *h = &p->header;
    int later = identity_enter_cwd(p, false, step);
    if (later < 0 || (h->flags & PROCESS_SET_CAPS && drop_bounding(h, step) < 0))
        return -1;
    *step = GOSTEP_KEEP_CAPS;
    if (prctl(PR_SET_KEEPCAPS, 1) < 0 || give_streams(h->uid, step) < 0 ||
        take_groups(p, step) < 0 || take_ids(h, step) < 0)
        return -1;
    init_shield(s);
    if ((later && identity_enter_cwd(p, true, step) < 0) || check_cwd(step) < 0)
        return -1;
    *step = GOSTEP_KEEP_CAPS;
    if (prctl(PR_SET_KEEPCAPS, 0) < 0)
        return -1;
    return h->flags & PROCESS_SET_CAPS ? set_caps(h, step) : 0;
}
