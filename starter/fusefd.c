/* Loaded into servers that can only mount by themselves: the device is a descriptor that they were
 * given, mounted by who may, and directories are descriptors too. */
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { FUSE_FD = 4 };

int open64(const char *path, int flags, ...);

int open64(const char *path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;
    va_end(more);
    if (strcmp(path, "/dev/fuse") == 0)
        return fcntl(FUSE_FD, F_DUPFD_CLOEXEC, FUSE_FD);
    return (int)syscall(SYS_openat, AT_FDCWD, path, flags, mode);
}

int mount(const char *source, const char *target, const char *kind, unsigned long flags,
          const void *data) {
    (void)source;
    (void)target;
    (void)flags;
    (void)data;
    if (kind && strncmp(kind, "fuse", 4) == 0)
        return 0; /* it is there */
    errno = EPERM;
    return -1;
}

int umount2(const char *target, int flags) {
    (void)target;
    (void)flags;
    return 0; /* it goes with the container */
}

/* A descriptor of another mount namespace has a name that leads nowhere here. */
char *realpath(const char *path, char *resolved) {
    static const char descriptor[] = "/proc/self/fd/";
    if (strncmp(path, descriptor, strlen(descriptor)) == 0 && !resolved)
        return strdup(path);
    return canonicalize_file_name(path);
}
