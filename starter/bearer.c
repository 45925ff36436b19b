/* The process that becomes the payload and runs no Python: it waits inside the container, in C,
 * with the payload's identity, for what another has decided.  That is stage 2 where a user was
 * granted capabilities; and master for who joins a container, and for a lean stage 2. */
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "starter.h"

bool bearer_needed(const struct launch *l) {
    return l->flow == FLOW_SETUID && !fakeroot_wanted(l) &&
           l->plan.caps[CAP_SET_PERMITTED] != 0;
}

static void close_fd(int *fd) {
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

/* ---- stage 2's side: nothing here has a right that its user has not ---- */

static size_t add_strings(char *out, size_t used, char *const list[], uint32_t *count) {
    for (*count = 0; list[*count]; (*count)++) {
        size_t size = strlen(list[*count]) + 1;
        if (out)
            memcpy(out + used, list[*count], size);
        used += size;
    }
    return used;
}

/* All strings one after another, sealed; -1 with errno. */
static int pack_program(struct bearer_request *q, char *const path[], char *const argv[],
                        char *const envp[]) {
    uint32_t one;
    size_t size = add_strings(NULL, 0, path, &one);
    size = add_strings(NULL, size, argv, &q->argc);
    size = add_strings(NULL, size, envp, &q->envc);
    if (size > LIMIT_REQUEST_BYTES) {
        errno = E2BIG; /* the kernel would say the same, of less */
        return -1;
    }
    int fd = memfd_create("apptainer-py program", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0 || ftruncate(fd, (off_t)size) < 0)
        return -1;
    char *text = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (text == MAP_FAILED)
        return -1;
    size_t used = add_strings(text, 0, path, &one);
    used = add_strings(text, used, argv, &one);
    (void)add_strings(text, used, envp, &one);
    /* A mapping that could be written would forbid the seal. */
    if (munmap(text, size) == 0 && fcntl(fd, F_ADD_SEALS, REQUEST_SEALS) == 0)
        return fd;
    close(fd);
    return -1;
}

static int send_part(const struct launch *l, struct bearer_request q, int fd) {
    return fd < 0 ? -1 : wire_send(l->bearer_socket[0], &q, sizeof(q), fd);
}

/* The standard streams and the directory as start_process has made them. */
static int send_surroundings(const struct launch *l) {
    for (int fd = 0; fd < 3; fd++)
        if (fcntl(fd, F_GETFD) >= 0 &&
            send_part(l, (struct bearer_request){.part = BEARER_STREAM, .number = (uint32_t)fd},
                      fd) < 0)
            return -1;
    int directory = open(".", O_PATH | O_DIRECTORY | O_CLOEXEC);
    int result = send_part(l, (struct bearer_request){.part = BEARER_DIRECTORY}, directory);
    close_fd(&directory);
    return result;
}

/* What the payload's filter would be in stage 2, if there is one. */
static int send_filter(const struct launch *l) {
    static bool sent;
    struct bearer_request q = {.part = BEARER_FILTER};
    size_t size;
    const void *code = filter_get(&size, &q.number);
    if (size == 0 || sent)
        return 0;
    int fd = memfd_create("apptainer-py filter", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    int result = -1;
    if (fd >= 0 && write(fd, code, size) == (ssize_t)size &&
        fcntl(fd, F_ADD_SEALS, REQUEST_SEALS) == 0)
        result = send_part(l, q, fd);
    sent = result == 0;
    close_fd(&fd);
    return result;
}

/* Its answer: the kernel may refuse the label, and then there is no payload. */
static int send_label(const struct launch *l) {
    static bool sent;
    struct bearer_request q = {.part = BEARER_LABEL};
    struct bearer_reply a = {.error = EIO};
    size_t size;
    const void *text = label_get(&size, &q.number);
    if (size == 0 || sent)
        return 0;
    int fd = memfd_create("apptainer-py label", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0 || write(fd, text, size) != (ssize_t)size ||
        fcntl(fd, F_ADD_SEALS, REQUEST_SEALS) < 0 || send_part(l, q, fd) < 0 ||
        wire_receive(l->bearer_socket[0], &a, sizeof(a), NULL) != (ssize_t)sizeof(a))
        a.error = errno ? errno : EIO;
    close_fd(&fd);
    sent = a.error == 0;
    errno = a.error;
    return sent ? 0 : -1;
}

/* Ends stage 2 when bearer has become the payload, or has ended; else the errno. */
int bearer_ask(const struct launch *l, const char *path, char *const argv[],
               char *const envp[]) {
    struct bearer_request q = {.part = BEARER_PROGRAM};
    struct bearer_reply a;
    char *name = NULL;
    memcpy(&name, &path, sizeof(name)); /* argv is not const-correct */
    step_begin(STEP_ASK_BEARER);
    if (send_label(l) < 0) {
        int error = errno;
        bearer_dismiss(l);
        fail("failed to apply security configuration: the label", error);
    }
    if (send_surroundings(l) < 0 || send_filter(l) < 0)
        return errno;
    mode_t mask = umask(0);
    (void)umask(mask);
    q.number = (uint32_t)mask;
    int fd = pack_program(&q, (char *const[]){name, NULL}, argv, envp);
    int result = send_part(l, q, fd), error = errno;
    close_fd(&fd);
    if (result < 0)
        return error;
    step_end(STEP_ASK_BEARER);
    ssize_t got = wire_receive(l->bearer_socket[0], &a, sizeof(a), NULL);
    if (got == (ssize_t)sizeof(a))
        return a.error;
    _exit(got == 0 ? 0 : 255);
}

/* Stage 2 ends, and the user has been told why there is no payload. */
void bearer_dismiss(const struct launch *l) {
    const struct bearer_request q = {.part = BEARER_NOTHING};
    if (l->bearer_socket[0] >= 0 && wire_send(l->bearer_socket[0], &q, sizeof(q), -1) < 0)
        return; /* bearer has ended before */
}

/* ---- bearer's side ---- */

/* path, argv, NULL, envp, NULL: pointers into a text whose last byte is a NUL, if they are as many
 * as told. */
static int split(char *text, size_t size, const struct bearer_request *q, char **vector) {
    size_t strings = 0, wanted = (size_t)1 + q->argc + q->envc;
    for (size_t at = 0; at < size; at += strlen(text + at) + 1) {
        if (strings == wanted)
            return -1;
        vector[strings + (strings > q->argc)] = text + at;
        strings++;
    }
    return strings == wanted ? 0 : -1;
}

struct program {
    char *text, **vector;
};

static void forget(struct program *p) {
    free(p->text);
    free(p->vector);
    p->text = NULL;
    p->vector = NULL;
}

/* A copy of a program's strings; -1 if they are not what they should be. */
static int unpack_program(const struct bearer_request *q, int fd, struct program *p) {
    struct stat st;
    if (fd < 0 || request_check_seals(fd, &st) < 0 || st.st_size < 1 ||
        st.st_size > LIMIT_REQUEST_BYTES)
        return -1;
    size_t size = (size_t)st.st_size, wanted = (size_t)1 + q->argc + q->envc;
    if (wanted > size)
        return -1;
    p->text = malloc(size);
    p->vector = calloc(wanted + 2, sizeof(char *));
    if (p->text && p->vector && pread(fd, p->text, size, 0) == (ssize_t)size &&
        p->text[size - 1] == '\0' && split(p->text, size, q, p->vector) == 0)
        return 0;
    forget(p);
    return -1;
}

NO_RETURN static void malformed(void) {
    report("FATAL:   ", "a payload was asked for in a malformed way; the launch is abandoned");
    _exit(255);
}

NO_RETURN static void nothing_asked(void) {
    report("FATAL:   ", "who says what to run has ended before");
    _exit(255);
}

/* Where the payload's own filter lets nothing be answered, it is said here. */
static void answer(int socket, int error) {
    struct bearer_reply a = {.error = error};
    if (wire_send(socket, &a, sizeof(a), -1) == 0)
        return;
    if (errno == EPIPE)
        _exit(255);
    fail("the program cannot be executed", error);
}

/* A directory of the container, for a master that has no way to open it. */
static void enter_place(const struct bearer_request *q, int fd, int socket) {
    struct program p = {NULL, NULL};
    struct place_reply a = {.error = 0};
    if (q->argc != 0 || q->envc != 0 || q->number != 0 || unpack_program(q, fd, &p) < 0)
        malformed();
    close(fd);
    if (chdir(p.vector[0]) < 0)
        a.error = errno;
    else if (!getcwd(a.path, sizeof(a.path)) || a.path[0] != '/')
        a.path[0] = '\0';
    forget(&p);
    if (wire_send(socket, &a, sizeof(a.error) + strlen(a.path), -1) < 0)
        nothing_asked();
}

/* Another try comes with a descriptor, for which the payload's own limit may be too small. */
static void lift_descriptors(void) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) < 0)
        return;
    limit.rlim_cur = limit.rlim_max;
    (void)setrlimit(RLIMIT_NOFILE, &limit); /* then that try ends with a line of its own */
}

