/* What is known of a container beyond its record: when it was started, how it ended, who is told.
 *
 *   STATE/ID/monitor     JSON: the members that `state` adds for this program
 *   STATE/ID/exit        the exit status as digits, when nothing more comes
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "monitor.h"

#define FIFO_FILE "exec.fifo"
#define MESSAGES_MAX 16

static const struct settings *settings;
static int watch_fd = -1, sync_dir = -1; /* of the socket that is told */
static uint64_t created_at, started_at, finished_at;
static bool paused, ended;
static int exit_code;
static char exit_text[64];
/* The last words of the state at each change; the socket may not take them at once. */
static char *messages[MESSAGES_MAX];
static size_t message_count;

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return (uint64_t)now.tv_sec * 1000000000U + (uint64_t)now.tv_nsec;
}

/* The members, each with a comma before it. */
static void members(char *out, size_t size) {
    size_t used = (size_t)snprintf(out, size, ",\"createdAt\":%lu", created_at);
    if (started_at != 0)
        used += (size_t)snprintf(out + used, size - used, ",\"startedAt\":%lu", started_at);
    if (ended)
        used += (size_t)snprintf(out + used, size - used,
                                 ",\"finishedAt\":%lu,\"exitCode\":%d,\"exitDesc\":\"%s\"",
                                 finished_at, exit_code, exit_text);
}

/* By another name first: a reader finds the old one or the new one. */
static void write_file(const char *name, const char *fresh, const char *text) {
    const int flags = O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW;
    int fd = openat(settings->head.dir_fd, fresh, flags, 0600);
    if (fd < 0)
        return; /* it was deleted: nobody asks any more */
    size_t size = strlen(text);
    bool whole = write(fd, text, size) == (ssize_t)size;
    close(fd);
    if (whole)
        (void)renameat(settings->head.dir_fd, fresh, settings->head.dir_fd, name);
    else
        (void)unlinkat(settings->head.dir_fd, fresh, 0);
}

static void write_state(void) {
    static char more[512], text[2 * 4096 + 1024];
    members(more, sizeof(more));
    (void)snprintf(text, sizeof(text), "{%s,%s}", more + 1, settings->text[TEXT_SOCKETS]);
    write_file("monitor", ".monitor", text);
}

static void note(const char *status) {
    char more[512];
    write_state();
    if (*settings->text[TEXT_SYNC] == '\0' || message_count == MESSAGES_MAX)
        return;
    members(more, sizeof(more));
    char *text = NULL;
    if (asprintf(&text, "%s%s%s%s,%s}", settings->text[TEXT_STATE_BEFORE], status,
                 settings->text[TEXT_STATE_AFTER], more, settings->text[TEXT_SOCKETS]) > 0)
        messages[message_count++] = text;
    (void)state_tell();
}

/* Below its directory: the path itself may be longer than a socket's can be. */
static int sync_address(struct sockaddr_un *address) {
    const char *name = strrchr(settings->text[TEXT_SYNC], '/');
    *address = (struct sockaddr_un){.sun_family = AF_UNIX};
    int length = snprintf(address->sun_path, sizeof(address->sun_path), "/proc/self/fd/%d%s",
                          sync_dir, name);
    return sync_dir >= 0 && length < (int)sizeof(address->sun_path) ? 0 : -1;
}

/* 1: told; 0: not now; -1: nobody is there. */
static int send_message(const char *text) {
    struct sockaddr_un address;
    int fd = sync_address(&address) < 0
                 ? -1
                 : socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return -1;
    int result = -1, space = (int)strlen(text) + 4096;
    (void)setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &space, sizeof(space));
    if (connect(fd, (const struct sockaddr *)&address, sizeof(address)) < 0)
        result = errno == EAGAIN ? 0 : -1;
    else if (send(fd, text, strlen(text), MSG_NOSIGNAL) == (ssize_t)strlen(text))
        result = 1;
    close(fd);
    return result;
}

bool state_tell(void) {
    while (message_count > 0) {
        if (send_message(messages[0]) == 0)
            return true;
        /* Whoever does not listen is not told: it is no part of the container. */
        free(messages[0]);
        memmove(messages, messages + 1, (message_count - 1) * sizeof(messages[0]));
        message_count--;
    }
    return false;
}

