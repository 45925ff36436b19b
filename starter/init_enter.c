/* From the host's root to the container's. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "init_root.h"

#define MOUNTINFO_BYTES (4 << 20)

enum bundle_flag { BUNDLE_PARENT_PRIVATE = 1, BUNDLE_NO_BIND = 2 };
enum enter { ENTER_PIVOT, ENTER_MOVE, ENTER_CHROOT };

/* PROPAGATION(MS_ flags of "/"; 0: mounts made here stay here, those of the host come in). */
int init_propagation(struct init *s, const struct op_request *q, struct op_reply *a) {
    if (!row_is_plain(q, 0, 1, false, false) || s->passed >= 0)
        return ERR_MALFORMED;
    unsigned long flags = q->num[0] ? (unsigned long)q->num[0] : MS_SLAVE | MS_REC;
    return mount(NULL, "/", NULL, flags, NULL) < 0 ? init_failed(a) : ERR_OK;
}

/* What is mounted on the root's mount would reach the host, were the mount that it lies on shared;
 * and pivot_root(2) refuses that. */
static int make_parent_private(int root) {
    struct statx st;
    int at = fcntl(root, F_DUPFD_CLOEXEC, 3), result = -1;
    for (;;) {
        if (at < 0 || statx(at, "", AT_EMPTY_PATH, STATX_BASIC_STATS, &st) < 0)
            break;
        if (st.stx_attributes & STATX_ATTR_MOUNT_ROOT) {
            result = mount_propagation(at, MS_PRIVATE);
            break;
        }
        int up = openat(at, "..", O_PATH | O_DIRECTORY | O_CLOEXEC);
        if (up >= 0 && target_same(at, up) != 0) { /* the top of a chroot that is no mount */
            close(up);
            result = 0;
            break;
        }
        close(at);
        at = up;
    }
    int error = errno;
    init_close(&at);
    errno = error;
    return result;
}

