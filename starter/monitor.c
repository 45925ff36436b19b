/* starter-monitor: from the settings to the end of the container (monitor.h). */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "monitor.h"

#define TELL_AGAIN_MS 50
#define LINGER_MS 5000

static int read_settings(const char *number, struct settings *s) {
    struct stat st;
    int fd = atoi(number);
    if (fd < 3 || fstat(fd, &st) < 0 || st.st_size < (off_t)sizeof(s->head) ||
        st.st_size > (off_t)MONITOR_BYTES_MAX)
        return -1;
    size_t size = (size_t)st.st_size;
    const char *bytes = mmap(NULL, size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (bytes == MAP_FAILED || bytes[size - 1] != '\0')
        return -1;
    close(fd);
    memcpy(&s->head, bytes, sizeof(s->head));
    if (memcmp(s->head.magic, MONITOR_MAGIC, sizeof(s->head.magic)) != 0 ||
        s->head.total != size || s->head.flags & ~(uint32_t)MONITOR_FLAGS_ALL ||
        s->head.format >= LOG_FORMATS || s->head.init_pid <= 0)
        return -1;
    const char *at = bytes + sizeof(s->head), *end = bytes + size;
    for (size_t i = 0; i < MONITOR_TEXTS; i++) {
        if (at >= end)
            return -1;
        s->text[i] = at;
        at += strlen(at) + 1;
    }
    return at == end ? 0 : -1;
}

/* Ours are closed by an execve: only jobs have one, and the container's process has not. */
static void keep_from_children(const struct settings *s) {
    const int fds[] = {s->head.dir_fd,     s->head.attach_fd,  s->head.control_fd,
                       s->head.log_fd,     s->head.streams[0], s->head.streams[1],
                       s->head.streams[2], s->head.pty_fd,     s->head.ready_fd};
    for (size_t i = 0; i < COUNT(fds); i++)
        if (fds[i] >= 0)
            (void)fcntl(fds[i], F_SETFD, FD_CLOEXEC);
}

/* With a terminal the caller's streams are no business of the container's. */
static void leave_own_streams(void) {
    int fd = open("/dev/null", O_RDWR | O_CLOEXEC);
    for (int i = STDIN_FILENO; fd >= 0 && i <= STDERR_FILENO; i++)
        (void)dup2(fd, i);
    if (fd > STDERR_FILENO)
        close(fd);
}

static int take_signals(void) {
    sigset_t all;
    sigfillset(&all);
    (void)sigprocmask(SIG_SETMASK, &all, NULL);
    return signalfd(-1, &all, SFD_CLOEXEC | SFD_NONBLOCK);
}

/* A job that has ended is answered for; true: the container has. */
static bool reap(pid_t init, int *status) {
    int how;
    pid_t pid;
    bool ended = false;
    while ((pid = waitpid(-1, &how, WNOHANG)) > 0) {
        if (pid == init) {
            *status = how;
            ended = true;
        } else {
            control_job_ended(pid);
        }
    }
    return ended;
}

/* A signal for us is meant for the container: `kill` of this process says so to it. */
static void pass_signals(int signals, pid_t init) {
    struct signalfd_siginfo info;
    while (read(signals, &info, sizeof(info)) == (ssize_t)sizeof(info)) {
        int number = (int)info.ssi_signo;
        /* SAFE: our child, which nobody else reaps: the number is its own. */
        if (number != SIGCHLD && number != SIGPIPE && number != SIGURG)
            (void)kill(init, number);
    }
}

static int watch(const struct settings *s, int signals) {
    static struct pollfd fds[2 + STREAMS_POLLED + CONTROLS_POLLED];
    int status;
    if (reap(s->head.init_pid, &status)) /* its signal came before we looked for any */
        return status;
    for (;;) {
        fds[0] = (struct pollfd){.fd = signals, .events = POLLIN};
        fds[1] = (struct pollfd){.fd = state_watch_fd(), .events = POLLIN};
        size_t streams = streams_wish(fds + 2), controls = control_wish(fds + 2 + streams);
        int timeout = state_tell() ? TELL_AGAIN_MS : -1;
        if (poll(fds, 2 + streams + controls, timeout) < 0)
            continue;
        if (fds[1].revents)
            state_watch_read();
        streams_work(fds + 2, streams);
        control_work(fds + 2 + streams, controls);
        if (fds[0].revents) {
            pass_signals(signals, s->head.init_pid);
            if (reap(s->head.init_pid, &status))
                return status;
        }
    }
}

static long now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* Whoever reads slowly, or is slow to hear of the end, has a while after each step; nobody waits
 * for us by now. */
static void linger(void) {
    static struct pollfd fds[STREAMS_POLLED];
    size_t before = streams_pending();
    long end = now_ms() + LINGER_MS;
    for (;;) {
        streams_close();
        bool told = !state_tell();
        size_t pending = streams_pending();
        if (pending != before)
            end = now_ms() + LINGER_MS;
        before = pending;
        long left = end - now_ms();
        if (left <= 0 || (told && pending == 0))
            return;
        size_t count = streams_wish(fds);
        int timeout = told || left < TELL_AGAIN_MS ? (int)left : TELL_AGAIN_MS;
        if (poll(fds, count, timeout) > 0)
            streams_work(fds, count);
    }
}

/* What is next, and of which container: the launcher has not read its command line. */
static void tell_ready(const struct settings *s) {
    static char text[2 * 4096];
    int size = snprintf(text, sizeof(text), "%c%s%c%s", (int)s->head.next, s->text[TEXT_ROOT],
                        '\0', s->text[TEXT_ID]);
    if (s->head.ready_fd < 0)
        return;
    if (size > 0 && (size_t)size < sizeof(text))
        (void)!write(s->head.ready_fd, text, (size_t)size + 1);
    close(s->head.ready_fd);
}

int main(int argc, char *argv[]) {
    static struct settings s;
    if (argc != 2 || read_settings(argv[1], &s) < 0) {
        static const char text[] = "FATAL:   starter-monitor is not for direct use\n";
        return write(STDERR_FILENO, text, sizeof(text) - 1) < 0 ? 254 : 255;
    }
    /* The caller's streams and those of the container are ours to read: no one else's. */
    (void)prctl(PR_SET_DUMPABLE, 0);
    (void)umask(0027); /* of the log alone: all else is made by others */
    int signals = take_signals();
    keep_from_children(&s);
    if (!(s.head.flags & MONITOR_OWN_STREAMS))
        leave_own_streams();
    log_open(s.head.log_fd, s.text[TEXT_LOG], (enum log_format)s.head.format);
    state_open(&s);
    streams_open(&s);
    control_open(&s);
    if (chdir("/") < 0)
        return 255;
    /* From here on whoever has called may end. */
    (void)prctl(PR_SET_PDEATHSIG, 0);
    tell_ready(&s);
    int status = 0;
    status = watch(&s, signals);
    streams_drain();
    log_end();
    state_ended(status);
    control_close();
    linger();
    return 0;
}
