/* The payload's AppArmor profile or SELinux context (--security): the kernel takes it with the next
 * execve of the process that has written it.  The file is looked up in the host's own /proc, which
 * is opened before the root changes: in the container anything could lie there (CVE-2019-16884,
 * CVE-2025-65105). */
#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <linux/openat2.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "starter.h"

static struct {
    int proc; /* the host's /proc, until the label is written */
    bool written;
    uint32_t kind, size; /* what is kept for bearer */
    char text[LIMIT_LABEL_BYTES];
} label = {.proc = -1};

static const char exec_word[] = "exec ";

static bool is_proc(int fd) {
    struct statfs fs;
    return fd >= 0 && fstatfs(fd, &fs) == 0 && fs.f_type == PROC_SUPER_MAGIC;
}

/* Before the container's root is the root. */
void label_open(const struct launch *l) {
    if (!(l->plan.flags & PLAN_LABEL))
        return;
    label.proc = open("/proc", O_PATH | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
    if (!is_proc(label.proc))
        fail("a security label cannot be set without /proc", 0);
}

static int open_own(const char *name) {
    const struct open_how how = {.flags = O_WRONLY | O_CLOEXEC,
                                 .resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS |
                                            RESOLVE_NO_XDEV};
    char path[64] = "";
    ssize_t got = readlinkat(label.proc, "self", path, 16);
    if (got <= 0 || got >= 16)
        return -1;
    path[got] = '\0';
    append_text(path, sizeof(path), name);
    return (int)syscall(SYS_openat2, label.proc, path, &how, sizeof(how));
}

/* AppArmor's own file; kernels before 5.1 have one for whichever module there is. */
static int open_file(uint32_t kind) {
    int fd = kind == LABEL_APPARMOR ? open_own("/attr/apparmor/exec") : open_own("/attr/exec");
    return fd < 0 && errno == ENOENT && kind == LABEL_APPARMOR ? open_own("/attr/exec") : fd;
}

static bool is_label(uint32_t kind, const char *text, size_t size) {
    return (kind == LABEL_APPARMOR || kind == LABEL_SELINUX) && size > 0 &&
           size < sizeof(label.text) && memchr(text, '\0', size) == NULL;
}

/* 0 or an errno; what the kernel refuses has no effect. */
int label_write(uint32_t kind, const char *text, size_t size) {
    char line[sizeof(exec_word) + LIMIT_LABEL_BYTES];
    size_t used = kind == LABEL_APPARMOR ? sizeof(exec_word) - 1 : 0;
    if (label.proc < 0 || label.written || !is_label(kind, text, size))
        return EINVAL;
    memcpy(line, exec_word, used);
    memcpy(line + used, text, size);
    used += size;
    errno = EIO;
    int fd = open_file(kind);
    if (fd < 0)
        return errno;
    /* SAFE: the caller's own payload, which the kernel lets change to what its policy permits. */
    ssize_t wrote = write(fd, line, used);
    int error = wrote == (ssize_t)used ? 0 : wrote < 0 ? errno : EIO;
    close(fd);
    if (error != 0)
        return error;
    label.written = true;
    close(label.proc);
    label.proc = -1;
    return 0;
}

/* Stage 2 keeps what bearer is to write: the label is the process's that executes. */
int label_set(const struct launch *l, uint32_t kind, const char *text, size_t size) {
    if (l->bearer_socket[0] < 0)
        return label_write(kind, text, size);
    if (label.size != 0 || !is_label(kind, text, size))
        return EINVAL;
    memcpy(label.text, text, size);
    label.kind = kind;
    label.size = (uint32_t)size;
    return 0;
}

const void *label_get(size_t *size, uint32_t *kind) {
    *size = label.size;
    *kind = label.kind;
    return label.text;
}

/* A payload never starts without the label that was asked for. */
void label_check(const struct launch *l) {
    if (l->plan.flags & PLAN_LABEL && !label.written)
        fail("the security label that was asked for is not set", 0);
}