static void run_program(const struct launch *l, const struct bearer_request *q, int fd,
                        int socket) {
    struct program p = {NULL, NULL};
    if (q->argc == 0 || q->number & ~0777u || unpack_program(q, fd, &p) < 0)
        malformed();
    close(fd);
    (void)umask(q->number);
    stage_leave_start(0);
    step_begin(STEP_EXEC_PAYLOAD);
    label_check(l);
    sanitize_restore_for_payload(l);
    if (!stage_keeper_lives(l)) /* its death comes by way of the shim's, if there is one */
        _exit(255);
    filter_load();
    /* SAFE: this user's program with what this user was granted; in the container's own root. */
    (void)execve(p.vector[0], p.vector + 1, p.vector + 2 + q->argc);
    int error = errno;
    lift_descriptors();
    answer(socket, error);
    forget(&p);
}

static void take_filter(const struct bearer_request *q, int fd) {
    static char code[LIMIT_FILTER_BYTES];
    struct stat st;
    if (request_check_seals(fd, &st) < 0 || st.st_size < 1 || st.st_size > LIMIT_FILTER_BYTES ||
        pread(fd, code, sizeof(code), 0) != (ssize_t)st.st_size ||
        filter_set(code, (size_t)st.st_size, q->number) < 0)
        malformed();
    close(fd);
}

