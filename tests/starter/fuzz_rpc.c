/*
 * Hostile frames for the mounting process: its dispatcher and its operations as they are, over a
 * kernel that is made up here, so that nothing is ever mounted and every call can fail.
 */
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "fuzz.h"

static jmp_buf ended;
static int exit_status;
static uint32_t calls_to_a_failure = 1;
static struct stat judged; /* what stands behind every descriptor of a directory, here */

static int made_up_result(void) {
    static const int errors[] = {EPERM, ENOENT, EINVAL, EAGAIN, ENOTDIR, EBUSY, ENOSYS};
    if (dice(calls_to_a_failure) != 0 || calls_to_a_failure == 1)
        return 0;
    errno = errors[dice(sizeof(errors) / sizeof(errors[0]))];
    return -1;
}

static int made_up_fd(void) {
    return made_up_result() < 0 ? -1 : fcntl(dice(8) == 0 ? 0 : 3, F_DUPFD_CLOEXEC, 8);
}

/* The strings that reach the kernel end where they should, or ASan says so. */
static void read_all(const char *text) {
    must(text == NULL || strlen(text) <= 8192, "a string has an end");
}

static long made_up_syscall(long number, ...);
static int made_up_open(const char *path, int flags, ...);
static int made_up_ioctl(int fd, unsigned long request, ...);
static int made_up_mkdirat(int fd, const char *name, mode_t mode);
static int made_up_chdir(const char *path);
static int made_up_fchdir(int fd);
static int made_up_sethostname(const char *name, size_t length);
static void made_up_exit(int status) __attribute__((noreturn));
void made_up_report(const char *level, const char *text);

#define syscall made_up_syscall
#define open made_up_open
#define ioctl made_up_ioctl
#define mkdirat made_up_mkdirat
#define chdir made_up_chdir
#define fchdir made_up_fchdir
#define sethostname made_up_sethostname
#define _exit made_up_exit
#define report made_up_report
#include "../../starter/rpc.c"
/* After rpc.c, which makes names of the rows that a macro of mounts.c would replace. */
#include "../../starter/mounts.c"
#include "../../starter/mountcalls.c"
#include "../../starter/images.c"
#include "../../starter/layers.c"
#include "../../starter/underlay.c"
#include "../../starter/user_fuse.c"
#undef report
#undef syscall
#undef open
#undef ioctl
#undef mkdirat
#undef chdir
#undef fchdir
#undef sethostname
#undef _exit

/* A path could be another directory by the time that the kernel looks it up. */
static void only_descriptors(const char *layers) {
    static const char here[] = "/proc/self/fd/";
    for (const char *at = layers; *at; at += *at == ':') {
        must(strncmp(at, here, sizeof(here) - 1) == 0, "a layer is named by a descriptor");
        char *end;
        long fd = strtol(at + sizeof(here) - 1, &end, 10);
        must(end > at + sizeof(here) - 1 && (*end == ':' || !*end), "by nothing but its number");
        must(fcntl((int)fd, F_GETFD) >= 0, "that is open");
        at = end;
    }
}

static void made_up_fsconfig(unsigned command, const char *key, const char *value) {
    if (command == FSCONFIG_SET_STRING)
        read_all(value);
    if (command == FSCONFIG_SET_STRING && key && strstr(key, "dir") == key + strlen(key) - 3)
        only_descriptors(value);
}

static long made_up_syscall(long number, ...) {
    va_list arguments;
    long result = made_up_result();
    va_start(arguments, number);
    if (number == SYS_fsconfig) {
        (void)va_arg(arguments, int);
        unsigned command = va_arg(arguments, unsigned);
        const char *key = va_arg(arguments, const char *);
        made_up_fsconfig(command, key, va_arg(arguments, const char *));
    } else if (number == SYS_openat2) {
        (void)va_arg(arguments, int);
        read_all(va_arg(arguments, const char *));
        result = made_up_fd();
    } else if (number == SYS_fsopen || number == SYS_fsmount || number == SYS_open_tree) {
        result = made_up_fd();
    }
    va_end(arguments);
    return result;
}

static int made_up_open(const char *path, int flags, ...) {
    (void)flags;
    read_all(path);
    return made_up_fd();
}

static int made_up_ioctl(int fd, unsigned long request, ...) {
    (void)fd;
    (void)request;
    return made_up_result();
}

static int made_up_mkdirat(int fd, const char *name, mode_t mode) {
    (void)fd;
    (void)mode;
    read_all(name);
    return made_up_result();
}

static int made_up_chdir(const char *path) {
    read_all(path);
    return made_up_result();
}

static int made_up_fchdir(int fd) {
    (void)fd;
    return made_up_result();
}

