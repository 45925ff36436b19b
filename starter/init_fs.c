/* The mount in hand: a file system that is being configured, or a detached mount.  A context
 * becomes a mount when it is placed, so that all failures of a mount that may fail belong to one
 * row. */
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "init_root.h"

#define FSCONFIG_MOST 255              /* bytes of a value; longer ones need mount(2) */

static struct hand {
    char type[64];
    char source[LIMIT_PATH_BYTES];
    char data[LIMIT_PATH_BYTES];       /* all options in one string, as mount(2) takes them */
    bool whole;                        /* mount(2) and that string are used */
    bool data_fits;
    uint64_t set, clear, propagation;  /* for the mount that will be made */
} hand;

static int fs_config(int fs, unsigned command, const char *key, const char *value) {
    return (int)syscall(SYS_fsconfig, fs, command, key, value, 0);
}

void hand_drop(struct init *s) {
    init_close(&s->context_fd);
    init_close(&s->mount_fd);
    memset(&hand, 0, sizeof(hand));
}

bool hand_is(const struct init *s, const char *type) {
    (void)s;
    return strcmp(hand.type, type) == 0;
}

void hand_change(uint64_t set, uint64_t clear, uint64_t propagation) {
    hand.clear = (hand.clear & ~set) | clear;
    hand.set = (hand.set & ~clear) | set;
    if (propagation != 0)
        hand.propagation = propagation;
}

static int keep_text(char *out, size_t size, const char *text) {
    if (strlen(text) >= size) {
        errno = ENAMETOOLONG;
        return -1;
    }
    memcpy(out, text, strlen(text) + 1);
    return 0;
}

static void add_data(const char *key, const char *value) {
    size_t needed = strlen(hand.data) + strlen(key) + (value ? strlen(value) : 0) + 3;
    hand.data_fits = hand.data_fits && needed <= sizeof(hand.data);
    if (!hand.data_fits)
        return;
    if (hand.data[0])
        append_text(hand.data, sizeof(hand.data), ",");
    append_text(hand.data, sizeof(hand.data), key);
    if (value && *key)
        append_text(hand.data, sizeof(hand.data), "=");
    if (value)
        append_text(hand.data, sizeof(hand.data), value);
}

/* FS(type, source): what was in hand and never placed is closed. */
int init_fs(struct init *s, const struct op_request *q, struct op_reply *a) {
    const char *source = wire_string(q, 1);
    if (!row_is_plain(q, 0, 0, true, source != NULL) || s->passed >= 0)
        return ERR_MALFORMED;
    hand_drop(s);
    if (keep_text(hand.type, sizeof(hand.type), wire_string(q, 0)) < 0 ||
        keep_text(hand.source, sizeof(hand.source), source ? source : "none") < 0)
        return init_failed(a);
    hand.data_fits = true;
    s->context_fd = (int)syscall(SYS_fsopen, hand.type, FSOPEN_CLOEXEC);
    if (s->context_fd < 0)
        return init_failed(a);
    const char *subtype = strchr(hand.type, '.');
    if (subtype && fs_config(s->context_fd, FSCONFIG_SET_STRING, "subtype", subtype + 1) < 0)
        return init_failed(a);
    hand.whole = strlen(hand.source) > FSCONFIG_MOST;
    if (!hand.whole && fs_config(s->context_fd, FSCONFIG_SET_STRING, "source", hand.source) < 0)
        return init_failed(a);
    return ERR_OK;
}

/* A memory file system that is to be filled first gets read-only as a mount, at the end. */
static bool is_late_read_only(const struct op_request *q) {
    return strcmp(hand.type, "tmpfs") == 0 && strcmp(wire_string(q, 0), "ro") == 0 &&
           !wire_string(q, 1);
}

/* FSOPT(key, value or none): with key "" the value is all that mount(2) is to get. */
int init_fsopt(struct init *s, const struct op_request *q, struct op_reply *a) {
    const char *key = wire_string(q, 0), *value = wire_string(q, 1);
    if (!row_is_plain(q, 0, 0, true, value != NULL) || s->passed >= 0 || s->context_fd < 0 ||
        (!*key && !value))
        return ERR_MALFORMED;
    if (is_late_read_only(q)) {
        hand_change(MOUNT_ATTR_RDONLY, 0, 0);
        return ERR_OK;
    }
    add_data(key, value);
    hand.whole |= !*key || (value && strlen(value) > FSCONFIG_MOST);
    if (hand.whole)
        return ERR_OK;
    unsigned command = value ? FSCONFIG_SET_STRING : FSCONFIG_SET_FLAG;
    return fs_config(s->context_fd, command, key, value) < 0 ? init_failed(a) : ERR_OK;
}

