/* What the mount operations share: single system calls, with the checks that belong to each. */
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/mount.h>
#include <linux/openat2.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "mountcalls.h"

int sys_fsopen(const char *fs) {
    return (int)syscall(SYS_fsopen, fs, FSOPEN_CLOEXEC);
}

int set_string(int fs, const char *key, const char *value) {
    return (int)syscall(SYS_fsconfig, fs, FSCONFIG_SET_STRING, key, value, 0);
}

int set_flag(int fs, const char *key) {
    return (int)syscall(SYS_fsconfig, fs, FSCONFIG_SET_FLAG, key, NULL, 0);
}

int set_number(int fs, const char *key, uint64_t number) {
    char text[24] = "";
    append_number(text, sizeof(text), number);
    return set_string(fs, key, text);
}

/* Only root may leave set-user-id bits alive (--allow-setuid), and not in a user namespace. */
unsigned nosuid(const struct launch *l) {
    return l->flow == FLOW_ROOT && l->plan.flags & PLAN_SETUID ? 0 : MOUNT_ATTR_NOSUID;
}

/* Creates the super block and returns a detached mount, or -1. */
int make_mount(int fs, unsigned flags) {
    if (syscall(SYS_fsconfig, fs, FSCONFIG_CMD_CREATE, NULL, NULL, 0) < 0)
        return -1;
    return (int)syscall(SYS_fsmount, fs, FSMOUNT_CLOEXEC, flags);
}

int attach(int mount_fd, int target_fd) {
    return (int)syscall(SYS_move_mount, mount_fd, "", target_fd, "",
                        MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH);
}

int attach_at(int mount_fd, const char *path) {
    return (int)syscall(SYS_move_mount, mount_fd, "", AT_FDCWD, path, MOVE_MOUNT_F_EMPTY_PATH);
}

int open2(int dir, const char *path, uint64_t flags, uint64_t resolve) {
    struct open_how how = {.flags = flags | O_CLOEXEC, .resolve = resolve};
    long fd;
    int tries = 0;
    do /* EAGAIN: something was renamed while ".." was looked up */
        fd = syscall(SYS_openat2, dir, path, &how, sizeof(how));
    while (fd < 0 && (errno == EAGAIN || errno == EINTR) && tries++ < 64);
    return (int)fd;
}

int answer(struct op_reply *a, int code, int error) {
    a->error = error;
    return code;
}

int no_fields_but(const struct op_request *q, uint32_t flags, int nums, bool first,
                         bool second) {
    if (q->flags & ~flags || (q->length[0] > 0) != first || (q->length[1] > 0) != second)
        return -1;
    for (int i = nums; i < 6; i++)
        if (q->num[i] != 0)
            return -1;
    return 0;
}

/* The mount that was just attached, for the master to look into and for later operations. */
int keep_mount(int mount_fd, int *kept, int *fd_out) {
    *kept = mount_fd;
    *fd_out = fcntl(mount_fd, F_DUPFD_CLOEXEC, 3);
    return *fd_out < 0 ? -1 : 0;
}

/* As the caller, and the very file that was judged: num[0] device, num[1] inode. */
int open_judged(const struct op_request *q, uint64_t flags, struct op_reply *a, int *code) {
    struct stat st;
    int fd = open2(AT_FDCWD, wire_string(q, 0), flags | O_NONBLOCK | O_NOCTTY,
                   RESOLVE_NO_MAGICLINKS);
    if (fd < 0 || fstat(fd, &st) < 0) {
        *code = answer(a, ERR_SOURCE, errno);
        if (fd >= 0)
            close(fd);
        fd = -1;
    } else if (st.st_dev != q->num[0] || st.st_ino != q->num[1]) {
        *code = answer(a, ERR_CHANGED, 0);
        close(fd);
        fd = -1;
    }
    return fd;
}

/* A copy of the tree below fd, with its flags set before anybody can reach it. */
int clone_tree(int fd, uint64_t set, uint64_t clear, bool recursive) {
    unsigned flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_EMPTY_PATH |
                     (recursive ? (unsigned)AT_RECURSIVE : 0);
    int tree = (int)syscall(SYS_open_tree, fd, "", flags);
    struct mount_attr attributes = {.attr_set = set, .attr_clr = clear};
    if (tree >= 0 && (set | clear) != 0 &&
        syscall(SYS_mount_setattr, tree, "", AT_EMPTY_PATH | (recursive ? AT_RECURSIVE : 0),
                &attributes, sizeof(attributes)) < 0) {
        int error = errno;
        close(tree);
        errno = error;
        return -1;
    }
    return tree;
}

uint64_t bind_attributes(const struct launch *l, uint32_t flags) {
    uint64_t set = MOUNT_ATTR_NODEV | nosuid(l);
    if (flags & BIND_DEVICES)
        set &= ~(uint64_t)MOUNT_ATTR_NODEV;
    if (flags & BIND_READ_ONLY)
        set |= MOUNT_ATTR_RDONLY;
    return set;
}

const char *without_slash(const char *path) {
    while (*path == '/')
        path++;
    return *path ? path : ".";
}

int kinds_match(int source, int target) {
    struct stat from, to;
    if (fstat(source, &from) < 0 || fstat(target, &to) < 0)
        return -1;
    if (S_ISLNK(to.st_mode) || S_ISDIR(from.st_mode) != S_ISDIR(to.st_mode)) {
        errno = S_ISDIR(from.st_mode) ? ENOTDIR : EISDIR;
        return -1;
    }
    return 0;
}

/* More capabilities than the usual one, for this call alone; -1 with errno. */
int make_mount_with(uint64_t caps, int fs, unsigned flags) {
    const struct raised *raised = privs_raise(caps);
    int mount_fd = raised ? make_mount(fs, flags) : -1, error = raised ? errno : EPERM;
    privs_lower(raised);
    if (!privs_raise(CAP_BIT(CAP_SYS_ADMIN)) && mount_fd >= 0) {
        close(mount_fd);
        mount_fd = -1;
        error = EPERM;
    }
    errno = error;
    return mount_fd;
}
