/* A container's state directory: found, read, locked and removed.
 * Its status is derived, not stored. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "lean.h"

#define DEFAULT_ROOT "/run/apptainer-py-oci"
#define RECORD_FILE "record"
#define DEPTH_MAX 16 /* of what a checkpoint may have left in the directory */

/* runc's rule for a default below XDG_RUNTIME_DIR: not root, or root of a namespace only. */
static bool is_nobody(const struct lean *l) {
    char map[64] = "";
    if (geteuid() != 0)
        return true;
    int fd = open("/proc/self/uid_map", O_RDONLY | O_CLOEXEC);
    ssize_t got = fd < 0 ? -1 : read(fd, map, sizeof(map) - 1);
    if (fd >= 0)
        close(fd);
    unsigned long inside = 1, outside = 1, count = 0;
    if (got <= 0 || sscanf(map, "%lu %lu %lu", &inside, &outside, &count) != 3)
        return false;
    const char *user = lean_variable(l->envp, "USER");
    return (inside != 0 || outside != 0 || count != 4294967295UL) &&
           (user == NULL || strcmp(user, "root") != 0);
}

static void find_root(const struct lean *l, char out[PATH_MAX]) {
    const char *runtime = lean_variable(l->envp, "XDG_RUNTIME_DIR");
    if (l->root != NULL)
        (void)snprintf(out, PATH_MAX, "%s", l->root);
    else if (runtime != NULL && *runtime != '\0' && is_nobody(l))
        (void)snprintf(out, PATH_MAX, "%s/apptainer-py-oci", runtime);
    else
        (void)snprintf(out, PATH_MAX, "%s", DEFAULT_ROOT);
}

static bool right_id(const char *id) {
    static const char marks[] = "_+-.";
    if (strcmp(id, ".") == 0 || strcmp(id, "..") == 0)
        return false;
    for (; *id != '\0'; id++)
        if (!((*id >= 'a' && *id <= 'z') || (*id >= 'A' && *id <= 'Z') ||
              (*id >= '0' && *id <= '9') || strchr(marks, *id) != NULL))
            return false;
    return true;
}

/* A record names processes to be killed, directories to be removed and hooks to be run: only what
 * the caller alone can have written is followed, whatever --root says. */
static bool is_own(int fd) {
    struct stat st;
    return fstat(fd, &st) == 0 && st.st_uid == geteuid() && (st.st_mode & (S_IWGRP | S_IWOTH)) == 0;
}

/* Reads the whole record: a new one comes by rename.  While its maker holds the lock it may note in
 * place how far the container has come; whoever acts on that reads it again behind the lock. */
static enum found read_record(struct container *c) {
    struct stat st;
    int fd = openat(c->dir_fd, RECORD_FILE, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0)
        return FOUND_NO_RECORD;
    free(c->data);
    c->data = NULL;
    size_t size = 0;
    if (fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && st.st_size <= (off_t)RECORD_BYTES_MAX) {
        size = (size_t)st.st_size;
        c->data = malloc(size + 1);
    }
    ssize_t got = c->data == NULL ? -1 : read(fd, c->data, size);
    close(fd);
    if (got < 0 || (size_t)got != size || record_check(&c->record, c->data, size) < 0 ||
        strcmp(record_string(&c->record, RECORD_ID, 0), c->lean->id) != 0)
        return FOUND_OTHER_VERSION;
    return FOUND;
}

/* Field 22 of /proc/PID/stat says whether the number still means the same process; a zombie has
 * ended.  The name in it may hold anything, so the last parenthesis counts. */
static bool is_process(pid_t pid, uint64_t start) {
    char path[48], text[1024];
    (void)snprintf(path, sizeof(path), "/proc/%d/stat", pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t got = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);
    if (fd >= 0)
        close(fd);
    if (got <= 0)
        return false;
    text[got] = '\0';
    char *at = strrchr(text, ')');
    if (at == NULL || at[1] != ' ' || at[2] == 'Z' || at[2] == 'X')
        return false;
    at += 2;
    for (int field = 3; field < 22 && at != NULL; field++)
        at = strchr(at + 1, ' ');
    return at != NULL && strtoull(at, NULL, 10) == start;
}

/* First the handle, then the question whose it is: the number cannot change hands in between. */
static int open_process(pid_t pid, uint64_t start) {
    int fd = pid <= 0 ? -1 : (int)syscall(SYS_pidfd_open, pid, 0);
    if (fd >= 0 && !is_process(pid, start)) {
        close(fd);
        return -1;
    }
    return fd;
}

static void open_init(struct container *c) {
    if (c->init_pidfd >= 0)
        close(c->init_pidfd);
    c->init_pidfd = open_process(c->record.head.init_pid, c->record.head.init_start);
}

