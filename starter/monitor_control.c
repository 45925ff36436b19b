/* The control socket: one object each, answered by the end of the connection.  What changes the
 * container is done by the program that does it for everybody else. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "build.h"
#include "monitor.h"

#define PROGRAM APY_BINDIR "/apptainer-py-oci"
#define CONTROLS_MAX 16
#define CONTROL_BYTES 4096

struct control {
    int fd;                              /* -1: free */
    pid_t job;                           /* it is answered when this child has ended, or 0 */
    size_t used;
    char bytes[CONTROL_BYTES];
};

static const struct settings *settings;
static struct control controls[CONTROLS_MAX];
static size_t oldest;
static int listener = -1;

_Static_assert(CONTROLS_MAX + 1 <= CONTROLS_POLLED, "all of them are polled");

void control_open(const struct settings *s) {
    settings = s;
    listener = s->head.control_fd;
    for (size_t i = 0; i < CONTROLS_MAX; i++)
        controls[i].fd = -1;
}

static void answer(struct control *c) {
    if (c->fd >= 0)
        close(c->fd);
    c->fd = -1;
    c->job = 0;
    c->used = 0;
}

/* Where all places are taken by some who say nothing, the one who came first makes room. */
static void accept_control(void) {
    int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0)
        return;
    size_t i = 0;
    while (i < CONTROLS_MAX && controls[i].fd >= 0)
        i++;
    if (i == CONTROLS_MAX) {
        i = oldest;
        oldest = (oldest + 1) % CONTROLS_MAX;
        answer(&controls[i]);
    }
    controls[i].fd = fd;
}

static pid_t begin_job(const char *verb) {
    pid_t pid = 0;
    posix_spawnattr_t how;
    sigset_t none, all;
    const char *words[] = {PROGRAM, "--root", settings->text[TEXT_ROOT],
                           verb,    settings->text[TEXT_ID], NULL};
    union { const char **in; char *const *out; } arguments = {.in = words};
    char *const environment[] = {NULL};
    sigemptyset(&none);
    sigfillset(&all);
    if (posix_spawnattr_init(&how) != 0)
        return 0;
    (void)posix_spawnattr_setsigmask(&how, &none);
    (void)posix_spawnattr_setsigdefault(&how, &all);
    (void)posix_spawnattr_setflags(&how, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
    if (posix_spawn(&pid, PROGRAM, NULL, &how, arguments.out, environment) != 0)
        pid = 0;
    posix_spawnattr_destroy(&how);
    return pid;
}

static void obey(struct control *c, const struct command *what) {
    const char *verb = what->start && !state_started() ? "start"
                       : what->pause                   ? "pause"
                       : what->resume                  ? "resume"
                                                       : NULL;
    if (what->has_size)
        streams_resize(what->rows, what->columns);
    if (what->reopen_log)
        log_reopen();
    c->job = verb != NULL ? begin_job(verb) : 0;
    if (c->job == 0)
        answer(c);
}

static void read_control(struct control *c) {
    struct command what;
    ssize_t got = recv(c->fd, c->bytes + c->used, sizeof(c->bytes) - c->used, MSG_DONTWAIT);
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (got <= 0) {
        answer(c);
        return;
    }
    c->used += (size_t)got;
    /* Whoever asks here and then looks at the state shall find what was done before. */
    state_look();
    enum json_found found = command_read(c->bytes, c->used, &what);
    if (found == JSON_OBJECT)
        obey(c, &what);
    else if (found == JSON_WRONG || c->used == sizeof(c->bytes))
        answer(c);
}

size_t control_wish(struct pollfd *fds) {
    fds[0] = (struct pollfd){.fd = listener, .events = POLLIN};
    for (size_t i = 0; i < CONTROLS_MAX; i++)
        fds[i + 1] = (struct pollfd){.fd = controls[i].job == 0 ? controls[i].fd : -1,
                                     .events = POLLIN};
    return CONTROLS_MAX + 1;
}

void control_work(const struct pollfd *fds, size_t count) {
    for (size_t i = 1; i < count; i++)
        if (fds[i].revents && controls[i - 1].fd == fds[i].fd)
            read_control(&controls[i - 1]);
    if (fds[0].revents)
        accept_control();
}

void control_job_ended(pid_t pid) {
    for (size_t i = 0; i < CONTROLS_MAX; i++) {
        if (controls[i].job != pid)
            continue;
        state_look();
        answer(&controls[i]);
    }
}

void control_close(void) {
    if (listener >= 0)
        close(listener);
    listener = -1;
    for (size_t i = 0; i < CONTROLS_MAX; i++)
        answer(&controls[i]);
}
