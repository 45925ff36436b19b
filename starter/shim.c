/* pid 1 of a pid namespace: forwards signals, reaps, and ends with the payload's status. */
#include <errno.h>
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

static int exit_code(int status) {
    return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

/* Ends the shim with its payload; the kernel then ends everything else in the namespace. */
static void reap(pid_t payload) {
    int status;
    pid_t pid;
    while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
        if (pid == payload)
            _exit(exit_code(status));
    if (pid < 0 && errno == ECHILD)
        _exit(255);
}

static void forward(const struct signalfd_siginfo *info, pid_t payload) {
    /* What the terminal sends reaches the payload by itself: both are in the foreground group. */
    if (info->ssi_code != SI_KERNEL)
        (void)kill(payload, (int)info->ssi_signo);
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
    trace_fd = -1;
    close_all_but(fd);
    for (int i = 0; i < 3; i++)
        close(i); /* a pipe of the caller's must see its end when the payload closes it */
    for (;;) {
        reap(stage2);
        struct signalfd_siginfo info;
        ssize_t got = read(fd, &info, sizeof(info));
        if (got == (ssize_t)sizeof(info) && info.ssi_signo != SIGCHLD)
            forward(&info, stage2);
    }
}
