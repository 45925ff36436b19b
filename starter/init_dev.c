/* Device nodes and links. */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "init_root.h"

enum mknod_flag { MKNOD_BIND = 1 };
enum link_flag { LINK_REPLACE = 1 };

bool is_null_device(int fd) {
    struct stat st;
    return fstat(fd, &st) == 0 && S_ISCHR(st.st_mode) && st.st_rdev == makedev(1, 3);
}

/* The host's own node, shown where the container expects it. */
static int bind_node(const struct init *s, const char *source, const char *path) {
    struct stat st;
    bool made;
    int tree = -1, target = -1, result = -1, node = open(source, O_PATH | O_NOFOLLOW | O_CLOEXEC);
    if (node >= 0 && fstat(node, &st) == 0) {
        if (S_ISDIR(st.st_mode))
            errno = EISDIR;
        else if ((tree = mount_clone(node, "", false)) >= 0 &&
                 (target = target_make(s->root_fd, path, false, &made)) >= 0)
            result = mount_attach(tree, target);
    }
    int error = errno;
    init_close(&node);
    init_close(&tree);
    init_close(&target);
    errno = error;
    return result;
}

/* 1: there was something, which is kept. */
static int make_node(int dir, const char *name, const struct op_request *q) {
    mode_t mode = (mode_t)q->num[0], was = umask(0);
    dev_t device = makedev((unsigned)(q->num[1] >> 32), (unsigned)(q->num[1] & UINT32_MAX));
    int result = mknodat(dir, name, mode, device), error = errno;
    (void)umask(was);
    errno = error;
    if (result < 0)
        return errno == EEXIST ? 1 : -1;
    struct stat st;
    int node = openat(dir, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
    result = node < 0 || fstat(node, &st) < 0 ? -1 : 0;
    if (result == 0 && ((st.st_mode & S_IFMT) != (mode & S_IFMT) || st.st_rdev != device)) {
        errno = EAGAIN; /* somebody has put another one in its place */
        result = -1;
    }
    if (result == 0 && (st.st_uid != q->num[2] || st.st_gid != q->num[3]))
        result = fchownat(node, "", (uid_t)q->num[2], (gid_t)q->num[3], AT_EMPTY_PATH);
    error = errno;
    init_close(&node);
    errno = error;
    return result;
}

static bool is_node_kind(uint64_t mode) {
    return mode >> 16 == 0 && (S_ISCHR(mode) || S_ISBLK(mode) || S_ISFIFO(mode));
}

/* MKNOD(path, host's node; mode, device, uid, gid).  What may not be made is the host's. */
int init_mknod(struct init *s, const struct op_request *q, struct op_reply *a) {
    const char *path = wire_string(q, 0), *host = wire_string(q, 1);
    char name[NAME_MAX + 1];
    if (!row_is_plain(q, MKNOD_BIND, 4, true, host != NULL) || s->passed >= 0 || s->root_fd < 0 ||
        !is_node_kind(q->num[0]) || q->num[2] > UINT32_MAX || q->num[3] > UINT32_MAX)
        return ERR_MALFORMED;
    if (!host)
        host = path;
    if (q->flags & MKNOD_BIND)
        return bind_node(s, host, path) < 0 ? init_failed(a) : ERR_OK;
    int dir = target_parent(s->root_fd, path, name, sizeof(name));
    int result = dir < 0 ? -1 : make_node(dir, name, q);
    if (dir >= 0 && result < 0 && errno == EPERM && !S_ISFIFO(q->num[0]))
        result = bind_node(s, host, path);
    int error = errno;
    init_close(&dir);
    errno = error;
    return result < 0 ? init_failed(a) : ERR_OK;
}

/* LINK(text, path): what is there is kept, unless it is to be replaced. */
int init_link(struct init *s, const struct op_request *q, struct op_reply *a) {
    char name[NAME_MAX + 1];
    if (!row_is_plain(q, LINK_REPLACE, 0, true, true) || s->passed >= 0 || s->root_fd < 0)
        return ERR_MALFORMED;
    int dir = target_parent(s->root_fd, wire_string(q, 1), name, sizeof(name));
    int result = dir < 0 ? -1 : 0;
    if (result == 0 && q->flags & LINK_REPLACE && unlinkat(dir, name, 0) < 0 && errno != ENOENT)
        result = -1;
    if (result == 0 && symlinkat(wire_string(q, 0), dir, name) < 0 && errno != EEXIST)
        result = -1;
    int error = errno;
    init_close(&dir);
    errno = error;
    return result < 0 ? init_failed(a) : ERR_OK;
}
