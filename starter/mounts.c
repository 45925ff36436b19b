/* The mount operations, one function a row.  Everything is a descriptor; a path is looked up once,
 * with the caller's rights, and every mount gets its flags before it is attached. */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/capability.h>
#include <linux/loop.h>
#include <linux/mount.h>
#include <linux/openat2.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "starter.h"

static int sys_fsopen(const char *fs) {
    return (int)syscall(SYS_fsopen, fs, FSOPEN_CLOEXEC);
}

static int set_string(int fs, const char *key, const char *value) {
    return (int)syscall(SYS_fsconfig, fs, FSCONFIG_SET_STRING, key, value, 0);
}

static int set_flag(int fs, const char *key) {
    return (int)syscall(SYS_fsconfig, fs, FSCONFIG_SET_FLAG, key, NULL, 0);
}

static int set_number(int fs, const char *key, uint64_t number) {
    char text[24] = "";
    append_number(text, sizeof(text), number);
    return set_string(fs, key, text);
}

/* Only root may leave set-user-id bits alive (--allow-setuid), and not in a user namespace. */
static unsigned nosuid(const struct launch *l) {
    return l->flow == FLOW_ROOT && l->plan.flags & PLAN_SETUID ? 0 : MOUNT_ATTR_NOSUID;
}

/* Creates the super block and returns a detached mount, or -1. */
static int make_mount(int fs, unsigned flags) {
    if (syscall(SYS_fsconfig, fs, FSCONFIG_CMD_CREATE, NULL, NULL, 0) < 0)
        return -1;
    return (int)syscall(SYS_fsmount, fs, FSMOUNT_CLOEXEC, flags);
}

static int attach(int mount_fd, int target_fd) {
    return (int)syscall(SYS_move_mount, mount_fd, "", target_fd, "",
                        MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH);
}

static int attach_at(int mount_fd, const char *path) {
    return (int)syscall(SYS_move_mount, mount_fd, "", AT_FDCWD, path, MOVE_MOUNT_F_EMPTY_PATH);
}

static int open2(int dir, const char *path, uint64_t flags, uint64_t resolve) {
    struct open_how how = {.flags = flags | O_CLOEXEC, .resolve = resolve};
    long fd;
    int tries = 0;
    do /* EAGAIN: something was renamed while ".." was looked up */
        fd = syscall(SYS_openat2, dir, path, &how, sizeof(how));
    while (fd < 0 && (errno == EAGAIN || errno == EINTR) && tries++ < 64);
    return (int)fd;
}

static int answer(struct op_reply *a, int code, int error) {
    a->error = error;
    return code;
}

static int no_fields_but(const struct op_request *q, uint32_t flags, int nums, bool first,
                         bool second) {
    if (q->flags & ~flags || (q->length[0] > 0) != first || (q->length[1] > 0) != second)
        return -1;
    for (int i = nums; i < 6; i++)
        if (q->num[i] != 0)
            return -1;
    return 0;
}

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