static bool is_frozen(void) {
    char said[16] = "";
    int fd = *settings->text[TEXT_FREEZER] == '\0'
                 ? -1
                 : open(settings->text[TEXT_FREEZER], O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    ssize_t got = read(fd, said, sizeof(said) - 1);
    close(fd);
    return got > 0 && (said[0] == '1' || said[0] == 'F');
}

void state_look(void) {
    struct stat st;
    if (ended)
        return;
    if (started_at == 0) {
        if (fstatat(settings->head.dir_fd, FIFO_FILE, &st, AT_SYMLINK_NOFOLLOW) == 0)
            return;
        started_at = now_ns();
        note("running");
    }
    bool frozen = is_frozen();
    if (frozen != paused) {
        paused = frozen;
        note(paused ? "paused" : "running");
    }
}

bool state_started(void) {
    return started_at != 0;
}

/* Go's names, which begin with a small letter unless it is an abbreviation. */
static void signal_text(int number, char *out, size_t size) {
    const char *name = sigdescr_np(number);
    (void)snprintf(out, size, "%s", name != NULL ? name : "unknown");
    if (out[0] >= 'A' && out[0] <= 'Z' && out[1] >= 'a' && out[1] <= 'z')
        out[0] = (char)(out[0] - 'A' + 'a');
}

void state_ended(int status) {
    char digits[16], name[40];
    state_look();
    finished_at = now_ns();
    /* Started, and over before `start` had removed the fifo: who waits there can only be killed. */
    if (started_at == 0 && WIFEXITED(status)) {
        started_at = finished_at;
        note("running");
    }
    ended = true;
    if (WIFSIGNALED(status)) {
        exit_code = 128 + WTERMSIG(status);
        signal_text(WTERMSIG(status), name, sizeof(name));
        (void)snprintf(exit_text, sizeof(exit_text), "interrupted by signal %s", name);
    } else {
        exit_code = WEXITSTATUS(status);
        (void)snprintf(exit_text, sizeof(exit_text), "exited with code %d", exit_code);
    }
    if (*settings->text[TEXT_PID_FILE] != '\0')
        (void)unlink(settings->text[TEXT_PID_FILE]);
    note("stopped");
    (void)snprintf(digits, sizeof(digits), "%d", exit_code);
    write_file("exit", ".exit", digits);
    /* Last: whoever finds no socket finds all the rest. */
    (void)unlinkat(settings->head.dir_fd, "attach.sock", 0);
    (void)unlinkat(settings->head.dir_fd, "control.sock", 0);
}

static void open_sync(const char *path) {
    static char directory[4096];
    const char *name = strrchr(path, '/');
    if (name == NULL || (size_t)(name - path) >= sizeof(directory))
        return;
    memcpy(directory, path, (size_t)(name - path));
    directory[name - path] = '\0';
    sync_dir = open(name == path ? "/" : directory, O_PATH | O_DIRECTORY | O_CLOEXEC);
}

/* The start is the end of the fifo; a pause is a write to the freezer's file, whoever does it. */
void state_open(const struct settings *s) {
    char path[48];
    settings = s;
    created_at = s->head.created_ns;
    open_sync(s->text[TEXT_SYNC]);
    watch_fd = inotify_init1(IN_CLOEXEC | IN_NONBLOCK);
    (void)snprintf(path, sizeof(path), "/proc/self/fd/%d", s->head.dir_fd);
    if (watch_fd >= 0) {
        (void)inotify_add_watch(watch_fd, path, IN_DELETE | IN_ONLYDIR);
        if (*s->text[TEXT_FREEZER] != '\0')
            (void)inotify_add_watch(watch_fd, s->text[TEXT_FREEZER], IN_MODIFY);
    }
    note("created");
    state_look();
}

int state_watch_fd(void) {
    return watch_fd;
}

void state_watch_read(void) {
    _Alignas(struct inotify_event) char events[4096];
    while (read(watch_fd, events, sizeof(events)) > 0)
        ;
    state_look();
}
