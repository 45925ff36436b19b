/* The control groups that a record names: frozen or not, whom they hold, and their removal. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "lean.h"

/* Of levels of groups; a bound for memory. */
#define DEPTH_MAX (1 << 16)
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

/* Where in the list of its directory a walk has come to.  A payload with a group that it may write
 * to nests as deep as it likes, so a level costs no descriptor and no frame of the stack. */
struct level {
    long next;
    ino_t inode;
    char name[NAME_MAX + 1];         /* in the directory above */
};

struct walk {
    int at;
    size_t depth, room;
    struct level *levels;
};

static bool is_group(const struct dirent *entry) {
    return entry->d_type == DT_DIR && strcmp(entry->d_name, ".") != 0 &&
           strcmp(entry->d_name, "..") != 0;
}

/* The next name in the list of a directory; false: there is none. */
static bool next_name(int at, struct level *here, struct level *below) {
    int own = openat(at, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *dir = own < 0 ? NULL : fdopendir(own);
    const struct dirent *entry = NULL;
    if (dir == NULL && own >= 0)
        close(own);
    if (dir != NULL && here->next != 0)
        seekdir(dir, here->next);
    while (dir != NULL && (entry = readdir(dir)) != NULL && !is_group(entry))
        ;
    if (entry != NULL) {
        here->next = telldir(dir);
        memcpy(below->name, entry->d_name, strlen(entry->d_name) + 1);
    }
    if (dir != NULL)
        closedir(dir);
    return entry != NULL;
}

static bool has_room(struct walk *w) {
    if (w->depth + 2 <= w->room)
        return true;
    size_t room = w->room == 0 ? 8 : w->room * 2;
    struct level *levels = room > DEPTH_MAX ? NULL : realloc(w->levels, room * sizeof(*levels));
    if (levels == NULL)
        return false;
    w->levels = levels;
    w->room = room;
    return true;
}

/* Into one of those below that it has not been in; one that has gone meanwhile is passed over. */
static bool go_down(struct walk *w) {
    const int flags = O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC;
    if (!has_room(w))
        return false;
    struct level *here = &w->levels[w->depth], *below = here + 1;
    struct stat st;
    while (next_name(w->at, here, below)) {
        int fd = openat(w->at, below->name, flags);
        if (fd < 0 || fstat(fd, &st) < 0) {
            if (fd >= 0)
                close(fd);
            continue;
        }
        close(w->at);
        w->at = fd;
        w->depth++;
        below->next = 0;
        below->inode = st.st_ino;
        return true;
    }
    return false;
}

/* Groups are not moved to another one above, so that ".." is where the walk came from. */
static bool go_up(struct walk *w, bool remove) {
    struct stat st;
    if (w->depth == 0)
        return false;
    int fd = openat(w->at, "..", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &st) < 0 || st.st_ino != w->levels[w->depth - 1].inode) {
        if (fd >= 0)
            close(fd);
        return false;
    }
    close(w->at);
    w->at = fd;
    if (remove)
        (void)unlinkat(fd, w->levels[w->depth].name, AT_REMOVEDIR);
    w->depth--;
    return true;
}

/* A directory and those below it, children first; takes the descriptor.  Without a function those
 * below are removed. */
static int walk(int fd, visit *function) {
    struct walk w = {.at = fd};
    struct stat st;
    int count = 0;
    if (fd < 0)
        return 0;
    if (has_room(&w) && fstat(fd, &st) == 0) {
        w.levels[0] = (struct level){.inode = st.st_ino};
        do {
            while (go_down(&w))
                ;
            count += function == NULL ? 0 : function(w.at);
        } while (go_up(&w, function == NULL));
    }
    free(w.levels);
    close(w.at);
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
        int found = walk(dup(fd), kill_listed);
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
            (void)walk(open_directory(path), NULL);
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