static int made_up_sethostname(const char *name, size_t length) {
    must(strlen(name) == length && length < LIMIT_HOSTNAME_BYTES, "a host name is as long as told");
    return made_up_result();
}

void made_up_report(const char *level, const char *text) {
    read_all(level);
    read_all(text);
}

static void made_up_exit(int status) {
    exit_status = status;
    longjmp(ended, 1);
}

/* ---- what belongs to other files of the starter ---- */

const struct raised *privs_raise(uint64_t caps) {
    return made_up_result() < 0 ? NULL : (const struct raised *)(uintptr_t)(caps | 1);
}

void privs_lower(const struct raised *token) {
    (void)token;
}

int privs_drop(const struct target_identity *target) {
    (void)target;
    return -1;
}

void privs_new_keyring(void) {
}

int policy_image(const struct launch *l, int image_fd) {
    (void)l;
    (void)image_fd;
    return dice(4) == 0 ? ERR_OWNER : ERR_OK;
}

bool policy_limits_images(const struct launch *l) {
    (void)l;
    return dice(2) == 0;
}

bool policy_holds_mounts(int fd) {
    must(fcntl(fd, F_GETFD) >= 0, "a mount is named by its descriptor");
    return dice(8) == 0;
}

uint64_t privs_last_cap_mask(void) {
    return (1ull << 41) - 1;
}

/* The child that a user's layer takes is no part of this. */
int layers_in_userns(struct rpc *r) {
    must(r->upper_fd > 0 && r->work_fd > 0, "there is something to write to");
    return made_up_fd();
}

void stage_target(const struct launch *l, enum role role, struct target_identity *target) {
    (void)l;
    (void)role;
    (void)target;
}

pid_t container_pid;

bool policy_is_served(int fd) {
    (void)fd;
    return dice(4) == 0;
}

int names_home(const struct launch *l, char *out, size_t size) {
    (void)l;
    out[0] = '\0';
    append_text(out, size, "/tmp");
    return made_up_result();
}

const char *early_word(const struct launch *l, uint32_t which, char *out, size_t size) {
    (void)l;
    (void)which;
    (void)out;
    (void)size;
    return NULL;
}

void loan_spare(struct launch *l, int mount_fd) {
    must(mount_fd >= 0 && l->loan_mount < 0, "a mount of our own is handed out");
}

void prefetch_program(int root_fd, const char *name) {
    (void)root_fd;
    (void)name;
}

void trace_set_role(enum role role) {
    (void)role;
}

void turn_give(void) {
}

void trace_process(void) {
}

uint64_t trace_now(void) {
    return 0;
}

void trace_operation(uint32_t op, uint64_t start_ns, int code, int error, const char *text) {
    (void)op;
    (void)start_ns;
    (void)code;
    (void)error;
    read_all(text);
}

void step_begin(enum step step) {
    (void)step;
}

void step_end(enum step step) {
    (void)step;
}

void step_operation(uint32_t op, bool end) {
    (void)op;
    (void)end;
}

/* ---- one launch ---- */

static struct launch launch;
static struct rpc served;
static int sockets[2];
static uint64_t accepted;

static const char *const words[] = {
    "", "/", "/dev", "/dev/null", "/dev/../etc", "/tmp", "/a/b/c", "relative", "..", "/..", "//",
    "/.", "a-host-name", "/session", "\xff\xfe", "/x/.",
};

static void add_string(struct op_request *q, size_t *size, int which) {
    const char *word = words[dice(ARRAY_SIZE(words))];
    size_t length = strlen(word) + 1;
    memcpy((char *)q + *size, word, length);
    if (dice(40) == 0) { /* as long as can be */
        length = LIMIT_PATH_BYTES;
        memset((char *)q + *size, '/', length - 1);
        ((char *)q)[*size + length - 1] = '\0';
    }
    q->length[which] = (uint16_t)length;
    *size += length;
}

/* How many strings each operation takes, so that most frames get past the first check. */
static uint32_t strings_of(uint32_t op) {
    if (op == OP_BIND || op == OP_UNDERLAY_BIND)
        return 2;
    return op == OP_ROOT_SQUASHFS || op == OP_ROOT_DIRECTORY || op == OP_MOUNT ||
           op == OP_HOSTNAME || op == OP_IMAGE_KERNEL || op == OP_IMAGE_DIRECTORY;
}

static uint32_t fitting_op(int phase) {
    uint32_t fit[ARRAY_SIZE(table)];
    size_t count = 0;
    for (size_t i = 0; i < ARRAY_SIZE(table); i++)
        if (table[i].phase == phase)
            fit[count++] = table[i].op;
    return count == 0 || dice(50) == 0 ? table[dice(ARRAY_SIZE(table))].op
                                       : fit[dice((uint32_t)count)];
}

