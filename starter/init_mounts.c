/* Mounts of the container: each gets its flags before it is attached, and is attached to a
 * descriptor that was looked up beneath the root. */
#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <linux/openat2.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "init_root.h"

#define MS_PROPAGATION (MS_SHARED | MS_PRIVATE | MS_SLAVE | MS_UNBINDABLE)

enum tree_flag { TREE_RECURSIVE = 1, TREE_NO_FOLLOW = 2 };
enum attr_flag { ATTR_RECURSIVE = 1 };
enum place_flag { PLACE_FILE = 1, PLACE_COPY_MODE = 2, PLACE_BELOW_PROC = 4, PLACE_MAY_FAIL = 8 };
/* Why a row failed, where errno does not say it. */
enum why {
    WHY_ERRNO,
    WHY_CLEARED_LOCKED,
    WHY_LOCKED_ATIME,
    WHY_IS_ROOT,
    WHY_INSIDE_PROC,
    WHY_PROC_NOT_ORDINARY,
    WHY_SYSFS_NOT_ORDINARY,
    WHY_NOT_PROC,
    WHY_MOUNT
};

bool row_is_plain(const struct op_request *q, uint32_t flags, int nums, bool first, bool second) {
    if (q->flags & ~flags || (q->length[0] > 0) != first || (q->length[1] > 0) != second)
        return false;
    for (int i = nums; i < 6; i++)
        if (q->num[i] != 0)
            return false;
    return true;
}

int mount_clone(int dir, const char *path, bool recursive) {
    unsigned flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | (recursive ? (unsigned)AT_RECURSIVE : 0);
    return (int)syscall(SYS_open_tree, dir, path, *path ? flags : flags | AT_EMPTY_PATH);
}

int mount_attach(int mount_fd, int target_fd) {
    return (int)syscall(SYS_move_mount, mount_fd, "", target_fd, "",
                        MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH);
}

static int change(int fd, bool recursive, struct mount_attr *attributes) {
    return (int)syscall(SYS_mount_setattr, fd, "", AT_EMPTY_PATH | (recursive ? AT_RECURSIVE : 0),
                        attributes, sizeof(*attributes));
}

int mount_attributes(int fd, bool recursive, uint64_t set, uint64_t clear) {
    struct mount_attr attributes = {.attr_set = set, .attr_clr = clear};
    if (set & MOUNT_ATTR__ATIME) /* it is a number and not bits */
        attributes.attr_clr |= MOUNT_ATTR__ATIME;
    return change(fd, recursive, &attributes);
}

int mount_propagation(int fd, uint64_t ms_flags) {
    struct mount_attr attributes = {.propagation = ms_flags & MS_PROPAGATION};
    return change(fd, ms_flags & MS_REC, &attributes);
}

/* What a path of the host leads to.  "x/." makes an automounter mount x.  Links that procfs makes
 * up are followed only where the path itself is one of them (a namespace file). */
static int open_source(const char *path, bool follow) {
    static char inside[LIMIT_PATH_BYTES + 4];
    struct open_how how = {.flags = O_PATH | O_CLOEXEC | (follow ? 0 : (uint64_t)O_NOFOLLOW)};
    if (strncmp(path, "/proc/", 6) != 0)
        how.resolve = RESOLVE_NO_MAGICLINKS;
    inside[0] = '\0';
    append_text(inside, sizeof(inside), path);
    append_text(inside, sizeof(inside), "/.");
    long fd = follow ? syscall(SYS_openat2, AT_FDCWD, inside, &how, sizeof(how)) : -1;
    if (fd < 0 && (!follow || errno == ENOTDIR))
        fd = syscall(SYS_openat2, AT_FDCWD, path, &how, sizeof(how));
    if (fd < 0 && errno == ENOSYS)
        fd = open(path, O_PATH | O_CLOEXEC | (follow ? 0 : O_NOFOLLOW));
    return (int)fd;
}

/* TREE(path of the host) or a detached mount that was passed. */
int init_tree(struct init *s, const struct op_request *q, struct op_reply *a) {
    if (!row_is_plain(q, TREE_RECURSIVE | TREE_NO_FOLLOW, 0, s->passed < 0, false))
        return ERR_MALFORMED;
    hand_drop(s);
    if (s->passed >= 0) {
        s->mount_fd = s->passed;
        s->passed = -1;
        return ERR_OK;
    }
    int source = open_source(wire_string(q, 0), !(q->flags & TREE_NO_FOLLOW));
    if (source >= 0)
        s->mount_fd = mount_clone(source, "", q->flags & TREE_RECURSIVE);
    int error = errno;
    init_close(&source);
    errno = error;
    return s->mount_fd < 0 ? init_failed(a) : ERR_OK;
}