/* The mount that was just attached, for the master to look into and for later operations. */
static int keep_mount(int mount_fd, int *kept, int *fd_out) {
    *kept = mount_fd;
    *fd_out = fcntl(mount_fd, F_DUPFD_CLOEXEC, 3);
    return *fd_out < 0 ? -1 : 0;
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
        (void)set_number(fs, "uid", r->launch->plan.uid);
        (void)set_number(fs, "gid", r->launch->plan.gid);
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

/* ROOT_FUSE(device): the image, served by a process of the user's that the user cannot alter. */
int op_root_fuse(struct rpc *r, const struct op_request *q, struct op_reply *a, int *fd_out) {
    struct launch *l = r->launch;
    if (no_fields_but(q, 0, 1, false, false) < 0 || q->num[0] >= LIMIT_FUSE_DEVICES ||
        l->fuse_fds[q->num[0]] < 0)
        return ERR_MALFORMED;
    int device = l->fuse_fds[q->num[0]];
    int fs = sys_fsopen("fuse");
    if (fs < 0)
        return answer(a, ERR_MOUNT, errno);
    (void)set_string(fs, "source", "squashfuse_ll");
    (void)set_string(fs, "rootmode", "40000");
    bool inner = fakeroot_wanted(l);
    if (set_number(fs, "fd", (uint64_t)device) < 0 ||
        set_number(fs, "user_id", inner ? 0 : l->uid) < 0 ||
        set_number(fs, "group_id", inner ? 0 : l->gid) < 0)
        return answer(a, ERR_MOUNT, errno);
    /* In a user namespace this would shut the master out, which stays outside of it. */
    if (l->flow != FLOW_USERNS && !inner && set_flag(fs, "allow_other") < 0)
        return answer(a, ERR_MOUNT, errno);
    /* SAFE: the server is the user's and what it says not trusted: nosuid, nodev, read-only. */
    int mount_fd = make_mount(fs, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_RDONLY);
    if (mount_fd < 0 || attach(mount_fd, r->places[PLACE_ROOTFS]) < 0)
        return answer(a, ERR_MOUNT, errno);
    close(fs);
    /* With our copy open the connection would outlive its server, and every access would hang. */
    for (size_t i = 0; i < LIMIT_FUSE_DEVICES; i++)
        if (l->fuse_fds[i] >= 0) {
            close(l->fuse_fds[i]);
            l->fuse_fds[i] = -1;
        }
    return keep_mount(mount_fd, &r->root_fd, fd_out) < 0 ? answer(a, ERR_MOUNT, errno) : ERR_OK;
}

/* As the caller, and the very file that was judged: num[0] device, num[1] inode. */
static int open_judged(const struct op_request *q, uint64_t flags, struct op_reply *a, int *code) {
    struct stat st;
    int fd = open2(AT_FDCWD, wire_string(q, 0), flags | O_NONBLOCK | O_NOCTTY,
                   RESOLVE_NO_MAGICLINKS);
    if (fd < 0 || fstat(fd, &st) < 0) {
        *code = answer(a, ERR_SOURCE, errno);
    } else if (st.st_dev != q->num[0] || st.st_ino != q->num[1]) {
        *code = answer(a, ERR_CHANGED, 0);
        close(fd);
        fd = -1;
    }
    return fd;
}

static int loop_device(int image_fd, uint64_t offset, uint64_t size, int most) {
    int control = open("/dev/loop-control", O_RDWR | O_CLOEXEC);
    for (int tries = 0; control >= 0 && tries < 32; tries++) {
        int number = ioctl(control, LOOP_CTL_GET_FREE);
        if (number < 0 || number >= most)
            break;
        char path[32] = "/dev/loop";
        append_number(path, sizeof(path), (uint64_t)number);
        int device = open(path, O_RDWR | O_CLOEXEC);
        if (device < 0)
            break;
        struct loop_config config = {.fd = (uint32_t)image_fd};
        config.info.lo_offset = offset;
        config.info.lo_sizelimit = size;
        config.info.lo_flags = LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR;
        if (ioctl(device, LOOP_CONFIGURE, &config) == 0) {
            close(control);
            return device;
        }
        close(device);
        if (errno != EBUSY) /* somebody else took it: the next one */
            break;
    }
    if (control >= 0)
        close(control);
    return -1;
}

/* ROOT_SQUASHFS(path; device, inode, offset, size): the kernel's driver, where policy allows. */
int op_root_squashfs(struct rpc *r, const struct op_request *q, struct op_reply *a, int *fd_out) {
    const struct launch *l = r->launch;
    int code = ERR_OK;
    if (no_fields_but(q, 0, 4, true, false) < 0)
        return ERR_MALFORMED;
    if (!(l->plan.flags & PLAN_KERNEL_IMAGE) || l->flow == FLOW_USERNS || fakeroot_wanted(l))
        return ERR_REFUSED;
    int image = open_judged(q, O_RDONLY, a, &code);
    if (image < 0)
        return code;
    if (policy_on_fuse(image))
        return ERR_KIND; /* whoever serves the file could change it under the kernel's parser */
    if ((code = policy_image(l, image)) != ERR_OK)
        return code;
    const struct raised *raised = privs_raise(CAP_BIT(CAP_SYS_ADMIN) | CAP_BIT(CAP_DAC_OVERRIDE));
    if (!raised)
        return answer(a, ERR_LOOP, EPERM);
    /* SAFE: fixed device names; the image was opened as the user; read-only, cleared on last close;
     * policy_plan() has asked the administrator whether the kernel may parse such an image. */
    int device = loop_device(image, q->num[2], q->num[3],
                             (int)config_uint(&l->config, CONFIG_MAX_LOOP_DEVICES));
    int error = errno;
    privs_lower(raised);
    raised = privs_raise(CAP_BIT(CAP_SYS_ADMIN));
    if (device < 0 || !raised)
        return answer(a, ERR_LOOP, error);
    char source[32] = "/proc/self/fd/", name[64] = "";
    append_number(source, sizeof(source), (uint64_t)device);
    ssize_t length = readlink(source, name, sizeof(name) - 1);
    int fs = sys_fsopen("squashfs");
    if (length <= 0 || fs < 0 || set_string(fs, "source", name) < 0)
        return answer(a, ERR_MOUNT, errno);
    (void)set_flag(fs, "ro"); /* as the loop device is: opening it for writing would fail */
    (void)set_string(fs, "errors", "continue");
    raised = privs_raise(CAP_BIT(CAP_SYS_ADMIN) | CAP_BIT(CAP_DAC_OVERRIDE));
    int mount_fd = !raised ? -1
                           : make_mount(fs, nosuid(l) | MOUNT_ATTR_NODEV | MOUNT_ATTR_RDONLY);
    error = errno;
    privs_lower(raised);
    raised = privs_raise(CAP_BIT(CAP_SYS_ADMIN));
    if (!raised || mount_fd < 0 || attach(mount_fd, r->places[PLACE_ROOTFS]) < 0)
        return answer(a, ERR_MOUNT, error);
    close(fs);
    close(device);
    close(image);
    return keep_mount(mount_fd, &r->root_fd, fd_out) < 0 ? answer(a, ERR_MOUNT, errno) : ERR_OK;
}

/* A copy of the tree below fd, with its flags set before anybody can reach it. */
static int clone_tree(int fd, uint64_t set, uint64_t clear, bool recursive) {
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

static uint64_t bind_attributes(const struct launch *l, uint32_t flags) {
    uint64_t set = MOUNT_ATTR_NODEV | nosuid(l);
    if (flags & BIND_DEVICES)
        set &= ~(uint64_t)MOUNT_ATTR_NODEV;
    if (flags & BIND_READ_ONLY)
        set |= MOUNT_ATTR_RDONLY;
    return set;
}

/* ROOT_DIRECTORY(path; device, inode): a sandbox. */
int op_root_directory(struct rpc *r, const struct op_request *q, struct op_reply *a, int *fd_out) {
    const struct launch *l = r->launch;
    struct stat st, host;
    int code = ERR_OK;
    if (no_fields_but(q, BIND_READ_ONLY, 2, true, false) < 0)
        return ERR_MALFORMED;
    int image = open_judged(q, O_RDONLY | O_DIRECTORY, a, &code);
    if (image < 0)
        return code;
    /* Inside, the owner of a file is whoever the caller's ranges make of it. */
    if (l->flow == FLOW_SETUID && fakeroot_wanted(l) && policy_limits_images(l))
        return ERR_OWNER;
    if (l->flow == FLOW_SETUID && (code = policy_image(l, image)) != ERR_OK)
        return code;
    if (fstat(image, &st) < 0 || stat("/", &host) < 0 ||
        (st.st_dev == host.st_dev && st.st_ino == host.st_ino))
        return answer(a, ERR_KIND, 0); /* the host's root is no image */
    /* SAFE: a directory that the user could open, made nosuid and nodev before it is attached. */
    int tree = clone_tree(image, bind_attributes(l, q->flags), 0, true);
    if (tree < 0 || attach(tree, r->places[PLACE_ROOTFS]) < 0)
        return answer(a, ERR_MOUNT, errno);
    close(image);
    return keep_mount(tree, &r->root_fd, fd_out) < 0 ? answer(a, ERR_MOUNT, errno) : ERR_OK;
}

static const char *without_slash(const char *path) {
    while (*path == '/')
        path++;
    return *path ? path : ".";
}

static int kinds_match(int source, int target) {
    struct stat from, to;
    if (fstat(source, &from) < 0 || fstat(target, &to) < 0)
        return -1;
    if (S_ISLNK(to.st_mode) || S_ISDIR(from.st_mode) != S_ISDIR(to.st_mode)) {
        errno = S_ISDIR(from.st_mode) ? ENOTDIR : EISDIR;
        return -1;
    }
    return 0;
}

/* UNDERLAY_BIND(path in the image, path in the underlay): one entry of the image shown again. */
int op_underlay_bind(struct rpc *r, const struct op_request *q, struct op_reply *a, int *fd_out) {
    (void)fd_out;
    if (no_fields_but(q, 0, 0, true, true) < 0 || r->root_fd < 0)
        return ERR_MALFORMED;
    int source = open2(r->root_fd, without_slash(wire_string(q, 0)), O_PATH | O_NOFOLLOW,
                       RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS);
    if (source < 0)
        return answer(a, ERR_SOURCE, errno);
    int target = open2(r->places[PLACE_UNDERLAY], without_slash(wire_string(q, 1)),
                       O_PATH | O_NOFOLLOW,
                       RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS);
    int code = ERR_OK;
    /* SAFE: both ends lie in the container's own trees; flags of the image's mount are kept. */
    int tree = target < 0 ? -1 : clone_tree(source, 0, 0, true);
    if (target < 0 || kinds_match(source, target) < 0)
        code = answer(a, ERR_TARGET, errno);
    else if (tree < 0 || attach(tree, target) < 0)
        code = answer(a, ERR_MOUNT, errno);
    close(source);
    if (target >= 0)
        close(target);
    if (tree >= 0)
        close(tree);
    return code;
}

/* Overlay takes its layers by name only, so each is named by a descriptor: of a directory that was
 * pinned, or of a mount itself, which a directory below it would not lead to. */
static void append_layer(char *out, size_t size, int fd) {
    append_text(out, size, "/proc/self/fd/");
    append_number(out, size, (uint64_t)fd);
}

static int set_layer(int fs, const char *key, int fd) {
    char name[48] = "";
    append_layer(name, sizeof(name), fd);
    return set_string(fs, key, name);
}

/* The image below what the mounts need.  Made with SYS_ADMIN alone: what the kernel does on behalf
 * of the container in these layers, it does with the user's own rights. */
static int overlay_read_only(const struct rpc *r) {
    char layers[96] = "";
    append_layer(layers, sizeof(layers), r->places[PLACE_LOWER]);
    append_text(layers, sizeof(layers), ":");
    append_layer(layers, sizeof(layers), r->root_fd);
    int fs = sys_fsopen("overlay"), mount_fd = -1;
    /* SAFE: both layers are directories of this session, pinned before anybody could move them. */
    if (fs >= 0 && set_string(fs, "source", "overlay") == 0 &&
        set_string(fs, "lowerdir", layers) == 0)
        mount_fd = make_mount(fs, nosuid(r->launch) | MOUNT_ATTR_NODEV | MOUNT_ATTR_RDONLY);
    int error = errno;
    if (fs >= 0)
        close(fs);
    errno = error;
    return mount_fd;
}

/* A memory layer over that.  The kernel's work directory has mode 0, so this one alone is made with
 * DAC_OVERRIDE.  It must lie over the other overlay and not over the image: there, an entry that
 * the user owns in the upper layers would open a directory of the image that is closed to the
 * user. */
static int overlay_writable(const struct rpc *r) {
    int below = overlay_read_only(r);
    if (below < 0 || attach(below, r->places[PLACE_MERGED]) < 0)
        return -1;
    int fs = sys_fsopen("overlay"), mount_fd = -1;
    if (fs < 0 || set_string(fs, "source", "overlay") < 0 ||
        set_layer(fs, "lowerdir", below) < 0 ||
        set_layer(fs, "upperdir", r->places[PLACE_UPPER]) < 0 ||
        set_layer(fs, "workdir", r->places[PLACE_WORK]) < 0)
        return -1;
    if (r->launch->flow == FLOW_USERNS || fakeroot_wanted(r->launch))
        (void)set_flag(fs, "userxattr");
    /* Root of the container's own namespace has all of that anyway, and changes owners too. */
    bool inner = fakeroot_wanted(r->launch);
    const struct raised *raised =
        inner ? NULL : privs_raise(CAP_BIT(CAP_SYS_ADMIN) | CAP_BIT(CAP_DAC_OVERRIDE));
    /* SAFE: the layer below checks every access again with the user's rights; upper and work are
     * this session's own. */
    if (raised || inner)
        mount_fd = make_mount(fs, nosuid(r->launch) | MOUNT_ATTR_NODEV);
    int error = errno;
    privs_lower(raised);
    if (!inner && !privs_raise(CAP_BIT(CAP_SYS_ADMIN)))
        mount_fd = -1;
    close(fs);
    close(below);
    errno = error;
    return mount_fd;
}

static int make_layer(const struct rpc *r, enum layer_kind kind) {
    switch (kind) {
    case LAYER_OVERLAY:
        return overlay_read_only(r);
    case LAYER_OVERLAY_TMPFS:
        return overlay_writable(r);
    case LAYER_UNDERLAY:
        return clone_tree(r->places[PLACE_UNDERLAY],
                          nosuid(r->launch) | MOUNT_ATTR_NODEV | MOUNT_ATTR_RDONLY, 0, true);
    case LAYER_NONE:
    default:
        return clone_tree(r->root_fd, 0, 0, true);
    }
}

/* LAYER(kind): what lies over the image; from here on targets are looked up in the result. */
int op_layer(struct rpc *r, const struct op_request *q, struct op_reply *a, int *fd_out) {
    const struct launch *l = r->launch;
    if (no_fields_but(q, 0, 1, false, false) < 0 || q->num[0] > LAYER_UNDERLAY || r->root_fd < 0)
        return ERR_MALFORMED;
    enum layer_kind kind = (enum layer_kind)q->num[0];
    if ((kind == LAYER_OVERLAY_TMPFS && !(l->plan.flags & PLAN_WRITABLE_LAYER)) ||
        !policy_layer(l, kind))
        return ERR_REFUSED;
    int tree = make_layer(r, kind);
    /* SAFE: trees that earlier operations made, attached to a directory of our own. */
    if (tree < 0 || attach(tree, r->places[PLACE_FINAL]) < 0)
        return answer(a, ERR_MOUNT, errno);
    return keep_mount(tree, &r->final_fd, fd_out) < 0 ? answer(a, ERR_MOUNT, errno) : ERR_OK;
}

/* Never the root itself: what is mounted over it would not be the root that is changed to. */
static int open_target(const struct rpc *r, const char *path) {
    struct stat target, root;
    int fd = open2(r->final_fd, path, O_PATH, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS);
    if (fd >= 0 && (fstat(fd, &target) < 0 || fstat(r->final_fd, &root) < 0 ||
                    (target.st_dev == root.st_dev && target.st_ino == root.st_ino))) {
        close(fd);
        errno = EBUSY;
        return -1;
    }
    return fd;
}

/* A path "x/." makes an automounter mount x, which O_PATH on x alone would not. */
static int open_host_source(const char *path, uint64_t resolve) {
    char inside[LIMIT_PATH_BYTES + 4] = "";
    append_text(inside, sizeof(inside), path);
    append_text(inside, sizeof(inside), "/.");
    int fd = open2(AT_FDCWD, inside, O_PATH, resolve);
    if (fd < 0 && errno == ENOTDIR)
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
    const uint32_t known =
        BIND_READ_ONLY | BIND_DEVICES | BIND_MAY_FAIL | BIND_SAME_INODE | BIND_ALONE;
    (void)fd_out;
    if (no_fields_but(q, known, 3, true, true) < 0 || q->num[0] > AREA_ROOT ||
        wire_string(q, 0)[0] != '/' || wire_string(q, 1)[0] != '/')
        return ERR_MALFORMED;
    if (q->flags & BIND_DEVICES &&
        (q->num[0] != AREA_HOST || !is_device_tree(wire_string(q, 0)) ||
         strstr(wire_string(q, 0), "/.")))
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
    else if ((tree = clone_tree(source, bind_attributes(r->launch, q->flags), 0,
                                !(q->flags & BIND_ALONE))) < 0 ||
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
    if (fs >= 0 && q->num[0] == KERNELFS_DEVPTS) {
        (void)set_string(fs, "mode", "0620");
        (void)set_string(fs, "ptmxmode", "0666");
        if (l->flow != FLOW_USERNS && !fakeroot_wanted(l) && q->num[1] < 65536)
            (void)set_number(fs, "gid", q->num[1]);
    } else if (fs >= 0 && q->num[0] == KERNELFS_TMPFS) {
        uint64_t most = config_uint(&l->config, CONFIG_SESSIONDIR_MAX_SIZE);
        uint64_t mib = most > 0 && (q->num[2] == 0 || q->num[2] > most) ? most : q->num[2];
        (void)set_string(fs, "mode", "1777");
        if (l->flow == FLOW_SETUID || q->num[2] > 0)
            (void)(mib > 0 && mib <= UINT64_MAX >> 20 ? set_number(fs, "size", mib << 20) : 0);
    }
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
