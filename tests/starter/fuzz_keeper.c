/*
 * Hostile frames for keeper, the process with the rights: its dispatcher and its operations as they
 * are, with processes that are made up here and that end whenever they like.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <setjmp.h>
#include <stdarg.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "fuzz.h"

static pid_t made_up_fork(void);
static int made_up_kill(pid_t pid, int number);
static pid_t made_up_waitpid(pid_t pid, int *status, int options);
static int made_up_open(const char *path, int flags, ...);
static int made_up_fstat(int fd, struct stat *st);
static int made_up_execve(const char *path, char *const argv[], char *const envp[]);
static void made_up_exit(int status) __attribute__((noreturn));
void made_up_report(const char *level, const char *text);
void made_up_fail(const char *what, int error) __attribute__((noreturn));

#define fork made_up_fork
#define kill made_up_kill
#define waitpid made_up_waitpid
#define open made_up_open
#define fstat made_up_fstat
#define execve made_up_execve
#define _exit made_up_exit
#define report made_up_report
#define fail made_up_fail
#include "../../starter/keeper.c"
#undef fork
#undef kill
#undef waitpid
#undef open
#undef fstat
#undef execve
#undef _exit
#undef report
#undef fail

static struct launch launch;
static struct keeper kept;
static jmp_buf ended;
static enum { RUNS, ABANDONED, BECAME_PLAIN, GAVE_UP } how_it_ended;
static bool dropped, raised, fails;
static uint64_t accepted, granted;

static bool unlucky(void) {
    return fails && dice(8) == 0;
}

/* ---- processes: few numbers, so that one that was reaped is soon somebody else's ---- */

enum life { NOBODY, STRANGER, OURS, ENDED_OF_OURS };
enum { FIRST_PID = 2, LAST_PID = 12 };
static enum life lives[LAST_PID + 1];

static pid_t born(void) {
    if (unlucky()) {
        errno = EAGAIN;
        return -1;
    }
    for (int tries = 0; tries < 1000; tries++) {
        int pid = FIRST_PID + (int)dice(LAST_PID - FIRST_PID + 1);
        if (lives[pid] == NOBODY) {
            lives[pid] = OURS;
            return pid;
        }
    }
    errno = EAGAIN;
    return -1;
}

/* Children end, and their numbers, once reaped, go to others. */
static void time_passes(void) {
    for (int pid = FIRST_PID; pid <= LAST_PID; pid++) {
        if (lives[pid] == OURS && dice(12) == 0)
            lives[pid] = ENDED_OF_OURS;
        else if (lives[pid] == NOBODY && dice(3) == 0)
            lives[pid] = STRANGER;
        else if (lives[pid] == STRANGER && dice(3) == 0)
            lives[pid] = NOBODY;
    }
}

static pid_t made_up_fork(void) {
    return born();
}

static int made_up_kill(pid_t pid, int number) {
    if (pid == getpid())
        return 0;
    must(pid >= FIRST_PID && pid <= LAST_PID, "a signal goes to one process");
    must(lives[pid] == OURS || lives[pid] == ENDED_OF_OURS, "a signal goes to a child of ours");
    if (number == SIGKILL)
        lives[pid] = ENDED_OF_OURS;
    return 0;
}

static pid_t made_up_waitpid(pid_t pid, int *status, int options) {
    *status = dice(2) == 0 ? 0 : SIGKILL;
    for (int n = FIRST_PID; n <= LAST_PID; n++)
        if ((pid == -1 || pid == n) && lives[n] == ENDED_OF_OURS) {
            lives[n] = dice(2) == 0 ? NOBODY : STRANGER;
            return n;
        }
    must(options & WNOHANG, "nobody is waited for who goes on");
    return 0;
}

/* ---- the rest of the system ---- */

static int made_up_open(const char *path, int flags, ...) {
    must(strcmp(path, "/dev/fuse") == 0 && flags & O_CLOEXEC, "one device is opened");
    must(raised == (launch.flow != FLOW_USERNS), "with a right that is raised for it");
    return unlucky() ? -1 : fcntl(0, F_DUPFD_CLOEXEC, 8);
}

/* A mount that is for its owner alone. */
static int made_up_fstat(int fd, struct stat *st) {
    if (!unlucky())
        return fstat(fd, st);
    errno = EACCES;
    return -1;
}

static int made_up_execve(const char *path, char *const argv[], char *const envp[]) {
    must(strcmp(path, APY_STARTER) == 0 && argv[0] && !envp[0], "it becomes the plain starter");
    must(dropped && !raised, "which has no rights");
    how_it_ended = BECAME_PLAIN;
    longjmp(ended, 1);
}