static uint64_t attributes_of(const struct statvfs *fs) {
    static const struct {
        unsigned long flag;
        uint64_t attribute;
    } table[] = {{ST_RDONLY, MOUNT_ATTR_RDONLY},         {ST_NOSUID, MOUNT_ATTR_NOSUID},
                 {ST_NODEV, MOUNT_ATTR_NODEV},           {ST_NOEXEC, MOUNT_ATTR_NOEXEC},
                 {ST_NODIRATIME, MOUNT_ATTR_NODIRATIME}, {0x2000, MOUNT_ATTR_NOSYMFOLLOW},
                 {ST_NOATIME, MOUNT_ATTR_NOATIME}};
    uint64_t found = 0;
    for (size_t i = 0; i < ARRAY_SIZE(table); i++)
        if (fs->f_flag & table[i].flag)
            found |= table[i].attribute;
    if (!(fs->f_flag & (ST_NOATIME | ST_RELATIME)))
        found |= MOUNT_ATTR_STRICTATIME;
    return found;
}

/* A flag that a more privileged namespace locked stays as it is, unless the configuration asks for
 * the contrary in so many words: `asked` are those that it wants cleared. */
static int change_unlocked(int fd, uint64_t set, uint64_t clear, uint64_t asked,
                           struct op_reply *a) {
    const uint64_t bits = ~(uint64_t)MOUNT_ATTR__ATIME;
    struct statvfs fs;
    if (fstatvfs(fd, &fs) < 0)
        return init_failed(a);
    uint64_t present = attributes_of(&fs);
    errno = EPERM;
    if (asked & bits & present)
        return init_failed_at(a, WHY_CLEARED_LOCKED);
    if ((set | asked) & MOUNT_ATTR__ATIME &&
        (present & MOUNT_ATTR__ATIME) != (set & MOUNT_ATTR__ATIME))
        return init_failed_at(a, WHY_LOCKED_ATIME);
    return mount_attributes(fd, false, set & bits, clear & bits & ~present) < 0 ? init_failed(a)
                                                                                : ERR_OK;
}

static int change_flags(int fd, const struct op_request *q, uint64_t set, uint64_t asked,
                        struct op_reply *a) {
    bool recursive = q->flags & ATTR_RECURSIVE;
    if ((set | q->num[1]) == 0 || mount_attributes(fd, recursive, set, q->num[1]) == 0)
        return ERR_OK;
    if (errno != EPERM || recursive)
        return init_failed(a);
    return change_unlocked(fd, set, q->num[1], asked, a);
}

static int map_in_hand(struct init *s, const struct op_request *q) {
    struct mount_attr attributes = {.attr_set = MOUNT_ATTR_IDMAP,
                                    .userns_fd = (__u64)s->passed};
    return change(s->mount_fd, q->flags & ATTR_RECURSIVE, &attributes);
}

/* ATTR(set, clear, propagation, cleared in so many words) and a user namespace for an id map. */
int init_attr(struct init *s, const struct op_request *q, struct op_reply *a) {
    if (!row_is_plain(q, ATTR_RECURSIVE, 4, false, false) ||
        (s->mount_fd < 0 && s->context_fd < 0))
        return ERR_MALFORMED;
    uint64_t set = q->num[0] & ~(uint64_t)MOUNT_ATTR_IDMAP;
    if (set != q->num[0] && s->passed < 0)
        return ERR_MALFORMED;
    if (s->passed < 0 && s->mount_fd < 0) {
        hand_change(q->num[0], q->num[1], q->num[2]);
        return ERR_OK;
    }
    if (s->passed >= 0 && (hand_make(s, true) < 0 || map_in_hand(s, q) < 0))
        return init_failed(a);
    int code = change_flags(s->mount_fd, q, set, q->num[3], a);
    uint64_t propagation = q->num[2] | (q->flags & ATTR_RECURSIVE ? MS_REC : 0);
    if (code == ERR_OK && q->num[2] != 0 && mount_propagation(s->mount_fd, propagation) < 0)
        return init_failed(a);
    return code;
}