/* ROOT_BUNDLE(path): gives back the root, which from here on is known by descriptor. */
int init_root_bundle(struct init *s, const struct op_request *q, struct op_reply *a) {
    const uint32_t known = BUNDLE_PARENT_PRIVATE | BUNDLE_NO_BIND;
    if (!row_is_plain(q, known, 0, true, false) || s->passed >= 0 || wire_string(q, 0)[0] != '/')
        return ERR_MALFORMED;
    int root = open(wire_string(q, 0), O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (root < 0)
        return init_failed(a);
    int tree = -1, code = ERR_OK;
    if (q->flags & BUNDLE_PARENT_PRIVATE && make_parent_private(root) < 0)
        code = init_failed_at(a, 1);
    else if (q->flags & BUNDLE_NO_BIND)
        tree = fcntl(root, F_DUPFD_CLOEXEC, 3);
    else if ((tree = mount_clone(root, "", true)) < 0 || mount_attach(tree, root) < 0)
        code = init_failed(a);
    init_close(&root);
    if (code == ERR_OK && (s->fd_out = fcntl(tree, F_DUPFD_CLOEXEC, 3)) < 0)
        code = init_failed(a);
    if (code == ERR_OK)
        s->root_fd = tree;
    else
        init_close(&tree);
    return code;
}

static int pivot(int root) {
    int old = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
    int result = old < 0 || fchdir(root) < 0 ? -1 : (int)syscall(SYS_pivot_root, ".", ".");
    /* Slave: that the old tree goes must not be seen where it came from. */
    if (result == 0 &&
        (fchdir(old) < 0 || mount(NULL, ".", NULL, MS_SLAVE | MS_REC, NULL) < 0 ||
         umount2(".", MNT_DETACH) < 0))
        result = -1;
    int error = errno;
    init_close(&old);
    errno = error;
    return result;
}

/* The octal escapes of mountinfo, undone in place. */
static void unescape(char *text) {
    char *out = text;
    for (const char *in = text; *in; out++)
        if (in[0] == '\\' && in[1] && in[2] && in[3]) {
            *out = (char)((in[1] - '0') << 6 | (in[2] - '0') << 3 | (in[3] - '0'));
            in += 4;
        } else {
            *out = *in++;
        }
    *out = '\0';
}

static int hide(const char *path) {
    if (mount(NULL, path, NULL, MS_SLAVE | MS_REC, NULL) < 0)
        return errno == ENOENT || errno == EINVAL ? 0 : -1;
    if (umount2(path, MNT_DETACH) == 0)
        return 0;
    if (errno != EINVAL && errno != EPERM)
        return -1;
    return mount("tmpfs", path, "tmpfs", 0, "");
}

/* "ID PARENT DEVICE ROOT POINT OPTIONS [...] - TYPE SOURCE OPTIONS": a whole procfs or sysfs
 * outside of the root is hidden. */
static int hide_line(char *line, const char *root) {
    char *field[6], *next = line;
    size_t length = strlen(root);
    for (size_t i = 0; i < ARRAY_SIZE(field); i++)
        if (!(field[i] = strsep(&next, " ")))
            return 0;
    const char *type = next ? strstr(next, "- ") : NULL;
    if (!type || (strncmp(type, "- proc ", 7) != 0 && strncmp(type, "- sysfs ", 8) != 0) ||
        strcmp(field[3], "/") != 0)
        return 0;
    unescape(field[4]);
    bool inside = strncmp(field[4], root, length) == 0 &&
                  (field[4][length] == '/' || field[4][length] == '\0');
    return inside ? 0 : hide(field[4]);
}

static char *read_mountinfo(struct init *s) {
    int fd = init_proc(s) < 0 ? -1 : openat(s->proc_fd, "self/mountinfo", O_RDONLY | O_CLOEXEC);
    char *text = fd < 0 ? NULL : malloc(MOUNTINFO_BYTES);
    size_t used = 0;
    ssize_t got = 1;
    while (text && got > 0 && used < MOUNTINFO_BYTES - 1) {
        got = read(fd, text + used, MOUNTINFO_BYTES - 1 - used);
        used += got > 0 ? (size_t)got : 0;
    }
    init_close(&fd);
    if (text && got != 0) {
        free(text);
        errno = got < 0 ? EIO : E2BIG;
        return NULL;
    }
    if (text)
        text[used] = '\0';
    return text;
}

/* Without pivot_root(2) the host's mounts stay reachable beneath: with a whole procfs or sysfs
 * among them the container could mount one of its own without what covers parts of it here. */
static int move(struct init *s) {
    static char root[LIMIT_PATH_BYTES];
    char name[32] = "self/fd/";
    append_number(name, sizeof(name), (uint64_t)s->root_fd);
    ssize_t length = init_proc(s) < 0 ? -1
                                      : readlinkat(s->proc_fd, name, root, sizeof(root) - 1);
    char *text = length < 0 ? NULL : read_mountinfo(s);
    if (!text)
        return -1;
    root[length] = '\0';
    int result = 0;
    for (char *next = text, *line; result == 0 && (line = strsep(&next, "\n"));)
        result = hide_line(line, root);
    free(text);
    if (result < 0 || fchdir(s->root_fd) < 0 || mount(".", "/", NULL, MS_MOVE, NULL) < 0)
        return -1;
    return chroot(".");
}

static int change_root(struct init *s, enum enter how) {
    switch (how) {
    case ENTER_PIVOT:
        return pivot(s->root_fd);
    case ENTER_MOVE:
        return move(s);
    case ENTER_CHROOT:
    default:
        return fchdir(s->root_fd) < 0 ? -1 : chroot(".");
    }
}

/* The host's /dev/null on 0-2 becomes the container's, if that is one. */
static void replace_null(struct init *s) {
    int own = -1;
    for (int fd = 0; fd < 3; fd++) {
        if (!is_null_device(fd))
            continue;
        if (own < 0) {
            int found = target_open(s->root_fd, "/dev/null", O_PATH);
            own = found >= 0 && is_null_device(found) ? open_again(s, found, O_RDWR) : -1;
            init_close(&found);
        }
        if (own >= 0)
            (void)dup3(own, fd, 0);
    }
    init_close(&own);
}

static int make_cwd(const struct init *s, const char *path) {
    struct stat st;
    bool made;
    int fd = target_make(s->root_fd, path, true, &made);
    int result = fd < 0 ? -1 : fstat(fd, &st);
    if (result == 0 && !S_ISDIR(st.st_mode)) {
        errno = ENOTDIR;
        result = -1;
    }
    int error = errno;
    init_close(&fd);
    errno = error;
    return result;
}

/* ENTER(directory to make; how, propagation).  The value of a failed one: 1 root, 2 propagation,
 * 3 directory. */
int init_enter(struct init *s, const struct op_request *q, struct op_reply *a) {
    const char *cwd = wire_string(q, 0);
    if (!row_is_plain(q, 0, 2, cwd != NULL, false) || s->passed >= 0 || s->root_fd < 0 ||
        q->num[0] > ENTER_CHROOT)
        return ERR_MALFORMED;
    hand_drop(s);
    paths_before_enter();
    if (init_proc(s) < 0 || change_root(s, (enum enter)q->num[0]) < 0 || chdir("/") < 0)
        return init_failed_at(a, 1);
    if (q->num[1] != 0 && mount_propagation(s->root_fd, q->num[1]) < 0)
        return init_failed_at(a, 2);
    replace_null(s);
    return cwd && make_cwd(s, cwd) < 0 ? init_failed_at(a, 3) : ERR_OK;
}

/* ROOT_READONLY: only the mount, not the file system below it, which others use too. */
int init_root_readonly(struct init *s, const struct op_request *q, struct op_reply *a) {
    if (!row_is_plain(q, 0, 0, false, false) || s->passed >= 0 || s->root_fd < 0)
        return ERR_MALFORMED;
    return mount_attributes(s->root_fd, false, MOUNT_ATTR_RDONLY, 0) < 0 ? init_failed(a) : ERR_OK;
}
