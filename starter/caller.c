/* The flow CALLER: the call's own process is master, and the only other process is starter-init,
 * which enters the container.  Nothing is raised and nothing dropped: both are the caller. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "starter.h"
#include "steps.h"

#ifdef APY_TEST_STEPS
#define INIT_FILE APY_LIBEXECDIR "/starter-init-steps"
#else
#define INIT_FILE APY_LIBEXECDIR "/starter-init"
#endif
/* Above what --preserve-fds and LISTEN_FDS can mean: those numbers are the caller's. */
#define FIRST_OWN_FD 1000

#ifndef MFD_EXEC
#define MFD_EXEC 0x0010U
#endif
#ifndef F_SEAL_EXEC
#define F_SEAL_EXEC 0x0020
#endif

bool caller_asked(int argc, char *const argv[]) {
    return argc > 2 && strcmp(argv[2], "caller") == 0;
}

static int move_up(int *fd) {
    int high = fcntl(*fd, F_DUPFD_CLOEXEC, FIRST_OWN_FD);
    if (high < 0 && errno == EINVAL)
        high = fcntl(*fd, F_DUPFD_CLOEXEC, 32); /* a small hard limit: sanitize.c asks for 64 */
    if (high < 0)
        return -1;
    close(*fd);
    *fd = high;
    return 0;
}

/* CVE-2019-5736: the container's first process shows its program as /proc/PID/exe.  This copy is
 * nobody's file, and the seals keep it as it is. */
static int sealed_copy(void) {
    struct stat st;
    const int seals = F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE;
    int source = open(INIT_FILE, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    if (source < 0 || fstat(source, &st) < 0)
        return -1;
    const unsigned flags = MFD_CLOEXEC | MFD_ALLOW_SEALING;
    int copy = memfd_create("apptainer-py-init", flags | MFD_EXEC);
    if (copy < 0 && errno == EINVAL)
        copy = memfd_create("apptainer-py-init", flags);
    for (off_t done = 0; copy >= 0 && done < st.st_size;)
        if (sendfile(copy, source, &done, (size_t)(st.st_size - done)) <= 0)
            return -1;
    if (copy < 0 || move_up(&copy) < 0 || close(source) < 0)
        return -1;
    (void)fcntl(copy, F_ADD_SEALS, F_SEAL_EXEC); /* since Linux 6.3 */
    return fcntl(copy, F_ADD_SEALS, seals) == 0 ? copy : -1;
}

static const char *number_text(char *end, int number) {
    *--end = '\0';
    do {
        *--end = (char)('0' + number % 10);
        number /= 10;
    } while (number > 0);
    return end;
}

NO_RETURN static void become_init(struct launch *l, pid_t master) {
    char digits[16], name[] = "apptainer-py-init";
    char network[] = INIT_NETWORK;
    char *arguments[] = {name, NULL, NULL, NULL};
#ifdef APY_TEST_STEPS
    char *const *environment = test_environment();
#else
    char *const environment[] = {NULL};
#endif
    step_begin(STEP_EXEC_INIT);
    int program = sealed_copy();
    if (program < 0)
        fail("cannot make the sealed copy of " INIT_FILE, errno);
    if (fcntl(l->init_socket[0], F_SETFD, 0) < 0)
        fail("cannot start " INIT_FILE, errno);
    const char *text = number_text(digits + sizeof(digits), l->init_socket[0]);
    memcpy(&arguments[1], &text, sizeof(text));
    if (l->request.forecast_spaces & SPACE_NET)
        arguments[2] = network;
    l->inherited.ignored = 0; /* as runc: what is blocked stays so, what is ignored does not */
    sanitize_restore_for_payload(l);
    (void)umask(l->inherited.umask);
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) < 0 || getppid() != master)
        _exit(255);
    (void)syscall(SYS_execveat, program, "", arguments, environment, AT_EMPTY_PATH);
    fail("cannot execute the sealed copy of " INIT_FILE, errno);
}

/* At once: what it takes to copy and execute overlaps with the start of the interpreter. */
static void start_init(struct launch *l) {
    pid_t self = getpid();
    if (wire_pair(l->init_socket) < 0 || move_up(&l->init_socket[0]) < 0 ||
        move_up(&l->init_socket[1]) < 0)
        fail("cannot make a channel to the container's first process", errno);
    step_begin(STEP_FORK_INIT);
    l->init_pid = fork();
    if (l->init_pid < 0)
        fail("cannot start the container's first process", errno);
    if (l->init_pid == 0)
        become_init(l, self);
    close(l->init_socket[0]);
    l->init_socket[0] = -1;
    step_end(STEP_FORK_INIT);
}

/* Before there is an interpreter to be forked with it; which image, master finds out. */
static void start_server(struct launch *l) {
    if (wire_pair(l->server_socket) < 0 || move_up(&l->server_socket[0]) < 0 ||
        move_up(&l->server_socket[1]) < 0)
        fail("cannot make a channel to the image server", errno);
    step_begin(STEP_FORK_SERVER);
    l->server_pid = fork();
    if (l->server_pid < 0)
        fail("cannot start the image server", errno);
    if (l->server_pid == 0) {
        close(l->init_socket[1]);
        close(l->server_socket[1]);
        server_wait(l, l->server_socket[0]);
    }
    close(l->server_socket[0]);
    l->server_socket[0] = -1;
    step_end(STEP_FORK_SERVER);
}

static void no_channels(struct launch *l) {
    int *const pairs[] = {l->keeper_socket,     l->rpc_socket,        l->start_socket,
                          l->methods_socket,    l->helper_sockets[0], l->helper_sockets[1],
                          l->bearer_socket,     l->seal_pipe,         l->ready_pipe,
                          l->go_socket,         l->life_pipe,         l->serve_pipe,
                          l->probe_pipe,        l->init_socket,       l->server_socket};
    for (size_t i = 0; i < ARRAY_SIZE(pairs); i++)
        pairs[i][0] = pairs[i][1] = -1;
    l->config_fd = -1;
}

/* The launcher's, behind the word of this flow; whoever forges it gives away a file of his own. */
static int ready_of(int argc, char *const argv[]) {
    int fd = 0;
    if (argc < 4 || argv[3][0] == '\0')
        return -1;
    for (const char *c = argv[3]; *c != '\0'; c++) {
        if (*c < '0' || *c > '9' || fd > LIMIT_INHERITED_FDS)
            fail("the number of a descriptor is none", 0);
        fd = fd * 10 + (*c - '0');
    }
    return fcntl(fd, F_GETFD) < 0 ? -1 : fd;
}

NO_RETURN void caller_main(struct launch *l, int argc, char *const argv[]) {
    /* SAFE: the setuid flow never comes here; the process has no right that its caller lacks. */
    if (l->flow == FLOW_SETUID)
        fail("the starter of this engine runs without the setuid bit", 0);
    no_channels(l);
    l->flow = FLOW_CALLER;
    request_open(l, argc, argv);
    l->ready_fd = ready_of(argc, argv);
    if (l->request.flow != FLOW_CALLER)
        fail("this request is not for this starter", 0);
    step_end(STEP_KEEPER_START);
    start_init(l);
    if (l->request.forecast & FORECAST_FUSE)
        start_server(l);
    /* What it makes, cgroups and state, is for others to look at as far as the caller lets them. */
    (void)umask(l->inherited.umask);
    stage_run(l, STAGE_MASTER);
}
