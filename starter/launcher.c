/*
 * PREFIX/bin/apptainer-py.  A launch of a local image goes straight to the starter,
 * without an interpreter before it; everything else goes to the plain interpreter.
 * No privilege here, and nothing that is decided here is trusted by anybody.
 */
#include <errno.h>
#include <fcntl.h>
#include <pwd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include "build.h"
#include "launcher.h"

#define EXIT_FATAL 255
#define MAIN_FILE APY_LIBEXECDIR "/main.py"
#define OCI_PROGRAM APY_BINDIR "/apptainer-py-oci"
/* A single argument of execve(2) may have 128 KiB; this one is for people who read ps(1). */
#define TITLE_BYTES 4096

static struct iovec piece(const char *text) {
    /* writev(2) only reads it; the structure has no const. */
    union { const char *in; char *out; } u = {.in = text};
    return (struct iovec){.iov_base = u.out, .iov_len = strlen(text)};
}

__attribute__((noreturn)) static void fatal(const char *what, const char *why) {
    struct iovec line[] = {piece("FATAL:   "), piece(what), piece(": "), piece(why), piece("\n")};
    ssize_t ignored = writev(STDERR_FILENO, line, COUNT(line));
    (void)ignored;
    _exit(EXIT_FATAL);
}

/* Without this, the request itself could become the payload's stdin. */
static void open_standard_streams(void) {
    for (int fd = STDIN_FILENO; fd <= STDERR_FILENO; fd++) {
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", O_RDWR) != fd)
            _exit(EXIT_FATAL);
    }
}

__attribute__((noreturn)) static void run_interpreter(int argc, char *const argv[],
                                                      char *const envp[]) {
    static const char *const start[] = {APY_PYTHON, "-I", "-S", "-B", MAIN_FILE};
    size_t count = argc > 1 ? (size_t)argc - 1 : 0;
    const char **all = calloc(COUNT(start) + count + 1, sizeof(*all));
    if (all == NULL)
        fatal("the command line", strerror(errno));
    memcpy(all, start, sizeof(start));
    for (size_t i = 0; i < count; i++)
        all[COUNT(start) + i] = argv[i + 1];
    union { const char **in; char *const *out; } u = {.in = all};
    execve(APY_PYTHON, u.out, envp);
    fatal(APY_PYTHON, strerror(errno));
}

/* It tells by its first argument how it was called. */
__attribute__((noreturn)) static void run_oci(char *argv[], char *const envp[]) {
    char name[] = "apptainer-py";
    argv[0] = name;
    execve(OCI_PROGRAM, argv, envp);
    fatal(OCI_PROGRAM, strerror(errno));
}

static int open_trace(const char *file) {
    /* O_NONBLOCK: a FIFO that nobody reads is an error, and one that fills holds up no process. */
    int fd = open(file, O_WRONLY | O_CREAT | O_APPEND | O_NOCTTY | O_NONBLOCK, 0666);
    if (fd < 0)
        fatal("the file of --trace cannot be opened", strerror(errno));
    return fd;
}

static char *number_text(char *end, int number) {
    *--end = '\0';
    do {
        *--end = (char)('0' + number % 10);
        number /= 10;
    } while (number > 0);
    return end;
}

/* What ps(1) shows of keeper.  `instance list`, Apptainer's too, knows an instance by it. */
static void write_title(char title[TITLE_BYTES], const char *image, const char *name) {
    const struct passwd *user = name != NULL ? getpwuid(getuid()) : NULL;
    if (name == NULL)
        (void)snprintf(title, TITLE_BYTES, "Apptainer runtime parent: %s", image);
    else
        (void)snprintf(title, TITLE_BYTES, "Apptainer instance: %s [%s]",
                       user != NULL ? user->pw_name : "?", name);
}

__attribute__((noreturn)) static void run_starter(const struct choice *c, const char *image,
                                                  const char *name, int request_fd) {
    const char *starter = c->flow == FLOW_SETUID ? APY_STARTER_SUID : APY_STARTER;
    char title[TITLE_BYTES], number[16], word[] = "caller";
    write_title(title, image, c->instance ? name : NULL);
    char *arguments[] = {title, number_text(number + sizeof(number), request_fd),
                         c->flow == FLOW_CALLER ? word : NULL, NULL};
    char *environment[] = {NULL};
    execve(starter, arguments, environment);
    if (errno == ENOENT)
        fatal(starter, "not found, please check your installation");
    fatal(starter, strerror(errno));
}

/* `run --oci`: the other engine, with the caller's own rights.  Its parser tells by the name that
 * this is no command line of runc's. */
static void choose_oci(struct choice *c, struct scan *s, char *argv[]) {
    static char name[] = "apptainer-py";
    struct stat st;
    argv[0] = name;
    c->engine = "oci";
    c->flow = FLOW_CALLER;
    if (s->image == NULL)
        s->image = s->layout;
    else if (stat(s->image, &st) == 0 && S_ISREG(st.st_mode))
        c->forecast.what = FORECAST_FUSE;
}

int main(int argc, char *argv[], char *envp[]) {
    struct scan s;
    struct choice c = {.engine = "apptainer", .trace_fd = -1};
    const char *why;
    open_standard_streams();
    scan_arguments(&s, argc, argv);
    if (s.is_oci)
        run_oci(argv, envp);
    bool oci = scan_asks_oci(&s, envp);
    if ((s.image == NULL && (!oci || s.layout == NULL)) || (!oci && scan_asks_unsquash(&s, envp)))
        run_interpreter(argc, argv, envp);
    if (s.instance != NULL)
        account_needed(argv, envp);
    if (oci) {
        choose_oci(&c, &s, argv);
    } else {
        struct fakeroot_options o = {0};
        bool fakeroot = !s.joins && scan_asks_fakeroot(&s, envp, &o);
        if (fakeroot)
            account_needed(argv, envp);
        bool shares = scan_asks_sharing(&s, envp);
        flow_choose(&c, shares || scan_asks_userns(&s, envp) ||
                            (fakeroot && fakeroot_by_userns(&o)));
        if (!fakeroot)
            c.forecast = scan_forecast(&s);
        if (shares || scan_is_rank(envp))
            c.forecast.what |= FORECAST_RANK;
    }
    if (s.trace != NULL && *s.trace != '\0')
        c.trace_fd = open_trace(s.trace);
    c.image_arg = s.image_arg;
    c.instance = s.instance != NULL;
    int fd = request_make(&c, argc, argv, envp, &why);
    if (fd < 0)
        fatal("the request to the starter", why);
    run_starter(&c, s.image, s.instance, fd);
}