static void made_up_exit(int status) {
    must(status == 255, "an abandoned launch says so");
    how_it_ended = ABANDONED;
    longjmp(ended, 1);
}

void made_up_report(const char *level, const char *text) {
    must(strlen(level) < 16 && strlen(text) < 256, "a report is short");
}

void made_up_fail(const char *what, int error) {
    (void)what;
    (void)error;
    how_it_ended = GAVE_UP;
    longjmp(ended, 1);
}

/* ---- what belongs to other files of the starter ---- */

static struct container_plan on_record;
static bool is_on_record;

int audit_launch(const struct launch *l, const struct container_plan *plan, const char *image,
                 const char *decision) {
    (void)l;
    must(strlen(image) <= LIMIT_PATH_BYTES, "an image's path has an end");
    if (unlucky())
        return -1;
    is_on_record = strcmp(decision, "begun") == 0 || strcmp(decision, "allowed") == 0;
    on_record = *plan;
    return 0;
}

pid_t container_start(struct launch *l, int *err) {
    must(is_on_record && memcmp(&on_record, &l->plan, sizeof(on_record)) == 0,
         "what is made is on record");
    must(policy_plan(l, &l->plan) == ERR_OK, "and allowed");
    must(!(l->plan.flags & PLAN_INSTANCE) || l->plan.flags & PLAN_SHIM || l->uid == 0,
         "an instance begins with our own program, or is root's");
    bool inner = (l->plan.flags & PLAN_FAKEROOT) != 0;
    must(!inner || (l->plan.uid == 0 && l->plan.gid == 0 && l->plan.group_count == 0),
         "root of a namespace is root");
    must(!inner || l->flow == FLOW_USERNS ||
             (l->plan.flags & PLAN_SUBIDS && l->plan.flags & PLAN_NO_NEW_PRIVS),
         "who may become others gains nothing more");
    must(!inner || (l->plan.flags & (PLAN_SETUID | PLAN_KERNEL_IMAGE | PLAN_KERNEL_EXTFS)) == 0,
         "and has none of the host's own rights");
    if (l->flow == FLOW_SETUID && !inner)
        for (int set = 0; set < CAP_SETS; set++)
            must(l->plan.caps[set] == l->plan.caps[0] && !(l->plan.caps[set] & ~granted),
                 "the setuid flow gives no capability that was not granted");
    bool own = l->plan.uid == l->uid && l->plan.gid == l->gid;
    must(inner || l->flow == FLOW_ROOT || l->flow == FLOW_USERNS || own,
         "the payload is the caller's");
    for (int set = 0; set < CAP_SETS && l->flow == FLOW_USERNS && !inner && !own; set++)
        must(l->plan.caps[set] == 0 && l->plan.flags & PLAN_NO_NEW_PRIVS &&
                 !(l->plan.flags & (PLAN_INSTANCE | PLAN_SHARED)),
             "who has another name in a user namespace has nothing more");
    pid_t pid = born();
    *err = errno;
    return pid;
}

int fakeroot_prepare(struct launch *l, int *error) {
    (void)l;
    *error = EMFILE;
    return dice(8) == 0 ? ERR_SETUP : ERR_OK;
}

int fakeroot_map(struct launch *l, pid_t container, int *error) {
    must(container > 0, "there is one to map");
    *error = EPERM;
    if (dice(4) == 0)
        return ERR_SUBIDS;
    for (uint32_t i = 0; i < l->plan.fuse_count; i++)
        l->fuse_fds[i] = open("/dev/null", O_RDWR | O_CLOEXEC);
    return ERR_OK;
}

void fakeroot_close(struct launch *l) {
    (void)l;
}

bool early_plan(const struct launch *l, struct container_plan *plan) {
    memset(plan, 0, sizeof(*plan));
    plan->uid = l->uid;
    plan->gid = l->gid;
    plan->flags = PLAN_NO_NEW_PRIVS;
    plan->fuse_count = dice(2);
    return dice(2) == 0 && policy_plan(l, plan) == ERR_OK;
}

void early_image(const struct launch *l, char *out, size_t size) {
    (void)l;
    append_text(out, size, "/image");
}

/* The early server's answer: the file that is asked for later, another, or none. */
pid_t server_start_early(struct launch *l) {
    struct stat st;
    struct probe found = {.offset = dice(2)};
    must(fstat(3, &st) == 0, "there is an image");
    found.dev = st.st_dev;
    found.ino = st.st_ino + dice(2);
    if (dice(3) != 0)
        must(write(l->probe_pipe[1], &found, sizeof(found)) == (ssize_t)sizeof(found), "it tells");
    return born();
}

