/* One hook after another: JSON on stdin, a time limit, and output that is kept for the message. */
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "hook.h"

/* Strings of one entry: pointers into the frame, each vector ended by NULL. */
struct hook_strings {
    struct hook_entry entry;
    const char *path;
    const char **arguments, **environment;
};

struct output {
    int fd;                          /* our end, or -1 */
    size_t used;
    char text[HOOK_OUTPUT_BYTES];
};

static const char *next_string(const char **at, const char *end) {
    const char *text = *at;
    size_t length = strnlen(text, (size_t)(end - text));
    if (text + length == end)
        return NULL;
    *at = text + length + 1;
    return text;
}

/* The entry's strings one by one into `out`, if there is one; -1: they do not fill it exactly. */
static int walk_entry(const char *at, const char *end, const struct hook_entry *e,
                      struct hook_strings *out) {
    const char *text = next_string(&at, end);
    if (text == NULL || *text != '/')
        return -1;
    if (out != NULL)
        out->path = text;
    for (uint32_t i = 0; i < e->argc + e->envc; i++) {
        text = next_string(&at, end);
        if (text == NULL)
            return -1;
        if (out != NULL && i < e->argc)
            out->arguments[i] = text;
        else if (out != NULL)
            out->environment[i - e->argc] = text;
    }
    return at == end ? 0 : -1;
}

static int read_entry(const char *at, const char *end, struct hook_entry *e) {
    if ((size_t)(end - at) < sizeof(*e))
        return -1;
    memcpy(e, at, sizeof(*e));
    return e->size <= sizeof(*e) || e->size > (size_t)(end - at) || e->argc < 1 ||
                   e->argc > HOOK_STRINGS_MAX || e->envc > HOOK_STRINGS_MAX ||
                   e->own_environment > 1
               ? -1
               : 0;
}

int hook_check(const char *frame, size_t size) {
    struct hook_header h;
    struct hook_entry e;
    if (size < sizeof(h))
        return -1;
    memcpy(&h, frame, sizeof(h));
    if (memcmp(h.magic, HOOK_MAGIC, sizeof(h.magic)) != 0 || h.total != size ||
        h.count > HOOK_COUNT_MAX || h.state_before > size - sizeof(h) ||
        h.state_after > size - sizeof(h) - h.state_before)
        return -1;
    const char *at = frame + sizeof(h) + h.state_before + h.state_after, *end = frame + size;
    for (uint32_t i = 0; i < h.count; i++, at += e.size)
        if (read_entry(at, end, &e) < 0 ||
            walk_entry(at + sizeof(e), at + e.size, &e, NULL) < 0)
            return -1;
    return at == end ? 0 : -1;
}

/* A file, not a pipe: a hook that reads nothing then costs neither a signal nor a wait. */
static int state_file(const char *frame, const struct hook_header *h, pid_t pid) {
    const char *state = frame + sizeof(*h);
    char number[24];
    int length = h->state_after == 0 ? 0 : snprintf(number, sizeof(number), "%d", pid);
    int fd = memfd_create("hook-state", MFD_CLOEXEC);
    if (fd < 0 || write(fd, state, h->state_before) != (ssize_t)h->state_before ||
        write(fd, number, (size_t)length) != length ||
        write(fd, state + h->state_before, h->state_after) != (ssize_t)h->state_after ||
        lseek(fd, 0, SEEK_SET) != 0) {
        if (fd >= 0)
            close(fd);
        return -1;
    }
    return fd;
}

