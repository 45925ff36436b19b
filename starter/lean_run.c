/* Apptainer's `create` and `run`: the starter works in a process of its own, which stays as the
 * container's monitor; this one waits until all stands and, for `run`, does what is left. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "lean.h"

#define FAILED 255
/* Above what --preserve-fds and LISTEN_FDS can mean: those numbers are the caller's. */
#define FIRST_OWN_FD 1000

static char word[PATH_MAX + 512];        /* what the monitor says */

static int make_pipe(int ends[2]) {
    if (pipe2(ends, O_CLOEXEC) < 0)
        return -1;
    int high = fcntl(ends[1], F_DUPFD, FIRST_OWN_FD);
    if (high < 0)
        return fcntl(ends[1], F_SETFD, 0); /* a small limit: then where it is */
    close(ends[1]);
    ends[1] = high;
    return 0;
}

/* A session of its own: what is typed at the caller's terminal is not meant for it.  It ends with
 * the caller until all stands. */
__attribute__((noreturn)) static void become_starter(struct lean *l, int argc, char *const argv[],
                                                     lean_launch *launch, int ready, pid_t parent) {
    (void)setsid();
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) < 0 || getppid() != parent)
        _exit(FAILED);
    launch(l, argc, argv, ready);
    _exit(FAILED);
}

static int status_of(pid_t child) {
    int status = 0;
    while (waitpid(child, &status, 0) < 0 && errno == EINTR)
        ;
    return WIFEXITED(status) ? WEXITSTATUS(status) : FAILED;
}

/* The whole word, or nothing if the other side has failed, and has said why. */
static bool hear(int fd) {
    size_t used = 0;
    ssize_t got;
    while ((got = read(fd, word + used, sizeof(word) - used)) != 0) {
        if (got < 0 && errno != EINTR)
            break;
        used += got > 0 ? (size_t)got : 0;
    }
    close(fd);
    return used > 3 && used < sizeof(word) && word[used - 1] == '\0' &&
           strlen(word) + 1 < used;
}

/* A command of ours in a process of its own, for what only the interpreter does. */
static int call(const struct lean *l, int (*command)(struct lean *), const char *name) {
    struct lean again = *l;
    int result = command(&again);
    if (result != LEAN_TO_PYTHON)
        return result;
    pid_t child = fork();
    if (child == 0) {
        char first[] = "apptainer-py", second[] = "oci", third[] = "--root";
        char fourth[PATH_MAX], fifth[16], sixth[256];
        char *words[] = {first, second, third, fourth, fifth, sixth, NULL};
        (void)snprintf(fourth, sizeof(fourth), "%s", l->root);
        (void)snprintf(fifth, sizeof(fifth), "%s", name);
        (void)snprintf(sixth, sizeof(sixth), "%s", l->id);
        lean_interpreter(&again, 6, words);
    }
    return child > 0 && status_of(child) == 0 ? LEAN_DONE : LEAN_FAILED;
}

static void discard(struct lean *l) {
    l->force = true;
    (void)call(l, lean_delete, "delete");
}

/* Whoever starts it is attached before: then nothing that it says is missed. */
static int run_container(struct lean *l) {
    struct container c;
    struct attached a;
    if (container_tell(l, container_find(l, &c)) != LEAN_DONE)
        return FAILED;
    const char *why = attach_open(&c, &a);
    if (why != NULL)
        lean_error(l, "%s", why);
    if (why != NULL || call(l, lean_start, "start") != LEAN_DONE) {
        discard(l);
        return FAILED;
    }
    a.silent = !a.terminal; /* its streams are ours already */
    int status = attach_stay(&c, &a);
    if (status >= 0) /* else it goes on without us: whoever wants to attaches again */
        (void)call(l, lean_delete, "delete");
    return status < 0 ? FAILED : status;
}

int lean_run(struct lean *l, int argc, char *const argv[], lean_launch *launch) {
    int ends[2];
    pid_t self = getpid(), child = make_pipe(ends) < 0 ? -1 : fork();
    if (child < 0) {
        lean_error(l, "cannot start the container's monitor: %s", lean_errno_text(errno));
        return FAILED;
    }
    if (child == 0)
        become_starter(l, argc, argv, launch, ends[1], self);
    close(ends[1]);
    if (!hear(ends[0]))
        return status_of(child);
    l->root = word + 1;
    l->id = word + strlen(word) + 1;
    switch (word[0]) {
    case 'r':
        return run_container(l);
    case 'd':
        return call(l, lean_start, "start") == LEAN_DONE ? 0 : FAILED;
    default:
        return 0;
    }
}
