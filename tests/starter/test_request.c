/* The launcher's memfd as the starter judges it: 0, or abort with the line. */
#define _GNU_SOURCE
#include "../../starter/request.c"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);                \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

enum { PART_BYTES = 4, ARGV_OFF = sizeof(struct request_header) };

/* argv "a", env "b", cwd "c", engine "d", each with room to spare; the built-in engine. */
static struct request_header good(void) {
    struct request_header h = {
        .magic = REQUEST_MAGIC, .version = REQUEST_VERSION, .header_size = sizeof(h),
        .build_id = APY_BUILD_ID, .flow = FLOW_USERNS, .reason = REASON_ASKED, .trace_fd = -1,
        .argc = 1, .envc = 1, .argv_off = ARGV_OFF, .env_off = ARGV_OFF + PART_BYTES,
        .cwd_off = ARGV_OFF + 2 * PART_BYTES, .engine_off = ARGV_OFF + 3 * PART_BYTES,
        .engine_file_off = ARGV_OFF + 4 * PART_BYTES, .total = ARGV_OFF + 4 * PART_BYTES + 1,
    };
    return h;
}

static int judge(const struct request_header *h) {
    return check_header(h, (off_t)h->total);
}

static void test_numbers(void) {
    CHECK(number_in("3") == 3 && number_in("0") == 0 && number_in("1000000") == 1000000);
    CHECK(number_in(NULL) < 0 && number_in("") < 0 && number_in("-3") < 0);
    CHECK(number_in("3x") < 0 && number_in(" 3") < 0 && number_in("+3") < 0);
    CHECK(number_in("99999999999999999999") < 0);
}

#define REFUSES(change)                                                                            \
    do {                                                                                           \
        struct request_header h = good();                                                          \
        CHECK(judge(&h) == 0);                                                                     \
        change;                                                                                    \
        CHECK(judge(&h) < 0);                                                                      \
    } while (0)

static void test_every_field_is_judged(void) {
    REFUSES(h.magic[0] = 'x');
    REFUSES(h.magic[7] = 'x');
    REFUSES(h.version = REQUEST_VERSION + 1);
    REFUSES(h.header_size--);
    REFUSES(h.flags = 4);
    REFUSES(h.flags = 1u << 31);
    REFUSES(h.image_arg = h.argc);
    REFUSES(h.image_arg = UINT32_MAX);
    REFUSES(h.forecast = 1u << 30);
    REFUSES(h.argc = 0);
    REFUSES(h.argc = REQUEST_ARGC_MAX + 1);
    REFUSES(h.envc = REQUEST_ENVC_MAX + 1);
    REFUSES(h.argv_off--);
    REFUSES(h.env_off = h.argv_off - 1);
    REFUSES(h.env_off = UINT32_MAX);
    REFUSES(h.cwd_off = h.env_off - 1);
    REFUSES(h.engine_off = h.cwd_off - 1);
    REFUSES(h.engine_file_off = h.engine_off - 1);
    REFUSES(h.engine_file_off = h.total + 1);
    REFUSES(h.total = h.engine_file_off - 1);
    REFUSES(h.total = LIMIT_REQUEST_BYTES + 1);
    struct request_header h = good();
    CHECK(check_header(&h, (off_t)h.total + 1) < 0 && check_header(&h, 0) < 0);
    CHECK(check_header(&h, -1) < 0);
}

static void test_parts_are_bounded(void) {
    struct request_header longest = good();
    longest.engine_off = longest.cwd_off + REQUEST_CWD_MAX;
    longest.engine_file_off = longest.engine_off + REQUEST_ENGINE_MAX;
    longest.total = longest.engine_file_off + 1;
    CHECK(judge(&longest) == 0);
    REFUSES((h.engine_off = h.cwd_off + REQUEST_CWD_MAX + 1, h.engine_file_off = h.engine_off,
             h.total = h.engine_off));
    REFUSES((h.engine_file_off = h.engine_off + REQUEST_ENGINE_MAX + 1,
             h.total = h.engine_file_off));
}

static int memfd_with(const struct request_header *h, int seals) {
    int fd = memfd_create("request", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    CHECK(fd >= 3 && ftruncate(fd, (off_t)h->total) == 0);
    CHECK(pwrite(fd, h, sizeof(*h), 0) == (ssize_t)sizeof(*h));
    CHECK(seals == 0 || fcntl(fd, F_ADD_SEALS, seals) == 0);
    return fd;
}

/* Opens a request in a child, as the starter's first process would; returns its exit status. */
static int opened(int fd, enum flow flow, char *said, size_t size) {
    int ends[2], status;
    CHECK(pipe(ends) == 0);
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        static struct launch launch;
        char number[16] = "", name[] = "starter";
        char *const argv[] = {name, number, NULL};
        append_number(number, sizeof(number), (uint64_t)fd);
        dup2(ends[1], STDERR_FILENO);
        launch.flow = flow;
        request_open(&launch, 2, argv);
        _exit(launch.trace_file == -1 && fcntl(fd, F_GETFD) == FD_CLOEXEC ? 0 : 1);
    }
    close(ends[1]);
    ssize_t got = read(ends[0], said, size - 1);
    CHECK(got >= 0 && waitpid(pid, &status, 0) == pid && WIFEXITED(status));
    said[got] = '\0';
    close(ends[0]);
    return WEXITSTATUS(status);
}