static void take_label(const struct bearer_request *q, int fd, int socket) {
    static char text[LIMIT_LABEL_BYTES];
    struct stat st;
    if (request_check_seals(fd, &st) < 0 || st.st_size < 1 || st.st_size >= LIMIT_LABEL_BYTES ||
        pread(fd, text, sizeof(text), 0) != (ssize_t)st.st_size)
        malformed();
    close(fd);
    answer(socket, label_write(q->number, text, (size_t)st.st_size));
}

static bool told_by_master(const struct launch *l) {
    return l->plan.flags & (PLAN_JOIN | PLAN_LEAN);
}

static void take_part(const struct launch *l, const struct bearer_request *q, int fd,
                      int socket) {
    bool plain = q->argc == 0 && q->envc == 0 && fd >= 0;
    switch (q->part) {
    case BEARER_STREAM:
        if (!plain || q->number > 2 || dup2(fd, (int)q->number) < 0)
            malformed();
        close(fd);
        break;
    case BEARER_DIRECTORY:
        if (!plain || q->number != 0 || told_by_master(l) || fchdir(fd) < 0)
            malformed();
        close(fd);
        break;
    case BEARER_FILTER:
        if (!plain)
            malformed();
        take_filter(q, fd);
        break;
    case BEARER_LABEL:
        if (!plain)
            malformed();
        take_label(q, fd, socket);
        break;
    case BEARER_PROGRAM:
        run_program(l, q, fd, socket);
        break;
    case BEARER_PLACE:
        if (!told_by_master(l))
            malformed();
        enter_place(q, fd, socket);
        break;
    case BEARER_NOTHING:
        stage_leave_start(1);
        _exit(255);
    default:
        malformed();
    }
}

