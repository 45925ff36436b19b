/* In the janitor: what has been made of a container's networks, in a file that outlives it and its
 * twin.  Whoever makes a network next undoes what is left of containers that have ended, and
 * nobody undoes.  The files count a user's networks, too: what is undone after a launch was killed
 * is no process of its user's. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "networks.h"

#define FOLDER "/run/apptainer-py-networks"

enum { FORMAT = 1, PAGE = 4096, RESULTS_AT = PAGE + (sizeof(struct networks) / PAGE + 1) * PAGE };
enum { RECORD_BYTES = RESULTS_AT + 2 * NETWORKS_MAX * NETWORK_RESULT_BYTES };
/* Of the networks, as many as there are: /run is small, and everybody's. */
enum { NETWORKS_AT = offsetof(struct networks, at) };

_Static_assert(sizeof(struct network_record) <= PAGE, "what is mapped has its place");

struct network_record *network_record;
static int record_fd = -1;

/* ---- which process ---- */

/* When a process began, in the kernel's ticks; 0: it has ended. */
static uint64_t start_of(pid_t pid) {
    enum { STATE = 3, START = 22 };
    char path[64] = "/proc/", text[1024];
    append_number(path, sizeof(path), (uint64_t)pid);
    append_text(path, sizeof(path), "/stat");
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t got = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);
    if (fd >= 0)
        close(fd);
    text[got > 0 ? got : 0] = '\0';
    const char *at = strrchr(text, ')'); /* the name before it may hold anything */
    if (!at || !at[1] || at[2] == 'Z' || at[2] == 'X')
        return 0;
    for (int field = STATE - 1; at && field < START; field++)
        at = strchr(at + 1, ' ');
    return at ? strtoull(at, NULL, 10) : 0;
}

/* Of which namespace the numbers of processes are. */
static uint64_t own_pid_space(void) {
    struct stat st;
    return stat("/proc/self/ns/pid", &st) == 0 ? st.st_ino : 0;
}

/* Where that cannot be told it has not. */
static bool has_ended(const struct network_record *r) {
    return r->pid_space == own_pid_space() &&
           (r->pid <= 0 || r->start == 0 || start_of(r->pid) != r->start);
}

/* ---- the files ---- */