static void test_only_a_sealed_memfd_is_read(void) {
    struct request_header h = good();
    char said[256];
    static const int seals[] = {F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_WRITE};
    CHECK(opened(memfd_with(&h, REQUEST_SEALS), FLOW_USERNS, said, sizeof(said)) == 0);
    CHECK(said[0] == '\0');
    for (size_t i = 0; i < ARRAY_SIZE(seals); i++) {
        int fd = memfd_with(&h, REQUEST_SEALS & ~seals[i]);
        CHECK(opened(fd, FLOW_USERNS, said, sizeof(said)) == 255);
        CHECK(strstr(said, "not for direct use") != NULL);
        close(fd);
    }
    CHECK(opened(0, FLOW_USERNS, said, sizeof(said)) == 255);
    CHECK(opened(999, FLOW_USERNS, said, sizeof(said)) == 255);
}

static void test_other_builds_and_engines_are_refused(void) {
    struct request_header h = good();
    char said[256];
    h.build_id[0] ^= 1;
    CHECK(opened(memfd_with(&h, REQUEST_SEALS), FLOW_USERNS, said, sizeof(said)) == 255);
    CHECK(strstr(said, "different builds") != NULL);
    h = good();
    h.total += 8; /* the name of an engine's file */
    CHECK(opened(memfd_with(&h, REQUEST_SEALS), FLOW_USERNS, said, sizeof(said)) == 0);
    CHECK(opened(memfd_with(&h, REQUEST_SEALS), FLOW_SETUID, said, sizeof(said)) == 255);
    CHECK(strstr(said, "built-in engines only") != NULL);
    h = good();
    h.total = h.engine_file_off; /* not even the NUL of "" */
    CHECK(opened(memfd_with(&h, REQUEST_SEALS), FLOW_SETUID, said, sizeof(said)) == 255);
}

/* A trace number that is not open, or is the request itself, is as good as none. */
static void test_a_false_trace_descriptor_is_ignored(void) {
    struct request_header h = good();
    char said[256];
    static const int32_t wrong[] = {-1, 0, 2, 999, INT32_MIN};
    h.flags = REQUEST_TRACE;
    for (size_t i = 0; i < ARRAY_SIZE(wrong); i++) {
        h.trace_fd = wrong[i];
        CHECK(opened(memfd_with(&h, REQUEST_SEALS), FLOW_USERNS, said, sizeof(said)) == 0);
    }
}

/* The setuid program's own limit is 8 MiB at most; the caller's may go up to the hard limit. */
static void test_the_stack_is_the_callers(void) {
    static const struct {
        enum flow flow;
        rlim_t now, hard, asked, then;
    } rows[] = {
        {FLOW_SETUID, 8 << 20, RLIM_INFINITY, RLIM_INFINITY, RLIM_INFINITY},
        {FLOW_SETUID, 8 << 20, RLIM_INFINITY, 100 << 20, 100 << 20},
        {FLOW_SETUID, 8 << 20, 64 << 20, RLIM_INFINITY, 64 << 20},
        {FLOW_SETUID, 8 << 20, RLIM_INFINITY, 1 << 20, 8 << 20},
        {FLOW_SETUID, 8 << 20, RLIM_INFINITY, 0, 8 << 20},
        {FLOW_USERNS, 8 << 20, RLIM_INFINITY, RLIM_INFINITY, 8 << 20},
    };
    for (size_t i = 0; i < ARRAY_SIZE(rows); i++) {
        static struct launch l;
        l.flow = rows[i].flow;
        l.request.stack_limit = (uint64_t)rows[i].asked;
        l.inherited.limits[RLIMIT_STACK] = (struct rlimit){rows[i].now, rows[i].hard};
        keep_stack_limit(&l);
        CHECK(l.inherited.limits[RLIMIT_STACK].rlim_cur == rows[i].then);
        CHECK(l.inherited.limits[RLIMIT_STACK].rlim_max == rows[i].hard);
    }
}

int main(void) {
    test_the_stack_is_the_callers();
    test_numbers();
    test_every_field_is_judged();
    test_parts_are_bounded();
    test_only_a_sealed_memfd_is_read();
    test_other_builds_and_engines_are_refused();
    test_a_false_trace_descriptor_is_ignored();
    return 0;
}
