/* Ranks of one job, and who asks for it, live in one container: a launch enters the mounts of
 * another one of its caller's, by a descriptor that the other has handed out (runtime/meeting.py).
 * Only in the user-namespace flow, where neither has a right that the caller has not. */
#include <errno.h>
#include <fcntl.h>
#include <linux/nsfs.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "starter.h"

enum { HOST_USER = 0 };

static void close_fd(int *fd) {
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

/* What owns the mounts is the kernel's to say; that the caller made it, and not the machine. */
static int judge(const struct launch *l, int user) {
    struct stat st;
    uid_t owner;
    if (user < 0 || fstat(user, &st) < 0 || ioctl(user, NS_GET_OWNER_UID, &owner) < 0)
        return ERR_SHARED;
    return st.st_ino != l->host_spaces[HOST_USER] && owner == l->uid ? ERR_OK : ERR_SHARED;
}

int share_open(const struct launch *l, int mounts_fd, int *user, int *mounts) {
    if (l->flow != FLOW_USERNS || ioctl(mounts_fd, NS_GET_NSTYPE) != CLONE_NEWNS)
        return ERR_SHARED;
    *user = ioctl(mounts_fd, NS_GET_USERNS);
    int code = judge(l, *user);
    if (code == ERR_OK) {
        *mounts = fcntl(mounts_fd, F_DUPFD_CLOEXEC, 3);
        code = *mounts < 0 ? ERR_SETUP : ERR_OK;
    }
    if (code != ERR_OK)
        close_fd(user);
    return code;
}