static size_t compose(struct op_request *q) {
    size_t size = offsetof(struct op_request, tail);
    memset(q, 0, sizeof(*q));
    q->op = fitting_op(served.phase);
    q->flags = dice(3) == 0 ? dice(64) : 0;
    q->num[0] = dice(3) != 0 ? dice(6) : dice(1000);
    if (q->op == OP_ROOT_DIRECTORY || q->op == OP_ROOT_SQUASHFS || q->op == OP_IMAGE_DIRECTORY ||
        q->op == OP_IMAGE_KERNEL) {
        q->num[0] = judged.st_dev;
        q->num[1] = judged.st_ino;
        q->num[q->op == OP_IMAGE_KERNEL ? 4 : 2] = q->op < OP_IMAGE_FUSE ? 0 : dice(4);
        q->flags |= q->op == OP_IMAGE_DIRECTORY ? BIND_READ_ONLY : 0;
    }
    for (uint32_t i = 0, count = strings_of(q->op); i < count; i++)
        add_string(q, &size, (int)i);
    for (uint32_t n = dice(40) == 0 ? dice(4) : 0; n > 0; n--)
        mutate(q, dice(2) == 0 ? offsetof(struct op_request, tail) : size);
    if (dice(100) == 0)
        size = dice(sizeof(*q) + 1);
    return size;
}

static void reset(void) {
    static const int phases[] = {PHASE_SESSION, PHASE_ROOT, PHASE_LAYER, PHASE_ASSEMBLE};
    memset(&served, 0, sizeof(served));
    served.launch = &launch;
    served.phase = phases[dice(4)];
    served.session_fd = served.root_fd = served.final_fd = -1;
    if (served.phase > PHASE_ROOT)
        served.session_fd = served.root_fd = 3;
    if (served.phase > PHASE_LAYER)
        served.final_fd = 3;
    launch.flow = (enum flow)(1 + dice(3));
    launch.config.number[CONFIG_USER_BIND_CONTROL] = dice(2);
    launch.plan.flags = dice(128);
    launch.plan.spaces = dice(32);
    launch.rpc_socket[0] = sockets[0];
    launch.seal_pipe[0] = 0;
    launch.serve_pipe[0] = launch.serve_pipe[1] = -1;
    launch.loan_mount = dice(4) == 0 ? fcntl(0, F_DUPFD_CLOEXEC, 8) : -1;
    calls_to_a_failure = dice(3) == 0 ? 2 + dice(40) : 1;
    for (size_t i = 0; i < LIMIT_FUSE_DEVICES; i++)
        launch.fuse_fds[i] = dice(2) == 0 ? -1 : fcntl(0, F_DUPFD_CLOEXEC, 8);
    exit_status = -1;
}

static void take_reply(uint32_t op, int phase_before) {
    struct op_reply a;
    int passed;
    must(wire_receive(sockets[1], &a, sizeof(a), &passed) == (ssize_t)sizeof(a), "it is answered");
    must(a.op == op, "the answer is that of the request");
    must(a.code != ERR_OK || served.phase >= phase_before, "a phase does not come back");
    must(a.code == ERR_OK || passed < 0, "a refusal hands nothing out");
    accepted += a.code == ERR_OK;
    if (passed >= 0)
        close(passed);
}

static bool leaves_it_running(bool *failed) {
    static struct op_request q;
    size_t size = compose(&q);
    int before = served.phase;
    bool shape = wire_check_request(&q, size) == 0;
    must(wire_send(sockets[1], &q, size, dice(20) == 0 ? 0 : -1) == 0, "it can be sent");
    if (setjmp(ended) != 0) {
        must(exit_status == 254, "an abandoned launch says so");
        return false;
    }
    bool goes_on = serve(&served, failed);
    must(shape || size == 0, "a frame without shape ends it");
    if (size > 0)
        take_reply(q.op, before);
    return goes_on;
}

static void once(void) {
    bool failed = false;
    reset();
    while (leaves_it_running(&failed) && (!failed || dice(4) != 0))
        ;
    close_range(8, ~0U, 0);
}

int main(int argc, char **argv) {
    int zero = open("/dev/zero", O_RDWR);
    must(zero >= 0 && dup2(zero, 0) == 0, "there is a stream that can be read");
    must(dup2(open("/etc", O_RDONLY | O_DIRECTORY), 3) == 3, "there is a directory");
    must(fstat(3, &judged) == 0, "which can be judged");
    must(wire_pair(sockets) == 0, "there is a channel");
    config_defaults(&launch.config);
    fuzz_main(argc, argv, once, &accepted);
    return 0;
}
