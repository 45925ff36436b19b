/* The kernel's own files, reached through a procfs that no container can have touched. */
#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <linux/openat2.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "init_root.h"

enum name_flag { NAME_DOMAIN = 1 };

static int new_proc(void) {
    int fs = (int)syscall(SYS_fsopen, "proc", FSOPEN_CLOEXEC), made = -1;
    if (fs >= 0 && syscall(SYS_fsconfig, fs, FSCONFIG_CMD_CREATE, NULL, NULL, 0) == 0)
        made = (int)syscall(SYS_fsmount, fs, FSMOUNT_CLOEXEC,
                            MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC);
    init_close(&fs);
    return made;
}

static bool is_proc_root(int fd) {
    struct statfs fs;
    struct stat st;
    return fstatfs(fd, &fs) == 0 && fs.f_type == PROC_SUPER_MAGIC && fstat(fd, &st) == 0 &&
           st.st_ino == 1; /* PROC_ROOT_INO */
}

/* The host's: a copy without what is mounted on it, or itself; never a container's /proc. */
static int host_proc(const struct init *s) {
    if (s->host_proc_fd >= 0)
        return fcntl(s->host_proc_fd, F_DUPFD_CLOEXEC, 3);
    if (s->tenant || s->phase > ASSEMBLE) {
        errno = ENODEV;
        return -1;
    }
    int fd = mount_clone(AT_FDCWD, "/proc", false);
    return fd >= 0 ? fd : open("/proc", O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
}

/* A new one where that is allowed.  ENTER sees to it that there is one, whichever it is. */
int init_proc(struct init *s) {
    if (s->proc_fd >= 0)
        return s->proc_fd;
    int fd = new_proc();
    if (fd < 0)
        fd = host_proc(s);
    if (fd >= 0 && !is_proc_root(fd)) {
        init_close(&fd);
        errno = ENODEV;
    }
    s->proc_fd = fd;
    return fd;
}

int open_again(struct init *s, int fd, int flags) {
    char name[32] = "self/fd/";
    append_number(name, sizeof(name), (uint64_t)fd);
    return init_proc(s) < 0 ? -1 : openat(s->proc_fd, name, flags | O_CLOEXEC);
}

/* Relative and with no dots to climb with. */
static bool is_plain_key(const char *key) {
    while (*key) {
        size_t length = strcspn(key, "/");
        if (length == 0 || (length == 1 && key[0] == '.') ||
            (length == 2 && key[0] == '.' && key[1] == '.'))
            return false;
        key += length;
        if (*key == '/' && !*++key)
            return false;
    }
    return true;
}

static int open_sysctl(const struct init *s, const char *key) {
    static char path[LIMIT_PATH_BYTES + 8];
    struct open_how how = {.flags = O_WRONLY | O_CLOEXEC | O_NOFOLLOW,
                           .resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV |
                                      RESOLVE_NO_MAGICLINKS};
    path[0] = '\0';
    append_text(path, sizeof(path), "sys/");
    append_text(path, sizeof(path), key);
    return (int)syscall(SYS_openat2, s->proc_fd, path, &how, sizeof(how));
}

/* SYSCTL(path below /proc/sys, value).  The value of a failed one: 1 open, 2 write. */
int init_sysctl(struct init *s, const struct op_request *q, struct op_reply *a) {
    const char *key = wire_string(q, 0), *value = wire_string(q, 1);
    if (!row_is_plain(q, 0, 0, true, true) || s->passed >= 0 || !is_plain_key(key))
        return ERR_MALFORMED;
    int fd = init_proc(s) < 0 ? -1 : open_sysctl(s, key);
    if (fd < 0)
        return init_failed_at(a, 1);
    ssize_t done = write(fd, value, strlen(value));
    int code = done != (ssize_t)strlen(value) ? init_failed_at(a, 2) : ERR_OK;
    init_close(&fd);
    return code;
}

/* NAME(name): of the host or, with the flag, of the NIS domain. */
int init_name(struct init *s, const struct op_request *q, struct op_reply *a) {
    if (!row_is_plain(q, NAME_DOMAIN, 0, true, false) || s->passed >= 0)
        return ERR_MALFORMED;
    const char *name = wire_string(q, 0);
    int result = q->flags & NAME_DOMAIN ? setdomainname(name, strlen(name))
                                        : sethostname(name, strlen(name));
    return result < 0 ? init_failed(a) : ERR_OK;
}
