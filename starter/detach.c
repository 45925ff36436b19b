/* An instance: its keeper has a session of its own and outlives the caller, who waits, without any
 * right, until all stands. */
#include <errno.h>
#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "starter.h"

/* Keeper's own status where it could not start the instance; what went wrong has been said. */
NO_RETURN static void wait_for_keeper(pid_t keeper, int fd) {
    char byte = 0;
    int status = 0;
    ssize_t got;
    do
        got = read(fd, &byte, 1);
    while (got < 0 && errno == EINTR);
    if (got == 1 && byte == 'R')
        _exit(0);
    while (waitpid(keeper, &status, 0) < 0)
        if (errno != EINTR)
            _exit(255);
    _exit(WIFEXITED(status) ? WEXITSTATUS(status) : 255);
}

NO_RETURN static void waiter_main(struct launch *l, pid_t keeper, int fd) {
    struct target_identity target;
    step_begin(STEP_DROP_WAITER);
    stage_target(l, ROLE_KEEPER, &target);
    /* Before the user namespace exists there is no right to trim the bounding set. */
    target.keep_bounding = l->flow == FLOW_USERNS;
    /* SAFE: irrevocable, verified; all that is left to do is to wait. */
    if (privs_drop(&target) < 0)
        fail("cannot give up privileges", errno);
    step_end(STEP_DROP_WAITER);
    sanitize_close_inherited(l);
    (void)close_range(3, (unsigned)fd - 1, 0);
    (void)close_range((unsigned)fd + 1, ~0U, 0);
    wait_for_keeper(keeper, fd);
}

/* Returns in keeper.  A socket tells each side of the other's end. */
void detach(struct launch *l) {
    int ends[2];
    step_begin(STEP_DETACH);
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) < 0)
        fail("cannot make the channels between the processes", errno);
    pid_t pid = fork();
    if (pid < 0)
        fail("cannot start a process", errno);
    if (pid > 0) {
        close(ends[1]);
        waiter_main(l, pid, ends[0]);
    }
    close(ends[0]);
    l->waiter_fd = ends[1];
    if (setsid() < 0)
        fail("cannot make a session for the instance", errno);
    step_end(STEP_DETACH);
}

/* Keeper has dropped before.  Streams and directory of the caller are let go; master has the word
 * that all stands. */
void detach_streams(struct launch *l) {
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    for (int fd = 0; fd < 3 && null >= 0; fd++)
        (void)dup2(null, fd);
    if (null >= 0)
        close(null);
    if (chdir("/") < 0)
        report("WARNING: ", "the directory of the caller stays in use");
    if (l->waiter_fd >= 0)
        close(l->waiter_fd);
    l->waiter_fd = -1;
}
