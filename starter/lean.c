/*
 * PREFIX/bin/apptainer-py-oci: runc's command line.  What clients call most is done here, in C;
 * create, run and exec go to the starter as a sealed request, and all else to the interpreter.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "build.h"
#include "launcher.h"
#include "lean.h"
#include "steps.h"

#define MAIN_FILE APY_LIBEXECDIR "/main.py"
#ifdef APY_TEST_STEPS
#define STARTER_FILE APY_LIBEXECDIR "/starter-steps"
#else
#define STARTER_FILE APY_STARTER
#endif
#define EXIT_FATAL 255
/* Above what --preserve-fds and LISTEN_FDS can mean: those numbers are the caller's. */
#define FIRST_OWN_FD 1000
/* Of the runtime specification: the newest whose configuration is understood. */
#define SPEC_VERSION "1.2.1"

__attribute__((noreturn)) static void fatal(struct lean *l, const char *what, const char *why) {
    if (l->log_fd < 0)
        (void)lean_log_open(l);
    lean_error(l, "%s: %s", what, why);
    _exit(l->apptainer ? EXIT_FATAL : LEAN_FAILED);
}

/* Without this, the request itself could become the payload's stdin. */
static void open_standard_streams(void) {
    for (int fd = STDIN_FILENO; fd <= STDERR_FILENO; fd++)
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", O_RDWR) != fd)
            _exit(1);
}

void lean_interpreter(struct lean *l, int argc, char *const argv[]) {
    static const char *const start[] = {APY_PYTHON, "-I", "-S", "-B", MAIN_FILE, "oci"};
    size_t count = (size_t)argc;
    const char **all = calloc(COUNT(start) + count + 1, sizeof(*all));
    if (all == NULL)
        fatal(l, "the command line", strerror(errno));
    memcpy(all, start, sizeof(start));
    for (size_t i = 0; i < count; i++)
        all[COUNT(start) + i] = argv[i];
    union { const char **in; char *const *out; } u = {.in = all};
    execve(APY_PYTHON, u.out, l->envp);
    fatal(l, APY_PYTHON, strerror(errno));
}

static char *number_text(char *end, int number) {
    *--end = '\0';
    do {
        *--end = (char)('0' + number % 10);
        number /= 10;
    } while (number > 0);
    return end;
}

/* `ready` is the end of a pipe at which somebody waits, or -1. */
__attribute__((noreturn)) static void run_starter(struct lean *l, int argc, char *const argv[],
                                                  int ready) {
    struct choice c = {.flow = FLOW_CALLER, .engine = "oci", .trace_fd = -1};
    const char *why;
    if (!l->makes)
        c.forecast.what = FORECAST_COMMAND;
    if (lean_forecast_network(l, argc, argv))
        c.forecast.spaces = SPACE_NET;
    int fd = request_make(&c, argc, argv, l->envp, &why);
    if (fd < 0)
        fatal(l, "the request to the starter", why);
    int high = fcntl(fd, F_DUPFD, FIRST_OWN_FD);
    if (high >= 0)
        close(fd);
    char number[16], ready_number[16], word[] = "caller";
    char *arguments[] = {argv[0], number_text(number + sizeof(number), high >= 0 ? high : fd),
                         word, NULL, NULL};
    if (ready >= 0)
        arguments[3] = number_text(ready_number + sizeof(ready_number), ready);
#ifdef APY_TEST_STEPS
    char *const *environment = test_environment();
#else
    char *const environment[] = {NULL};
#endif
    lean_step_begin(STEP_EXEC_STARTER);
    execve(STARTER_FILE, arguments, environment);
    fatal(l, STARTER_FILE, strerror(errno));
}

static int show_version(const struct lean *l) {
    const char *slash = strrchr(l->argv0, '/');
    (void)printf("%s version %s\ncommit: %s\nspec: %s\n", slash != NULL ? slash + 1 : l->argv0,
                 APY_VERSION, APY_BUILD_ID, SPEC_VERSION);
    return fflush(stdout) == 0 ? LEAN_DONE : LEAN_FAILED;
}

static int run(struct lean *l) {
    switch (l->command) {
    case LEAN_STATE:
        return lean_state(l);
    case LEAN_START:
        return lean_start(l);
    case LEAN_KILL:
        return lean_kill(l);
    case LEAN_DELETE:
        return lean_delete(l);
    case LEAN_ATTACH:
        return lean_attach(l);
    case LEAN_VERSION:
        return show_version(l);
    case LEAN_LAUNCH:
    case LEAN_MONITORED:
    case LEAN_OTHER:
    default:
        return LEAN_TO_PYTHON;
    }
}

int main(int argc, char *argv[], char *envp[]) {
    struct lean l = {.envp = envp, .log_fd = -1};
#ifdef APY_TEST_STEPS
    test_read_environment(envp);
#endif
    open_standard_streams();
    if (argc < 1)
        return 1;
    if (lean_watch_asked(argc, argv))
        return lean_watch(&l, argc, argv);
    lean_scan(&l, argc, argv);
    if (l.command == LEAN_LAUNCH)
        run_starter(&l, argc, argv, -1);
    if (l.command == LEAN_MONITORED)
        return lean_run(&l, argc, argv, run_starter);
    if (l.command != LEAN_OTHER && lean_log_open(&l) < 0)
        return LEAN_FAILED;
    int status = run(&l);
    if (status == LEAN_TO_PYTHON)
        lean_interpreter(&l, argc, argv);
    return status == LEAN_FAILED && l.apptainer ? EXIT_FATAL : status;
}
