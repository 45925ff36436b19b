/* The launcher's sealed memfd.  C reads the header; strings are for Python, after the drop. */
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "starter.h"

static int number_in(const char *text) {
    int number = 0;
    if (!text || !*text)
        return -1;
    for (; *text; text++) {
        if (*text < '0' || *text > '9' || number > 1000000)
            return -1;
        number = number * 10 + (*text - '0');
    }
    return number;
}

/* A memfd that nobody can change any more; any other kind of file could change under our eyes. */
int request_check_seals(int fd, struct stat *st) {
    int seals = fcntl(fd, F_GET_SEALS);
    if (seals < 0 || (seals & REQUEST_SEALS) != REQUEST_SEALS)
        return -1;
    return fstat(fd, st) == 0 && S_ISREG(st->st_mode) ? 0 : -1;
}

static int check_header(const struct request_header *h, off_t size) {
    const uint32_t offsets[] = {h->argv_off, h->env_off,         h->cwd_off,
                                h->engine_off, h->engine_file_off, h->total};
    if (memcmp(h->magic, REQUEST_MAGIC, sizeof(h->magic)) != 0 || h->version != REQUEST_VERSION ||
        h->header_size != sizeof(*h) || h->argc < 1 || h->argc > REQUEST_ARGC_MAX ||
        h->envc > REQUEST_ENVC_MAX || h->flags & ~(uint32_t)(REQUEST_TRACE | REQUEST_INSTANCE) ||
        h->image_arg >= h->argc ||
        h->forecast & ~(uint32_t)(FORECAST_CONTAINER | FORECAST_FUSE | FORECAST_COMMAND |
                                  FORECAST_RANK))
        return -1;
    if (offsets[0] != sizeof(*h) || h->total > LIMIT_REQUEST_BYTES || (off_t)h->total != size)
        return -1;
    for (size_t i = 1; i < ARRAY_SIZE(offsets); i++)
        if (offsets[i] < offsets[i - 1])
            return -1;
    return h->engine_off - h->cwd_off <= REQUEST_CWD_MAX &&
                   h->engine_file_off - h->engine_off <= REQUEST_ENGINE_MAX
               ? 0
               : -1;
}

static void check_build(const struct request_header *h) {
    char own[REQUEST_BUILD_ID_BYTES] = APY_BUILD_ID;
    if (memcmp(h->build_id, own, sizeof(own)) != 0)
        fail("launcher and starter are of different builds; install apptainer-py again (./install)",
             0);
}

/* The kernel has lowered a larger soft limit to 8 MiB; anybody may raise theirs to the hard one. */
static void keep_stack_limit(struct launch *l) {
    struct rlimit *stack = &l->inherited.limits[RLIMIT_STACK];
    rlim_t asked = (rlim_t)l->request.stack_limit;
    if (l->flow == FLOW_SETUID && asked > stack->rlim_cur)
        stack->rlim_cur = asked < stack->rlim_max ? asked : stack->rlim_max;
}

void request_open(struct launch *l, int argc, char *const argv[]) {
    struct stat st;
    l->request_fd = argc > 1 ? number_in(argv[1]) : -1;
    if (l->request_fd < 3 || request_check_seals(l->request_fd, &st) < 0)
        fail("the starter is not for direct use; run apptainer-py", 0);
    if (pread(l->request_fd, &l->request, sizeof(l->request), 0) != (ssize_t)sizeof(l->request) ||
        check_header(&l->request, st.st_size) < 0)
        fail("the launch request is malformed; install apptainer-py again (./install)", 0);
    check_build(&l->request);
    if (l->flow != FLOW_CALLER && l->request.flow == FLOW_CALLER)
        fail("this request is not for this starter", 0);
    /* Root may ask for less than it has. */
    if (l->flow == FLOW_ROOT && l->request.flow == FLOW_USERNS)
        l->flow = FLOW_USERNS;
    bool builtin = l->request.total - l->request.engine_file_off == 1;
    if (l->flow == FLOW_SETUID && !builtin)
        fail("the setuid flow accepts built-in engines only", 0);
    l->reason = l->request.reason <= REASON_POLICY ? (enum reason)l->request.reason : REASON_NONE;
    /* A starter that keeper fell back to is told so by keeper, in words of its own. */
    bool by_policy = argc > 2 && strcmp(argv[2], "policy") == 0;
    if (by_policy || (argc > 2 && strcmp(argv[2], "engine") == 0)) {
        l->reason = by_policy ? REASON_POLICY : REASON_ENGINE;
        if (l->flow == FLOW_ROOT)
            l->flow = FLOW_USERNS; /* exec has brought back what keeper had given up */
    }
    keep_stack_limit(l);
    l->trace_file = -1;
    if (l->request.flags & REQUEST_TRACE && l->request.trace_fd >= 3 &&
        l->request.trace_fd != l->request_fd &&
        fcntl(l->request.trace_fd, F_SETFD, FD_CLOEXEC) == 0)
        l->trace_file = l->request.trace_fd;
    (void)fcntl(l->request_fd, F_SETFD, FD_CLOEXEC);
}
