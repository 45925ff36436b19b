/* Opening the administrator's file: who could have written it is asked of every path component. */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "config.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* What is shown to people must not move a cursor or start a second line. */
static void copy_printable(char *target, size_t size, const char *source)
{
    size_t n = 0;

    for (; source[n] && n + 1 < size; n++)
        target[n] = source[n] >= ' ' && source[n] != 0x7f ? source[n] : '?';
    target[n] = '\0';
    if (source[n] && size > 4)
        memcpy(target + size - 4, "...", 4);
}

void config_problem_add(struct config_error *why, uint32_t line, const char *key,
                        const char *nearest, const char *format, ...)
{
    char text[sizeof(why->problem[0].text) * 2];
    struct config_problem *p;
    va_list values;

    if (why->count >= CONFIG_PROBLEMS) {
        why->count += why->count < UINT32_MAX;
        return;
    }
    p = &why->problem[why->count++];
    p->line = line;
    va_start(values, format);
    if (vsnprintf(text, sizeof(text), format, values) < 0)
        text[0] = '\0';
    va_end(values);
    copy_printable(p->text, sizeof(p->text), text);
    copy_printable(p->key, sizeof(p->key), key ? key : "");
    copy_printable(p->nearest, sizeof(p->nearest), nearest ? nearest : "");
}

/* An ACL that lets others write shows in the group bits: they are its mask. */
static void check_writers(const char *path, const struct stat *st, struct config_error *why)
{
    if (st->st_uid != 0)
        config_problem_add(why, 0, path, NULL, "must be owned by root, not by uid %u",
                           (unsigned)st->st_uid);
    if (st->st_mode & (S_IWGRP | S_IWOTH))
        config_problem_add(why, 0, path, NULL, "must be writable by root only (mode %04o)",
                           (unsigned)(st->st_mode & 07777));
}

static int failed(const char *path, int error, struct config_error *why)
{
    config_problem_add(why, 0, path, NULL, "%s", strerror(error));
    return -error;
}

static int check_file(const char *path, const struct stat *st, uint32_t most,
                      struct config_error *why)
{
    if (!S_ISREG(st->st_mode)) {
        config_problem_add(why, 0, path, NULL, "is not a regular file");
        return -EINVAL;
    }
    if (st->st_size > (off_t)most) {
        config_problem_add(why, 0, path, NULL, "is larger than %u bytes", most);
        return -EFBIG;
    }
    return 0;
}

/* O_NONBLOCK: a FIFO in its place must not make us wait. */
static int open_file(int dir, const char *name, const char *path, int flags, uint32_t most,
                     struct config_error *why)
{
    struct stat st;
    int result;
    int fd = openat(dir, name, O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC | flags);

    if (fd < 0)
        return failed(path, errno, why);
    result = fstat(fd, &st) == 0 ? check_file(path, &st, most, why) : failed(path, errno, why);
    if (result == 0)
        return fd;
    close(fd);
    return result;
}

/* Opens the directory `name` in place of *dir and asks who may write it. */
static int step_into(int *dir, const char *name, const char *path, struct config_error *why)
{
    struct stat st;
    int next = openat(*dir, name, O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    int error = errno;

    if (next < 0 && error == ENOTDIR)
        config_problem_add(why, 0, path, NULL, "is a symbolic link or not a directory");
    else if (next < 0)
        config_problem_add(why, 0, path, NULL, "%s", strerror(error));
    if (next < 0)
        return -error;
    if (*dir >= 0)
        close(*dir);
    *dir = next;
    if (fstat(next, &st) != 0)
        return failed(path, errno, why);
    check_writers(path, &st, why);
    return 0;
}

/* The last component, judged before it is opened: a device must not notice us. */
static int open_trusted(int dir, const char *name, const char *path, uint32_t most,
                        struct config_error *why)
{
    struct stat st;
    int result;

    if (fstatat(dir, name, &st, AT_SYMLINK_NOFOLLOW) != 0)
        return failed(path, errno, why);
    if (S_ISLNK(st.st_mode)) {
        config_problem_add(why, 0, path, NULL, "is a symbolic link");
        return -ELOOP;
    }
    check_writers(path, &st, why);
    result = check_file(path, &st, most, why);
    if (result == 0 && why->count != 0)
        result = -EPERM;
    return result == 0 ? open_file(dir, name, path, O_NOFOLLOW, most, why) : result;
}

/* `path` is cut and mended as the walk goes on, so that each message names the part at fault. */
static int walk(char *path, int *dir, uint32_t most, struct config_error *why)
{
    char *name = path + 1;
    char *end;
    int result = step_into(dir, "/", "/", why);

    while (result == 0 && (end = strchr(name, '/')) != NULL) {
        *end = '\0';
        result = step_into(dir, name, path, why);
        *end = '/';
        name = end + 1;
    }
    return result == 0 ? open_trusted(*dir, name, path, most, why) : result;
}

/* Only /a/b/c: what "//", "." and ".." would mean is not worth a rule. */
static bool is_plain_path(const char *path)
{
    size_t length = strlen(path);

    return path[0] == '/' && length > 1 && length < PATH_MAX && path[length - 1] != '/' &&
           !strstr(path, "//") && !strstr(path, "/./") && !strstr(path, "/../") &&
           strcmp(path + length - 2, "/.") != 0 &&
           (length < 3 || strcmp(path + length - 3, "/..") != 0);
}

int config_open(const char *path, bool require_root_owned, struct config_error *why)
{
    if (!require_root_owned)
        return open_file(AT_FDCWD, path, path, 0, CONFIG_FILE_BYTES, why);
    return config_open_trusted(path, CONFIG_FILE_BYTES, why);
}

int config_open_trusted(const char *path, uint32_t most, struct config_error *why)
{
    char copy[PATH_MAX];
    int dir = -1;
    int result;

    if (!is_plain_path(path)) {
        config_problem_add(why, 0, path, NULL, "is not an absolute path without dots");
        return -EINVAL;
    }
    memcpy(copy, path, strlen(path) + 1);
    result = walk(copy, &dir, most, why);
    if (dir >= 0)
        close(dir);
    return result;
}
