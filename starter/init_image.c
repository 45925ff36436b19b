/* The root of an image that is only read (`run --oci`): what the container writes goes to memory.
 * All is mounted in the container's own namespace, below a directory that is empty otherwise. */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "init_root.h"

enum image_flag { IMAGE_FUSE = 1 };
enum overlay_flag { OVERLAY_USERXATTR = 1 };
/* Which of several calls a reply's errno is about. */
enum image_why { WHY_SESSION = 1, WHY_DEVICE, WHY_MOUNT, WHY_SOURCE, WHY_READ };
enum image_place { AT_IMAGE, AT_UPPER, AT_WORK, AT_ROOT, AT_COUNT };

static const char *const names[AT_COUNT] = {"image", "upper", "work", "root"};
static int places[AT_COUNT] = {-1, -1, -1, -1};
static int image_fd = -1;

static int set_string(int fs, const char *key, const char *value) {
    return (int)syscall(SYS_fsconfig, fs, FSCONFIG_SET_STRING, key, value, 0);
}

static int set_number(int fs, const char *key, uint64_t number) {
    char text[24] = "";
    append_number(text, sizeof(text), number);
    return set_string(fs, key, text);
}

static int set_place(int fs, const char *key, int fd) {
    char name[48] = "/proc/self/fd/";
    append_number(name, sizeof(name), (uint64_t)fd);
    return set_string(fs, key, name);
}

/* Closes the context in any case; a detached mount or -1. */
static int finish(int fs, bool configured, unsigned flags) {
    int made = -1;
    if (configured && syscall(SYS_fsconfig, fs, FSCONFIG_CMD_CREATE, NULL, NULL, 0) == 0)
        made = (int)syscall(SYS_fsmount, fs, FSMOUNT_CLOEXEC, flags);
    int error = errno;
    init_close(&fs);
    errno = error;
    return made;
}

static int attach_and_close(int *mount_fd, int target) {
    int result = *mount_fd < 0 ? -1 : mount_attach(*mount_fd, target), error = errno;
    init_close(mount_fd);
    errno = error;
    return result;
}

