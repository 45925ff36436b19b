/* Paths of the container, looked up beneath its root.  The kernel does it where all exists; what
 * lacks is made one component at a time, each in a directory that is held open.  Whoever changes
 * the tree meanwhile can lead this to another place in the container, but to none outside. */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/magic.h>
#include <linux/openat2.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "init_root.h"

#define MOST_LINKS 40
#define MOST_TRIES 64

/* What becomes of the last component. */
enum last { LAST_EXISTS, LAST_NOT_FOLLOWED, LAST_DIRECTORY, LAST_FILE };

static struct walk {
    int root, at;
    enum last last;
    bool made;
    int links;
    char done[LIMIT_PATH_BYTES];       /* path of `at` beneath the root; without links, dots */
    char left[LIMIT_PATH_BYTES];
    char link[LIMIT_PATH_BYTES];
} walk;

static int open2(int dir, const char *path, uint64_t flags, uint64_t resolve) {
    struct open_how how = {.flags = flags | O_CLOEXEC, .resolve = resolve};
    long fd;
    int tries = 0;
    do /* EAGAIN: something was renamed or mounted while ".." was looked up */
        fd = syscall(SYS_openat2, dir, path, &how, sizeof(how));
    while (fd < 0 && (errno == EAGAIN || errno == EINTR) && tries++ < MOST_TRIES);
    return (int)fd;
}

/* The next component of w->left, which loses it: 1, 0 at the end, or -1. */
static int next_component(struct walk *w, char *name, size_t size) {
    size_t skip = strspn(w->left, "/"), length = strcspn(w->left + skip, "/");
    size_t rest = skip + length + strspn(w->left + skip + length, "/");
    if (length >= size) {
        errno = ENAMETOOLONG;
        return -1;
    }
    memcpy(name, w->left + skip, length);
    name[length] = '\0';
    memmove(w->left, w->left + rest, strlen(w->left + rest) + 1);
    return length > 0;
}

static int go_to(struct walk *w, int fd) {
    if (fd < 0)
        return -1;
    close(w->at);
    w->at = fd;
    return 0;
}

