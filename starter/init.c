/* What enters a container: one row after another, then the payload. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stddef.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "init.h"
#include "steps.h"

#define ROW_KEEPER(name, phase, next, times, function)
#define ROW_JANITOR(name, phase, next, times, function)
#define ROW_RPC(name, phase, next, times, function)
#define ROW_INIT(name, phase, next, times, function) {OP_##name, (phase), (next), times, function},

/* Which rows exist, when, how often, and where each leads (0: nowhere). */
static const struct row {
    uint32_t op;
    int phases, next_phase;
    uint32_t times;
    init_row *run;
} table[] = {
#define OP(name, number, server, phase, next, times, function)                                     \
    ROW_##server(name, phase, next, times, function)
#include "rows.h"
};

static uint32_t uses[ARRAY_SIZE(table)];

int init_failed(struct op_reply *a) {
    a->error = errno;
    return ERR_SYSTEM;
}

int init_failed_at(struct op_reply *a, uint32_t value) {
    a->value = value;
    return init_failed(a);
}

void init_close(int *fd) {
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

/* An ordinary user's process must stay dumpable until its maps are written: they belong to root
 * otherwise.  Nobody of the container can see it before. */
void init_shield(const struct init *s) {
    (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (s->phase > BORN || s->join_count > 0 || s->root)
        (void)prctl(PR_SET_DUMPABLE, 0);
}

int init_send_reply(const struct init *s, const struct op_reply *a, int fd) {
    return wire_send(s->socket, a, sizeof(*a), fd);
}

NO_RETURN static void abandon(int code) {
    report("FATAL:   ", code == ERR_PHASE   ? "a row outside its phase; the launch is abandoned"
                        : code == ERR_TIMES ? "a row once too often; the launch is abandoned"
                                            : "a row is malformed; the launch is abandoned");
    _exit(254);
}

static const struct row *find_row(const struct init *s, const struct op_request *q) {
    for (size_t i = 0; i < ARRAY_SIZE(table); i++) {
        if (table[i].op != q->op)
            continue;
        if (!(s->phase & table[i].phases))
            abandon(ERR_PHASE);
        if (uses[i]++ >= table[i].times)
            abandon(ERR_TIMES);
        return &table[i];
    }
    abandon(ERR_MALFORMED);
}

static void run_row(struct init *s, const struct op_request *q, struct op_reply *a) {
    const struct row *row = find_row(s, q);
    step_operation(q->op, false);
    a->code = row->run(s, q, a);
    step_operation(q->op, true);
    if (a->code == ERR_MALFORMED)
        abandon(ERR_MALFORMED);
    if (a->code != ERR_OK)
        s->failed = true;
    else if (row->next_phase != 0)
        s->phase = row->next_phase;
}

static char message[LIMIT_ROWS_BYTES];

/* Rows lie in a message one after another; each says by its strings how long it is. */
static size_t take_row(struct op_request *q, const char *at, size_t left) {
    const size_t head = offsetof(struct op_request, tail);
    if (left < head)
        abandon(ERR_MALFORMED);
    memcpy(q, at, head);
    size_t size = head + q->length[0] + q->length[1];
    if (size > left || size > sizeof(*q))
        abandon(ERR_MALFORMED);
    memcpy(q->tail, at + head, size - head);
    if (wire_check_request(q, size) < 0)
        abandon(ERR_MALFORMED);
    return size;
}

/* Until one fails; *a is the last one's reply, and says in its upper half which that was.  A
 * descriptor belongs to a row that comes alone, and nothing comes with what makes init. */
static void run_rows(struct init *s, size_t size, struct op_reply *a) {
    static struct op_request q;
    size_t at = 0;
    for (uint32_t number = 0; at < size; number++) {
        at += take_row(&q, message + at, size - at);
        if ((s->passed >= 0 && (number > 0 || at < size)) || s->forerunner_ends || s->silent)
            abandon(ERR_MALFORMED);
        init_close(&s->fd_out);
        *a = (struct op_reply){.op = q.op | number << 16, .code = ERR_CANCELLED};
        if (s->failed)
            return;
        run_row(s, &q, a);
        if (s->failed)
            return;
    }
}

/* One message, one reply; after a failure nothing more is done, but every message is answered. */
static bool serve(struct init *s) {
    struct op_reply a = {.code = ERR_CANCELLED};
    ssize_t got = wire_receive(s->socket, message, sizeof(message), &s->passed);
    if (got < 0 && errno == EMSGSIZE)
        abandon(ERR_MALFORMED);
    if (got <= 0)
        return false;
    s->silent = false;
    run_rows(s, (size_t)got, &a);
    init_close(&s->passed);
    int sent = s->silent ? 0 : init_send_reply(s, &a, s->fd_out);
    init_close(&s->fd_out);
    return sent == 0 && !s->forerunner_ends;
}

static int number_in(const char *text) {
    int number = 0;
    if (!*text)
        return -1;
    for (; *text; text++) {
        if (*text < '0' || *text > '9' || number > 1000000)
            return -1;
        number = number * 10 + (*text - '0');
    }
    return number;
}

static struct init state = {.phase = SPACES,
                            .born_pipe = {-1, -1},
                            .passed = -1,
                            .fd_out = -1,
                            .own_net_fd = -1,
                            .host_proc_fd = -1,
                            .proc_fd = -1,
                            .root_fd = -1,
                            .context_fd = -1,
                            .mount_fd = -1};

int main(int argc, char *argv[]) {
    struct init *s = &state;
    struct stat st;
    s->socket = argc == 2 || argc == 3 ? number_in(argv[1]) : -1;
    if (s->socket < 3 || fstat(s->socket, &st) < 0 || !S_ISSOCK(st.st_mode) ||
        fcntl(s->socket, F_SETFD, FD_CLOEXEC) < 0)
        fail("starter-init is not for direct use; run apptainer-py-oci", 0);
    s->root = geteuid() == 0;
    init_shield(s);
#ifdef APY_TEST_STEPS
    test_read_environment(environ);
#endif
    s->umask = umask(022);
    if (argc == 3 && strcmp(argv[2], INIT_NETWORK) == 0)
        init_network_ahead(s);
    while (serve(s))
        ;
    if (s->forerunner_ends && write(s->born_pipe[1], "b", 1) == 1)
        _exit(0);
    _exit(255);
}