/* What neither payload nor its wait needs. */
static void close_others(struct launch *l) {
    close_fd(&l->bearer_socket[0]);
    close_fd(&l->start_socket[0]);
    close_fd(&l->seal_pipe[1]);
    close_fd(&l->request_fd);
    close_fd(&l->config_fd);
    close_fd(&l->trace_file);
}

/* Answers a question about a place that waits already, while keeper gives up what it has: nothing
 * of the user's runs, and stage 2 has dropped. */
void bearer_enter_early(int socket) {
    struct bearer_request q;
    int passed;
    if (recv(socket, &q, sizeof(q), MSG_PEEK | MSG_DONTWAIT) != (ssize_t)sizeof(q) ||
        q.part != BEARER_PLACE)
        return;
    if (wire_receive(socket, &q, sizeof(q), &passed) != (ssize_t)sizeof(q))
        malformed();
    enter_place(&q, passed, socket);
}

/* Until it becomes the payload, or is told that there is none. */
NO_RETURN void bearer_serve(const struct launch *l, int socket) {
    for (;;) {
        struct bearer_request q;
        int passed;
        ssize_t got = wire_receive(socket, &q, sizeof(q), &passed);
        if (got == 0)
            nothing_asked();
        if (got != (ssize_t)sizeof(q))
            malformed();
        take_part(l, &q, passed, socket);
    }
}

NO_RETURN static void bearer_main(struct launch *l) {
    struct target_identity target;
    close_others(l);
    step_begin(STEP_DROP_BEARER);
    stage_target(l, ROLE_BEARER, &target);
    /* SAFE: the payload's own identity, which policy_plan() found granted; verified. */
    if (privs_drop(&target) < 0)
        fail("cannot give up privileges", errno);
    if (stage_die_with_keeper(l) < 0)
        _exit(255);
    step_end(STEP_DROP_BEARER);
    trace_process();
    /* Not before keeper has dropped may anything of the user's run, whatever stage 2 says. */
    if ((stage_rpc_pid > 0 && stage_wait_for_rpc(l, stage_rpc_pid) < 0) || stage_wait_for_go(l) < 0)
        _exit(255);
    bearer_serve(l, l->bearer_socket[1]);
}

/* Returns in a new process, which is stage 2; the caller waits to become the payload.  They are
 * siblings, as the payload must not find a child that it did not start. */
void bearer_split(struct launch *l) {
    trace_set_role(ROLE_BEARER);
    if (wire_pair(l->bearer_socket) < 0)
        fail("cannot make the channels between the processes", errno);
    /* pid 1 can have no sibling; but pid 1 has to reap strangers in any case. */
    unsigned long flags = (getpid() == 1 ? 0 : (unsigned long)CLONE_PARENT) | SIGCHLD;
    step_begin(STEP_FORK_BEARER);
    /* SAFE: no new rights and nothing shared; stage 2 drops before it does anything. */
    pid_t pid = (pid_t)syscall(SYS_clone, flags, NULL, NULL, NULL, NULL);
    if (pid < 0)
        fail("cannot start a process", errno);
    if (pid > 0) {
        step_end(STEP_FORK_BEARER);
        bearer_main(l);
    }
    trace_set_role(ROLE_STAGE2);
    close_fd(&l->bearer_socket[1]);
    close_fd(&l->ready_pipe[1]);
    stage_rpc_pid = 0;
}
