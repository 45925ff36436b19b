/* GO: init becomes the payload.  After the filter is on, as few system calls as can be. */
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/close_range.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "init.h"

#ifndef AT_EACCESS
#define AT_EACCESS 0x200
#endif

static char *arguments[PROCESS_STRINGS_MAX + 1], *variables[PROCESS_STRINGS_MAX + 1];
static char program[LIMIT_PATH_BYTES];

/* What the payload keeps are the caller's own descriptors, and none of ours may sit among them. */
static int mark_descriptors(const struct init *s, enum go_step *step) {
    const unsigned first = 3 + s->process.header.keep_fds;
    const int own[] = {s->socket,  s->passed,     s->proc_fd, s->host_proc_fd,
                       s->root_fd, s->context_fd, s->mount_fd};
    *step = GOSTEP_DESCRIPTORS;
    for (size_t i = 0; i < ARRAY_SIZE(own); i++)
        if (own[i] >= 0 && (unsigned)own[i] < first) {
            errno = EBADF;
            return -1;
        }
    return (int)syscall(SYS_close_range, first, ~0U, CLOSE_RANGE_CLOEXEC);
}

static int set_label(struct init *s, enum go_step *step) {
    const char *label = process_string(&s->process, PROCESS_LABEL);
    *step = GOSTEP_LABEL;
    if (label == NULL)
        return 0;
    int fd = openat(init_proc(s), "self/attr/exec", O_WRONLY | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0)
        return -1;
    ssize_t wrote = write(fd, label, strlen(label));
    int error = errno;
    close(fd);
    errno = error;
    return wrote == (ssize_t)strlen(label) ? 0 : -1;
}

/* Master takes the listener out of us by its number and says so, or the first call that it is to
 * judge would fail for want of a listener.  write(2) and read(2): a filter that forbids them would
 * forbid the payload's own. */
static int hand_over_listener(const struct init *s, long listener) {
    const struct op_reply a = {.op = OP_GO, .code = ERR_OK, .value = (uint32_t)listener};
    char ack;
    if (write(s->socket, &a, sizeof(a)) != (ssize_t)sizeof(a) || read(s->socket, &ack, 1) != 1)
        return -1;
    close((int)listener);
    return 0;
}

static int install_filter(const struct init *s, enum go_step *step) {
    const struct process *p = &s->process;
    size_t size;
    const char *bytes = process_bytes(p, PROCESS_FILTER, &size);
    struct sock_fprog filter = {.len = (unsigned short)p->header.count[PROCESS_FILTER]};
    bool listens = (p->header.flags & PROCESS_LISTENER) != 0;
    memcpy(&filter.filter, &bytes, sizeof(bytes)); /* the kernel's structure is not const-correct */
    *step = GOSTEP_FILTER;
    if (filter.len == 0)
        return 0;
    /* An ordinary user's master can take a descriptor only out of a dumpable process. */
    if (listens && p->header.flags & PROCESS_USERNS)
        (void)prctl(PR_SET_DUMPABLE, 1);
    long result = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, p->header.filter_flags, &filter);
    if (result < 0 || (listens && hand_over_listener(s, result) < 0))
        return -1;
    if (listens)
        (void)prctl(PR_SET_DUMPABLE, 0);
    return 0;
}

NO_RETURN static void die(const char *what, const char *path, int error) {
    char text[1024] = "";
    const char *why = strerrordesc_np(error) ? strerrordesc_np(error) : "error";
    append_text(text, sizeof(text), what);
    append_escaped(text, sizeof(text) - 128, path, strlen(path));
    append_text(text, sizeof(text), ": ");
    size_t at = append_text(text, sizeof(text), why) - strlen(why);
    text[at] = (char)tolower((unsigned char)text[at]); /* as the rest of a runtime's texts */
    report("", text);
    _exit(255);
}

/* Waits until `start` opens the other end.  One that dies between open and read leaves us a broken
 * pipe: the next one is waited for. */
static int wait_for_start(int fifo, int proc) {
    char path[32] = "self/fd/";
    append_number(path, sizeof(path), (uint64_t)fifo);
    for (;;) {
        int fd = openat(proc, path, O_WRONLY | O_CLOEXEC);
        if (fd < 0 && errno == EINTR)
            continue;
        if (fd < 0)
            return -1;
        ssize_t wrote = write(fd, "0", 1);
        close(fd);
        if (wrote == 1)
            return 0;
        if (errno != EPIPE && errno != EINTR)
            return -1;
    }
}

/* Now there is somebody to tell.  A filter may not know the call: then the open will show it. */
static int check_fifo(const struct init *s, enum go_step *step) {
    *step = GOSTEP_FIFO;
    if (s->passed < 0 ||
        syscall(SYS_faccessat2, s->passed, "", W_OK, AT_EACCESS | AT_EMPTY_PATH) == 0)
        return 0;
    return errno == EACCES || errno == EROFS ? -1 : 0;
}

static void end_by_signal(int number) {
    _exit(128 + number);
}

/* The first process of a pid namespace does not have signals' default actions, but a container that
 * was not started ends by them all the same.  execve takes the handlers away. */
