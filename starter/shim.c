/* pid 1 of a pid namespace: forwards signals, reaps, and ends with the payload's status. */
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include "starter.h"

static void close_all_but(int keep) {
    (void)close_range(3, (unsigned)keep - 1, 0);
    (void)close_range((unsigned)keep + 1, ~0U, 0);
}

enum { ENDING_MS = 20 };
static int ending; /* the signal that an instance is to end by, or 0 */

static int exit_code(int status) {
    return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

/* Ends the shim with its payload; the kernel then ends everything else in the namespace.  An
 * instance goes on: its start script may have left services, and commands come to join it. */
static void reap(pid_t payload, bool instance) {
    int status;
    pid_t pid;
    while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
        if (pid == payload && !instance)
            _exit(exit_code(status));
    if (pid < 0 && errno == ECHILD && !instance)
        _exit(255);
}

static void forward(const struct signalfd_siginfo *info, pid_t payload, bool instance) {
    int number = (int)info->ssi_signo;
    bool ends = number == SIGINT || number == SIGTERM || number == SIGQUIT;
    /* All that is in the instance, of which shim is not a part; it ends when nothing is left. */
    if (instance) {
        (void)kill(-1, number);
        if (ends)
            ending = number;
        return;
    }
    /* What the terminal sends reaches the payload by itself: both are in the foreground group. */
    if (info->ssi_code != SI_KERNEL)
        (void)kill(payload, number);
}

NO_RETURN static void pass_signals_on(int signals_fd, pid_t payload, bool instance) {
    for (;;) {
        /* Who has joined is nobody's child here, and its end tells nobody. */
        struct pollfd signals = {.fd = signals_fd, .events = POLLIN};
        reap(payload, instance);
        if (ending && kill(-1, 0) < 0 && errno == ESRCH)
            _exit(128 + ending);
        if (ending && poll(&signals, 1, ENDING_MS) == 0)
            continue;
        struct signalfd_siginfo info;
        ssize_t got = read(signals_fd, &info, sizeof(info));
        if (got == (ssize_t)sizeof(info) && info.ssi_signo != SIGCHLD)
            forward(&info, payload, instance);
    }
}

NO_RETURN void shim_main(struct launch *l, pid_t rpc, pid_t stage2) {
    struct target_identity target;
    sigset_t all;
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, NULL);
    trace_set_role(ROLE_SHIM);
    (void)prctl(PR_SET_NAME, "appinit");
    step_begin(STEP_DROP_SHIM);
    stage_target(l, ROLE_SHIM, &target);
    /* SAFE: the payload's own identity or less, which it could not leave. */
    if (privs_drop(&target) < 0 || prctl(PR_SET_PDEATHSIG, SIGKILL) < 0)
        _exit(255);
    step_end(STEP_DROP_SHIM);
    trace_process();
    if (stage_wait_for_rpc(l, rpc) < 0)
        _exit(255);
    if (!stage_keeper_lives(l))
        _exit(255);
    int fd = signalfd(-1, &all, SFD_CLOEXEC);
    if (fd < 0)
        _exit(255);
    /* Its user must open its namespaces to join them, and holds every right that there is in this
     * user namespace.  Whoever is inside finds no more in it than a program that is busy. */
    bool instance = (l->plan.flags & PLAN_INSTANCE) != 0;
    bool own = l->flow == FLOW_USERNS || (l->flow == FLOW_SETUID && fakeroot_wanted(l));
    trace_fd = -1;
    close_all_but(fd);
    for (int i = 0; i < 3; i++)
        close(i); /* a pipe of the caller's must see its end when the payload closes it */
    if (instance && own)
        (void)prctl(PR_SET_DUMPABLE, 1);
    pass_signals_on(fd, stage2, instance);
}