/* The directory of a new memory file system gets the mode of the one that it covers. */
int hand_mode(struct init *s, mode_t mode) {
    char text[8] = {(char)('0' + (mode >> 9 & 7)), (char)('0' + (mode >> 6 & 7)),
                    (char)('0' + (mode >> 3 & 7)), (char)('0' + (mode & 7)), '\0'};
    if (s->context_fd >= 0) {
        add_data("mode", text);
        return hand.whole ? 0 : fs_config(s->context_fd, FSCONFIG_SET_STRING, "mode", text);
    }
    int fd = openat(s->mount_fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int result = fd < 0 ? -1 : fchmod(fd, mode & 07777);
    init_close(&fd);
    return result;
}

/* A directory of our own, attached where nobody looks: mount(2) can only act on what is. */
static int make_scratch(struct init *s, int *scratch) {
    int fs = (int)syscall(SYS_fsopen, "tmpfs", FSOPEN_CLOEXEC), inner = -1;
    *scratch = -1;
    if (fs >= 0 && fs_config(fs, FSCONFIG_CMD_CREATE, NULL, NULL) == 0)
        *scratch = (int)syscall(SYS_fsmount, fs, FSMOUNT_CLOEXEC, 0);
    if (*scratch >= 0 && mount_propagation(*scratch, MS_PRIVATE) == 0 &&
        mkdirat(*scratch, "m", 0700) == 0 && mount_attach(*scratch, s->root_fd) == 0)
        inner = openat(*scratch, "m", O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    int error = errno;
    init_close(&fs);
    errno = error;
    return inner;
}

/* mount(2) by a name that only a descriptor leads to; then a detached copy of the result. */
static int mount_whole(struct init *s, int inner, int scratch) {
    char name[32] = "self/fd/";
    append_number(name, sizeof(name), (uint64_t)inner);
    if (!hand.data_fits) {
        errno = E2BIG;
        return -1;
    }
    if (init_proc(s) < 0 || fchdir(s->proc_fd) < 0 ||
        mount(hand.source, name, hand.type, 0, hand.data) < 0)
        return -1;
    int made = mount_clone(scratch, "m", false), error = errno;
    if (fchdir(scratch) == 0)
        (void)umount2("m", MNT_DETACH);
    errno = error;
    return made;
}

static int make_whole(struct init *s) {
    int scratch, cwd = open(".", O_PATH | O_DIRECTORY | O_CLOEXEC);
    int inner = make_scratch(s, &scratch), made = -1;
    if (inner >= 0 && cwd >= 0)
        made = mount_whole(s, inner, scratch);
    int error = errno;
    /* From its own root "." is the mount itself, the topmost on the container's. */
    if (scratch >= 0 && fchdir(scratch) == 0)
        (void)umount2(".", MNT_DETACH);
    if (cwd >= 0 && fchdir(cwd) < 0)
        init_close(&made);
    init_close(&inner);
    init_close(&scratch);
    init_close(&cwd);
    errno = error;
    return made;
}

int hand_make(struct init *s, bool writable) {
    if (s->mount_fd >= 0)
        return 0;
    if (s->context_fd < 0) {
        errno = EBADF;
        return -1;
    }
    /* Given at once: the kernel may demand the flags of a mount that it finds already there. */
    uint64_t later = hand.whole ? hand.set : writable ? hand.set & MOUNT_ATTR_RDONLY : 0;
    if (hand.whole)
        s->mount_fd = make_whole(s);
    else if (fs_config(s->context_fd, FSCONFIG_CMD_CREATE, NULL, NULL) == 0)
        s->mount_fd = (int)syscall(SYS_fsmount, s->context_fd, FSMOUNT_CLOEXEC,
                                   (unsigned)(hand.set & ~later));
    int error = errno;
    init_close(&s->context_fd);
    errno = error;
    hand.set = later;
    return s->mount_fd < 0 ? -1 : 0;
}

int hand_finish(struct init *s) {
    if (hand.set != 0 && mount_attributes(s->mount_fd, false, hand.set, 0) < 0)
        return -1;
    hand.set = 0;
    return hand.propagation == 0 ? 0 : mount_propagation(s->mount_fd, hand.propagation);
}