static int make_places(const char *path) {
    int dir = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    int result = dir < 0 ? -1 : 0;
    for (size_t i = 0; result == 0 && i < AT_COUNT; i++) {
        result = mkdirat(dir, names[i], 0755);
        if (result == 0)
            places[i] = openat(dir, names[i], O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
        if (places[i] < 0)
            result = -1;
    }
    int error = errno;
    init_close(&dir);
    errno = error;
    return result;
}

/* Memory that ends with the container's mount namespace. */
static int make_session(const char *path) {
    int target = open(path, O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    int fs = target < 0 ? -1 : (int)syscall(SYS_fsopen, "tmpfs", FSOPEN_CLOEXEC);
    if (fs < 0)
        return -1;
    bool configured = set_string(fs, "source", "tmpfs") == 0 && set_string(fs, "mode", "0755") == 0;
    int made = finish(fs, configured, MOUNT_ATTR_NODEV);
    int result = attach_and_close(&made, target), error = errno;
    init_close(&target);
    errno = error;
    return result < 0 ? -1 : make_places(path);
}

/* Opened here, because the kernel wants device and mount to be of one user namespace. */
static int mount_fuse(struct op_reply *a, int *device) {
    *device = open("/dev/fuse", O_RDWR | O_CLOEXEC | O_NOCTTY);
    if (*device < 0)
        return init_failed_at(a, WHY_DEVICE);
    int fs = (int)syscall(SYS_fsopen, "fuse", FSOPEN_CLOEXEC);
    if (fs < 0)
        return init_failed_at(a, WHY_MOUNT);
    bool configured = set_string(fs, "source", "squashfuse_ll") == 0 &&
                      set_string(fs, "rootmode", "40000") == 0 &&
                      syscall(SYS_fsconfig, fs, FSCONFIG_SET_FLAG, "ro", NULL, 0) == 0 &&
                      set_number(fs, "fd", (uint64_t)*device) == 0 &&
                      set_number(fs, "user_id", geteuid()) == 0 &&
                      set_number(fs, "group_id", getegid()) == 0 &&
                      syscall(SYS_fsconfig, fs, FSCONFIG_SET_FLAG, "allow_other", NULL, 0) == 0;
    image_fd = finish(fs, configured, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_RDONLY);
    return image_fd < 0 ? init_failed_at(a, WHY_MOUNT) : ERR_OK;
}

static int clone_directory(struct op_reply *a, const char *path) {
    int source = open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
    image_fd = source < 0 ? -1 : mount_clone(source, "", false);
    int error = errno;
    init_close(&source);
    errno = error;
    if (image_fd < 0)
        return init_failed_at(a, WHY_SOURCE);
    const uint64_t set = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NODEV;
    return mount_attributes(image_fd, false, set, 0) < 0 ? init_failed_at(a, WHY_MOUNT) : ERR_OK;
}

/* IMAGE(place[, directory]): the layer that is only read.  Without a directory it is served through
 * the FUSE device that goes back with the reply. */
int init_image(struct init *s, const struct op_request *q, struct op_reply *a) {
    bool fuse = (q->flags & IMAGE_FUSE) != 0;
    int device = -1;
    if (!row_is_plain(q, IMAGE_FUSE, 0, true, !fuse) || s->passed >= 0 ||
        wire_string(q, 0)[0] != '/' || (!fuse && wire_string(q, 1)[0] != '/'))
        return ERR_MALFORMED;
    if (make_session(wire_string(q, 0)) < 0)
        return init_failed_at(a, WHY_SESSION);
    int code = fuse ? mount_fuse(a, &device) : clone_directory(a, wire_string(q, 1));
    if (code == ERR_OK && mount_attach(image_fd, places[AT_IMAGE]) < 0)
        code = init_failed_at(a, WHY_MOUNT);
    /* Only the server may hold it then: a copy of ours would keep a dead server's mount waiting. */
    s->fd_out = device;
    return code;
}

/* The merged root shows owner and mode of the upper layer's directory. */
static int copy_root(void) {
    struct stat st;
    int upper = openat(places[AT_UPPER], ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int result = fstat(image_fd, &st) < 0 || upper < 0 ? -1 : fchmod(upper, st.st_mode & 07777);
    /* An owner whom the container does not know stays unknown. */
    if (result == 0 && fchown(upper, st.st_uid, st.st_gid) < 0 && errno != EINVAL && errno != EPERM)
        result = -1;
    int error = errno;
    init_close(&upper);
    errno = error;
    return result;
}

/* OVERLAY: the image below what will be written; afterwards it is to be had by name alone. */
int init_overlay(struct init *s, const struct op_request *q, struct op_reply *a) {
    if (!row_is_plain(q, OVERLAY_USERXATTR, 0, false, false) || s->passed >= 0 || image_fd < 0)
        return ERR_MALFORMED;
    if (copy_root() < 0)
        return init_failed_at(a, WHY_READ);
    int fs = (int)syscall(SYS_fsopen, "overlay", FSOPEN_CLOEXEC);
    if (fs < 0)
        return init_failed_at(a, WHY_MOUNT);
    bool configured = set_string(fs, "source", "overlay") == 0 &&
                      set_place(fs, "lowerdir", image_fd) == 0 &&
                      set_place(fs, "upperdir", places[AT_UPPER]) == 0 &&
                      set_place(fs, "workdir", places[AT_WORK]) == 0;
    if (configured && q->flags & OVERLAY_USERXATTR)
        configured = syscall(SYS_fsconfig, fs, FSCONFIG_SET_FLAG, "userxattr", NULL, 0) == 0;
    int made = finish(fs, configured, MOUNT_ATTR_NODEV);
    if (attach_and_close(&made, places[AT_ROOT]) < 0)
        return init_failed_at(a, WHY_MOUNT);
    init_close(&image_fd);
    for (size_t i = 0; i < AT_COUNT; i++)
        init_close(&places[i]);
    return ERR_OK;
}