enum found container_find(const struct lean *l, struct container *c) {
    const int flags = O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC;
    *c = (struct container){.lean = l, .root_fd = -1, .dir_fd = -1, .init_pidfd = -1};
    if (*l->id == '\0')
        return FOUND_NO_ID;
    if (!right_id(l->id))
        return FOUND_BAD_ID;
    find_root(l, c->root);
    c->root_fd = open(c->root, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    c->dir_fd = c->root_fd < 0 ? -1 : openat(c->root_fd, l->id, flags);
    if (c->dir_fd < 0)
        return FOUND_NOTHING;
    if (!is_own(c->dir_fd))
        return FOUND_FOREIGN;
    enum found found = read_record(c);
    if (found == FOUND)
        open_init(c);
    return found;
}

int container_tell(const struct lean *l, enum found found) {
    switch (found) {
    case FOUND:
        return LEAN_DONE;
    case FOUND_OTHER_VERSION:
        return LEAN_TO_PYTHON;
    case FOUND_NO_ID:
        lean_error(l, "container id cannot be empty");
        return LEAN_FAILED;
    case FOUND_BAD_ID:
        lean_error(l, "invalid container ID format");
        return LEAN_FAILED;
    case FOUND_FOREIGN:
        lean_error(l, "the state of container %s belongs to another user", l->id);
        return LEAN_FAILED;
    case FOUND_NOTHING:
    case FOUND_NO_RECORD:
    case FOUND_LOCKED:
    default:
        if (l->apptainer)
            lean_error(l, "no container found with name %s", l->id);
        else
            lean_error(l, "container does not exist");
        return LEAN_FAILED;
    }
}

/* Waits for whoever creates, starts or deletes it; what was read before may be out of date then,
 * and the directory may be gone. */
enum found container_lock(struct container *c, bool wait) {
    struct stat st;
    int result;
    do
        result = flock(c->dir_fd, wait ? LOCK_EX : LOCK_EX | LOCK_NB);
    while (result < 0 && errno == EINTR);
    if (result < 0)
        return FOUND_LOCKED;
    if (fstat(c->dir_fd, &st) < 0 || st.st_nlink == 0)
        return FOUND_NOTHING;
    enum found found = read_record(c);
    if (found == FOUND)
        open_init(c);
    return found;
}

void container_unlock(const struct container *c) {
    (void)flock(c->dir_fd, LOCK_UN);
}

bool container_creator(const struct container *c, int *pidfd) {
    int fd = open_process(c->record.head.creator_pid, c->record.head.creator_start);
    if (fd >= 0 && pidfd != NULL)
        *pidfd = fd;
    else if (fd >= 0)
        close(fd);
    return fd >= 0;
}

/* The fifo alone would not do: a `start` that was killed may have left it there.  Where the program
 * cannot be seen (an ordinary caller), it has to. */
static bool waits_for_start(const struct container *c) {
    char path[48], program[64];
    struct stat st;
    if (fstatat(c->dir_fd, CLIENT_FIFO, &st, AT_SYMLINK_NOFOLLOW) < 0)
        return false;
    (void)snprintf(path, sizeof(path), "/proc/%d/exe", c->record.head.init_pid);
    ssize_t got = readlink(path, program, sizeof(program) - 1);
    if (got < 0)
        return true;
    program[got] = '\0';
    return strncmp(program, "/memfd:apptainer-py-init", 24) == 0;
}

enum status container_status(const struct container *c) {
    if (c->record.head.phase == RECORD_CREATING)
        return container_creator(c, NULL) ? STATUS_CREATING : STATUS_STOPPED;
    if (cgroup_frozen(&c->record))
        return STATUS_PAUSED;
    if (c->init_pidfd < 0)
        return STATUS_STOPPED;
    return waits_for_start(c) ? STATUS_CREATED : STATUS_RUNNING;
}

const char *container_status_text(enum status status) {
    static const char *const texts[] = {
        [STATUS_CREATING] = "creating", [STATUS_CREATED] = "created",
        [STATUS_RUNNING] = "running",   [STATUS_PAUSED] = "paused",
        [STATUS_STOPPED] = "stopped",
    };
    return texts[status];
}

static bool remove_entry(int dir_fd, const char *name, int depth);

/* Everything in a directory but one name, which goes last; takes the descriptor. */
static bool empty_directory(int fd, const char *last, int depth) {
    DIR *dir = fdopendir(fd);
    struct dirent *entry;
    bool all = dir != NULL;
    if (dir == NULL)
        close(fd);
    while (dir != NULL && (entry = readdir(dir)) != NULL) {
        const char *name = entry->d_name;
        if (strcmp(name, ".") == 0 || strcmp(name, "..") == 0 ||
            (last != NULL && strcmp(name, last) == 0))
            continue;
        all = remove_entry(dirfd(dir), name, depth) && all;
    }
    if (all && last != NULL)
        (void)unlinkat(dirfd(dir), last, 0);
    if (dir != NULL)
        closedir(dir);
    return all;
}

static bool remove_entry(int dir_fd, const char *name, int depth) {
    if (unlinkat(dir_fd, name, 0) == 0 || errno == ENOENT)
        return true;
    if (errno != EISDIR || depth >= DEPTH_MAX)
        return false;
    int fd = openat(dir_fd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    return fd >= 0 && empty_directory(fd, NULL, depth + 1) &&
           unlinkat(dir_fd, name, AT_REMOVEDIR) == 0;
}

/* The record goes last: until then the container can be found, and what it has be removed. */
bool container_remove_files(const struct container *c) {
    int fd = openat(c->dir_fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    bool emptied = fd >= 0 && empty_directory(fd, RECORD_FILE, 0);
    if (emptied && unlinkat(c->root_fd, c->lean->id, AT_REMOVEDIR) == 0)
        return true;
    lean_error(c->lean, "unable to remove container state dir: %s", lean_errno_text(errno));
    return false;
}
