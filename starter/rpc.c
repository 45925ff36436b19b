/* The mounting process: the user in every id, one capability, a closed table of operations. */
#include <errno.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "starter.h"

typedef int (*operation)(struct rpc *, const struct op_request *, struct op_reply *, int *);

#define ROW_INIT(name, phase, next, times, function)
#define ROW_RPC(name, phase, next, times, function)                                                \
    {OP_##name, PHASE_##phase, PHASE_##next, times, function},
#define ROW_KEEPER(name, phase, next, times, function)
#define ROW_JANITOR(name, phase, next, times, function)

/* Which operations exist, when, how often, and where each leads: the rows of protocol.def. */
static const struct row {
    uint32_t op;
    int phase, next_phase;
    uint32_t times;
    operation run;
} table[] = {
#define OP(name, number, server, phase, next, times, function)                                     \
    ROW_##server(name, phase, next, times, function)
#include "rows.h"
};

NO_RETURN static void abandon(const struct op_request *q, int code) {
    trace_operation(q->op, trace_now(), code, 0, "the launch is abandoned");
    report("FATAL:   ", code == ERR_PHASE ? "a mount request came outside its phase; the launch "
                                            "is abandoned"
                        : code == ERR_TIMES ? "a mount request came once too often; the launch is "
                                              "abandoned"
                                            : "a mount request is malformed; the launch is "
                                              "abandoned");
    _exit(254);
}

static const struct row *find_row(struct rpc *r, const struct op_request *q) {
    for (size_t i = 0; i < ARRAY_SIZE(table); i++) {
        if (table[i].op != q->op)
            continue;
        if (r->phase != table[i].phase)
            abandon(q, ERR_PHASE);
        if (r->uses[i]++ >= table[i].times)
            abandon(q, ERR_TIMES);
        return &table[i];
    }
    abandon(q, ERR_MALFORMED);
}

/* The two first operations, done before they are asked for; the answers wait here.  A failure is
 * one too: it has used up the device, so that another try could not tell the reason. */
static struct early {
    struct op_request q;
    struct op_reply a;
    int fd;
    bool waits;
} early[2];
static pid_t reader;

static bool answered_early(const struct op_request *q, size_t size, struct op_reply *a,
                           int *fd_out) {
    for (size_t i = 0; i < ARRAY_SIZE(early); i++) {
        if (!early[i].waits || memcmp(q, &early[i].q, size) != 0)
            continue;
        *a = early[i].a;
        *fd_out = early[i].fd;
        early[i].waits = false;
        return true;
    }
    return false;
}

static bool do_early(struct rpc *r, struct early *e, uint32_t op, uint64_t number, operation run) {
    memset(&e->q, 0, sizeof(e->q));
    e->q.op = e->a.op = op;
    e->q.num[0] = number;
    e->fd = -1;
    uint64_t start = trace_now();
    step_operation(op, false);
    e->a.code = run(r, &e->q, &e->a, &e->fd);
    trace_operation(op, start, e->a.code, e->a.error, "early");
    step_operation(op, true);
    e->waits = true;
    return e->a.code == ERR_OK;
}

/* Reads ahead what the payload's loader will touch, while the interpreters still start. */
static void start_reader(const struct rpc *r) {
    const struct launch *l = r->launch;
    char name[LIMIT_PATH_BYTES];
    struct target_identity target;
    if (!(l->request.forecast & FORECAST_COMMAND) ||
        !early_word(l, l->request.image_arg + 1, name, sizeof(name)))
        return;
    step_begin(STEP_FORK_READER);
    reader = fork();
    if (reader == 0) {
        trace_set_role(ROLE_READER);
        step_begin(STEP_DROP_READER);
        stage_target(l, ROLE_READER, &target);
        /* SAFE: reads files of the image with nothing but the user's rights, and ends. */
        if (privs_drop(&target) < 0 || prctl(PR_SET_PDEATHSIG, SIGKILL) < 0)
            _exit(255);
        step_end(STEP_DROP_READER);
        trace_process();
        close(l->rpc_socket[0]);
        prefetch_program(r->root_fd, name);
        _exit(0);
    }
    step_end(STEP_FORK_READER);
}

static void stop_reader(void) {
    int status;
    if (reader > 0 && kill(reader, SIGKILL) == 0)
        (void)waitpid(reader, &status, 0);
}

/* The mount is there: the early image server, if there is one, waits for this alone. */
static void tell_server(struct launch *l) {
    if (l->serve_pipe[1] < 0)
        return;
    ssize_t ignored = write(l->serve_pipe[1], "M", 1); /* its reader may have given up */
    (void)ignored;
    close(l->serve_pipe[1]);
    l->serve_pipe[1] = -1;
}

/* Memory file system and image, as stage 1 will most likely ask for them; both lie in a namespace
 * that nobody sees, and the image is served by a process without privilege. */
static void head_start(struct rpc *r) {
    const struct launch *l = r->launch;
    bool read_before = l->loan_mount >= 0; /* what another launch has read is in memory */
    if (!l->early_fuse ||
        !do_early(r, &early[0], OP_SESSION,
                  config_uint(&l->config, CONFIG_SESSIONDIR_MAX_SIZE), op_session) ||
        !do_early(r, &early[1], OP_ROOT_FUSE, 0, op_root_fuse))
        return;
    tell_server(r->launch);
    if (!read_before)
        start_reader(r);
}

static int target_of(const struct op_request *q) {
    return q->length[1] > 0 ? 1 : 0;
}

/* What was begun early in another way than it is asked for now cannot be had twice. */
static int run_once(struct rpc *r, const struct row *row, const struct op_request *q,
                    struct op_reply *a, int *fd_out) {
    if (row->phase <= PHASE_ROOT && r->session_fd >= 0 && row->op == OP_SESSION)
        return ERR_CHANGED;
    if (row->phase == PHASE_ROOT && r->root_fd >= 0)
        return ERR_CHANGED;
    if (row->op == OP_PIVOT)
        stop_reader();
    int code = row->run(r, q, a, fd_out);
    return code;
}

/* One request, one reply; after a failure nothing more is done, but every request is answered. */
static bool serve(struct rpc *r, bool *failed) {
    static struct op_request q;
    int passed, fd_out = -1;
    ssize_t got = wire_receive(r->launch->rpc_socket[0], &q, sizeof(q), &passed);
    if (got < 0 && errno == EMSGSIZE)
        abandon(&q, ERR_MALFORMED);
    if (got <= 0)
        return false;
    if (passed >= 0)
        close(passed); /* no mount takes a descriptor from outside */
    struct op_reply a = {.op = q.op, .code = ERR_CANCELLED};
    if (wire_check_request(&q, (size_t)got) < 0)
        abandon(&q, ERR_MALFORMED);
    uint64_t start = trace_now();
    if (!*failed) {
        const struct row *row = find_row(r, &q);
        if (!answered_early(&q, (size_t)got, &a, &fd_out)) {
            step_operation(q.op, false);
            a.code = run_once(r, row, &q, &a, &fd_out);
        }
        if (a.code == ERR_MALFORMED)
            abandon(&q, ERR_MALFORMED);
        trace_operation(q.op, start, a.code, a.error, wire_string(&q, target_of(&q)));
        step_operation(q.op, true);
        if (a.code == ERR_OK)
            r->phase = row->next_phase;
        else if (!(q.op == OP_BIND && q.flags & BIND_MAY_FAIL) &&
                 !(q.op == OP_MOUNT && q.flags & BIND_MAY_FAIL) && q.op != OP_LAYER)
            *failed = true;
    }
    if (wire_send(r->launch->rpc_socket[0], &a, sizeof(a), fd_out) < 0)
        return false;
    if (fd_out >= 0)
        close(fd_out);
    return r->phase != PHASE_DONE;
}

NO_RETURN void rpc_main(struct launch *l) {
    static struct rpc r;
    struct target_identity target;
    bool failed = false;
    r.launch = l;
    r.phase = PHASE_SESSION;
    r.session_fd = r.root_fd = r.final_fd = -1;
    stage_target(l, ROLE_RPC, &target);
    step_begin(STEP_DROP_RPC);
    privs_new_keyring();
    /* SAFE: the user in every id, so that every look-up is the user's own; the capability acts in
     * the container's private mount namespace. */
    if (privs_drop(&target) < 0 || prctl(PR_SET_PDEATHSIG, SIGKILL) < 0)
        fail("the mounting process cannot take its identity", errno);
    if (getppid() != container_pid)
        _exit(255); /* it has died before the signal was set */
    step_end(STEP_DROP_RPC);
    trace_process();
    head_start(&r);
    turn_give(); /* to stage 2: what the image server waits for has been done */
    while (serve(&r, &failed))
        ;
    _exit(r.phase == PHASE_DONE ? 0 : 255);
}
