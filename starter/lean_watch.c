/* What stays with a payload in the foreground: master becomes this once the payload runs, so that
 * no interpreter waits.  Its words, after the name: the payload's pid, the number of its terminal
 * or -1, then a command line whose `delete`, if it has one, is done in the end. */
#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "lean.h"
#include "relay.h"

enum { WORD_PID = 1, WORD_PTY, WORD_COMMAND, WORDS_LEAST };

bool lean_watch_asked(int argc, char *const argv[]) {
    return argc >= WORDS_LEAST && strcmp(argv[0], LEAN_WATCH_NAME) == 0;
}

static bool read_number(const char *text, long least, int *number) {
    char *end;
    errno = 0;
    long value = strtol(text, &end, 10);
    if (errno != 0 || end == text || *end != '\0' || value < least || value > INT_MAX)
        return false;
    *number = (int)value;
    return true;
}

/* The signals that come meanwhile are held back since before there was a payload. */
static int watch(struct lean *l, pid_t pid, int pty, int *status) {
    lean_step_begin(STEP_WATCHED);
    if (relay_run(pid, pty, status) < 0) {
        lean_error(l, "cannot watch the container's process: %s", lean_errno_text(errno));
        return -1;
    }
    lean_step_end(STEP_WATCHED);
    return 0;
}

int lean_watch(struct lean *l, int argc, char *const argv[]) {
    int pid = 0, pty = -1, status = 0;
    /* As the stage that has become this: nobody of the same user looks into it. */
    if (prctl(PR_SET_DUMPABLE, 0) < 0)
        return LEAN_FAILED;
    lean_scan(l, argc - WORD_COMMAND, argv + WORD_COMMAND);
    if (!read_number(argv[WORD_PID], 1, &pid) || !read_number(argv[WORD_PTY], -1, &pty)) {
        lean_error(l, "the process that is to be watched has no number");
        return LEAN_FAILED;
    }
    if (watch(l, pid, pty, &status) < 0)
        return LEAN_FAILED;
    if (l->command == LEAN_DELETE) {
        lean_step_begin(STEP_UNDONE);
        (void)lean_log_open(l);
        lean_delete_own(l, pid);
        lean_step_end(STEP_UNDONE);
    }
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}
