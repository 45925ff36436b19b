/* The mounting process: the user in every id, one capability, a closed table of operations. */
#include <errno.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "starter.h"

typedef int (*operation)(struct rpc *, const struct op_request *, struct op_reply *, int *);

#define ROW_RPC(name, phase, next, times, function)                                                \
    {OP_##name, PHASE_##phase, PHASE_##next, times, function},
#define ROW_KEEPER(name, phase, next, times, function)

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

static int target_of(const struct op_request *q) {
    return q->length[1] > 0 ? 1 : 0;
}

/* One request, one reply; after a failure nothing more is done, but every request is answered. */
static bool serve(struct rpc *r, bool *failed) {
    static struct op_request q;
    int passed, fd_out = -1;
    ssize_t got = wire_receive(r->launch->rpc_socket[0], &q, sizeof(q), &passed);
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
        step_operation(q.op, false);
        a.code = row->run(r, &q, &a, &fd_out);
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
    step_end(STEP_DROP_RPC);
    trace_process();
    while (serve(&r, &failed))
        ;
    _exit(r.phase == PHASE_DONE ? 0 : 255);
}
