/* `start`: opens the fifo at which init waits, so that it becomes the payload; then hooks. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#include "hook.h"
#include "lean.h"

/* Whoever reads first has started it.  NULL, or why not. */
static const char *open_fifo(const struct container *c) {
    char byte;
    const char *why = "container process is already dead";
    lean_step_begin(STEP_OPEN_FIFO);
    int fd = openat(c->dir_fd, CLIENT_FIFO, O_RDONLY | O_NONBLOCK | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0)
        return "cannot start an already running container";
    struct pollfd fds[] = {{.fd = fd, .events = POLLIN},
                           {.fd = c->init_pidfd, .events = POLLIN}};
    int ready;
    do
        ready = poll(fds, COUNT(fds), -1);
    while (ready < 0 && errno == EINTR);
    if (ready > 0 && fds[0].revents)
        why = read(fd, &byte, 1) == 1 ? NULL : "cannot start an already running container";
    close(fd);
    lean_step_end(STEP_OPEN_FIFO);
    if (why == NULL && unlinkat(c->dir_fd, CLIENT_FIFO, 0) < 0)
        why = "cannot remove the fifo of the container";
    return why;
}

/* The specification: an error is generated and the container is stopped. */
static int run_poststart(const struct container *c) {
    static struct hook_result result;
    size_t size;
    const char *frame = record_bytes(&c->record, RECORD_POSTSTART, &size);
    lean_step_begin(STEP_POSTSTART);
    int failed = size == 0 ? 0 : hook_run(frame, size, c->record.head.init_pid, c->lean->envp,
                                          &result);
    lean_step_end(STEP_POSTSTART);
    if (failed == 0)
        return LEAN_DONE;
    (void)lean_signal(c, SIGKILL);
    (void)lean_wait_end(c->init_pidfd, 10000);
    lean_error(c->lean, "error running poststart hook #%u: %s", result.failed - 1, result.text);
    return LEAN_FAILED;
}

/* So that whoever asks next finds when it was started; the answer is the end. */
static void tell_monitor(const struct container *c) {
    char byte;
    int fd = c->record.head.flags & RECORD_MONITOR ? container_connect(c, "control.sock") : -1;
    if (fd < 0)
        return; /* it has ended by now, perhaps */
    if (send(fd, "{}", 2, MSG_NOSIGNAL) == 2)
        (void)!read(fd, &byte, 1);
    close(fd);
}

static const char *refusal(enum status status) {
    switch (status) {
    case STATUS_STOPPED:
        return "cannot start a container that has stopped";
    case STATUS_RUNNING:
        return "cannot start an already running container";
    case STATUS_PAUSED:
        return "cannot start a container in the paused state";
    case STATUS_CREATING:
        return "cannot start a container in the creating state";
    case STATUS_CREATED:
    default:
        return NULL;
    }
}

int lean_start(struct lean *l) {
    struct container c;
    if (lean_variable(l->envp, "NOTIFY_SOCKET") != NULL ||
        lean_variable(l->envp, "LISTEN_FDS") != NULL)
        return LEAN_TO_PYTHON;
    int result = container_tell(l, container_find(l, &c));
    if (result != LEAN_DONE)
        return result;
    /* `create` holds the lock until its container waits at the fifo. */
    result = container_tell(l, container_lock(&c, true));
    if (result != LEAN_DONE || c.record.head.flags & RECORD_PYTHON)
        return result != LEAN_DONE ? result : LEAN_TO_PYTHON;
    const char *why = refusal(container_status(&c));
    if (why == NULL)
        why = open_fifo(&c);
    /* Hooks may ask for this container, and take any time. */
    container_unlock(&c);
    if (why == NULL)
        tell_monitor(&c);
    if (why == NULL)
        return run_poststart(&c);
    if (l->apptainer)
        lean_error(l, "cannot start '%s', the state of the container must be created", l->id);
    else
        lean_error(l, "%s", why);
    return LEAN_FAILED;
}