static int open_component(int dir, const char *name) {
    return openat(dir, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
}

/* To the directory whose path is w->done, from the root, through no link. */
static int go_from_root(struct walk *w) {
    int at = fcntl(w->root, F_DUPFD_CLOEXEC, 3);
    char name[NAME_MAX + 1];
    for (const char *next = w->done; at >= 0 && *next;) {
        size_t length = strcspn(next, "/");
        memcpy(name, next, length);
        name[length] = '\0';
        next += length + strspn(next + length, "/");
        int inner = openat(at, name, O_PATH | O_NOFOLLOW | O_DIRECTORY | O_CLOEXEC);
        close(at);
        at = inner;
    }
    return go_to(w, at);
}

static int climb(struct walk *w) {
    char *slash = strrchr(w->done, '/');
    *(slash ? slash : w->done) = '\0';
    return go_from_root(w);
}

static int add_done(struct walk *w, const char *name) {
    size_t used = strlen(w->done), more = strlen(name);
    if (used + more + 2 > sizeof(w->done)) {
        errno = ENAMETOOLONG;
        return -1;
    }
    if (used > 0)
        w->done[used++] = '/';
    memcpy(w->done + used, name, more + 1);
    return 0;
}

/* The text of a link is read as the container would read it.  What procfs calls a link names
 * things of the host: it is not followed. */
static int follow(struct walk *w, int link) {
    struct statfs fs;
    ssize_t length = readlinkat(link, "", w->link, sizeof(w->link) - 1);
    if (length < 0 || fstatfs(link, &fs) < 0)
        return -1;
    if (fs.f_type == PROC_SUPER_MAGIC || ++w->links > MOST_LINKS) {
        errno = ELOOP;
        return -1;
    }
    size_t size = (size_t)length, rest = strlen(w->left);
    if (size + rest + 2 > sizeof(w->left)) {
        errno = ENAMETOOLONG;
        return -1;
    }
    memmove(w->left + size + 1, w->left, rest + 1);
    memcpy(w->left, w->link, size);
    w->left[size] = '/';
    if (size == 0 || w->link[0] != '/')
        return 0;
    w->done[0] = '\0';
    return go_from_root(w);
}

static int make_component(struct walk *w, const char *name) {
    bool file = w->left[0] == '\0' && w->last == LAST_FILE;
    int result = 0;
    if (w->last == LAST_EXISTS || w->last == LAST_NOT_FOLLOWED) {
        errno = ENOENT;
        return -1;
    }
    if (file) {
        result = openat(w->at, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0644);
        if (result >= 0)
            close(result);
    } else {
        result = mkdirat(w->at, name, 0755);
    }
    w->made |= result >= 0;
    return result >= 0 || errno == EEXIST ? 0 : -1;
}

/* Down to `name`, which is made if it lacks, and through it if it is a link. */
static int descend(struct walk *w, const char *name) {
    struct stat st;
    int fd = open_component(w->at, name);
    for (int tries = 0; fd < 0 && errno == ENOENT && tries < MOST_TRIES; tries++) {
        if (make_component(w, name) < 0)
            return -1;
        fd = open_component(w->at, name);
    }
    if (fd < 0)
        return -1;
    int result = fstat(fd, &st);
    bool end = w->left[0] == '\0' && w->last == LAST_NOT_FOLLOWED;
    if (result == 0 && S_ISLNK(st.st_mode) && !end) {
        result = follow(w, fd);
        close(fd);
        return result;
    }
    if (result == 0 && w->left[0] != '\0' && !S_ISDIR(st.st_mode)) {
        errno = ENOTDIR;
        result = -1;
    }
    if (result == 0)
        result = add_done(w, name);
    if (result == 0)
        return go_to(w, fd);
    close(fd);
    return -1;
}

static int step(struct walk *w, const char *name) {
    if (strcmp(name, ".") == 0)
        return 0;
    return strcmp(name, "..") == 0 ? climb(w) : descend(w, name);
}

static int walk_path(int root, const char *path, enum last last, bool *made) {
    struct walk *w = &walk;
    char name[NAME_MAX + 1];
    int more, error;
    if (strlen(path) >= sizeof(w->left)) {
        errno = ENAMETOOLONG;
        return -1;
    }
    memset(w, 0, sizeof(*w));
    w->root = root;
    w->last = last;
    memcpy(w->left, path, strlen(path) + 1);
    w->at = fcntl(root, F_DUPFD_CLOEXEC, 3);
    if (w->at < 0)
        return -1;
    while ((more = next_component(w, name, sizeof(name))) > 0 && (more = step(w, name)) == 0)
        ;
    error = errno;
    if (more != 0)
        close(w->at);
    errno = error;
    *made = w->made;
    return more == 0 ? w->at : -1;
}

/* Opens what exists; for O_PATH alone where the kernel lacks openat2(2). */
int target_open(int root, const char *path, uint64_t flags) {
    bool made;
    int fd = open2(root, path, flags, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS);
    if (fd >= 0 || errno != ENOSYS || (flags & ~(uint64_t)O_NOFOLLOW) != O_PATH)
        return fd;
    return walk_path(root, path, flags & O_NOFOLLOW ? LAST_NOT_FOLLOWED : LAST_EXISTS, &made);
}

int target_make(int root, const char *path, bool directory, bool *made) {
    *made = false;
    int fd = target_open(root, path, O_PATH);
    if (fd >= 0 || errno != ENOENT)
        return fd;
    return walk_path(root, path, directory ? LAST_DIRECTORY : LAST_FILE, made);
}

int target_parent(int root, const char *path, char *name, size_t size) {
    static char parent[LIMIT_PATH_BYTES];
    bool made;
    size_t end = strlen(path);
    while (end > 0 && path[end - 1] == '/')
        end--;
    size_t start = end;
    while (start > 0 && path[start - 1] != '/')
        start--;
    if (end - start >= size || start >= sizeof(parent)) {
        errno = ENAMETOOLONG;
        return -1;
    }
    memcpy(name, path + start, end - start);
    name[end - start] = '\0';
    memcpy(parent, path, start);
    parent[start] = '\0';
    if (name[0] == '\0' || strcmp(name, ".") == 0 || strcmp(name, "..") == 0) {
        errno = EISDIR;
        return -1;
    }
    return target_make(root, start == 0 ? "/" : parent, true, &made);
}

/* 1 if both are one directory of one mount, 0 if not, or -1. */
int target_same(int one, int other) {
    struct statx a, b;
    if (statx(one, "", AT_EMPTY_PATH, STATX_INO | STATX_MNT_ID, &a) < 0 ||
        statx(other, "", AT_EMPTY_PATH, STATX_INO | STATX_MNT_ID, &b) < 0)
        return -1;
    return a.stx_ino == b.stx_ino && a.stx_dev_major == b.stx_dev_major &&
           a.stx_dev_minor == b.stx_dev_minor && a.stx_mnt_id == b.stx_mnt_id;
}
