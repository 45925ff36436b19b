/* The mount operations, one function a row.  Everything is a descriptor; a path is looked up once,
 * with the caller's rights, and every mount gets its flags before it is attached. */
#include <errno.h>
#include <fcntl.h>
#include <linux/mount.h>
#include <linux/openat2.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "mountcalls.h"

/* A directory that the master fills: it belongs to the user and needs no privilege. */
static int hand_out(const char *path, int *fd_out) {
    *fd_out = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    return *fd_out < 0 ? -1 : 0;
}

static const char *const place_names[PLACE_COUNT] = {"rootfs", "final", "lower", "underlay",
                                                      "upper",  "work",  "merged"};

/* Pinned by descriptor before the directory is handed out: whoever fills it owns it, and could put
 * a link in the place of each. */
static int make_directories(struct rpc *r) {
    int dir = open(APY_SESSIONDIR, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
    int result = dir < 0 ? -1 : 0;
    mode_t was = umask(0);
    if (result == 0)
        result = mkdirat(dir, "files", 0755);
    for (size_t i = 0; result == 0 && i < PLACE_COUNT; i++) {
        result = mkdirat(dir, place_names[i], 0755);
        r->places[i] = open2(dir, place_names[i], O_PATH | O_DIRECTORY | O_NOFOLLOW,
                             RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV);
        if (r->places[i] < 0)
            result = -1;
    }
    umask(was);
    if (dir >= 0)
        close(dir);
    return result;
}

/* SESSION(size in MiB, 0 = no limit): the memory file system that holds everything else. */
int op_session(struct rpc *r, const struct op_request *q, struct op_reply *a, int *fd_out) {
    const struct launch *l = r->launch;
    if (no_fields_but(q, 0, 1, false, false) < 0 || q->num[0] > UINT64_MAX >> 20)
        return ERR_MALFORMED;
    uint64_t size = q->num[0], most = config_uint(&l->config, CONFIG_SESSIONDIR_MAX_SIZE);
    if (l->flow == FLOW_SETUID && most != 0 && (size == 0 || size > most))
        return ERR_REFUSED;
    bool ramfs = config_enum(&l->config, CONFIG_MEMORY_FS_TYPE) == MEMORY_FS_RAMFS &&
                 l->flow != FLOW_USERNS && !fakeroot_wanted(l);
    /* SAFE: new memory in a private namespace; the administrator bounds its size. */
    int fs = sys_fsopen(ramfs ? "ramfs" : "tmpfs");
    if (fs < 0)
        return answer(a, ERR_MOUNT, errno);
    if (!ramfs) {
        /* The payload may be somebody else's; the directory is whose processes fill it. */
        (void)set_number(fs, "uid", fakeroot_wanted(l) ? 0 : l->uid);
        (void)set_number(fs, "gid", fakeroot_wanted(l) ? 0 : l->gid);
        if (size > 0)
            (void)set_number(fs, "size", size << 20);
    }
    (void)set_string(fs, "source", "tmpfs");
    (void)set_string(fs, "mode", ramfs ? "1777" : "0755");
    int mount_fd = make_mount(fs, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV);
    if (mount_fd < 0 || attach_at(mount_fd, APY_SESSIONDIR) < 0)
        return answer(a, ERR_MOUNT, errno);
    close(fs);
    close(mount_fd);
    if (make_directories(r) < 0 || hand_out(APY_SESSIONDIR, fd_out) < 0)
        return answer(a, ERR_MOUNT, errno);
    r->session_fd = fcntl(*fd_out, F_DUPFD_CLOEXEC, 3);
    return r->session_fd < 0 ? answer(a, ERR_MOUNT, errno) : ERR_OK;
}

/* By the kernel's own numbers: a file system that a program serves may give two files one inode. */
static int find_mount(int fd, struct statx *found) {
    if (statx(fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_MNT_ID, found) < 0)
        return -1;
    return found->stx_mask & STATX_MNT_ID ? 0 : -1;
}

/* Never the root itself: what is mounted over it would not be the root that is changed to. */
int open_target(const struct rpc *r, const char *path) {
    struct statx target, root;
    int fd = open2(r->final_fd, path, O_PATH, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS);
    if (fd >= 0 && (find_mount(fd, &target) < 0 || find_mount(r->final_fd, &root) < 0 ||
                    (target.stx_mnt_id == root.stx_mnt_id &&
                     target.stx_attributes & STATX_ATTR_MOUNT_ROOT))) {
        close(fd);
        errno = EBUSY;
        return -1;
    }
    return fd;
}

/* A path "x/." makes an automounter mount x, which O_PATH on x alone would not.  A directory that
 * the user cannot enter is shown all the same, and stays as closed as it is outside. */
static int open_host_source(const char *path, uint64_t resolve) {
    char inside[LIMIT_PATH_BYTES + 4] = "";
    append_text(inside, sizeof(inside), path);
    append_text(inside, sizeof(inside), "/.");
    int fd = open2(AT_FDCWD, inside, O_PATH, resolve);
    if (fd < 0 && (errno == ENOTDIR || errno == EACCES))
        fd = open2(AT_FDCWD, path, O_PATH, resolve);
    return fd;
}

static int open_bind_source(const struct rpc *r, const struct op_request *q) {
    const char *path = wire_string(q, 0);
    switch ((enum area)q->num[0]) {
    case AREA_HOST:
        return open_host_source(path, RESOLVE_NO_MAGICLINKS);
    case AREA_SESSION:
        return open2(r->session_fd, without_slash(path), O_PATH | O_NOFOLLOW,
                     RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS |
                         RESOLVE_NO_XDEV);
    case AREA_IMAGE:
        return open2(r->images[q->num[1]].fd, path, O_PATH,
                     RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS);
    case AREA_ROOT:
        return open2(r->root_fd, path, O_PATH, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS);
    default:
        errno = EINVAL;
        return -1;
    }
}

/* Device nodes stay usable only where they are the host's own. */
static bool is_device_tree(const char *path) {
    return strcmp(path, "/dev") == 0 || strncmp(path, "/dev/", 5) == 0;
}

/* BIND(source, target; area, device, inode): nosuid and nodev, whatever lies below it too. */
int op_bind(struct rpc *r, const struct op_request *q, struct op_reply *a, int *fd_out) {
    const uint32_t known = BIND_READ_ONLY | BIND_DEVICES | BIND_MAY_FAIL | BIND_SAME_INODE;
    (void)fd_out;
    if (no_fields_but(q, known, 3, true, true) < 0 || q->num[0] > AREA_IMAGE ||
        wire_string(q, 0)[0] != '/' || wire_string(q, 1)[0] != '/')
        return ERR_MALFORMED;
    if (q->flags & BIND_DEVICES &&
        (q->num[0] != AREA_HOST || !is_device_tree(wire_string(q, 0)) ||
         strstr(wire_string(q, 0), "/.")))
        return ERR_REFUSED;
    if (q->num[0] == AREA_IMAGE &&
        (q->num[1] >= LIMIT_IMAGES || !r->images[q->num[1]].there || q->flags & BIND_SAME_INODE))
        return ERR_MALFORMED;
    if (q->num[0] == AREA_IMAGE && !policy_image_bind(r->launch))
        return ERR_REFUSED;
    struct stat st;
    int source = open_bind_source(r, q), target = -1, tree = -1, code = ERR_OK;
    if (source < 0 || fstat(source, &st) < 0)
        code = answer(a, ERR_SOURCE, errno);
    else if (q->num[0] == AREA_HOST &&
             !policy_bind(r->launch, wire_string(q, 0), wire_string(q, 1), source))
        code = ERR_REFUSED;
    else if (q->flags & BIND_SAME_INODE && (st.st_dev != q->num[1] || st.st_ino != q->num[2]))
        code = answer(a, ERR_CHANGED, 0);
    else if ((target = open_target(r, wire_string(q, 1))) < 0 || kinds_match(source, target) < 0)
        code = answer(a, ERR_TARGET, errno);
    /* SAFE: looked up once, with the user's rights, inside the private namespace; the copy gets
     * nosuid and nodev on every mount below it before it can be reached. */
    else if ((tree = clone_tree(source, bind_attributes(r->launch, q->flags), 0, true)) < 0 ||
             attach(tree, target) < 0)
        code = answer(a, ERR_MOUNT, errno);
    if (source >= 0)
        close(source);
    if (target >= 0)
        close(target);
    if (tree >= 0)
        close(tree);
    return code;
}

static const struct {
    enum kernel_fs kind;
    const char *name;
    unsigned flags;
} kernel_filesystems[] = {
    {KERNELFS_PROC, "proc", MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC},
    {KERNELFS_SYSFS, "sysfs", MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC},
    {KERNELFS_DEVPTS, "devpts", MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC},
    {KERNELFS_MQUEUE, "mqueue", MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC},
    {KERNELFS_TMPFS, "tmpfs", MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV},
};

/* What the kernel may leave out costs an option, not the launch. */
static void set_options(const struct launch *l, const struct op_request *q, int fs) {
    if (q->num[0] == KERNELFS_DEVPTS) {
        (void)set_string(fs, "mode", "0620");
        (void)set_string(fs, "ptmxmode", "0666");
        if (l->flow != FLOW_USERNS && !fakeroot_wanted(l) && q->num[1] < 65536)
            (void)set_number(fs, "gid", q->num[1]);
    } else if (q->num[0] == KERNELFS_TMPFS) {
        uint64_t most = config_uint(&l->config, CONFIG_SESSIONDIR_MAX_SIZE);
        uint64_t mib = most > 0 && (q->num[2] == 0 || q->num[2] > most) ? most : q->num[2];
        (void)set_string(fs, "mode", "1777");
        if (l->flow == FLOW_SETUID || q->num[2] > 0)
            (void)(mib > 0 && mib <= UINT64_MAX >> 20 ? set_number(fs, "size", mib << 20) : 0);
    }
}

/* MOUNT(target; kind, tty gid or -1 | mode, size in MiB). */
int op_mount(struct rpc *r, const struct op_request *q, struct op_reply *a, int *fd_out) {
    const struct launch *l = r->launch;
    size_t row = 0;
    (void)fd_out;
    if (no_fields_but(q, BIND_MAY_FAIL | BIND_READ_ONLY, 3, true, false) < 0 ||
        wire_string(q, 0)[0] != '/')
        return ERR_MALFORMED;
    if (q->num[0] == KERNELFS_PROC && !(l->plan.spaces & SPACE_PID))
        return ERR_REFUSED; /* a fresh one would undo the host's hidepid */
    while (row < ARRAY_SIZE(kernel_filesystems) && kernel_filesystems[row].kind != q->num[0])
        row++;
    if (row == ARRAY_SIZE(kernel_filesystems))
        return ERR_MALFORMED;
    if (!policy_kernel_mount(l, kernel_filesystems[row].kind, wire_string(q, 0)) ||
        (l->flow == FLOW_SETUID && r->kernel_mounts & (uint32_t)1 << row))
        return ERR_REFUSED; /* one of each: what it holds is not bounded by the caller's limits */
    r->kernel_mounts |= (uint32_t)1 << row;
    int target = open_target(r, wire_string(q, 0));
    if (target < 0)
        return answer(a, ERR_TARGET, errno);
    int fs = sys_fsopen(kernel_filesystems[row].name), mount_fd = -1;
    if (fs >= 0)
        set_options(l, q, fs);
    (void)(fs < 0 ? 0 : set_string(fs, "source", kernel_filesystems[row].name));
    /* SAFE: file systems of the kernel's own, of the container's namespaces, from a closed list. */
    if (fs >= 0)
        mount_fd = make_mount(fs, kernel_filesystems[row].flags |
                                      (q->flags & BIND_READ_ONLY ? MOUNT_ATTR_RDONLY : 0));
    int code = mount_fd < 0 || attach(mount_fd, target) < 0 ? answer(a, ERR_MOUNT, errno) : ERR_OK;
    if (fs >= 0)
        close(fs);
    if (mount_fd >= 0)
        close(mount_fd);
    close(target);
    return code;
}

/* HOSTNAME(name): of the container's own UTS namespace, never of the host's. */
int op_hostname(struct rpc *r, const struct op_request *q, struct op_reply *a, int *fd_out) {
    (void)fd_out;
    if (no_fields_but(q, 0, 0, true, false) < 0 || q->length[0] > LIMIT_HOSTNAME_BYTES)
        return ERR_MALFORMED;
    if (!(r->launch->plan.spaces & SPACE_UTS))
        return ERR_REFUSED;
    /* SAFE: the plan made a UTS namespace of our own, tested in the line above. */
    if (sethostname(wire_string(q, 0), (size_t)q->length[0] - 1u) < 0)
        return answer(a, ERR_SETUP, errno);
    return ERR_OK;
}

/* SPACE(which): the container's own network (0) or user namespace (1), for who connects it; or that
 * of its mounts (2), for who shares them. */
int op_space(struct rpc *r, const struct op_request *q, struct op_reply *a, int *fd_out) {
    static const char *const paths[] = {"/proc/self/ns/net", "/proc/self/ns/user",
                                        "/proc/self/ns/mnt"};
    if (q->flags || q->num[0] >= ARRAY_SIZE(paths) || q->num[1] || q->num[2] || q->num[3] ||
        q->num[4] || q->num[5] || q->length[0] || q->length[1])
        return ERR_MALFORMED;
    /* In the setuid flow the network is not the user's to hold; the user namespace of --fakeroot is
     * the caller's own. */
    const struct container_plan *plan = &r->launch->plan;
    bool own = r->launch->flow == FLOW_USERNS;
    bool planned = q->num[0] == 2 ? own && plan->flags & PLAN_SHARED
                                  : (own && plan->spaces & SPACE_NET) ||
                                        (q->num[0] == 1 && fakeroot_wanted(r->launch));
    if (!planned)
        return ERR_REFUSED;
    *fd_out = open(paths[q->num[0]], O_RDONLY | O_CLOEXEC);
    return *fd_out < 0 ? answer(a, ERR_NAMESPACE, errno) : ERR_OK;
}

/* PIVOT: waits until stage 2 will load nothing more, then the host's tree is gone. */
int op_pivot(struct rpc *r, const struct op_request *q, struct op_reply *a, int *fd_out) {
    char byte;
    ssize_t got;
    (void)fd_out;
    if (no_fields_but(q, 0, 0, false, false) < 0 || r->final_fd < 0)
        return ERR_MALFORMED;
    do
        got = read(r->launch->seal_pipe[0], &byte, 1);
    while (got < 0 && errno == EINTR);
    if (got != 1)
        return answer(a, ERR_SEAL, 0);
    /* SAFE: changes the root of this mount namespace only; the old tree is detached at once. */
    if (fchdir(r->final_fd) < 0 || syscall(SYS_pivot_root, ".", ".") < 0)
        return answer(a, ERR_PIVOT, errno);
    struct mount_attr slave = {.propagation = 1u << 19 /* MS_SLAVE */};
    if (syscall(SYS_mount_setattr, AT_FDCWD, ".", AT_RECURSIVE, &slave, sizeof(slave)) < 0 ||
        syscall(SYS_umount2, ".", 2 /* MNT_DETACH */) < 0 || chdir("/") < 0)
        return answer(a, ERR_PIVOT, errno);
    return ERR_OK;
}
