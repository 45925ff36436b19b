/* Images become mounts: served through FUSE, parsed by the kernel where policy allows, or a
 * directory that is shown again.  The root is one; the others are overlays and image binds. */
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/loop.h>
#include <linux/mount.h>
#include <linux/openat2.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "mountcalls.h"
#include "loan.h"

static void close_device(struct launch *l, uint64_t number) {
    close(l->fuse_fds[number]);
    l->fuse_fds[number] = -1;
}

static bool is_device(const struct launch *l, uint64_t number) {
    return number < LIMIT_FUSE_DEVICES && l->fuse_fds[number] >= 0;
}

/* Of a user namespace only those inside may be let in: that would shut the master out, which stays
 * outside.  So what it looks into is the user's alone, and what the container's other ids need is
 * theirs too. */
static bool lets_others_in(const struct launch *l, enum fuse_reach reach) {
    if (l->plan.flags & PLAN_SUBIDS)
        return reach == REACH_INSIDE;
    return reach != REACH_USER && l->flow != FLOW_USERNS && !fakeroot_wanted(l);
}

static bool synchronised(const struct launch *l, uint32_t flags) {
    return flags & BIND_WRITABLE && flags & BIND_EXTFS &&
           config_bool(&l->config, CONFIG_SYNC_WRITABLE_EXTFS);
}

/* A file system that a process of the user's serves; a detached mount, or -1 with errno. */
int image_fuse(struct launch *l, uint64_t device, const char *source, uint32_t flags,
               enum fuse_reach reach) {
    int fs = sys_fsopen("fuse");
    if (fs < 0)
        return -1;
    (void)set_string(fs, "source", source);
    (void)set_string(fs, "rootmode", "40000");
    /* Else each read makes the kernel ask when the file was read last. */
    if (!(flags & BIND_WRITABLE))
        (void)set_flag(fs, "ro");
    int result = 0;
    if (set_number(fs, "fd", (uint64_t)l->fuse_fds[device]) < 0 ||
        set_number(fs, "user_id", fakeroot_wanted(l) ? 0 : l->uid) < 0 ||
        set_number(fs, "group_id", fakeroot_wanted(l) ? 0 : l->gid) < 0)
        result = -1;
    if (result == 0 && lets_others_in(l, reach) && set_flag(fs, "allow_other") < 0)
        result = -1;
    if (result == 0 && synchronised(l, flags) && set_flag(fs, "sync") < 0)
        result = -1;
    /* What such a server answers for owners and modes, the kernel enforces. */
    if (result == 0 && flags & BIND_EXTFS && set_flag(fs, "default_permissions") < 0)
        result = -1;
    unsigned attributes = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV;
    if (!(flags & BIND_WRITABLE))
        attributes |= MOUNT_ATTR_RDONLY;
    /* SAFE: the server is the user's and what it says not trusted: nosuid and nodev. */
    int mount_fd = result < 0 ? -1 : make_mount(fs, attributes), error = errno;
    close(fs);
    /* With our copy open the connection would outlive its server, and every access would hang. */
    close_device(l, device);
    errno = error;
    return mount_fd;
}

/* The mount of another launch of this image, which keeper has taken: served already. */
static int shown_again(struct launch *l, uint64_t device) {
    /* SAFE: a mount that rpc of another launch has made for this user: judge() in loan.c. */
    int mount_fd = clone_tree(l->loan_mount,
                              MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV, 0, false);
    int error = errno;
    close(l->loan_mount);
    l->loan_mount = -1;
    close_device(l, device);
    errno = error;
    return mount_fd;
}

static int root_image(struct launch *l, uint64_t device, const char *source, uint32_t flags) {
    if (l->loan_mount >= 0 && device == 0 && flags == 0)
        return shown_again(l, device);
    /* What is written to directly is the container's root itself. */
    enum fuse_reach reach = flags & BIND_WRITABLE ? REACH_INSIDE : REACH_OTHERS;
    int mount_fd = image_fuse(l, device, source, flags, reach);
    if (mount_fd >= 0 && device == 0 && flags == 0)
        loan_spare(l, mount_fd);
    return mount_fd;
}

