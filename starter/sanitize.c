/* Everything that a process inherits from its caller, made harmless; restored for the payload. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <unistd.h>

#include "starter.h"

/* What the privileged part needs; a smaller hard limit could not be restored once raised. */
static const struct {
    __rlimit_resource_t resource;
    rlim_t needed;
    const char *text;
} needs[] = {
    {RLIMIT_FSIZE, 1 << 20, "the hard limit on file size (ulimit -Hf) is below 1 MiB; raise it"},
    {RLIMIT_NOFILE, 64, "the hard limit on open files (ulimit -Hn) is below 64; raise it"},
    {RLIMIT_AS, 256 << 20, "the hard limit on memory (ulimit -Hv) is below 256 MiB; raise it"},
    {RLIMIT_DATA, 64 << 20, "the hard limit on data size (ulimit -Hd) is below 64 MiB; raise it"},
    {RLIMIT_STACK, 1 << 20, "the hard limit on stack size (ulimit -Hs) is below 1 MiB; raise it"},
    {RLIMIT_CPU, 5, "the hard limit on processor time (ulimit -Ht) is below 5 seconds; raise it"},
};

static void open_standard_streams(void) {
    for (int fd = 0; fd < 3; fd++)
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", O_RDWR) != fd)
            _exit(255); /* no stream to report on */
}

static void save_and_raise_limits(struct inherited *in) {
    for (int i = 0; i < RLIM_NLIMITS; i++)
        if (getrlimit((__rlimit_resource_t)i, &in->limits[i]) < 0)
            fail("cannot read the resource limits", errno);
    for (size_t i = 0; i < ARRAY_SIZE(needs); i++) {
        struct rlimit now = in->limits[needs[i].resource];
        if (now.rlim_max != RLIM_INFINITY && now.rlim_max < needs[i].needed)
            fail(needs[i].text, 0);
        now.rlim_cur = now.rlim_max;
        /* A stack without limit would move the mappings of the next program. */
        if (needs[i].resource == RLIMIT_STACK)
            continue;
        if (needs[i].resource == RLIMIT_NOFILE && now.rlim_cur > 65536)
            now.rlim_cur = 65536;
        if (setrlimit(needs[i].resource, &now) < 0)
            fail("cannot set the resource limits", errno);
    }
    struct rlimit none = {.rlim_cur = 0, .rlim_max = in->limits[RLIMIT_CORE].rlim_max};
    if (setrlimit(RLIMIT_CORE, &none) < 0)
        fail("cannot set the resource limits", errno);
}

static void reset_signals(struct inherited *in) {
    struct sigaction was, standard = {.sa_handler = SIG_DFL};
    for (int n = 1; n < NSIG; n++) {
        if (n == SIGKILL || n == SIGSTOP || sigaction(n, NULL, &was) < 0)
            continue;
        if (was.sa_handler == SIG_IGN)
            in->ignored |= (uint64_t)1 << (n - 1);
        (void)sigaction(n, &standard, NULL);
    }
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, &in->blocked);
}

static void reset_timers(void) {
    static const struct itimerval off;
    setitimer(ITIMER_REAL, &off, NULL);
    setitimer(ITIMER_VIRTUAL, &off, NULL);
    setitimer(ITIMER_PROF, &off, NULL);
}

static int number_of(const char *name) {
    int number = 0;
    for (; *name; name++) {
        if (*name < '0' || *name > '9' || number > 100000000)
            return -1;
        number = number * 10 + (*name - '0');
    }
    return number;
}

/* The request and the trace are ours by now; all the others are the caller's.
 * /proc says which are open; where it is missing, each number up to the limit is tried. */
void sanitize_descriptors(struct launch *l) {
    struct inherited *in = &l->inherited;
    int dir = open("/proc/self/fd", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (dir >= 0) {
        _Alignas(8) char buffer[4096];
        long got;
        while ((got = syscall(SYS_getdents64, dir, buffer, sizeof(buffer))) > 0)
            for (long at = 0; at < got;) {
                unsigned short length;
                memcpy(&length, buffer + at + 16, sizeof(length));
                int fd = number_of(buffer + at + 19);
                at += length;
                if (fd < 3 || fd == dir || fd == l->request_fd ||
                    fd == l->trace_file)
                    continue;
                if (in->fd_count == LIMIT_INHERITED_FDS)
                    fail("more than 4096 files are open; close some of them", 0);
                in->fds[in->fd_count++] = fd;
            }
        close(dir);
        return;
    }
    for (int fd = 3; fd < LIMIT_INHERITED_FDS; fd++)
        if (fd != l->request_fd && fd != l->trace_file && fcntl(fd, F_GETFD) >= 0)
            in->fds[in->fd_count++] = fd;
    (void)syscall(SYS_close_range, LIMIT_INHERITED_FDS, ~0U, 0);
}

void sanitize_start(struct launch *l) {
    static char *nothing[] = {NULL};
    environ = nothing;
    (void)prctl(PR_SET_DUMPABLE, 0);
    open_standard_streams();
    save_and_raise_limits(&l->inherited);
    reset_signals(&l->inherited);
    reset_timers();
    l->inherited.umask = umask(077);
}

/* Every process but the payload: what the caller had open is no business of ours. */
void sanitize_close_inherited(const struct launch *l) {
    for (size_t i = 0; i < l->inherited.fd_count; i++)
        close(l->inherited.fds[i]);
}

void sanitize_restore_for_payload(const struct launch *l) {
    const struct inherited *in = &l->inherited;
    for (int i = 0; i < RLIM_NLIMITS; i++)
        (void)setrlimit((__rlimit_resource_t)i, &in->limits[i]);
    struct sigaction ignore = {.sa_handler = SIG_IGN}, standard = {.sa_handler = SIG_DFL};
    for (int n = 1; n < NSIG; n++)
        if (n != SIGKILL && n != SIGSTOP)
            (void)sigaction(n, in->ignored >> (n - 1) & 1 ? &ignore : &standard, NULL);
    sigprocmask(SIG_SETMASK, &in->blocked, NULL);
}
