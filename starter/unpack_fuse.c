/* Also loaded into the image server, between it and libfuse: an image does not change, so the
 * kernel need not ask before it opens a file, lists a directory again, follows a symbolic link
 * again, or asks for attributes that no file has.  Each question costs two switches of processes,
 * and a launch asks some two hundred. */
#include <dlfcn.h>
#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "unpack.h"

/* Of fuse_common.h and fuse_lowlevel.h, libfuse 3. */
struct fuse_file_info {
    int flags;
    uint32_t bits, padding;
    uint64_t fh, lock_owner;
    uint32_t poll_events;
};
struct fuse_conn_info {
    uint32_t proto_major, proto_minor, max_write, max_read, max_readahead, capable, want,
        max_background, congestion_threshold;
};
typedef struct fuse_req *fuse_req_t;
typedef void init_operation(void *, struct fuse_conn_info *);
typedef void file_operation(fuse_req_t, uint64_t, struct fuse_file_info *);
typedef void read_operation(fuse_req_t, uint64_t, size_t, int64_t, struct fuse_file_info *);

enum { CAP_CACHE_SYMLINKS = 1 << 23, AHEAD = 2 };
/* The order of struct fuse_lowlevel_ops. */
enum { OP_INIT, OP_OPEN = 14, OP_READ, OP_RELEASE = 18, OP_OPENDIR = 20, OP_READDIR, OP_RELEASEDIR,
       OP_GETXATTR = 26, OP_COUNT };
typedef void any_operation(void);

void *fuse_session_new(void *args, any_operation *const *ops, size_t size, void *data);
int fuse_reply_open(fuse_req_t request, const struct fuse_file_info *file);
int fuse_reply_err(fuse_req_t request, int error);

static any_operation *meant[OP_COUNT];

static any_operation *next_of(const char *name) {
    union { void *in; any_operation *out; } u = {.in = dlsym(RTLD_NEXT, name)};
    if (u.out == NULL)
        _exit(127); /* libfuse is there, or nothing had been looked up */
    return u.out;
}

/* What the server keeps of open files and directories, by inode: of the last that were read. */
enum { HANDLES = 16 };
struct handle {
    uint64_t inode, fh;
    bool is_directory, is_open;
};
static struct handle handles[HANDLES];
static unsigned next_handle;

/* While the server opens or closes on our behalf, its answer is for us. */
static struct {
    bool wanted;
    int error;
    uint64_t fh;
} answer;

int fuse_reply_open(fuse_req_t request, const struct fuse_file_info *file) {
    static int (*next)(fuse_req_t, const struct fuse_file_info *);
    if (answer.wanted) {
        answer.error = 0;
        answer.fh = file->fh;
        return 0;
    }
    if (next == NULL)
        next = (int (*)(fuse_req_t, const struct fuse_file_info *))next_of("fuse_reply_open");
    return next(request, file);
}

int fuse_reply_err(fuse_req_t request, int error) {
    static int (*next)(fuse_req_t, int);
    if (answer.wanted) {
        answer.error = error;
        return 0;
    }
    if (next == NULL)
        next = (int (*)(fuse_req_t, int))next_of("fuse_reply_err");
    return next(request, error);
}

static int call(int operation, fuse_req_t request, uint64_t inode, uint64_t *fh) {
    struct fuse_file_info file = {.fh = *fh};
    answer.wanted = true;
    answer.error = EIO;
    ((file_operation *)meant[operation])(request, inode, &file);
    answer.wanted = false;
    *fh = answer.fh;
    return answer.error;
}

static int find_handle(fuse_req_t request, uint64_t inode, bool is_directory, uint64_t *fh) {
    for (size_t i = 0; i < HANDLES; i++)
        if (handles[i].is_open && handles[i].inode == inode &&
            handles[i].is_directory == is_directory) {
            *fh = handles[i].fh;
            return 0;
        }
    struct handle *h = &handles[next_handle++ % HANDLES];
    if (h->is_open)
        (void)call(h->is_directory ? OP_RELEASEDIR : OP_RELEASE, request, h->inode, &h->fh);
    *h = (struct handle){.inode = inode, .is_directory = is_directory};
    int error = call(is_directory ? OP_OPENDIR : OP_OPEN, request, inode, &h->fh);
    h->is_open = error == 0;
    *fh = h->fh;
    return error;
}