/* ROOT_FUSE(device): the image, served by a process of the user's that the user cannot alter. */
int op_root_fuse(struct rpc *r, const struct op_request *q, struct op_reply *a, int *fd_out) {
    struct launch *l = r->launch;
    if (no_fields_but(q, BIND_WRITABLE | BIND_EXTFS, 1, false, false) < 0 ||
        !is_device(l, q->num[0]))
        return ERR_MALFORMED;
    const char *source = q->flags & BIND_EXTFS ? "fuse2fs" : "squashfuse_ll";
    int mount_fd = root_image(l, q->num[0], source, q->flags);
    if (mount_fd < 0 || attach(mount_fd, r->places[PLACE_ROOTFS]) < 0)
        return answer(a, ERR_MOUNT, errno);
    return keep_mount(mount_fd, &r->root_fd, fd_out) < 0 ? answer(a, ERR_MOUNT, errno) : ERR_OK;
}

static int loop_device(int image_fd, uint64_t offset, uint64_t size, uint32_t flags,
                       int most) {
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
        config.info.lo_flags = LO_FLAGS_AUTOCLEAR;
        if (!(flags & BIND_WRITABLE))
            config.info.lo_flags |= LO_FLAGS_READ_ONLY;
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

/* Which images the kernel may parse is the administrator's to say, for each kind of its own. */
static bool kernel_may(const struct launch *l, uint32_t flags) {
    uint32_t needed = flags & BIND_EXTFS ? PLAN_KERNEL_EXTFS : PLAN_KERNEL_IMAGE;
    return l->plan.flags & needed && l->flow != FLOW_USERNS && !fakeroot_wanted(l);
}

static int parse_loop(const struct launch *l, int device, uint32_t flags) {
    char source[32] = "/proc/self/fd/", name[64] = "";
    append_number(source, sizeof(source), (uint64_t)device);
    ssize_t length = readlink(source, name, sizeof(name) - 1);
    int fs = sys_fsopen(flags & BIND_EXTFS ? "ext3" : "squashfs"), mount_fd = -1;
    if (length > 0 && fs >= 0 && set_string(fs, "source", name) == 0) {
        unsigned attributes = nosuid(l) | MOUNT_ATTR_NODEV;
        if (!(flags & BIND_WRITABLE)) {
            (void)set_flag(fs, "ro"); /* as the loop device is: it opens for nothing else */
            attributes |= MOUNT_ATTR_RDONLY;
        }
        (void)set_string(fs, "errors", flags & BIND_EXTFS ? "remount-ro" : "continue");
        if (synchronised(l, flags))
            (void)set_flag(fs, "sync");
        mount_fd = make_mount_with(CAP_BIT(CAP_SYS_ADMIN) | CAP_BIT(CAP_DAC_OVERRIDE), fs,
                                   attributes);
    }
    int error = errno;
    if (fs >= 0)
        close(fs);
    errno = error;
    return mount_fd;
}

/* (path; device, inode, offset, size): a detached mount by the kernel's own driver; -1 and code. */
static int kernel_image(const struct launch *l, const struct op_request *q, struct op_reply *a,
                        int *code) {
    if (!kernel_may(l, q->flags)) {
        *code = ERR_REFUSED;
        return -1;
    }
    int image = open_judged(q, q->flags & BIND_WRITABLE ? O_RDWR : O_RDONLY, a, code);
    if (image < 0)
        return -1;
    if (policy_is_served(image)) /* whoever serves the file could change it under the parser */
        *code = ERR_KIND;
    else
        *code = policy_image(l, image);
    const struct raised *raised = NULL;
    if (*code == ERR_OK) {
        raised = privs_raise(CAP_BIT(CAP_SYS_ADMIN) | CAP_BIT(CAP_DAC_OVERRIDE));
        if (!raised)
            *code = answer(a, ERR_LOOP, EPERM);
    }
    if (*code != ERR_OK) {
        close(image);
        return -1;
    }
    /* SAFE: fixed device names; the image was opened as the user, cleared on last close;
     * policy_plan() has asked the administrator whether the kernel may parse such an image. */
    int device = loop_device(image, q->num[2], q->num[3], q->flags,
                             (int)config_uint(&l->config, CONFIG_MAX_LOOP_DEVICES));
    int error = errno;
    privs_lower(raised);
    close(image);
    raised = privs_raise(CAP_BIT(CAP_SYS_ADMIN));
    if (device < 0 || !raised) {
        *code = answer(a, ERR_LOOP, error);
        return -1;
    }
    int mount_fd = parse_loop(l, device, q->flags);
    if (mount_fd < 0)
        *code = answer(a, ERR_MOUNT, errno);
    close(device);
    return mount_fd;
}

/* ROOT_SQUASHFS(path; device, inode, offset, size): the kernel's driver, where policy allows. */
int op_root_squashfs(struct rpc *r, const struct op_request *q, struct op_reply *a, int *fd_out) {
    int code = ERR_OK;
    if (no_fields_but(q, BIND_WRITABLE | BIND_EXTFS, 4, true, false) < 0)
        return ERR_MALFORMED;
    int mount_fd = kernel_image(r->launch, q, a, &code);
    if (mount_fd < 0)
        return code;
    if (attach(mount_fd, r->places[PLACE_ROOTFS]) < 0)
        return answer(a, ERR_MOUNT, errno);
    return keep_mount(mount_fd, &r->root_fd, fd_out) < 0 ? answer(a, ERR_MOUNT, errno) : ERR_OK;
}

/* With DEVICES: the host's own tree, as it is, for a program that is root of a user namespace but
 * in no container.  It shows nothing that the caller could not bind. */
static int judge_host_tree(const struct launch *l) {
    if (!fakeroot_wanted(l))
        return ERR_REFUSED;
    if (l->flow != FLOW_SETUID)
        return ERR_OK;
    return policy_image_bind(l) && !policy_limits_images(l) ? ERR_OK : ERR_REFUSED;
}

static int judge_directory(const struct launch *l, int image, bool host_tree) {
    if (host_tree)
        return judge_host_tree(l);
    /* Inside, the owner of a file is whoever the caller's ranges make of it. */
    if (l->flow != FLOW_SETUID)
        return ERR_OK;
    return fakeroot_wanted(l) && policy_limits_images(l) ? ERR_OWNER : policy_image(l, image);
}

/* (path; device, inode): a directory that the user may open, as a detached mount; -1 and code. */
static int directory_image(const struct launch *l, const struct op_request *q, bool recursive,
                           struct op_reply *a, int *code) {
    struct stat st, host;
    int image = open_judged(q, O_RDONLY | O_DIRECTORY, a, code);
    if (image < 0)
        return -1;
    bool host_tree = (q->flags & BIND_DEVICES) != 0;
    *code = judge_directory(l, image, host_tree);
    if (*code == ERR_OK && (fstat(image, &st) < 0 || stat("/", &host) < 0 ||
                            (st.st_dev == host.st_dev && st.st_ino == host.st_ino) != host_tree))
        *code = answer(a, ERR_KIND, 0); /* the host's root is no image */
    /* SAFE: a directory that the user could open, made nosuid and nodev before it is attached; of
     * the host's tree each mount has nodev as it has on the host, and those below stay locked. */
    int tree = *code == ERR_OK ? clone_tree(image, bind_attributes(l, q->flags), 0, recursive) : -1;
    if (*code == ERR_OK && tree < 0)
        *code = answer(a, ERR_MOUNT, errno);
    close(image);
    return tree;
}

/* ROOT_DIRECTORY(path; device, inode): a sandbox; DEVICES: the host's own tree. */
int op_root_directory(struct rpc *r, const struct op_request *q, struct op_reply *a, int *fd_out) {
    int code = ERR_OK;
    if (no_fields_but(q, BIND_READ_ONLY | BIND_DEVICES, 2, true, false) < 0)
        return ERR_MALFORMED;
    int tree = directory_image(r->launch, q, true, a, &code);
    if (tree < 0)
        return code;
    r->root_directory = true;
    if (attach(tree, r->places[PLACE_ROOTFS]) < 0)
        return answer(a, ERR_MOUNT, errno);
    return keep_mount(tree, &r->root_fd, fd_out) < 0 ? answer(a, ERR_MOUNT, errno) : ERR_OK;
}

/* ---- images beside the root ---- */

static bool is_free(const struct rpc *r, uint64_t number) {
    return number < LIMIT_IMAGES && !r->images[number].there && r->root_fd >= 0;
}

/* The session belongs to the user: whatever stands in the place of this directory, it is one, of
 * this session, and not a link. */
static int show_image(struct rpc *r, uint64_t number, int mount_fd, uint32_t flags,
                      struct op_reply *a, int *fd_out) {
    char name[24] = "image";
    append_number(name, sizeof(name), number);
    (void)mkdirat(r->session_fd, name, 0755);
    int place = open2(r->session_fd, name, O_PATH | O_DIRECTORY | O_NOFOLLOW,
                      RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV);
    if (place < 0 || attach(mount_fd, place) < 0)
        return answer(a, ERR_MOUNT, errno);
    close(place);
    struct shown_image *image = &r->images[number];
    if (keep_mount(mount_fd, &image->fd, fd_out) < 0)
        return answer(a, ERR_MOUNT, errno);
    image->there = true;
    image->writable = (flags & BIND_WRITABLE) != 0;
    return ERR_OK;
}

/* IMAGE_FUSE(number, device): an overlay, or an image that something is bound from. */
int op_image_fuse(struct rpc *r, const struct op_request *q, struct op_reply *a, int *fd_out) {
    struct launch *l = r->launch;
    if (no_fields_but(q, BIND_WRITABLE | BIND_EXTFS, 2, false, false) < 0 ||
        !is_free(r, q->num[0]) || !is_device(l, q->num[1]))
        return ERR_MALFORMED;
    const char *source = q->flags & BIND_EXTFS ? "fuse2fs" : "squashfuse_ll";
    int mount_fd = image_fuse(l, q->num[1], source, q->flags, REACH_OTHERS);
    if (mount_fd < 0)
        return answer(a, ERR_MOUNT, errno);
    return show_image(r, q->num[0], mount_fd, q->flags, a, fd_out);
}

/* IMAGE_KERNEL(path; device, inode, offset, size, number) */
int op_image_kernel(struct rpc *r, const struct op_request *q, struct op_reply *a, int *fd_out) {
    int code = ERR_OK;
    if (no_fields_but(q, BIND_WRITABLE | BIND_EXTFS, 5, true, false) < 0 || !is_free(r, q->num[4]))
        return ERR_MALFORMED;
    int mount_fd = kernel_image(r->launch, q, a, &code);
    return mount_fd < 0 ? code : show_image(r, q->num[4], mount_fd, q->flags, a, fd_out);
}

/* IMAGE_DIRECTORY(path; device, inode, number).  An overlay sees nothing mounted below; in the
 * setuid flow what is mounted is kept, so that op_layer() finds out what it would uncover. */
int op_image_directory(struct rpc *r, const struct op_request *q, struct op_reply *a,
                       int *fd_out) {
    int code = ERR_OK;
    if (no_fields_but(q, BIND_WRITABLE | BIND_READ_ONLY, 3, true, false) < 0 ||
        !is_free(r, q->num[2]) || !(q->flags & BIND_WRITABLE) == !(q->flags & BIND_READ_ONLY))
        return ERR_MALFORMED;
    int tree = directory_image(r->launch, q, r->launch->flow == FLOW_SETUID, a, &code);
    if (tree < 0)
        return code;
    r->images[q->num[2]].directory = true;
    return show_image(r, q->num[2], tree, q->flags, a, fd_out);
}