static int open_folder(void) {
    struct stat st;
    /* SAFE: fixed names in a directory that is root's alone to write; what is there must be so. */
    if (mkdir(FOLDER, 0700) < 0 && errno != EEXIST)
        return -errno;
    int fd = open(FOLDER, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    if (fstat(fd, &st) == 0 && st.st_uid == 0 && !(st.st_mode & 077))
        return fd;
    close(fd);
    return -EPERM;
}

/* The lock goes with the last of the processes that were forked with it: not with a plugin. */
static bool lock(int fd) {
    struct flock whole = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    return fcntl(fd, F_OFD_SETLK, &whole) == 0;
}

/* 1: there is something to undo; 0: there is nothing; -1: it is not of this form. */
static int is_begun(int fd, struct network_record *r) {
    memset(r, 0, sizeof(*r));
    if (pread(fd, r, sizeof(*r), 0) != (ssize_t)sizeof(*r) || r->format == 0)
        return 0;
    if (r->format != FORMAT || r->size != sizeof(struct networks))
        return -1;
    for (size_t i = 0; i < NETWORKS_MAX; i++)
        if (r->begun[i] > PLUGINS_MAX)
            return -1;
    for (size_t i = 0; i < NETWORKS_MAX; i++)
        if (r->begun[i] > 0)
            return 1;
    return 0;
}

/* The first that nobody has and in which nothing is left; or a negative errno. */
static int take(const struct launch *l, int folder) {
    static struct network_record found;
    for (uint64_t i = 0; i < LIMIT_USER_NETWORKS; i++) {
        char name[48] = "";
        append_number(name, sizeof(name), l->uid);
        append_text(name, sizeof(name), ".");
        append_number(name, sizeof(name), i);
        int fd = openat(folder, name, O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0600);
        if (fd < 0)
            return -errno;
        if (lock(fd) && is_begun(fd, &found) == 0)
            return fd;
        close(fd);
    }
    return -EUSERS;
}

static bool map(int fd) {
    void *place = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (place == MAP_FAILED)
        return false;
    network_record = place;
    record_fd = fd;
    return true;
}

/* A number that nobody has chosen: what CNI keeps is known by it. */
static int describe(struct network_record *r, pid_t container) {
    uint64_t number;
    if (getrandom(&number, sizeof(number), 0) != sizeof(number))
        return -1;
    memset(r, 0, sizeof(*r));
    append_text(r->container, sizeof(r->container), "apptainer-py-");
    append_number(r->container, sizeof(r->container), number);
    r->pid = container;
    r->start = start_of(container);
    r->pid_space = own_pid_space();
    r->size = sizeof(struct networks);
    r->format = FORMAT;
    return 0;
}

static size_t size_of(size_t count) {
    return NETWORKS_AT + count * sizeof(struct network);
}

/* A page that is there can be written in memory, whatever else is full. */
static int begin(int fd, pid_t container) {
    const size_t size = size_of(networks.count);
    if (ftruncate(fd, 0) < 0 || ftruncate(fd, PAGE) < 0 ||
        (fallocate(fd, 0, 0, PAGE) < 0 && errno != EOPNOTSUPP))
        return -errno;
    ssize_t put = pwrite(fd, &networks, size, PAGE);
    if (put != (ssize_t)size)
        return put < 0 ? -errno : -ENOSPC;
    return map(fd) && describe(network_record, container) == 0 ? 0 : -errno;
}

int record_open(const struct launch *l, pid_t container) {
    int folder = open_folder();
    int fd = folder < 0 ? folder : take(l, folder);
    if (folder >= 0)
        close(folder);
    int error = fd < 0 ? fd : begin(fd, container);
    if (error == 0 || l->flow != FLOW_ROOT)
        return error;
    /* Root is not counted, and needs no such directory: then janitor and twin alone know. */
    fd = memfd_create("networks", MFD_CLOEXEC);
    return fd < 0 ? -errno : begin(fd, container);
}

/* What was written down takes no room any more, and keeps no other version from its place. */
void record_close(void) {
    network_record->format = 0;
    (void)fallocate(record_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, PAGE,
                    RECORD_BYTES - PAGE);
}

/* ---- what a network's plugins have said ---- */

static off_t result_at(size_t network, uint32_t half) {
    return (off_t)(RESULTS_AT + (2 * network + half) * NETWORK_RESULT_BYTES);
}

/* Beside the one before it, which counts until this one is whole. */
int record_keep(size_t network, const char *text, size_t size) {
    uint32_t half = !(network_record->result[network] & 1);
    if (pwrite(record_fd, text, size, result_at(network, half)) != (ssize_t)size)
        return EIO;
    network_record->result[network] = (uint32_t)size << 1 | half;
    return 0;
}

ssize_t record_result(size_t network, char *text, size_t size) {
    uint32_t word = network_record->result[network];
    if (word >> 1 > size)
        return -1;
    return pread(record_fd, text, word >> 1, result_at(network, word & 1));
}

/* ---- what is left of others ---- */

static bool load(int fd) {
    ssize_t got = pread(fd, &networks, sizeof(networks), PAGE);
    if (got < (ssize_t)NETWORKS_AT || networks.count == 0 || networks.count > NETWORKS_MAX ||
        (size_t)got < size_of(networks.count) || !map(fd))
        return false;
    network_record->container[sizeof(network_record->container) - 1] = '\0';
    for (size_t i = 0; i < networks.count; i++)
        if (!network_is_name(networks.at[i].name) || !network_fits(&networks.at[i].file) ||
            networks.at[i].port_count > PORTS_MAX ||
            network_record->begun[i] > networks.at[i].file.plugin_count ||
            strnlen(networks.at[i].args, NETWORK_ARGS_BYTES) == NETWORK_ARGS_BYTES)
            return false;
    return true;
}

/* In a process of its own, as all that is known of the own networks is replaced.  The container's
 * network is gone, or nobody has its first process any more: plugins are told of none. */
static void undo(const struct launch *l, int fd) {
    pid_t self = getpid(), pid = fork();
    int status;
    if (pid == 0) {
        if (prctl(PR_SET_PDEATHSIG, SIGKILL) < 0 || getppid() != self || dup2(0, 2) < 0 ||
            prctl(PR_SET_CHILD_SUBREAPER, 1) < 0 || !load(fd))
            _exit(1);
        networks_disconnect(l, -1);
        _exit(0);
    }
    while (pid > 0 && waitpid(pid, &status, 0) < 0 && errno == EINTR)
        ;
}

static void look_at(const struct launch *l, int folder, const char *name) {
    static struct network_record found;
    int fd = openat(folder, name, O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0)
        return;
    if (lock(fd) && is_begun(fd, &found) == 1 && has_ended(&found))
        undo(l, fd);
    close(fd);
}

void record_sweep(const struct launch *l) {
    int folder = open_folder();
    DIR *listing = folder < 0 ? NULL : fdopendir(folder);
    const struct dirent *entry;
    while (listing && (entry = readdir(listing)) != NULL)
        if (entry->d_type == DT_REG)
            look_at(l, dirfd(listing), entry->d_name);
    if (listing)
        closedir(listing);
    else if (folder >= 0)
        close(folder);
}