/* A mount of another launch: of the file that is asked for later, of another, or none. */
static struct stat lent;

void loan_init(struct launch *l, struct loan *s) {
    l->loan_mount = l->loan_asked = s->token_fd = s->server_fd = s->listener = s->holder = -1;
    s->taken = false;
}

void loan_close(struct launch *l, struct loan *s) {
    if (l->loan_mount >= 0)
        close(l->loan_mount);
    if (s->server_fd >= 0)
        close(s->server_fd);
    loan_init(l, s);
}

void loan_ask(struct launch *l, struct loan *s) {
    (void)l;
    (void)s;
}

bool loan_take(struct launch *l, struct loan *s) {
    must(is_on_record && kept.phase == PREPARE, "nothing is taken before it is on record");
    must(!policy_limits_images(l), "nor where rules bind images");
    if (dice(3) != 0)
        return false;
    must(fstat(3, &lent) == 0, "there is an image");
    lent.st_ino += dice(3) == 0;
    l->loan_mount = dup(1);
    s->server_fd = dup(1);
    return s->taken = true;
}

bool loan_is(const struct loan *s, const struct stat *st, uint64_t offset) {
    must(s->taken, "what was taken is compared");
    return st->st_ino == lent.st_ino && offset == 0;
}

void loan_forget(struct launch *l) {
    must(l->loan_mount < 0, "what was taken is given up first");
}

void loan_seal(struct launch *l, struct loan *s, pid_t server, const struct stat *st,
                uint64_t offset) {
    must(server > 0 && (lives[server] == OURS || lives[server] == ENDED_OF_OURS),
         "what is handed out is served");
    must(!s->taken && S_ISREG(st->st_mode) && offset < (uint64_t)st->st_size, "and was judged");
    (void)l;
}

int loan_server_status(const struct launch *l, const struct loan *s) {
    must(s->taken && l->flow != FLOW_ROOT, "a server of another launch's");
    return dice(2) == 0 ? SIGKILL : 0;
}

void loan_listen(struct launch *l, struct loan *s) {
    must(dropped || l->flow == FLOW_ROOT, "nobody listens with rights");
    (void)s;
}

void loan_serve(const struct launch *l, const struct loan *s) {
    (void)l;
    must(s->listener >= 0, "somebody listens");
}

pid_t janitor_start(struct launch *l, pid_t container, int socket, int signals) {
    must(l->flow == FLOW_ROOT || (l->flow == FLOW_SETUID && networks.count > 0),
         "a janitor is root's, or has networks to make that were judged");
    must(!dropped, "and comes before the end of all rights");
    must(fcntl(socket, F_GETFD) >= 0 && fcntl(signals, F_GETFD) >= 0, "and has its descriptors");
    (void)container;
    return dice(2) == 0 ? -1 : 1 << 22;
}

struct networks networks;

int networks_add(const struct launch *l, const char *name, const char *args) {
    must(is_on_record && !dropped, "of a container that stands");
    must(!name || strlen(name) < LIMIT_PATH_BYTES, "a name ends");
    must(!args || strlen(args) < LIMIT_PATH_BYTES, "so do arguments");
    if (l->flow == FLOW_USERNS || !name || dice(2) == 0 || networks.count == NETWORKS_MAX)
        return ERR_REFUSED;
    networks.count++;
    return ERR_OK;
}

int networks_port(const struct launch *l, const uint64_t num[6], int *error) {
    (void)l;
    must(num[4] == 0 && num[5] == 0, "nothing more is said of a port");
    *error = EACCES;
    return dice(2) == 0 ? ERR_PORT : ERR_OK;
}

int join_start(struct launch *l, int process_fd, pid_t *pid, int *error) {
    must(l->plan.flags & PLAN_JOIN, "nobody joins who has not asked to");
    must(!(l->plan.flags & PLAN_BOOTED) || l->uid == 0, "an init of the image's own is root's");
    must(is_on_record && fcntl(process_fd, F_GETFD) >= 0, "whom is told by a descriptor");
    *pid = born();
    *error = errno;
    return *pid < 0 ? ERR_FORK : ERR_OK;
}

void detach_streams(struct launch *l) {
    must(l->plan.flags & PLAN_INSTANCE, "what an instance writes goes to its own files");
}

int policy_netns(const struct launch *l, int fd) {
    (void)l;
    must(fcntl(fd, F_GETFD) >= 0, "a network is open");
    return dice(2) == 0 ? ERR_REFUSED : ERR_OK;
}

