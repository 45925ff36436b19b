/* Copies a directory of the image into a new mount: by descriptor, through no link, and no more of
 * a file than it held when it was opened. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "init_root.h"

#define MOST_LEVELS 128

static char names[65536], value[65536], text[LIMIT_PATH_BYTES];

/* What a file system does not keep, or a user namespace may not set, is left out. */
static void copy_attributes(int source, int target) {
    ssize_t length = flistxattr(source, names, sizeof(names));
    for (ssize_t at = 0; at < length; at += (ssize_t)strlen(names + at) + 1) {
        ssize_t size = fgetxattr(source, names + at, value, sizeof(value));
        if (size >= 0)
            (void)fsetxattr(target, names + at, value, (size_t)size, 0);
    }
}

static int finish(int source, int target, const struct stat *st) {
    const struct timespec times[2] = {st->st_atim, st->st_mtim};
    if (fchown(target, st->st_uid, st->st_gid) < 0 || fchmod(target, st->st_mode & 07777) < 0)
        return -1;
    copy_attributes(source, target);
    return futimens(target, times);
}

static int copy_bytes(int source, int target, off_t left) {
    while (left > 0) {
        ssize_t done = sendfile(target, source, NULL, (size_t)left);
        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0)
            return (int)done;
        left -= done;
    }
    return 0;
}

static int copy_file(int from, const char *name, int to) {
    struct stat st;
    int source = openat(from, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (source < 0)
        return -1;
    int target = openat(to, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    int result = target < 0 || fstat(source, &st) < 0 ? -1 : 0;
    if (result == 0)
        result = copy_bytes(source, target, S_ISREG(st.st_mode) ? st.st_size : 0);
    if (result == 0)
        result = finish(source, target, &st);
    int error = errno;
    init_close(&source);
    init_close(&target);
    errno = error;
    return result;
}

static int copy_link(int from, const char *name, int to, const struct stat *st) {
    ssize_t length = readlinkat(from, name, text, sizeof(text) - 1);
    if (length < 0)
        return -1;
    text[length] = '\0';
    if (symlinkat(text, to, name) < 0)
        return -1;
    return fchownat(to, name, st->st_uid, st->st_gid, AT_SYMLINK_NOFOLLOW);
}

static int copy_node(int to, const char *name, const struct stat *st) {
    if (mknodat(to, name, (st->st_mode & S_IFMT) | 0600, st->st_rdev) < 0 ||
        fchownat(to, name, st->st_uid, st->st_gid, AT_SYMLINK_NOFOLLOW) < 0)
        return -1;
    return fchmodat(to, name, st->st_mode & 07777, 0);
}

static int copy_directory(int source, int target, int levels);

static int copy_below(int from, const char *name, int to, int levels) {
    int source = openat(from, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC), target = -1;
    if (source < 0)
        return -1;
    if (mkdirat(to, name, 0700) == 0)
        target = openat(to, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    struct stat st;
    int result = target < 0 || fstat(source, &st) < 0 ? -1 : copy_directory(source, target, levels);
    if (result == 0)
        result = finish(source, target, &st);
    int error = errno;
    init_close(&source);
    init_close(&target);
    errno = error;
    return result;
}

static int copy_entry(int from, const char *name, int to, int levels) {
    struct stat st;
    if (fstatat(from, name, &st, AT_SYMLINK_NOFOLLOW) < 0)
        return errno == ENOENT ? 0 : -1;
    if (S_ISREG(st.st_mode))
        return copy_file(from, name, to);
    if (S_ISDIR(st.st_mode))
        return copy_below(from, name, to, levels);
    return S_ISLNK(st.st_mode) ? copy_link(from, name, to, &st) : copy_node(to, name, &st);
}

static int copy_directory(int source, int target, int levels) {
    int own = levels > 0 ? fcntl(source, F_DUPFD_CLOEXEC, 3) : -1, result = 0;
    DIR *list = own < 0 ? NULL : fdopendir(own);
    if (!list) {
        if (levels <= 0)
            errno = ELOOP;
        init_close(&own);
        return -1;
    }
    for (const struct dirent *entry; result == 0;) {
        errno = 0;
        entry = readdir(list);
        if (!entry) {
            result = errno == 0 ? 0 : -1;
            break;
        }
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0)
            result = copy_entry(source, entry->d_name, target, levels - 1);
    }
    int error = errno;
    closedir(list);
    errno = error;
    return result;
}

int copy_tree(int source, int target) {
    return copy_directory(source, target, MOST_LEVELS);
}
