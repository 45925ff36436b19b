/* Stays between the caller and a payload in the foreground (relay.h). */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/signalfd.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#include "relay.h"

/* One direction of a terminal: what was read and not yet written. */
struct flow_buffer {
    int from, to;                    /* -1: this end is over */
    size_t start, used;
    char bytes[4096];
};

struct relay {
    pid_t pid;
    int pidfd, signals, pty;
    bool raw;
    struct termios before;
    struct flow_buffer in, out;      /* stdin → pty, pty → stdout */
};

int relay_begin(void) {
    sigset_t all;
    sigfillset(&all);
    /* These come from ourselves, and cannot be held back. */
    sigdelset(&all, SIGSEGV);
    sigdelset(&all, SIGBUS);
    sigdelset(&all, SIGFPE);
    sigdelset(&all, SIGILL);
    return sigprocmask(SIG_SETMASK, &all, NULL);
}

static void copy_window(const struct relay *r) {
    struct winsize size;
    if (r->pty >= 0 && ioctl(STDIN_FILENO, TIOCGWINSZ, &size) == 0)
        (void)ioctl(r->pty, TIOCSWINSZ, &size);
}

static void make_raw(struct relay *r) {
    struct termios raw;
    if (tcgetattr(STDIN_FILENO, &r->before) < 0)
        return;
    raw = r->before;
    cfmakeraw(&raw);
    r->raw = tcsetattr(STDIN_FILENO, TCSANOW, &raw) == 0;
}

static int open_relay(struct relay *r, pid_t pid, int pty) {
    sigset_t all;
    sigfillset(&all);
    memset(r, 0, sizeof(*r));
    r->pid = pid;
    r->pty = pty;
    r->in = (struct flow_buffer){.from = pty < 0 ? -1 : STDIN_FILENO, .to = pty};
    r->out = (struct flow_buffer){.from = pty, .to = pty < 0 ? -1 : STDOUT_FILENO};
    r->pidfd = (int)syscall(SYS_pidfd_open, pid, 0);
    r->signals = signalfd(-1, &all, SFD_CLOEXEC | SFD_NONBLOCK);
    if (r->pidfd < 0 || r->signals < 0 || relay_begin() < 0)
        return -1;
    if (pty >= 0) {
        (void)fcntl(pty, F_SETFL, fcntl(pty, F_GETFL) | O_NONBLOCK);
        copy_window(r);
        make_raw(r);
    }
    return 0;
}

static void pass_signals(const struct relay *r) {
    struct signalfd_siginfo info;
    while (read(r->signals, &info, sizeof(info)) == (ssize_t)sizeof(info)) {
        int number = (int)info.ssi_signo;
        if (number == SIGWINCH && r->pty >= 0)
            copy_window(r);
        /* SIGPIPE is about our own writing; SIGURG no client sends, and runc drops it too. */
        else if (number != SIGCHLD && number != SIGPIPE && number != SIGURG)
            (void)syscall(SYS_pidfd_send_signal, r->pidfd, number, NULL, 0);
    }
}

static void take(struct flow_buffer *b) {
    ssize_t got = read(b->from, b->bytes, sizeof(b->bytes));
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    b->start = 0;
    b->used = got > 0 ? (size_t)got : 0;
    if (got <= 0)
        b->from = -1; /* EIO: the last slave end is closed */
}

static void give(struct flow_buffer *b) {
    ssize_t put = write(b->to, b->bytes + b->start, b->used);
    if (put < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (put < 0) {
        b->used = 0; /* nobody reads: what comes is lost, and the payload goes on */
        return;
    }
    b->start += (size_t)put;
    b->used -= (size_t)put;
}

/* At most one buffer in each direction, so neither side can fill memory. */
static struct pollfd wish(const struct flow_buffer *b) {
    struct pollfd none = {.fd = -1};
    if (b->used > 0)
        return (struct pollfd){.fd = b->to, .events = POLLOUT};
    return b->from < 0 ? none : (struct pollfd){.fd = b->from, .events = POLLIN};
}

static void copy(struct flow_buffer *b, short ready) {
    if (ready && b->used > 0)
        give(b);
    else if (ready)
        take(b);
}

/* Returns whether our child has ended; reaps the children of others that have become ours. */
static bool reap(const struct relay *r, int *status) {
    int how;
    pid_t pid;
    bool ended = false;
    while ((pid = waitpid(-1, &how, WNOHANG)) > 0) {
        if (pid != r->pid)
            continue;
        *status = how;
        ended = true;
    }
    return ended || (pid < 0 && errno == ECHILD);
}

/* What the payload wrote before it ended still lies in the terminal; a process that it left behind
 * may hold the other end open for ever, so only what is there is taken. */
static void drain(struct relay *r) {
    while (r->out.from >= 0 || r->out.used > 0) {
        struct pollfd fd = wish(&r->out);
        if (poll(&fd, 1, r->out.used > 0 ? -1 : 0) <= 0)
            return;
        copy(&r->out, fd.revents);
    }
}

static int stay(struct relay *r, int *status) {
    for (;;) {
        struct pollfd fds[] = {{.fd = r->signals, .events = POLLIN},
                               {.fd = r->pidfd, .events = POLLIN},
                               wish(&r->in),
                               wish(&r->out)};
        if (poll(fds, 4, -1) < 0) {
            if (errno == EINTR)
                continue;
            return -1;
        }
        if (fds[0].revents)
            pass_signals(r);
        copy(&r->in, fds[2].revents);
        copy(&r->out, fds[3].revents);
        if ((fds[0].revents || fds[1].revents) && reap(r, status)) {
            drain(r);
            return 0;
        }
    }
}

int relay_run(pid_t pid, int pty_fd, int *status) {
    static struct relay r;
    int result = open_relay(&r, pid, pty_fd);
    if (result == 0)
        result = stay(&r, status);
    int error = errno;
    if (r.raw)
        (void)tcsetattr(STDIN_FILENO, TCSANOW, &r.before);
    if (r.pidfd >= 0)
        close(r.pidfd);
    if (r.signals >= 0)
        close(r.signals);
    errno = error;
    return result;
}
