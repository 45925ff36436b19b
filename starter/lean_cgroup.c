/* The control groups that a record names: frozen or not, whom they hold, and their removal. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "lean.h"

#define DEPTH_MAX 32
#define ROUNDS_MAX 64
/* Version 1 tells nobody when the last process has left: 1, 2, 4 ... 64, 64 ms, 2 s in all. */
#define PATIENCE_MS 2000

static bool read_file(const char *path, char *text, size_t size) {
    int fd = open(path, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
    ssize_t got = fd < 0 ? -1 : read(fd, text, size - 1);
    if (fd >= 0)
        close(fd);
    text[got > 0 ? got : 0] = '\0';
    return got >= 0;
}

static bool write_file(const char *path, const char *text) {
    int fd = open(path, O_WRONLY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0)
        return false;
    bool wrote = write(fd, text, strlen(text)) == (ssize_t)strlen(text);
    return close(fd) == 0 && wrote;
}

static const char *freezer(const struct record *r) {
    return r->head.count[RECORD_FREEZER] == 0 ? NULL : record_string(r, RECORD_FREEZER, 0);
}

static void freeze(const struct record *r, bool on) {
    const char *file = freezer(r);
    if (file != NULL && r->head.flags & RECORD_CGROUP2)
        (void)write_file(file, on ? "1" : "0");
    else if (file != NULL)
        (void)write_file(file, on ? "FROZEN" : "THAWED");
}

bool cgroup_frozen(const struct record *r) {
    char text[32];
    const char *file = freezer(r);
    if (file == NULL || !read_file(file, text, sizeof(text)))
        return false;
    return strncmp(text, r->head.flags & RECORD_CGROUP2 ? "1" : "FROZEN",
                   r->head.flags & RECORD_CGROUP2 ? 1 : 6) == 0;
}

void cgroup_thaw(const struct record *r) {
    freeze(r, false);
}

/* Kills whom cgroup.procs of one directory lists; returns how many there were. */
static int kill_listed(int dir_fd) {
    char line[32];
    int count = 0, fd = openat(dir_fd, "cgroup.procs", O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
    FILE *file = fd < 0 ? NULL : fdopen(fd, "r");
    if (file == NULL && fd >= 0)
        close(fd);
    while (file != NULL && fgets(line, sizeof(line), file) != NULL) {
        pid_t pid = (pid_t)strtol(line, NULL, 10);
        if (pid > 1 && pid != getpid() && kill(pid, SIGKILL) == 0)
            count++;
    }
    if (file != NULL)
        fclose(file);
    return count;
}

typedef int visit(int dir_fd);

/* A directory and those below it, children first; takes the descriptor. */
static int walk(int fd, visit *function, int depth) {
    int count = 0;
    DIR *dir = fd < 0 ? NULL : fdopendir(fd);
    struct dirent *entry;
    if (dir == NULL && fd >= 0)
        close(fd);
    while (dir != NULL && depth < DEPTH_MAX && (entry = readdir(dir)) != NULL) {
        const char *name = entry->d_name;
        if (entry->d_type != DT_DIR || strcmp(name, ".") == 0 || strcmp(name, "..") == 0)
            continue;
        int below = openat(dirfd(dir), name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
        count += walk(below, function, depth + 1);
        if (function == NULL)
            (void)unlinkat(dirfd(dir), name, AT_REMOVEDIR);
    }
    if (dir != NULL && function != NULL)
        count += function(dirfd(dir));
    if (dir != NULL)
        closedir(dir);
    return count;
}

static int open_directory(const char *path) {
    return open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
}

/* Where all processes of the container are: beside the freezer's file, or in any other. */
static int process_directory(const struct record *r) {
    char path[PATH_MAX];
    const char *file = freezer(r);
    const char *slash = file == NULL ? NULL : strrchr(file, '/');
    if (slash != NULL && (size_t)(slash - file) < sizeof(path)) {
        (void)snprintf(path, sizeof(path), "%.*s", (int)(slash - file), file);
        return open_directory(path);
    }
    for (uint32_t i = 0; i < r->head.count[RECORD_CGROUPS]; i++) {
        int fd = open_directory(record_string(r, RECORD_CGROUPS, i));
        if (fd >= 0 && faccessat(fd, "cgroup.procs", R_OK, 0) == 0)
            return fd;
        if (fd >= 0)
            close(fd);
    }
    return -1;
}

/* Returns whether there was anybody.  Frozen meanwhile, so that nobody forks away. */
bool cgroup_kill_all(const struct record *r) {
    int fd = process_directory(r), killed = 0;
    if (fd < 0)
        return false;
    int all = r->head.flags & RECORD_CGROUP2 ? openat(fd, "cgroup.kill", O_WRONLY | O_CLOEXEC) : -1;
    if (all >= 0) {
        killed = write(all, "1", 1) == 1;
        close(all);
        close(fd);
        return killed;
    }
    freeze(r, true);
    for (int round = 0; round < ROUNDS_MAX; round++) {
        int found = walk(dup(fd), kill_listed, 0);
        killed += found;
        if (found == 0 || freezer(r) != NULL)
            break;
    }
    freeze(r, false);
    close(fd);
    return killed > 0;
}

/* A payload may have made groups below its own, and a process that was killed takes its time. */
static int remove_one(const char *path) {
    for (int waited = 0, pause = 1;; waited += pause, pause = pause < 64 ? pause * 2 : 64) {
        if (rmdir(path) == 0 || errno == ENOENT || errno == ENOTDIR)
            return 0;
        if (errno == EBUSY || errno == ENOTEMPTY)
            (void)walk(open_directory(path), NULL, 0);
        if (rmdir(path) == 0 || errno == ENOENT)
            return 0;
        if (errno != EBUSY || waited >= PATIENCE_MS)
            return -1;
        const struct timespec time = {.tv_nsec = pause * 1000000L};
        (void)nanosleep(&time, NULL);
    }
}

int cgroup_remove_all(const struct lean *l, const struct record *r) {
    for (uint32_t i = 0; i < r->head.count[RECORD_CGROUPS]; i++) {
        const char *path = record_string(r, RECORD_CGROUPS, i);
        if (*path != '/' || remove_one(path) == 0)
            continue;
        lean_error(l, "unable to remove container's cgroup: unable to remove path \"%s\": %s",
                   path, lean_errno_text(errno));
        return -1;
    }
    return 0;
}
