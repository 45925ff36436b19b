/* Paths that the payload may not change, or not even see. */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "init_root.h"

static int host_null = -1;             /* detached, of the host's /dev/null, or attached by now */
static int empty = -1;                 /* the directory that covers others, once there is one */

/* The container's /dev/null may be anything.  Where it is not what it should be, this one is used;
 * after the root is changed nobody could get at it any more. */
void paths_before_enter(void) {
    int null = open("/dev/null", O_PATH | O_NOFOLLOW | O_CLOEXEC);
    if (null >= 0 && is_null_device(null))
        host_null = mount_clone(null, "", false);
    init_close(&null);
}

static int open_path(const struct init *s, const struct op_request *q) {
    const char *rest;
    int from = mount_below(s, wire_string(q, 0), &rest), fd = target_open(from, rest, O_PATH);
    if (fd >= 0 && target_same(s->root_fd, fd) != 0) {
        close(fd);
        errno = EBUSY;
        return -1;
    }
    return fd;
}

static bool is_absent(void) {
    return errno == ENOENT || errno == ENOTDIR;
}

/* READONLY_PATH(path): a mount of its own that cannot be written through. */
int init_readonly_path(struct init *s, const struct op_request *q, struct op_reply *a) {
    if (!row_is_plain(q, 0, 0, true, false) || s->passed >= 0 || s->root_fd < 0)
        return ERR_MALFORMED;
    int target = open_path(s, q), code = ERR_OK;
    if (target < 0)
        return is_absent() ? ERR_OK : init_failed(a);
    int tree = mount_clone(target, "", true);
    if (tree < 0 || mount_attributes(tree, false, MOUNT_ATTR_RDONLY, 0) < 0 ||
        mount_attach(tree, target) < 0)
        code = init_failed(a);
    init_close(&tree);
    init_close(&target);
    return code;
}

/* What covers a file: a node whose numbers were seen through the descriptor that is mounted. */
static int clone_null(const struct init *s) {
    int own = target_open(s->root_fd, "/dev/null", O_PATH), tree = -1;
    if (own >= 0 && is_null_device(own))
        tree = mount_clone(own, "", false);
    init_close(&own);
    if (tree >= 0 && is_null_device(tree))
        return tree;
    init_close(&tree);
    if (host_null < 0)
        errno = ENODEV;
    return host_null < 0 ? -1 : mount_clone(host_null, "", false);
}

static int make_empty(const char *label) {
    int fs = (int)syscall(SYS_fsopen, "tmpfs", FSOPEN_CLOEXEC), made = -1;
    const char *options[][2] = {
        {"source", "tmpfs"}, {"nr_blocks", "1"}, {"nr_inodes", "1"}, {"context", label}};
    size_t count = ARRAY_SIZE(options) - (label ? 0 : 1);
    bool good = fs >= 0 && syscall(SYS_fsconfig, fs, FSCONFIG_SET_FLAG, "ro", NULL, 0) == 0;
    for (size_t i = 0; good && i < count; i++)
        good = syscall(SYS_fsconfig, fs, FSCONFIG_SET_STRING, options[i][0], options[i][1], 0) == 0;
    if (good && syscall(SYS_fsconfig, fs, FSCONFIG_CMD_CREATE, NULL, NULL, 0) == 0)
        made = (int)syscall(SYS_fsmount, fs, FSMOUNT_CLOEXEC, MOUNT_ATTR_RDONLY);
    int error = errno;
    init_close(&fs);
    errno = error;
    return made;
}

/* A kernel before 6.15 copies attached mounts only: then the one that is kept goes to its place,
 * and is copied from there. */
static int take(int *kept, int copy, int target) {
    if (copy < 0 && *kept >= 0 && errno == EINVAL)
        return mount_attach(*kept, target);
    int result = copy < 0 ? -1 : mount_attach(copy, target), error = errno;
    init_close(&copy);
    errno = error;
    return result;
}

static int cover_directory(int target, const char *label) {
    if (empty >= 0)
        return take(&empty, mount_clone(empty, "", false), target);
    empty = make_empty(label);
    return empty < 0 ? -1 : mount_attach(empty, target);
}

/* MASK_PATH(path, SELinux label). */
int init_mask_path(struct init *s, const struct op_request *q, struct op_reply *a) {
    struct stat st;
    const char *label = wire_string(q, 1);
    if (!row_is_plain(q, 0, 0, true, label != NULL) || s->passed >= 0 || s->root_fd < 0)
        return ERR_MALFORMED;
    int target = open_path(s, q);
    if (target < 0)
        return is_absent() ? ERR_OK : init_failed(a);
    int result = fstat(target, &st);
    if (result == 0 && S_ISDIR(st.st_mode))
        result = cover_directory(target, label);
    else if (result == 0)
        result = take(&host_null, clone_null(s), target);
    int code = result < 0 ? init_failed(a) : ERR_OK;
    init_close(&target);
    return code;
}