pid_t server_start(const struct launch *l, int image_fd, int fuse_fd, uint64_t offset) {
    struct stat st;
    must(fstat(image_fd, &st) == 0 && S_ISREG(st.st_mode), "an image is a file");
    must((fcntl(image_fd, F_GETFL) & O_ACCMODE) != O_WRONLY, "that can be read");
    must(offset < (uint64_t)st.st_size, "in which it begins");
    must(fcntl(fuse_fd, F_GETFD) >= 0, "and is served to a device");
    must(l->fuse_fds[0] == fuse_fd || l->plan.fuse_count > 1, "of this launch");
    return born();
}

pid_t server_start_extfs(const struct launch *l, int image_fd, int fuse_fd,
                         const struct extfs_place *place) {
    int mode = fcntl(image_fd, F_GETFL);
    must(!place->writable || (mode & O_ACCMODE) == O_RDWR, "what is written was opened for it");
    return server_start(l, image_fd, fuse_fd, place->offset);
}

pid_t server_start_overlay(struct launch *l) {
    must(l->plan.flags & PLAN_SERVED_LAYER && l->plan.fuse_count > 0, "it has a device");
    return born();
}

int server_look(const struct launch *l, int image_fd, struct image_facts *found) {
    must(l->flow == FLOW_SETUID, "root and a user's own flow look themselves");
    found->code = unlucky() ? ERR_REFUSED : ERR_OK;
    return unlucky() ? -1 : fstat(image_fd, &found->st);
}

const struct raised *privs_raise(uint64_t caps) {
    must(!raised && caps == CAP_BIT(CAP_DAC_OVERRIDE), "one right at a time");
    raised = true;
    return (const struct raised *)(uintptr_t)1;
}

void privs_lower(const struct raised *token) {
    must((token != NULL) == raised, "a right that was raised is lowered");
    raised = false;
}

int privs_drop(const struct target_identity *target) {
    must(target->uid == launch.uid && target->gid == launch.gid, "to the caller");
    for (int set = 0; set < CAP_SETS; set++)
        must(set == CAP_SET_BOUNDING || target->caps[set] == 0, "without a capability");
    dropped = !unlucky();
    return dropped ? 0 : -1;
}

int privs_make_userns(const struct launch *l) {
    must(l->flow == FLOW_USERNS, "a user namespace is made where it was asked for");
    return unlucky() ? -1 : 0;
}

void privs_new_keyring(void) {
}

uint64_t privs_last_cap_mask(void) {
    return (1ull << 41) - 1;
}

int names_match(const struct launch *l, enum config_id key, bool group, const gid_t *ids,
                size_t count) {
    (void)l;
    (void)key;
    (void)group;
    (void)ids;
    (void)count;
    return 0;
}

uint64_t names_granted_caps(const struct launch *l) {
    must(l->flow == FLOW_SETUID, "root and a user's own flow need no grant");
    return granted;
}

void sanitize_close_inherited(const struct launch *l) {
    (void)l;
}

void sanitize_restore_for_payload(const struct launch *l) {
    (void)l;
}

void stage_run(struct launch *l, enum stage stage) {
    (void)l;
    (void)stage;
    abort(); /* no child ever runs here */
}