static void end_by_signals(void) {
    static const int numbers[] = {SIGHUP, SIGINT, SIGQUIT, SIGTERM};
    struct sigaction end = {.sa_handler = end_by_signal}, before;
    for (size_t i = 0; i < sizeof(numbers) / sizeof(numbers[0]); i++)
        if (sigaction(numbers[i], NULL, &before) == 0 && before.sa_handler == SIG_DFL)
            (void)sigaction(numbers[i], &end, NULL);
}

/* With a fifo the channel is closed first: `create` ends, and whatever fails now has nobody to tell
 * but stderr. */
static void wait_if_asked(struct init *s) {
    if (s->passed < 0)
        return;
    step_begin(STEP_GO);
    init_close(&s->socket);
    if (wait_for_start(s->passed, s->proc_fd) < 0)
        die("cannot wait for the start: ", "the fifo", errno);
    init_close(&s->passed);
    init_close(&s->proc_fd);
}

/* The caller's too: whoever waits for the end of a pipe must not have to wait for `start`. */
static void close_unlisted(const struct init *s) {
    const int kept[] = {s->socket, s->passed, s->proc_fd};
    unsigned from = 3 + s->process.header.keep_fds;
    for (;;) {
        unsigned next = ~0U;
        for (size_t i = 0; i < ARRAY_SIZE(kept); i++)
            if (kept[i] >= 0 && (unsigned)kept[i] >= from && (unsigned)kept[i] < next)
                next = (unsigned)kept[i];
        if (next > from)
            (void)syscall(SYS_close_range, from, next == ~0U ? next : next - 1, 0);
        if (next == ~0U)
            return;
        from = next + 1;
    }
}

/* What is left is the channel and, to wait at the fifo, that and a procfs: a working directory that
 * names a descriptor of ours finds nothing (CVE-2024-21626). */
static void close_the_rest(struct init *s) {
    init_close(&s->root_fd);
    init_close(&s->host_proc_fd);
    if (s->passed < 0)
        init_close(&s->proc_fd);
    close_unlisted(s);
}

/* For a container that others will run in: it ends when it is asked to.  Held back and waited for,
 * because what has no handler never reaches the first process of a pid namespace. */
NO_RETURN static void stay_empty(void) {
    siginfo_t info;
    sigset_t wanted;
    sigemptyset(&wanted);
    sigaddset(&wanted, SIGCHLD);
    sigaddset(&wanted, SIGINT);
    sigaddset(&wanted, SIGTERM);
    (void)sigprocmask(SIG_SETMASK, &wanted, NULL);
    (void)syscall(SYS_close_range, 3, ~0U, 0);
    for (;;) {
        while (waitpid(-1, NULL, WNOHANG) > 0)
            ;
        if (sigwaitinfo(&wanted, &info) > 0 && info.si_signo != SIGCHLD)
            _exit(0);
    }
}

/* Taking an identity has cleared the signal; whoever ended since then has closed the channel. */
static void tie_to_master(const struct init *s) {
    struct pollfd master = {.fd = s->socket, .events = POLLRDHUP};
    bool tied = (s->process.header.flags & PROCESS_TIED) != 0;
    (void)prctl(PR_SET_PDEATHSIG, tied ? SIGKILL : 0);
    if (tied && poll(&master, 1, 0) > 0)
        _exit(255);
}

static void become(struct init *s, enum go_step *step) {
    const struct process *p = &s->process;
    const bool early = !(p->header.flags & PROCESS_NO_NEW_PRIVS);
    const bool empty = (p->header.flags & PROCESS_EMPTY) != 0;
    struct sigaction ignore = {.sa_handler = SIG_IGN}, before;
    process_strings(p, PROCESS_ARGS, arguments);
    process_strings(p, PROCESS_ENV, variables);
    *step = GOSTEP_FIFO;
    if ((s->passed >= 0 && init_proc(s) < 0) || mark_descriptors(s, step) < 0 ||
        set_label(s, step) < 0)
        return;
    close_the_rest(s);
    /* Without no_new_privs the filter needs a capability that the payload may not have. */
    if ((early && install_filter(s, step) < 0) || identity_take(s, step) < 0 ||
        (!empty && lookup_program(arguments, variables, program, sizeof(program), step) < 0) ||
        check_fifo(s, step) < 0)
        return;
    (void)umask(p->header.flags & PROCESS_SET_UMASK ? p->header.umask : s->umask);
    (void)sigaction(SIGPIPE, &ignore, &before);
    if (s->passed >= 0 && !empty)
        end_by_signals();
    tie_to_master(s);
    if (!early && install_filter(s, step) < 0)
        return;
    wait_if_asked(s);
    (void)sigaction(SIGPIPE, &before, NULL);
    if (hooks_before_start(p, variables) < 0)
        _exit(255);
    if (empty)
        stay_empty();
    step_begin(STEP_EXEC_PAYLOAD);
    (void)execve(program, arguments, variables);
    die("exec ", program, errno); /* started, and over: as runc, this is the container's own end */
}

int init_go(struct init *s, const struct op_request *q, struct op_reply *a) {
    enum go_step step = GOSTEP_FRAME;
    if (q->flags != 0)
        return ERR_MALFORMED;
    become(s, &step); /* returns only if it failed */
    return init_failed_at(a, step);
}
