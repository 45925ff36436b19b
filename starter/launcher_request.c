/* The request: arguments, environment and directory in a sealed memfd (request.h). */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include "build.h"
#include "launcher.h"

#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008U
#endif

_Static_assert(sizeof(APY_BUILD_ID) <= REQUEST_BUILD_ID_BYTES, "the build id has its place");

struct extent {
    size_t count, bytes;
};

static struct extent measure(char *const strings[], int most) {
    struct extent e = {0};
    for (; e.count < (size_t)most && strings[e.count] != NULL; e.count++)
        e.bytes += strlen(strings[e.count]) + 1;
    return e;
}

static char *copy(char *to, const char *text) {
    size_t length = strlen(text) + 1;
    memcpy(to, text, length);
    return to + length;
}

static void fill(char *base, const struct request_header *h, char *const argv[],
                 char *const envp[], const char *cwd, const char *engine) {
    memcpy(base, h, sizeof(*h));
    char *to = base + h->argv_off;
    for (uint32_t i = 0; i < h->argc; i++)
        to = copy(to, argv[i]);
    for (uint32_t i = 0; i < h->envc; i++)
        to = copy(to, envp[i]);
    to = copy(to, cwd);
    to = copy(to, engine);
    copy(to, "");
}

/* A limit on file sizes counts for a memfd too, and would end us with SIGXFSZ. */
static int resize(int fd, size_t size) {
    struct rlimit limit, raised;
    if (getrlimit(RLIMIT_FSIZE, &limit) != 0)
        return -1;
    raised = limit;
    if (limit.rlim_cur < size) {
        if (limit.rlim_max < size) {
            errno = EFBIG;
            return -1;
        }
        raised.rlim_cur = limit.rlim_max;
    }
    if (raised.rlim_cur != limit.rlim_cur && setrlimit(RLIMIT_FSIZE, &raised) != 0)
        return -1;
    int result = ftruncate(fd, (off_t)size), error = errno;
    if (raised.rlim_cur != limit.rlim_cur && setrlimit(RLIMIT_FSIZE, &limit) != 0)
        return -1;
    errno = error;
    return result;
}

static int make_file(size_t size, char **base) {
    unsigned flags = MFD_ALLOW_SEALING;
    int fd = memfd_create("apptainer-py request", flags | MFD_NOEXEC_SEAL);
    if (fd < 0 && errno == EINVAL)
        fd = memfd_create("apptainer-py request", flags);
    if (fd < 0)
        return -1;
    *base = resize(fd, size) == 0 ? mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)
                                  : MAP_FAILED;
    if (*base != MAP_FAILED)
        return fd;
    int error = errno;
    close(fd);
    errno = error;
    return -1;
}

/* Its soft limit, which the payload shall have again; 0 where it cannot be read. */
static uint64_t stack_limit(void) {
    struct rlimit limit;
    return getrlimit(RLIMIT_STACK, &limit) == 0 ? (uint64_t)limit.rlim_cur : 0;
}

static struct request_header describe(const struct choice *c, struct extent args,
                                      struct extent env, size_t cwd_bytes) {
    struct request_header h = {
        .magic = REQUEST_MAGIC,
        .version = REQUEST_VERSION,
        .header_size = sizeof(h),
        .build_id = APY_BUILD_ID,
        .flow = c->flow,
        .reason = c->reason,
        .flags = (c->trace_fd >= 0 ? REQUEST_TRACE : 0) |
                 (c->instance ? REQUEST_INSTANCE : 0),
        .trace_fd = c->trace_fd,
        .argc = (uint32_t)args.count,
        .envc = (uint32_t)env.count,
        .argv_off = sizeof(h),
    };
    h.env_off = h.argv_off + (uint32_t)args.bytes;
    h.cwd_off = h.env_off + (uint32_t)env.bytes;
    h.engine_off = h.cwd_off + (uint32_t)cwd_bytes;
    h.engine_file_off = h.engine_off + (uint32_t)strlen(c->engine) + 1;
    h.total = h.engine_file_off + 1;
    h.forecast = c->forecast.what;
    h.forecast_spaces = c->forecast.spaces;
    h.forecast_flags = c->forecast.flags;
    h.image_arg = c->image_arg;
    h.stack_limit = stack_limit();
    return h;
}

int request_make(const struct choice *c, int argc, char *const argv[], char *const envp[],
                 const char **why) {
    char cwd[REQUEST_CWD_MAX];
    if (getcwd(cwd, sizeof(cwd)) == NULL || cwd[0] != '/')
        cwd[0] = '\0';
    struct extent args = measure(argv, argc);
    struct extent env = measure(envp, REQUEST_ENVC_MAX + 1);
    size_t rest = sizeof(struct request_header) + sizeof(cwd) + REQUEST_ENGINE_MAX + 1;
    *why = "too many arguments, or too large an environment, for one launch";
    if (args.count > REQUEST_ARGC_MAX || env.count > REQUEST_ENVC_MAX ||
        args.bytes + env.bytes > LIMIT_REQUEST_BYTES - rest)
        return -1;
    struct request_header h = describe(c, args, env, strlen(cwd) + 1);
    char *base;
    int fd = make_file(h.total, &base);
    if (fd >= 0) {
        fill(base, &h, argv, envp, cwd, c->engine);
        if (munmap(base, h.total) == 0 && fcntl(fd, F_ADD_SEALS, REQUEST_SEALS) == 0)
            return fd;
        int error = errno;
        close(fd);
        errno = error;
    }
    *why = strerror(errno);
    return -1;
}
