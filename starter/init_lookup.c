/* Which file argv[0] means: Go's exec.LookPath, whose texts the callers of runtimes know. */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "init.h"

#ifndef AT_EACCESS
#define AT_EACCESS 0x200
#endif

/* faccessat2(2) asks for the effective ids, and knows of mounts without execution. */
static int executable(const char *path, enum go_step *step) {
    struct stat st;
    *step = GOSTEP_STAT;
    if (stat(path, &st) < 0)
        return -1;
    *step = GOSTEP_ACCESS;
    if (S_ISDIR(st.st_mode)) {
        errno = EISDIR;
        return -1;
    }
    if (syscall(SYS_faccessat2, AT_FDCWD, path, X_OK, AT_EACCESS) == 0)
        return 0;
    if ((errno == ENOSYS || errno == EPERM) && st.st_mode & 0111)
        return 0; /* a filter that does not know the call: execve will tell */
    errno = errno == ENOSYS || errno == EPERM ? EACCES : errno;
    return -1;
}

/* The last one counts, as in a shell that reads them in order. */
static const char *search_path(char *const envp[]) {
    const char *found = "";
    for (; *envp; envp++)
        if (strncmp(*envp, "PATH=", 5) == 0)
            found = *envp + 5;
    return found;
}

static int copy_path(char *out, size_t size, const char *directory, size_t length,
                     const char *name) {
    if (length + strlen(name) + 2 > size)
        return -1;
    memcpy(out, directory, length);
    out[length] = '\0';
    if (length > 0 && out[length - 1] != '/')
        append_text(out, size, "/");
    append_text(out, size, name);
    return 0;
}

static int search(const char *name, const char *path, char *out, size_t size,
                  enum go_step *step) {
    for (const char *at = path, *end; *path && at; at = *end ? end + 1 : NULL) {
        end = strchrnul(at, ':');
        if (copy_path(out, size, at, (size_t)(end - at), name) < 0 || executable(out, step) < 0)
            continue;
        *step = GOSTEP_RELATIVE;
        errno = EACCES;
        return out[0] == '/' ? 0 : -1;
    }
    *step = GOSTEP_NOT_FOUND;
    errno = ENOENT;
    return -1;
}

int lookup_program(char *const argv[], char *const envp[], char *out, size_t size,
                   enum go_step *step) {
    const char *name = argv[0];
    if (strchr(name, '/') == NULL)
        return search(name, search_path(envp), out, size, step);
    *step = GOSTEP_STAT;
    errno = ENAMETOOLONG;
    if (copy_path(out, size, "", 0, name) < 0)
        return -1;
    return executable(out, step);
}
