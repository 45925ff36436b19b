/*
 * PREFIX/bin/apptainer-py-oci: runc's command line.  What clients call most is done here, in C;
 * create, run and exec go to the starter as a sealed request, and all else to the interpreter.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "build.h"
#include "launcher.h"
#include "lean.h"

#define MAIN_FILE APY_LIBEXECDIR "/main.py"
/* Above what --preserve-fds and LISTEN_FDS can mean: those numbers are the caller's. */
#define FIRST_OWN_FD 1000

__attribute__((noreturn)) static void fatal(const char *what, const char *why) {
    static const char level[] = "FATAL:   ";
    ssize_t ignored = write(STDERR_FILENO, level, sizeof(level) - 1);
    ignored += write(STDERR_FILENO, what, strlen(what));
    ignored += write(STDERR_FILENO, ": ", 2);
    ignored += write(STDERR_FILENO, why, strlen(why));
    ignored += write(STDERR_FILENO, "\n", 1);
    (void)ignored;
    _exit(1);
}

/* Without this, the request itself could become the payload's stdin. */
static void open_standard_streams(void) {
    for (int fd = STDIN_FILENO; fd <= STDERR_FILENO; fd++)
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", O_RDWR) != fd)
            _exit(1);
}

__attribute__((noreturn)) static void run_interpreter(int argc, char *const argv[],
                                                      char *const envp[]) {
    static const char *const start[] = {APY_PYTHON, "-I", "-S", "-B", MAIN_FILE, "oci"};
    size_t count = (size_t)argc;
    const char **all = calloc(COUNT(start) + count + 1, sizeof(*all));
    if (all == NULL)
        fatal("the command line", strerror(errno));
    memcpy(all, start, sizeof(start));
    for (size_t i = 0; i < count; i++)
        all[COUNT(start) + i] = argv[i];
    union { const char **in; char *const *out; } u = {.in = all};
    execve(APY_PYTHON, u.out, envp);
    fatal(APY_PYTHON, strerror(errno));
}

static char *number_text(char *end, int number) {
    *--end = '\0';
    do {
        *--end = (char)('0' + number % 10);
        number /= 10;
    } while (number > 0);
    return end;
}

__attribute__((noreturn)) static void run_starter(int argc, char *const argv[],
                                                  char *const envp[]) {
    const struct choice c = {.flow = FLOW_CALLER, .engine = "oci", .trace_fd = -1};
    const char *why;
    int fd = request_make(&c, argc, argv, envp, &why);
    if (fd < 0)
        fatal("the request to the starter", why);
    int high = fcntl(fd, F_DUPFD, FIRST_OWN_FD);
    if (high >= 0)
        close(fd);
    char number[16], word[] = "caller";
    char *arguments[] = {argv[0], number_text(number + sizeof(number), high >= 0 ? high : fd),
                         word, NULL};
    char *environment[] = {NULL};
    execve(APY_STARTER, arguments, environment);
    fatal(APY_STARTER, strerror(errno));
}

int main(int argc, char *argv[], char *envp[]) {
    struct lean l = {.envp = envp};
    open_standard_streams();
    if (argc < 1)
        return 1;
    lean_scan(&l, argc, argv);
    switch (l.command) {
    case LEAN_LAUNCH:
        run_starter(argc, argv, envp);
    case LEAN_STATE:
    case LEAN_START:
    case LEAN_KILL:
    case LEAN_DELETE:
    case LEAN_VERSION:
    case LEAN_OTHER:
    default:
        run_interpreter(argc, argv, envp);
    }
}
