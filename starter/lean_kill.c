/* `state` and `kill`: one look at the record, one signal. */
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "lean.h"

int lean_state(struct lean *l) {
    struct container c;
    int result = container_tell(l, container_find(l, &c));
    if (result != LEAN_DONE)
        return result;
    enum status status = container_status(&c);
    int pid = status == STATUS_STOPPED || c.init_pidfd < 0 ? 0 : c.record.head.init_pid;
    (void)printf("%s%d%s%s%s", record_string(&c.record, RECORD_STATE, 0), pid,
                 record_string(&c.record, RECORD_STATE, 1), container_status_text(status),
                 record_string(&c.record, RECORD_STATE, 2));
    return fflush(stdout) == 0 ? LEAN_DONE : LEAN_FAILED;
}

/* The names that runc knows, by number. */
static const char *const signal_names[] = {
    [1] = "HUP",     [2] = "INT",   [3] = "QUIT",  [4] = "ILL",   [5] = "TRAP",   [6] = "ABRT",
    [7] = "BUS",     [8] = "FPE",   [9] = "KILL",  [10] = "USR1", [11] = "SEGV",  [12] = "USR2",
    [13] = "PIPE",   [14] = "ALRM", [15] = "TERM", [16] = "STKFLT", [17] = "CHLD", [18] = "CONT",
    [19] = "STOP",   [20] = "TSTP", [21] = "TTIN", [22] = "TTOU", [23] = "URG",   [24] = "XCPU",
    [25] = "XFSZ",   [26] = "VTALRM", [27] = "PROF", [28] = "WINCH", [29] = "IO", [30] = "PWR",
    [31] = "SYS",
};

static bool read_signal(const char *text, int *number) {
    char *end;
    errno = 0;
    long value = strtol(text, &end, 10);
    const char *digits = text + (*text == '+' || *text == '-');
    if (*digits >= '0' && *digits <= '9' && *end == '\0' && errno == 0 && value <= INT_MAX &&
        value >= INT_MIN) {
        *number = (int)value;
        return true;
    }
    const char *name = strncasecmp(text, "SIG", 3) == 0 ? text + 3 : text;
    for (size_t i = 1; i < COUNT(signal_names); i++)
        if (strcasecmp(name, signal_names[i]) == 0) {
            *number = (int)i;
            return true;
        }
    return false;
}

/* 0, ESRCH where nobody is left, or an errno.  Without a pid namespace the end of init ends nobody
 * else, so that SIGKILL goes to each process of the container. */
int lean_signal(const struct container *c, int number) {
    bool all = number == SIGKILL && !(c->record.head.flags & RECORD_PIDNS);
    bool killed = all && cgroup_kill_all(&c->record);
    if (c->init_pidfd < 0)
        return killed ? 0 : ESRCH;
    lean_step_begin(STEP_SIGNAL);
    if (syscall(SYS_pidfd_send_signal, c->init_pidfd, number, NULL, 0) < 0 && !killed)
        return errno;
    lean_step_end(STEP_SIGNAL);
    /* In a frozen group of version 1 even this one waits. */
    if (number == SIGKILL && cgroup_frozen(&c->record))
        cgroup_thaw(&c->record);
    return 0;
}

int lean_kill(struct lean *l) {
    struct container c;
    int number = SIGTERM, result = container_tell(l, container_find(l, &c));
    if (result != LEAN_DONE)
        return result;
    if (l->signal != NULL && *l->signal != '\0' && !read_signal(l->signal, &number)) {
        lean_error(l, "unknown signal \"%s\"", l->signal);
        return LEAN_FAILED;
    }
    int error = lean_signal(&c, number);
    if (error == ESRCH && l->all)
        return LEAN_DONE;
    if (error == ESRCH)
        lean_error(l, "container not running");
    else if (error != 0)
        lean_error(l, "unable to signal init: %s", lean_errno_text(error));
    return error == 0 ? LEAN_DONE : LEAN_FAILED;
}

bool lean_wait_end(int pidfd, int timeout_ms) {
    struct pollfd end = {.fd = pidfd, .events = POLLIN};
    int ready;
    if (pidfd < 0)
        return true;
    do
        ready = poll(&end, 1, timeout_ms);
    while (ready < 0 && errno == EINTR);
    return ready > 0;
}