static int spawn(const struct hook_strings *k, char *const environment[], const int streams[3],
                 pid_t *pid) {
    posix_spawn_file_actions_t files;
    posix_spawnattr_t how;
    sigset_t none, all;
    union { const char **in; char *const *out; } arguments = {.in = k->arguments},
                                                 own = {.in = k->environment};
    sigemptyset(&none);
    sigfillset(&all);
    if (posix_spawn_file_actions_init(&files) != 0 || posix_spawnattr_init(&how) != 0)
        return ENOMEM;
    for (int i = 0; i < 3; i++)
        (void)posix_spawn_file_actions_adddup2(&files, streams[i], i);
    (void)posix_spawn_file_actions_addclosefrom_np(&files, 3);
    (void)posix_spawnattr_setsigmask(&how, &none);
    (void)posix_spawnattr_setsigdefault(&how, &all);
    (void)posix_spawnattr_setflags(&how, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
    int error = posix_spawn(pid, k->path, &files, &how, arguments.out,
                            k->entry.own_environment ? own.out : environment);
    posix_spawn_file_actions_destroy(&files);
    posix_spawnattr_destroy(&how);
    return error;
}

static long now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static void take_output(struct output *o) {
    char lost[1024];
    size_t space = sizeof(o->text) - o->used;
    ssize_t got = space > 0 ? read(o->fd, o->text + o->used, space)
                            : read(o->fd, lost, sizeof(lost));
    if (got < 0 && (errno == EINTR || errno == EAGAIN))
        return;
    if (got <= 0) {
        close(o->fd);
        o->fd = -1;
    } else if (space > 0) {
        o->used += (size_t)got;
    }
}

/* Until the hook has ended; what its children still write is not waited for. */
static bool watch(int pidfd, struct output out[2], uint32_t timeout_ms) {
    long deadline = now_ms() + (long)timeout_ms;
    for (;;) {
        struct pollfd fds[] = {{.fd = pidfd, .events = POLLIN},
                               {.fd = out[0].fd, .events = POLLIN},
                               {.fd = out[1].fd, .events = POLLIN}};
        long left = timeout_ms == 0 ? -1 : deadline - now_ms();
        int ready = timeout_ms != 0 && left <= 0 ? 0 : poll(fds, 3, (int)left);
        if (ready == 0)
            return false;
        for (int i = 0; i < 2 && ready > 0; i++)
            if (fds[i + 1].revents)
                take_output(&out[i]);
        if (ready > 0 && fds[0].revents && !fds[1].revents && !fds[2].revents)
            return true;
    }
}

/* Go's names of signals, which runc's message has. */
static const char *signal_text(int number) {
    static const char *const names[] = {
        [SIGHUP] = "hangup",           [SIGINT] = "interrupt",
        [SIGQUIT] = "quit",            [SIGILL] = "illegal instruction",
        [SIGTRAP] = "trace/breakpoint trap", [SIGABRT] = "aborted",
        [SIGBUS] = "bus error",        [SIGFPE] = "floating point exception",
        [SIGKILL] = "killed",          [SIGUSR1] = "user defined signal 1",
        [SIGSEGV] = "segmentation fault", [SIGUSR2] = "user defined signal 2",
        [SIGPIPE] = "broken pipe",     [SIGALRM] = "alarm clock",
        [SIGTERM] = "terminated",
    };
    bool known = number > 0 && (size_t)number < sizeof(names) / sizeof(names[0]);
    return known && names[number] != NULL ? names[number] : "signal";
}

static void describe(struct hook_result *r, int status, const struct output out[2]) {
    char how[64];
    if (WIFEXITED(status))
        (void)snprintf(how, sizeof(how), "exit status %d", WEXITSTATUS(status));
    else
        (void)snprintf(how, sizeof(how), "signal: %s%s", signal_text(WTERMSIG(status)),
                       WCOREDUMP(status) ? " (core dumped)" : "");
    (void)snprintf(r->text, sizeof(r->text), "%s, stdout: %.*s, stderr: %.*s", how,
                   (int)out[0].used, out[0].text, (int)out[1].used, out[1].text);
}

static int finish(const struct hook_strings *k, pid_t pid, struct output out[2],
                  struct hook_result *r) {
    int pidfd = (int)syscall(SYS_pidfd_open, pid, 0), status = 0;
    bool in_time = pidfd >= 0 && watch(pidfd, out, k->entry.timeout_ms);
    if (!in_time)
        (void)kill(pid, SIGKILL); /* our own child: the number is its own until we have waited */
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
        ;
    if (pidfd >= 0)
        close(pidfd);
    if (in_time && WIFEXITED(status) && WEXITSTATUS(status) == 0)
        return 0;
    if (in_time)
        describe(r, status, out);
    else
        (void)snprintf(r->text, sizeof(r->text), "hook ran past specified timeout of %u.%us",
                       k->entry.timeout_ms / 1000, k->entry.timeout_ms % 1000 / 100);
    return -1;
}

static int run_spawned(const struct hook_strings *k, int state_fd, char *const environment[],
                       struct hook_result *r) {
    static struct output out[2];
    int pipes[2][2] = {{-1, -1}, {-1, -1}};
    pid_t pid = 0;
    memset(out, 0, sizeof(out));
    int error = pipe2(pipes[0], O_CLOEXEC) < 0 || pipe2(pipes[1], O_CLOEXEC) < 0 ? errno : 0;
    const int streams[3] = {state_fd, pipes[0][1], pipes[1][1]};
    if (error == 0)
        error = spawn(k, environment, streams, &pid);
    for (int i = 0; i < 2; i++) {
        out[i].fd = pipes[i][0];
        if (pipes[i][1] >= 0)
            close(pipes[i][1]);
    }
    int result = error != 0 ? -1 : finish(k, pid, out, r);
    if (error != 0) {
        const char *why = strerror(error);
        /* As Go says it: the clients look for the words. */
        (void)snprintf(r->text, sizeof(r->text), "fork/exec %s: %c%s", k->path,
                       tolower((unsigned char)why[0]), why + 1);
    }
    for (int i = 0; i < 2; i++)
        if (out[i].fd >= 0)
            close(out[i].fd);
    return result;
}

static int run_entry(const char *at, const struct hook_entry *e, int state_fd,
                     char *const environment[], struct hook_result *r) {
    struct hook_strings k = {.entry = *e};
    int result = -1;
    k.arguments = calloc(e->argc + 1, sizeof(*k.arguments));
    k.environment = calloc(e->envc + 1, sizeof(*k.environment));
    if (state_fd < 0 || k.arguments == NULL || k.environment == NULL)
        (void)snprintf(r->text, sizeof(r->text), "out of memory");
    else if (walk_entry(at + sizeof(*e), at + e->size, e, &k) == 0)
        result = run_spawned(&k, state_fd, environment, r);
    free(k.arguments);
    free(k.environment);
    return result;
}

int hook_run(const char *frame, size_t size, pid_t pid, char *const environment[],
             struct hook_result *result) {
    return hook_run_after(frame, size, 0, pid, environment, result);
}

int hook_run_after(const char *frame, size_t size, uint32_t skipped, pid_t pid,
                   char *const environment[], struct hook_result *result) {
    struct hook_header h;
    struct hook_entry e;
    result->failed = HOOK_COUNT_MAX; /* nothing is left to go on with */
    (void)snprintf(result->text, sizeof(result->text), "the hooks are malformed");
    if (hook_check(frame, size) < 0)
        return -1;
    memcpy(&h, frame, sizeof(h));
    const char *at = frame + sizeof(h) + h.state_before + h.state_after;
    for (uint32_t i = 0; i < h.count; i++, at += e.size) {
        memcpy(&e, at, sizeof(e));
        if (i < skipped)
            continue;
        int state = state_file(frame, &h, pid);
        int failed = run_entry(at, &e, state, environment, result);
        if (state >= 0)
            close(state);
        result->failed = i + 1;
        if (failed)
            return -1;
    }
    result->failed = 0;
    result->text[0] = '\0';
    return 0;
}