/* The kernel's answer to this is to open by itself from now on, and keep what was read. */
static void not_asked(fuse_req_t request, uint64_t inode, struct fuse_file_info *file) {
    (void)inode;
    (void)file;
    (void)fuse_reply_err(request, ENOSYS);
}

static void read_as(int operation, fuse_req_t request, uint64_t inode, size_t size, int64_t at) {
    struct fuse_file_info file = {0};
    int error = find_handle(request, inode, operation == OP_READDIR, &file.fh);
    if (error != 0)
        (void)fuse_reply_err(request, error);
    else
        ((read_operation *)meant[operation])(request, inode, size, at, &file);
}

static void read_file(fuse_req_t request, uint64_t inode, size_t size, int64_t at,
                      struct fuse_file_info *file) {
    (void)file;
    read_as(OP_READ, request, inode, size, at);
}

static void read_directory(fuse_req_t request, uint64_t inode, size_t size, int64_t at,
                           struct fuse_file_info *file) {
    (void)file;
    read_as(OP_READDIR, request, inode, size, at);
}

static void no_attribute(fuse_req_t request, uint64_t inode, const char *name, size_t size) {
    (void)inode;
    (void)name;
    (void)size;
    (void)fuse_reply_err(request, ENOSYS);
}

static void begin(void *data, struct fuse_conn_info *connection) {
    if (meant[OP_INIT] != NULL)
        ((init_operation *)meant[OP_INIT])(data, connection);
    connection->want |= connection->capable & CAP_CACHE_SYMLINKS;
    /* What is read ahead waits in the kernel, behind questions that somebody waits for. */
    connection->max_background = connection->congestion_threshold = AHEAD;
}

/* In the superblock: where the table of attributes begins, or all ones. */
static uint64_t image_offset;

enum { IMAGE_FD = 3 };

bool image_is_gzip(void) {
    enum { COMPRESSION_AT = 20, GZIP = 1 };
    uint16_t kind;
    return pread(IMAGE_FD, &kind, sizeof(kind), (off_t)(image_offset + COMPRESSION_AT)) ==
               (ssize_t)sizeof(kind) && kind == GZIP;
}

static bool has_attributes(void) {
    enum { TABLE_AT = 56 };
    uint64_t table;
    return pread(IMAGE_FD, &table, sizeof(table), (off_t)(image_offset + TABLE_AT)) !=
               (ssize_t)sizeof(table) || table != UINT64_MAX;
}

__attribute__((constructor)) static void read_offset(int argc, char *argv[]) {
    static const char key[] = "offset=";
    for (int i = 1; i < argc; i++) {
        const char *found = strstr(argv[i], key);
        if (found != NULL)
            image_offset = strtoull(found + strlen(key), NULL, 10);
    }
}

void *fuse_session_new(void *args, any_operation *const *ops, size_t size, void *data) {
    typedef void *new_session(void *, any_operation *const *, size_t, void *);
    enum { MOST = 64, SLOT = sizeof(void *) };
    static any_operation *ours[MOST];
    any_operation *next = next_of("fuse_session_new");
    if (size > MOST * SLOT || size < OP_COUNT * SLOT)
        return ((new_session *)next)(args, ops, size, data);
    memcpy(ours, ops, size);
    memcpy(meant, ops, OP_COUNT * SLOT);
    ours[OP_INIT] = (any_operation *)begin;
    if (meant[OP_OPEN] && meant[OP_READ] && meant[OP_RELEASE]) {
        ours[OP_OPEN] = (any_operation *)not_asked;
        ours[OP_READ] = (any_operation *)read_file;
    }
    if (meant[OP_OPENDIR] && meant[OP_READDIR] && meant[OP_RELEASEDIR]) {
        ours[OP_OPENDIR] = (any_operation *)not_asked;
        ours[OP_READDIR] = (any_operation *)read_directory;
    }
    if (!has_attributes())
        ours[OP_GETXATTR] = (any_operation *)no_attribute;
    return ((new_session *)next)(args, (any_operation *const *)ours, size, data);
}