/* COPYUP(path): what lies beneath the mount in hand is to be found in it again. */
int init_copyup(struct init *s, const struct op_request *q, struct op_reply *a) {
    if (!row_is_plain(q, 0, 0, true, false) || s->root_fd < 0 ||
        (s->mount_fd < 0 && s->context_fd < 0))
        return ERR_MALFORMED;
    if (hand_make(s, true) < 0)
        return init_failed(a);
    int source = target_open(s->root_fd, wire_string(q, 0), O_RDONLY | O_DIRECTORY | O_NONBLOCK);
    if (source < 0)
        return errno == ENOENT ? ERR_OK : init_failed(a);
    int target = openat(s->mount_fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int code = target < 0 || copy_tree(source, target) < 0 ? init_failed(a) : ERR_OK;
    init_close(&source);
    init_close(&target);
    return code;
}

static bool is_proc(int fd) {
    struct statfs fs;
    return fstatfs(fd, &fs) == 0 && fs.f_type == PROC_SUPER_MAGIC;
}

/* The path of an open file as the kernel names it, which nobody can make say something else. */
static ssize_t path_of(struct init *s, int fd, char *out, size_t size) {
    char name[32] = "self/fd/";
    append_number(name, sizeof(name), (uint64_t)fd);
    ssize_t length = init_proc(s) < 0 ? -1 : readlinkat(s->proc_fd, name, out, size - 1);
    if (length >= 0)
        out[length] = '\0';
    return length;
}

/* The path that leads to an open file in the container, or NULL. */
static const char *path_inside(struct init *s, int fd) {
    static char root[LIMIT_PATH_BYTES], path[LIMIT_PATH_BYTES];
    ssize_t length = path_of(s, s->root_fd, root, sizeof(root));
    if (length < 0 || path_of(s, fd, path, sizeof(path)) < 0)
        return NULL;
    if (length == 1) /* "/" */
        length = 0;
    return strncmp(path, root, (size_t)length) == 0 ? path + length : "";
}

/* What was placed on /proc and /sys.  Whoever shares the directory that holds their names can give
 * these to something else, so that what is to be masked is looked up from here. */
static struct {
    const char *path;
    int fd;
} kept[] = {{"/proc", -1}, {"/sys", -1}};

static void keep_mount(int mount_fd, const char *path) {
    for (size_t i = 0; i < ARRAY_SIZE(kept); i++)
        if (strcmp(kept[i].path, path) == 0) {
            init_close(&kept[i].fd);
            kept[i].fd = fcntl(mount_fd, F_DUPFD_CLOEXEC, 3);
        }
}

int mount_below(const struct init *s, const char *path, const char **rest) {
    *rest = path;
    for (size_t i = 0; i < ARRAY_SIZE(kept) && !strstr(path, "/.."); i++) {
        size_t length = strlen(kept[i].path);
        if (kept[i].fd >= 0 && strncmp(path, kept[i].path, length) == 0 && path[length] == '/') {
            *rest = path + length;
            return kept[i].fd;
        }
    }
    return s->root_fd;
}

/* On /proc there is procfs or nothing; and what is below it shows the kernel's own files. */
static enum why check_place(const struct init *s, const struct op_request *q, int target,
                            const char *path) {
    if (target_same(s->root_fd, target) != 0) {
        errno = EBUSY;
        return WHY_IS_ROOT;
    }
    errno = EPERM;
    if (strcmp(path, "/proc") == 0 && !hand_is(s, "proc") &&
        (s->mount_fd < 0 || !is_proc(s->mount_fd)))
        return WHY_NOT_PROC;
    if (strncmp(path, "/proc/", 6) == 0 && !(q->flags & PLACE_BELOW_PROC))
        return WHY_INSIDE_PROC;
    errno = 0;
    return WHY_ERRNO;
}

/* procfs and sysfs lie where their names say: a link there would hide them. */
static int open_ordinary(const struct init *s, const char *path, bool *made) {
    struct stat st;
    int fd = target_open(s->root_fd, path, O_PATH | O_NOFOLLOW);
    if (fd < 0 && errno == ENOENT) {
        fd = target_make(s->root_fd, path, true, made);
        init_close(&fd);
        fd = target_open(s->root_fd, path, O_PATH | O_NOFOLLOW);
    }
    if (fd >= 0 && (fstat(fd, &st) < 0 || !S_ISDIR(st.st_mode))) {
        init_close(&fd);
        errno = ENOTDIR;
    }
    return fd;
}

/* The kernel compares kinds too, but says EINVAL or ENOENT. */
static int check_kinds(int source, int target) {
    struct stat from, to;
    if (fstat(source, &from) < 0 || fstat(target, &to) < 0)
        return -1;
    if (S_ISLNK(to.st_mode) || S_ISDIR(from.st_mode) != S_ISDIR(to.st_mode)) {
        errno = ENOTDIR;
        return -1;
    }
    return 0;
}

static bool is_directory_in_hand(const struct init *s) {
    struct stat st;
    return s->mount_fd < 0 || (fstat(s->mount_fd, &st) == 0 && S_ISDIR(st.st_mode));
}

static int copy_mode(struct init *s, int target) {
    struct stat st;
    return fstat(target, &st) < 0 ? -1 : hand_mode(s, st.st_mode);
}

static int place_at(struct init *s, const struct op_request *q, int target, bool made) {
    if (q->flags & PLACE_COPY_MODE && !made && copy_mode(s, target) < 0)
        return -1;
    if (hand_make(s, false) < 0 || check_kinds(s->mount_fd, target) < 0 || hand_finish(s) < 0 ||
        mount_attach(s->mount_fd, target) < 0)
        return -1;
    return q->num[0] == 0 ? 0 : mount_propagation(s->mount_fd, q->num[0]);
}

/* Those that masks rely on are where their names say, and nowhere that a link leads to. */
static bool is_by_name(const struct init *s, const char *path) {
    return hand_is(s, "proc") || hand_is(s, "sysfs") || strcmp(path, "/proc") == 0 ||
           strcmp(path, "/sys") == 0;
}

static int place_checked(struct init *s, const struct op_request *q, struct op_reply *a,
                         int target, bool made) {
    const char *path = path_inside(s, target), *asked = wire_string(q, 0);
    if (!path)
        return init_failed(a);
    enum why why = check_place(s, q, target, path);
    if (errno != 0)
        return init_failed_at(a, why);
    if (place_at(s, q, target, made) < 0)
        return init_failed_at(a, WHY_MOUNT);
    keep_mount(s->mount_fd, is_by_name(s, asked) ? asked : path);
    return ERR_OK;
}

static int place(struct init *s, const struct op_request *q, struct op_reply *a) {
    const char *path = wire_string(q, 0);
    bool made = false, by_name = is_by_name(s, path);
    int target = by_name ? open_ordinary(s, path, &made)
                         : target_make(s->root_fd, path, is_directory_in_hand(s), &made);
    if (target < 0 && by_name && errno == ENOTDIR)
        return init_failed_at(a, hand_is(s, "sysfs") || strcmp(path, "/sys") == 0
                                     ? WHY_SYSFS_NOT_ORDINARY
                                     : WHY_PROC_NOT_ORDINARY);
    if (target < 0)
        return init_failed(a);
    int code = place_checked(s, q, a, target, made);
    init_close(&target);
    return code;
}

/* PLACE(target; propagation afterwards).  One that may fail says why in the value of its reply. */
int init_place(struct init *s, const struct op_request *q, struct op_reply *a) {
    const uint32_t known = PLACE_FILE | PLACE_COPY_MODE | PLACE_BELOW_PROC | PLACE_MAY_FAIL;
    if (!row_is_plain(q, known, 1, true, false) || s->root_fd < 0 || s->passed >= 0 ||
        (s->mount_fd < 0 && s->context_fd < 0))
        return ERR_MALFORMED;
    int code = place(s, q, a);
    hand_drop(s);
    if (code == ERR_OK || !(q->flags & PLACE_MAY_FAIL))
        return code;
    a->value = (uint32_t)a->error;
    a->error = 0;
    return ERR_OK;
}

/* REMOUNT(target; set, clear): flags of a mount that is there. */
int init_remount(struct init *s, const struct op_request *q, struct op_reply *a) {
    if (!row_is_plain(q, ATTR_RECURSIVE, 2, true, false) || s->root_fd < 0 || s->passed >= 0)
        return ERR_MALFORMED;
    const char *rest;
    int from = mount_below(s, wire_string(q, 0), &rest), target = target_open(from, rest, O_PATH);
    if (target < 0)
        return init_failed(a);
    int code = change_flags(target, q, q->num[0], 0, a);
    init_close(&target);
    return code;
}
