/* Which flow --fakeroot needs: ranges of subordinate ids the setuid starter maps, a single id
 * anybody may map; without user namespaces there is only the fakeroot command. */
#include <fcntl.h>
#include <pwd.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "launcher.h"
#include "subids.h"

static bool has_range(void) {
    struct subid_range range;
    const struct passwd *account = getpwuid(getuid());
    char *text = malloc(SUBIDS_FILE_BYTES);
    int fd = text ? open(SUBUID_FILE, O_RDONLY | O_NONBLOCK | O_CLOEXEC) : -1;
    size_t size = 0;
    ssize_t got = 0;
    while (fd >= 0 && size < SUBIDS_FILE_BYTES &&
           (got = read(fd, text + size, SUBIDS_FILE_BYTES - size)) > 0)
        size += (size_t)got;
    if (fd >= 0)
        close(fd);
    /* Ranges that are too small are a mistake, which stage 1 reports. */
    bool found = fd >= 0 && got >= 0 &&
                 subids_find(text, size, account ? account->pw_name : "", getuid(), &range) !=
                     SUBIDS_NONE;
    free(text);
    return found;
}

/* The kernel, a security module or a limit may forbid it: whether it works shows by trying. */
static bool has_userns(void) {
    int status = 1;
    pid_t pid = (pid_t)syscall(SYS_clone, (unsigned long)(CLONE_NEWUSER | SIGCHLD), NULL, NULL,
                               NULL, NULL);
    if (pid == 0)
        _exit(0);
    return pid > 0 && waitpid(pid, &status, 0) == pid && status == 0;
}

bool fakeroot_by_userns(const struct fakeroot_options *o) {
    if (getuid() == 0 || (!o->no_subids && has_range()))
        return false;
    return !o->no_userns && has_userns();
}
