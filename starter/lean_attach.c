/* `attach`: our streams become those of a container with a monitor, until it ends. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <termios.h>
#include <unistd.h>

#include "lean.h"

/* One direction: what was read and not yet written. */
struct direction {
    int from, to;                        /* -1: over */
    size_t start, used;
    char bytes[16384];
};

int container_connect(const struct container *c, const char *name) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    /* Below its directory: the path itself may be longer than a socket's can be. */
    (void)snprintf(address.sun_path, sizeof(address.sun_path), "/proc/self/fd/%d/%s", c->dir_fd,
                   name);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || connect(fd, (const struct sockaddr *)&address, sizeof(address)) == 0)
        return fd;
    close(fd);
    return -1;
}

static void send_size(const struct container *c, int more) {
    struct winsize size;
    char text[96], byte;
    int fd = ioctl(STDIN_FILENO, TIOCGWINSZ, &size) < 0 ? -1
                                                        : container_connect(c, "control.sock");
    if (fd < 0)
        return;
    int length = snprintf(text, sizeof(text), "{\"consoleSize\":{\"height\":%d,\"width\":%d}}",
                          size.ws_row + more, size.ws_col + more);
    if (send(fd, text, (size_t)length, MSG_NOSIGNAL) == length)
        (void)!read(fd, &byte, 1);
    close(fd);
}

const char *attach_open(const struct container *c, struct attached *a) {
    *a = (struct attached){.fd = -1,
                           .terminal = (c->record.head.flags & RECORD_TERMINAL) != 0};
    if (a->terminal && !isatty(STDIN_FILENO))
        return "attach requires a terminal when terminal config is set to true";
    if (c->record.head.flags & RECORD_MONITOR)
        a->fd = container_connect(c, "attach.sock");
    return a->fd < 0 ? "attach socket not available" : NULL;
}

static void take(struct direction *d) {
    ssize_t got = read(d->from, d->bytes, sizeof(d->bytes));
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    d->start = 0;
    d->used = got > 0 ? (size_t)got : 0;
    if (got <= 0)
        d->from = -1;
}

static void give(struct direction *d) {
    ssize_t put = d->to < 0 ? (ssize_t)d->used : write(d->to, d->bytes + d->start, d->used);
    if (put < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (put < 0) {
        d->from = -1;
        d->used = 0;
        return;
    }
    d->start += (size_t)put;
    d->used -= (size_t)put;
}

static struct pollfd wish(const struct direction *d) {
    if (d->used > 0 && d->to >= 0)
        return (struct pollfd){.fd = d->to, .events = POLLOUT};
    return (struct pollfd){.fd = d->from, .events = POLLIN};
}

static void work(struct direction *d, short ready) {
    if (ready && d->used == 0)
        take(d);
    else if (ready)
        give(d);
    if (d->to < 0)
        d->used = 0;
}

/* As the real one: each signal is the container's, but what is about ourselves. */
static void pass_signals(const struct container *c, int signals, bool terminal) {
    struct signalfd_siginfo info;
    while (read(signals, &info, sizeof(info)) == (ssize_t)sizeof(info)) {
        int number = (int)info.ssi_signo;
        if (number == SIGWINCH && terminal)
            send_size(c, 0);
        else if (number != SIGCHLD && number != SIGPIPE && number != SIGURG &&
                 number != SIGWINCH)
            (void)syscall(SYS_pidfd_send_signal, c->init_pidfd, number, NULL, 0);
    }
}

static void carry(const struct container *c, const struct attached *a, int signals) {
    static struct direction in, out;
    in = (struct direction){.from = a->silent ? -1 : STDIN_FILENO, .to = a->fd};
    out = (struct direction){.from = a->fd, .to = a->silent ? -1 : STDOUT_FILENO};
    while (out.from >= 0 || out.used > 0) {
        struct pollfd fds[] = {{.fd = signals, .events = POLLIN}, wish(&in), wish(&out)};
        if (poll(fds, COUNT(fds), -1) < 0)
            continue;
        if (fds[0].revents)
            pass_signals(c, signals, a->terminal);
        work(&in, fds[1].revents);
        work(&out, fds[2].revents);
    }
}

/* What the monitor has left when nothing more came. */
static int read_exit(const struct container *c) {
    char digits[16] = "";
    int fd = openat(c->dir_fd, "exit", O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    ssize_t got = fd < 0 ? -1 : read(fd, digits, sizeof(digits) - 1);
    if (fd >= 0)
        close(fd);
    return got > 0 ? atoi(digits) : -1;
}

int attach_stay(const struct container *c, const struct attached *a) {
    struct termios before, raw;
    sigset_t all;
    sigfillset(&all);
    (void)sigprocmask(SIG_SETMASK, &all, NULL);
    int signals = signalfd(-1, &all, SFD_CLOEXEC | SFD_NONBLOCK);
    bool is_raw = a->terminal && tcgetattr(STDIN_FILENO, &before) == 0;
    if (is_raw) {
        raw = before;
        cfmakeraw(&raw);
        (void)tcsetattr(STDIN_FILENO, TCSANOW, &raw);
        /* Twice: a change of size has the program draw its screen again. */
        send_size(c, 1);
        send_size(c, 0);
    }
    carry(c, a, signals);
    if (is_raw) {
        (void)tcsetattr(STDIN_FILENO, TCSANOW, &before);
        (void)!write(STDOUT_FILENO, "\r", 1);
    }
    close(signals);
    int status = read_exit(c);
    if (status < 0)
        lean_error(c->lean, "the connection to %s was lost", c->lean->id);
    return status;
}

int lean_attach(struct lean *l) {
    struct container c;
    struct attached a;
    int result = container_tell(l, container_find(l, &c));
    if (result != LEAN_DONE)
        return result;
    enum status status = container_status(&c);
    if (status != STATUS_RUNNING) {
        lean_error(l, "could not attach to %s: not in running state", l->id);
        return LEAN_FAILED;
    }
    const char *why = attach_open(&c, &a);
    if (why != NULL) {
        lean_error(l, c.record.head.flags & RECORD_MONITOR ? "%s" : "%s, container state: running",
                   why);
        return LEAN_FAILED;
    }
    int code = attach_stay(&c, &a);
    _exit(code < 0 ? 255 : code);
}
