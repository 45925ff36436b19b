/* The container's terminal: a pty of its own devpts, without one look at a path below /dev/pts. */
#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <linux/openat2.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "init.h"

#define PTMX_DEVICE makedev(5, 2)
#define PTMX_INODE 2                   /* mknod_ptmx() in the kernel's fs/devpts/inode.c */

/* CVE-2025-52565: what the container calls ptmx may be anything; only devpts has this inode. */
static int open_ptmx(const char *path) {
    struct stat st;
    struct statfs fs;
    int fd = open(path, O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return -1;
    if (fstat(fd, &st) == 0 && fstatfs(fd, &fs) == 0 && S_ISCHR(st.st_mode) &&
        st.st_rdev == PTMX_DEVICE && st.st_ino == PTMX_INODE && fs.f_type == DEVPTS_SUPER_MAGIC &&
        fcntl(fd, F_SETFL, 0) == 0)
        return fd;
    close(fd);
    errno = ENODEV;
    return -1;
}

/* Both ends.  The kernel opens the other one itself, whatever lies at /dev/pts/N. */
static int open_pair(int *other) {
    int unlocked = 0;
    int fd = open_ptmx("/dev/ptmx");
    if (fd < 0)
        fd = open_ptmx("/dev/pts/ptmx");
    if (fd < 0)
        return -1;
    *other = -1;
    if (ioctl(fd, TIOCSPTLCK, &unlocked) == 0)
        *other = ioctl(fd, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (*other < 0)
        init_close(&fd);
    return fd;
}

/* /dev/console as it is, or a new empty file: a link there would be somebody's trap. */
static int open_console(void) {
    struct stat st;
    int created = open("/dev/console", O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0666);
    init_close(&created);
    int fd = open("/dev/console", O_PATH | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0 || (fstat(fd, &st) == 0 && (S_ISREG(st.st_mode) || S_ISCHR(st.st_mode))))
        return fd;
    close(fd);
    errno = ELOOP;
    return -1;
}

static int bind_console(int terminal) {
    int tree = (int)syscall(SYS_open_tree, terminal, "",
                            AT_EMPTY_PATH | OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
    if (tree < 0)
        return -1;
    int target = open_console();
    int result = -1;
    if (target >= 0)
        result = (int)syscall(SYS_move_mount, tree, "", target, "",
                              MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH);
    int error = errno;
    init_close(&target);
    close(tree);
    errno = error;
    return result;
}

static int take_terminal(int terminal) {
    for (int fd = 0; fd < 3; fd++)
        if (dup2(terminal, fd) < 0)
            return -1;
    return ioctl(STDIN_FILENO, TIOCSCTTY, 0);
}

int init_console(struct init *s, const struct op_request *q, struct op_reply *a) {
    enum { BIND = 1 };
    enum { OPEN = 1, SIZE, CONSOLE, TAKE };
    int other = -1;
    if (q->flags & ~(uint32_t)BIND || q->num[0] > UINT16_MAX || q->num[1] > UINT16_MAX)
        return ERR_MALFORMED;
    s->fd_out = open_pair(&other);
    if (s->fd_out < 0)
        return init_failed_at(a, OPEN);
    struct winsize size = {.ws_row = (unsigned short)q->num[0],
                           .ws_col = (unsigned short)q->num[1]};
    uint32_t step = SIZE;
    int result = size.ws_row && size.ws_col ? ioctl(s->fd_out, TIOCSWINSZ, &size) : 0;
    if (result == 0 && q->flags & BIND) {
        step = CONSOLE;
        result = bind_console(other);
    }
    if (result == 0) {
        step = TAKE;
        result = take_terminal(other);
    }
    int code = result < 0 ? init_failed_at(a, step) : ERR_OK;
    close(other);
    if (code != ERR_OK)
        init_close(&s->fd_out);
    return code;
}

/* One of the three streams, from whoever carries them on. */
int init_stream(struct init *s, const struct op_request *q, struct op_reply *a) {
    if (s->passed < 0 || q->flags != 0 || q->num[0] > STDERR_FILENO)
        return ERR_MALFORMED;
    return dup2(s->passed, (int)q->num[0]) < 0 ? init_failed(a) : ERR_OK;
}