void turn_make(bool wanted) {
    (void)wanted;
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
    (void)text;
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

static int master; /* master's end of the channel */
static uint32_t uses[ARRAY_SIZE(table)];

static size_t compose_container(union keeper_request *q) {
    struct container_request *c = &q->container;
    c->image_length = dice(30) == 0 ? dice(2000) : dice(64);
    memset(c->image, dice(2) == 0 ? 'x' : (int)dice(256), sizeof(c->image));
    c->plan = launch.plan;
    c->plan.uid = launch.uid;
    c->plan.gid = launch.gid;
    c->plan.flags |= PLAN_NO_NEW_PRIVS;
    c->plan.fuse_count = dice(3);
    c->plan.spaces = dice(4) == 0 ? dice(32) : 0;
    uint64_t asked = dice(3) == 0 ? odd_number() & (dice(4) == 0 ? launch.permitted : granted) : 0;
    for (int set = 0; set < CAP_SETS; set++)
        c->plan.caps[set] = asked;
    for (uint32_t n = dice(3) == 0 ? dice(3) : 0; n > 0; n--)
        mutate(&c->plan, sizeof(c->plan));
    return sizeof(*c);
}

static size_t compose(union keeper_request *q) {
    size_t size = offsetof(struct op_request, tail);
    uint32_t fits = kept.phase == SETUP ? OP_SERVE_IMAGE : dice(3) == 0 ? 1 + dice(3) : OP_CONTAINER;
    memset(q, 0, sizeof(*q));
    q->plain.op = dice(60) == 0 ? dice(20) : fits;
    if (q->plain.op == OP_CONTAINER) {
        size = compose_container(q);
    } else if (q->plain.op == OP_SERVE_IMAGE) {
        q->plain.num[0] = dice(3) == 0 ? dice(6) : 0;
        q->plain.num[1] = dice(8) == 0 ? odd_number() : dice(2);
    }
    for (uint32_t n = dice(40) == 0 ? dice(4) : 0; n > 0; n--)
        mutate(q, size);
    return dice(100) == 0 ? dice(sizeof(*q) + 1) : size;
}

static void reset(void) {
    static const enum flow flows[] = {FLOW_SETUID, FLOW_USERNS, FLOW_ROOT};
    memset(&launch, 0, sizeof(launch));
    memset(&kept, 0, sizeof(kept));
    memset(lives, 0, sizeof(lives));
    memset(uses, 0, sizeof(uses));
    how_it_ended = RUNS;
    dropped = raised = is_on_record = false;
    fails = dice(3) == 0;
    granted = dice(2) == 0 ? odd_number() & ((1ull << 41) - 1) : 0;
    config_defaults(&launch.config);
    launch.flow = flows[dice(3)];
    launch.uid = launch.gid = 1000;
    launch.permitted = (1ull << 41) - 1;
    launch.trace_file = launch.config_fd = -1;
    launch.request.total = dice(2) + 1; /* of an engine that is built in, or not */
    kept.launch = &launch;
    kept.signals = -1;
    loan_init(&launch, &kept.loan);
    open_channels(&launch);
    kept.master = born();
    kept.master_alive = kept.master > 0;
    master = launch.keeper_socket[1];
}

static void take_reply(uint32_t op, enum phase before) {
    union {
        struct op_reply reply;
        struct event_frame event;
    } a;
    int passed;
    ssize_t got;
    do /* events come on the same channel */
        got = wire_receive(master, &a, sizeof(a), &passed);
    while (got >= 4 && a.reply.op > 1000);
    must(got == (ssize_t)sizeof(a.reply) && passed < 0, "it is answered, without a descriptor");
    must(a.reply.op == op, "the answer is that of the request");
    must(kept.phase >= before, "a phase does not come back");
    accepted += a.reply.code == ERR_OK;
    for (size_t i = 0; i < ARRAY_SIZE(table); i++)
        if (table[i].op == op)
            must(++uses[i] <= table[i].times, "nothing is done more often than allowed");
}

/* An image to serve: a file, one that cannot be read, a directory, or none at all. */
static int made_up_image(void) {
    switch (dice(12)) {
    case 0:
        return -1;
    case 1:
        return 4;
    case 2:
        return 5;
    case 3:
        return 6;
    default:
        return 3;
    }
}

static bool one_request(void) {
    static union keeper_request q;
    size_t size = compose(&q);
    enum phase before = kept.phase;
    int image = q.plain.op == OP_SERVE_IMAGE || dice(20) == 0 ? made_up_image() : -1;
    must(wire_send(master, &q, size, image) == 0, "it can be sent");
    serve(&kept);
    must(!raised, "no right stays raised");
    if (launch.keeper_socket[0] < 0)
        return false;
    take_reply(q.plain.op, before);
    return true;
}

static void live(void) {
    if (setjmp(ended) != 0)
        return;
    begin_early(&kept);
    for (int turns = 0; turns < 12; turns++) {
        time_passes();
        if (dice(2) == 0)
            reap(&kept);
        if (!one_request())
            break;
    }
    /* The end: whoever is left is ended, and nobody else. */
    reap(&kept);
    if (kept.container_alive)
        (void)made_up_kill(kept.container, SIGKILL);
    if (kept.master_alive)
        (void)made_up_kill(kept.master, SIGKILL);
}

static void once(void) {
    reset();
    live();
    close_range(8, ~0U, 0);
}

int main(int argc, char **argv) {
    char name[] = "/tmp/fuzz_keeper.XXXXXX";
    int file = mkstemp(name);
    must(file >= 0 && write(file, "an image", 8) == 8, "there is an image");
    must(dup2(open(name, O_RDONLY), 3) == 3 && dup2(open(name, O_WRONLY), 4) == 4 &&
             dup2(open("/etc", O_RDONLY | O_DIRECTORY), 5) == 5 &&
             dup2(open(name, O_PATH), 6) == 6 && unlink(name) == 0,
         "and what is none");
    fuzz_main(argc, argv, once, &accepted);
    return 0;
}
