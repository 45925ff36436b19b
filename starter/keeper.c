/* The first process: parent and reaper of all others; holds privilege until the payload can start,
 * and none afterwards. */
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <poll.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <unistd.h>

#include "loan.h"
#include "networks.h"

enum { SERVER_PATIENCE_MS = 5000 };
enum phase { PREPARE, SETUP, RUN, ENDED };

struct keeper {
    struct launch *launch;
    enum phase phase;
    int signals;
    pid_t master, container, helpers[2], servers[LIMIT_FUSE_DEVICES];
    bool master_alive, container_alive;
    uint32_t writers;                  /* bit n: servers[n] has what was written */
    bool early_server;                 /* servers[0] runs, but stage 1 has not asked for it yet */
    bool lent_ended;                   /* the server of a mount that was taken */
    struct loan loan;                /* the image's mount, from another launch or for the next */
    int host_device;                   /* FUSE, mounted in the host's namespace already, or -1 */
    bool in_userns;
    bool recorded;                     /* the plan as it stands is in the audit log */
    bool closed;                       /* so is that nothing came of it */
    bool told_failure;                 /* master has, and ended before the container */
    char image[LIMIT_PATH_BYTES];      /* as the audit log shows it */
    int master_status, container_status;
    uint32_t uses[16];
};

static void close_fd(int *fd) {
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

static void close_fuse(struct launch *l) {
    for (size_t i = 0; i < LIMIT_FUSE_DEVICES; i++)
        close_fd(&l->fuse_fds[i]);
}

static void open_channels(struct launch *l) {
    l->methods_socket[0] = l->methods_socket[1] = -1;
    l->bearer_socket[0] = l->bearer_socket[1] = -1;
    l->overlay_socket[0] = l->overlay_socket[1] = -1;
    l->netns_fd = -1;
    for (int i = 0; i < 2; i++)
        l->helper_sockets[i][0] = l->helper_sockets[i][1] = l->serve_pipe[i] = l->probe_pipe[i] =
            l->life_pipe[i] = -1;
    for (size_t i = 0; i < LIMIT_FUSE_DEVICES; i++)
        l->fuse_fds[i] = -1;
    l->fakeroot_socket[0] = l->fakeroot_socket[1] = l->fuse_node = -1;
    bool builtin = l->request.total - l->request.engine_file_off == 1;
    if (wire_pair(l->loan_socket) < 0 || wire_pair(l->keeper_socket) < 0 ||
        wire_pair(l->rpc_socket) < 0 ||
        wire_pair(l->start_socket) < 0 || pipe2(l->seal_pipe, O_CLOEXEC) < 0 ||
        pipe2(l->ready_pipe, O_CLOEXEC) < 0 ||
        socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, l->go_socket) < 0 ||
        (!builtin && wire_pair(l->methods_socket) < 0) ||
        ((!builtin || l->flow == FLOW_USERNS) && (wire_pair(l->helper_sockets[0]) < 0 ||
                                                  wire_pair(l->helper_sockets[1]) < 0)))
        fail("cannot make the channels between the processes", errno);
}

static int block_signals(void) {
    sigset_t all;
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, NULL);
    return signalfd(-1, &all, SFD_CLOEXEC | SFD_NONBLOCK);
}

/* What comes to the whole group, of the terminal or of timeout(1), keeper answers for the launch: a
 * master that it ended would take the payload with it, which may want to end in its own time. */
static void unblock_signals(void) {
    static const int of_group[] = {SIGINT,  SIGQUIT, SIGTSTP, SIGHUP,  SIGTTIN, SIGTTOU,
                                   SIGTERM, SIGUSR1, SIGUSR2, SIGALRM};
    sigset_t blocked;
    sigemptyset(&blocked);
    for (size_t i = 0; i < ARRAY_SIZE(of_group); i++)
        sigaddset(&blocked, of_group[i]);
    sigprocmask(SIG_SETMASK, &blocked, NULL);
}

/* ---- master and host helpers ---- */

static void close_inner_ends(struct launch *l) {
    close_fd(&l->keeper_socket[0]);
    close_fd(&l->rpc_socket[0]);
    close_fd(&l->start_socket[0]);
    close_fd(&l->methods_socket[0]);
    close_fd(&l->seal_pipe[0]);
    close_fd(&l->seal_pipe[1]);
    close_fd(&l->ready_pipe[0]);
    close_fd(&l->ready_pipe[1]);
    close_fd(&l->loan_socket[0]);
    close_fd(&l->loan_socket[1]);
    close_fd(&l->loan_kept[0]);
    close_fd(&l->loan_kept[1]);
    close_fd(&l->loan_asked);
    close_fd(&l->go_socket[0]);
    close_fd(&l->go_socket[1]);
    close_fd(&l->life_pipe[0]);
    close_fuse(l);
    sanitize_close_inherited(l);
    unblock_signals();
}

static void close_master_ends(struct launch *l) {
    close_fd(&l->keeper_socket[1]);
    close_fd(&l->rpc_socket[1]);
    close_fd(&l->start_socket[1]);
    close_fd(&l->methods_socket[1]);
    close_fd(&l->helper_sockets[0][1]);
    close_fd(&l->helper_sockets[1][1]);
}

static void start_master(struct keeper *k) {
    struct launch *l = k->launch;
    step_begin(STEP_FORK_MASTER);
    turn_make(l->request.forecast & FORECAST_FUSE); /* else nothing is set to work first */
    k->master = fork();
    if (k->master < 0)
        fail("cannot start a process", errno);
    if (k->master == 0) {
        close_inner_ends(l);
        close_fd(&k->signals);
        close_fd(&l->helper_sockets[0][0]);
        close_fd(&l->helper_sockets[1][0]);
        stage_run(l, STAGE_MASTER);
    }
    step_end(STEP_FORK_MASTER);
    k->master_alive = true;
    close_master_ends(l);
}

/* In the host's namespaces, with the caller's own rights; ends when master says so, or dies. */
static pid_t start_helper(struct keeper *k, int which) {
    struct launch *l = k->launch;
    step_begin(STEP_FORK_HELPER);
    pid_t pid = fork();
    if (pid == 0) {
        close_inner_ends(l);
        close_fd(&k->signals);
        close_fd(&l->waiter_fd);
        close_fd(&l->helper_sockets[1 - which][0]);
        stage_run(l, which == 0 ? STAGE_POST_START_HOST : STAGE_CLEANUP_HOST);
    }
    step_end(STEP_FORK_HELPER);
    return pid;
}

/* ---- operations ---- */

union keeper_request {
    struct op_request plain;
    struct container_request container;
};

/* Operations that say nothing but their number. */
static int no_fields(const union keeper_request *request, size_t size) {
    const struct op_request *q = &request->plain;
    uint64_t any = q->flags | q->length[0] | q->length[1];
    for (int i = 0; i < 6; i++)
        any |= q->num[i];
    return wire_check_request(q, size) < 0 || any != 0 ? -1 : 0;
}

static int open_fuse_devices(struct launch *l, int *error) {
    const struct raised *raised = NULL;
    if (l->flow != FLOW_USERNS)
        raised = privs_raise(CAP_BIT(CAP_DAC_OVERRIDE));
    for (uint32_t i = 0; i < l->plan.fuse_count; i++) {
        /* SAFE: one fixed device, handed to the mounting process and the image server alone. */
        l->fuse_fds[i] = open("/dev/fuse", O_RDWR | O_CLOEXEC);
        *error = errno;
        if (l->fuse_fds[i] < 0)
            break;
    }
    privs_lower(raised);
    return l->plan.fuse_count == 0 || l->fuse_fds[l->plan.fuse_count - 1] >= 0 ? ERR_OK : ERR_FUSE;
}

static int enter_userns(struct keeper *k, int *error) {
    if (k->launch->flow != FLOW_USERNS || k->in_userns)
        return ERR_OK;
    step_begin(STEP_USERNS);
    int result = privs_make_userns(k->launch);
    *error = errno;
    k->in_userns = result == 0;
    step_end(STEP_USERNS);
    return result < 0 ? ERR_NAMESPACE : ERR_OK;
}

/* The overlay server exists before the container does, and waits for what rpc will send.  Its
 * device is the plan's last. */
static int start_overlay_server(struct keeper *k, int *error) {
    struct launch *l = k->launch;
    if (!(l->plan.flags & PLAN_SERVED_LAYER))
        return ERR_OK;
    uint32_t last = l->plan.fuse_count - 1;
    if (wire_pair(l->overlay_socket) < 0) {
        *error = errno;
        return ERR_SETUP;
    }
    k->servers[last] = server_start_overlay(l);
    *error = errno;
    k->writers |= (uint32_t)1 << last;
    close_fd(&l->overlay_socket[1]);
    return k->servers[last] < 0 ? ERR_FORK : ERR_OK;
}

/* With our copy of the device open, the server's death would hang every access. */
static void close_overlay_ends(struct launch *l) {
    close_fd(&l->overlay_socket[0]);
    if (l->plan.flags & PLAN_SERVED_LAYER)
        close_fd(&l->fuse_fds[l->plan.fuse_count - 1]);
}

static void end_child(pid_t *pid) {
    int status;
    if (*pid > 0 && kill(*pid, SIGKILL) == 0)
        (void)waitpid(*pid, &status, 0);
    *pid = 0;
}

/* What the container needs before it is cloned; with --fakeroot keeper stays where it is. */
static int prepare_container(struct keeper *k, int *error) {
    if (fakeroot_wanted(k->launch))
        return k->in_userns ? ERR_NAMESPACE : fakeroot_prepare(k->launch, error);
    int code = enter_userns(k, error);
    return code == ERR_OK ? open_fuse_devices(k->launch, error) : code;
}

static int start_container(struct keeper *k, int *error) {
    struct launch *l = k->launch;
    int code = prepare_container(k, error);
    if (code != ERR_OK)
        return code;
    if ((code = start_overlay_server(k, error)) != ERR_OK)
        return code;
    if (pipe2(l->life_pipe, O_CLOEXEC) < 0) {
        *error = errno;
        return ERR_SETUP;
    }
    k->container = container_start(l, error);
    close_fd(&l->life_pipe[1]);
    close_fd(&l->loan_mount); /* rpc has it */
    if (l->early_fuse && !k->loan.taken && k->container > 0)
        k->servers[0] = server_start_early(l);
    k->early_server = k->servers[0] > 0 || k->loan.taken;
    if (k->container < 0) {
        fakeroot_close(l);
        return *error == EAGAIN ? ERR_FORK : ERR_NAMESPACE;
    }
    if (fakeroot_wanted(l) && (code = fakeroot_map(l, k->container, error)) != ERR_OK) {
        end_child(&k->container);
        return code;
    }
    close_overlay_ends(l);
    if (k->host_device >= 0) {
        close_fd(&l->fuse_fds[0]);
        l->fuse_fds[0] = k->host_device; /* the container is there, and has none of it */
        k->host_device = -1;
    }
    *error = 0;
    k->container_alive = true;
    return ERR_OK;
}

/* A process that is only about to die could still take a request meant for the next container. */
static void wait_for_the_last(struct launch *l) {
    char byte;
    while (l->life_pipe[0] >= 0 && read(l->life_pipe[0], &byte, 1) < 0 && errno == EINTR)
        ;
    close_fd(&l->life_pipe[0]);
}

/* What one stage 2 has said of itself is no word of the next one's. */
static void renew_seal(struct launch *l) {
    close_fd(&l->seal_pipe[0]);
    close_fd(&l->seal_pipe[1]);
    if (pipe2(l->seal_pipe, O_CLOEXEC) < 0)
        fail("cannot make the channels between the processes", errno);
}

/* Takes back what was begun; the channels are unused so far and serve the next container, but for
 * the seal, which a lean stage 2 sets at once. */
static void undo_early(struct keeper *k) {
    struct launch *l = k->launch;
    end_child(&k->container);
    wait_for_the_last(l);
    renew_seal(l);
    end_child(&k->servers[0]);
    k->container_alive = k->early_server = l->early_fuse = k->lent_ended = false;
    loan_close(l, &k->loan);
    loan_forget(l);
    close_fuse(l);
    for (int i = 0; i < 2; i++) {
        close_fd(&l->serve_pipe[i]);
        close_fd(&l->probe_pipe[i]);
    }
}

static bool take_mount(struct keeper *k) {
    step_begin(STEP_TAKE_MOUNT);
    bool taken = loan_take(k->launch, &k->loan);
    if (taken)
        turn_give(); /* no image server is to be set to work before master loads */
    step_end(STEP_TAKE_MOUNT);
    return taken;
}

/* Container, mount and image server for the plan that stage 1 will most likely make. */
static void begin_early(struct keeper *k) {
    struct launch *l = k->launch;
    int error;
    if (!early_plan(l, &l->plan))
        return;
    /* On record before anything is done that takes privilege. */
    early_image(l, k->image, sizeof(k->image));
    if (audit_launch(l, &l->plan, k->image, "begun") < 0)
        return; /* the same happens, and is told, when stage 1 asks */
    k->recorded = true;
    l->early_fuse = l->plan.fuse_count > 0 && !policy_limits_images(l) &&
                    (take_mount(k) || (pipe2(l->serve_pipe, O_CLOEXEC) == 0 &&
                                       pipe2(l->probe_pipe, O_CLOEXEC) == 0));
    if (start_container(k, &error) != ERR_OK) {
        undo_early(k); /* stage 1 will ask for it, and be told why it cannot be had */
        return;
    }
    close_fd(&l->serve_pipe[0]);
    close_fd(&l->serve_pipe[1]);
    close_fd(&l->probe_pipe[1]);
}

/* Keeper's copies of the container's ends; without them an end of file means an end. */
static void close_container_ends(struct launch *l) {
    close_fd(&l->rpc_socket[0]);
    close_fd(&l->start_socket[0]);
    close_fd(&l->methods_socket[0]);
    close_fd(&l->seal_pipe[0]);
    close_fd(&l->seal_pipe[1]);
    close_fd(&l->ready_pipe[1]);
    close_fd(&l->loan_socket[1]);
    close_fd(&l->go_socket[0]);
}

/* In place of a container of its own: a process in one that runs (join.c). */
static int join_container(struct keeper *k, int process_fd, int *error) {
    int code = join_start(k->launch, process_fd, &k->container, error);
    k->container_alive = code == ERR_OK;
    k->in_userns = k->launch->flow == FLOW_USERNS && !fakeroot_wanted(k->launch);
    return code;
}

/* For the audit record: of an image the path that was judged; of an instance the process that is
 * entered, as the kernel names it, for the record that names its image is the caller's own file. */
static void name_image(struct keeper *k, const struct container_request *q, int process_fd) {
    char link[32] = "/proc/self/fd/";
    memset(k->image, 0, sizeof(k->image));
    if (!(q->plan.flags & PLAN_JOIN)) {
        memcpy(k->image, q->image, q->image_length);
        return;
    }
    append_number(link, sizeof(link), (uint64_t)(process_fd < 0 ? 0 : process_fd));
    if (process_fd < 0 || readlink(link, k->image, sizeof(k->image) - 1) < 0)
        k->image[0] = '\0';
}

/* CONTAINER: the plan is judged again, recorded, and carried out. */
static int op_container(struct keeper *k, const union keeper_request *request, size_t size,
                        int passed, struct op_reply *a) {
    struct launch *l = k->launch;
    const struct container_request *q = &request->container;
    _Static_assert(sizeof(q->image) < sizeof(k->image), "with its NUL");
    if (size != sizeof(*q) || q->image_length > sizeof(q->image))
        return ERR_MALFORMED;
    static char begun[sizeof(k->image)];
    memcpy(begun, k->image, sizeof(begun));
    name_image(k, q, passed);
    int code = policy_plan(l, &q->plan);
    if (code == ERR_MALFORMED)
        return code;
    bool known = k->recorded && code == ERR_OK &&
                 memcmp(&l->plan, &q->plan, sizeof(l->plan)) == 0 &&
                 strncmp(begun, k->image, sizeof(q->image)) == 0;
    const char *decision = code == ERR_OK ? "allowed" : "refused";
    k->closed = code != ERR_OK;
    if (!known && audit_launch(l, &q->plan, k->image, decision) < 0) {
        a->error = errno;
        k->closed = true;
        report("FATAL:   ", "the audit record cannot be written; tell your administrator");
        return ERR_REFUSED;
    }
    if (code != ERR_OK)
        return code;
    if (!k->container_alive || memcmp(&l->plan, &q->plan, sizeof(l->plan)) != 0) {
        undo_early(k);
        l->plan = q->plan;
        code = l->plan.flags & PLAN_JOIN ? join_container(k, passed, &a->error)
                                         : start_container(k, &a->error);
    }
    if (code != ERR_OK)
        return code;
    close_container_ends(l);
    privs_new_keyring();
    a->value = (uint32_t)k->container;
    return ERR_OK;
}

static int op_host_helpers(struct keeper *k, const union keeper_request *request, size_t size,
                           int passed, struct op_reply *a) {
    struct launch *l = k->launch;
    (void)passed;
    if (no_fields(request, size) < 0)
        return ERR_MALFORMED;
    /* In a namespace of the caller's they would not be on the host any more. */
    if (l->helper_sockets[0][0] < 0 || k->in_userns)
        return ERR_REFUSED;
    for (int i = 0; i < 2; i++) {
        k->helpers[i] = start_helper(k, i);
        a->error = errno;
        if (k->helpers[i] < 0)
            return ERR_FORK;
    }
    close_fd(&l->helper_sockets[0][0]);
    close_fd(&l->helper_sockets[1][0]);
    a->error = 0;
    return ERR_OK;
}

/* FUSE_DEVICE and a descriptor: the caller has mounted an image in the host's namespace, as the
 * caller may, and this is what is read to serve it.  It becomes device 0. */
static int op_fuse_device(struct keeper *k, const union keeper_request *request, size_t size,
                          int passed, struct op_reply *a) {
    struct stat st;
    if (no_fields(request, size) < 0 || passed < 0)
        return ERR_MALFORMED;
    if (k->launch->flow != FLOW_USERNS)
        return ERR_REFUSED;
    if (fstat(passed, &st) < 0 || !S_ISCHR(st.st_mode) || st.st_rdev != makedev(10, 229))
        return ERR_KIND;
    k->host_device = fcntl(passed, F_DUPFD_CLOEXEC, 3);
    a->error = errno;
    if (k->host_device < 0)
        return ERR_SETUP;
    a->error = 0;
    return ERR_OK;
}

/* Has the early server opened this very file, with the root file system at this offset? */
static bool is_served(struct keeper *k, const struct stat *st, uint64_t offset, int *code) {
    struct probe found;
    ssize_t got = -1;
    struct pollfd answer = {.fd = k->launch->probe_pipe[0], .events = POLLIN};
    /* Somebody may have stopped it, and signals wait while we do. */
    if (poll(&answer, 1, SERVER_PATIENCE_MS) == 1)
        got = read(k->launch->probe_pipe[0], &found, sizeof(found));
    close_fd(&k->launch->probe_pipe[0]);
    k->early_server = false;
    if (got != (ssize_t)sizeof(found)) {
        end_child(&k->servers[0]); /* it made nothing of the image: the ordinary way, then */
        return false;
    }
    bool same = found.dev == st->st_dev && found.ino == st->st_ino && found.offset == offset;
    *code = !same ? ERR_CHANGED : k->servers[0] > 0 ? ERR_OK : ERR_SERVER;
    return true;
}

/* The image as it is open.  A FUSE mount that is for its owner alone answers nobody who is not the
 * caller in every id, and keeper is not: then a child that is looks at it, and tells. */
static int judge_image(const struct launch *l, int image_fd, struct image_facts *found,
                       int *error) {
    memset(found, 0, sizeof(*found));
    if (fstat(image_fd, &found->st) == 0)
        return l->flow == FLOW_SETUID ? policy_image(l, image_fd) : ERR_OK;
    *error = errno;
    if (*error != EACCES || l->flow != FLOW_SETUID || server_look(l, image_fd, found) < 0)
        return ERR_SOURCE;
    *error = 0;
    return found->code;
}

/* SERVE_IMAGE(device, offset) and the open image: judged again on that descriptor. */
static int op_serve_image(struct keeper *k, const union keeper_request *request, size_t size,
                          int image_fd, struct op_reply *a) {
    struct launch *l = k->launch;
    const struct op_request *q = &request->plain;
    struct image_facts image;
    if (wire_check_request(q, size) < 0 || q->num[0] >= LIMIT_FUSE_DEVICES ||
        l->fuse_fds[q->num[0]] < 0 || image_fd < 0 || q->flags || q->num[2] || q->num[3] ||
        q->num[4] || q->num[5] || q->length[0] || q->length[1])
        return ERR_MALFORMED;
    int mode = fcntl(image_fd, F_GETFL);
    if (mode < 0 || mode & O_PATH || (mode & O_ACCMODE) == O_WRONLY)
        return ERR_KIND;
    int code = judge_image(l, image_fd, &image, &a->error);
    if (code != ERR_OK)
        return code;
    if (!S_ISREG(image.st.st_mode) || q->num[1] >= (uint64_t)image.st.st_size)
        return ERR_KIND;
    int *device = &l->fuse_fds[q->num[0]];
    if (q->num[0] == 0 && k->loan.taken) {
        k->early_server = false;
        close_fd(device);
        return loan_is(&k->loan, &image.st, q->num[1]) ? ERR_OK : ERR_CHANGED;
    }
    if (q->num[0] == 0 && k->early_server && is_served(k, &image.st, q->num[1], &code)) {
        close_fd(device);
        if (code == ERR_OK)
            loan_seal(l, &k->loan, k->servers[0], &image.st, q->num[1]);
        return code;
    }
    k->servers[q->num[0]] = server_start(l, image_fd, *device, q->num[1]);
    a->error = errno;
    close_fd(device); /* with our copy open, the server's death would hang every access */
    if (k->servers[q->num[0]] < 0)
        return ERR_FORK;
    if (q->num[0] == 0)
        loan_seal(l, &k->loan, k->servers[0], &image.st, q->num[1]);
    a->error = 0;
    return ERR_OK;
}

/* NETNS and a network namespace, which the container is to join: judged on that descriptor. */
static int op_netns(struct keeper *k, const union keeper_request *request, size_t size, int passed,
                    struct op_reply *a) {
    struct launch *l = k->launch;
    if (no_fields(request, size) < 0 || passed < 0)
        return ERR_MALFORMED;
    int code = policy_netns(l, passed);
    if (code != ERR_OK)
        return code;
    l->netns_fd = fcntl(passed, F_DUPFD_CLOEXEC, 3);
    a->error = errno;
    if (l->netns_fd < 0)
        return ERR_SETUP;
    a->error = 0;
    return ERR_OK;
}

static int op_network(struct keeper *k, const union keeper_request *request, size_t size,
                      int passed, struct op_reply *a) {
    const struct op_request *q = &request->plain;
    uint64_t any = q->flags;
    for (int i = 0; i < 6; i++)
        any |= q->num[i];
    (void)a;
    if (wire_check_request(q, size) < 0 || any != 0 || passed >= 0)
        return ERR_MALFORMED;
    return networks_add(k->launch, wire_string(q, 0), wire_string(q, 1));
}

static int op_port(struct keeper *k, const union keeper_request *request, size_t size, int passed,
                   struct op_reply *a) {
    const struct op_request *q = &request->plain;
    if (wire_check_request(q, size) < 0 || q->flags || q->num[4] || q->num[5] || q->length[0] ||
        q->length[1] || passed >= 0)
        return ERR_MALFORMED;
    return networks_port(k->launch, q->num, &a->error);
}

/* JANITOR and a socket: this launch makes what must be undone whoever dies (janitor.c); a user's
 * makes networks that were judged before, and nothing else. */
static int op_janitor(struct keeper *k, const union keeper_request *request, size_t size,
                      int passed, struct op_reply *a) {
    struct launch *l = k->launch;
    if (no_fields(request, size) < 0 || passed < 0)
        return ERR_MALFORMED;
    if (l->flow != FLOW_ROOT && (l->flow != FLOW_SETUID || networks.count == 0))
        return ERR_REFUSED;
    pid_t pid = janitor_start(l, k->container, passed, k->signals);
    a->error = errno;
    if (pid < 0)
        return ERR_FORK;
    a->error = 0;
    return ERR_OK;
}

/* SERVE_EXTFS(device, offset) and the open image, as SERVE_IMAGE; WRITABLE: open for that too. */
static int op_serve_extfs(struct keeper *k, const union keeper_request *request, size_t size,
                          int image_fd, struct op_reply *a) {
    struct launch *l = k->launch;
    const struct op_request *q = &request->plain;
    struct image_facts image;
    struct extfs_place place = {.offset = q->num[1], .writable = q->flags & BIND_WRITABLE};
    if (wire_check_request(q, size) < 0 || q->num[0] >= LIMIT_FUSE_DEVICES ||
        l->fuse_fds[q->num[0]] < 0 || image_fd < 0 || q->flags & ~(uint32_t)BIND_WRITABLE ||
        q->num[2] || q->num[3] || q->num[4] || q->num[5] || q->length[0] || q->length[1])
        return ERR_MALFORMED;
    int mode = fcntl(image_fd, F_GETFL);
    if (mode < 0 || mode & O_PATH || (mode & O_ACCMODE) != (place.writable ? O_RDWR : O_RDONLY))
        return ERR_KIND;
    int code = judge_image(l, image_fd, &image, &a->error);
    if (code != ERR_OK)
        return code;
    if (!S_ISREG(image.st.st_mode) || place.offset >= (uint64_t)image.st.st_size)
        return ERR_KIND;
    int *device = &l->fuse_fds[q->num[0]];
    k->servers[q->num[0]] = server_start_extfs(l, image_fd, *device, &place);
    a->error = errno;
    close_fd(device);
    if (k->servers[q->num[0]] < 0)
        return ERR_FORK;
    if (place.writable)
        k->writers |= (uint32_t)1 << q->num[0];
    a->error = 0;
    return ERR_OK;
}

/* The setuid flow does not apply after all: no way back, then the program without the bit. */
NO_RETURN void keeper_become_plain(struct launch *l, const char *why) {
    struct target_identity target = {.uid = l->uid, .gid = l->gid, .keep_bounding = true};
    char number[16] = "", reason[16] = "";
    append_text(reason, sizeof(reason), why);
    step_begin(STEP_PLAIN_STARTER);
    append_number(number, sizeof(number), (uint64_t)l->request_fd);
    target.caps[CAP_SET_BOUNDING] = l->bounding;
    /* SAFE: irrevocable, verified; what follows is the caller's own program with its own rights. */
    if (privs_drop(&target) < 0)
        fail("cannot give up privileges", errno);
    (void)fcntl(l->request_fd, F_SETFD, 0);
    if (l->trace_file >= 0)
        (void)fcntl(l->trace_file, F_SETFD, 0);
    umask(l->inherited.umask);
    sanitize_restore_for_payload(l);
    static char name[] = "Apptainer runtime parent", starter[] = APY_STARTER;
    char *const argv[] = {name, number, reason, NULL};
    char *const envp[] = {NULL};
    execve(starter, argv, envp);
    fail("cannot run " APY_STARTER, errno);
}

static int op_plain_starter(struct keeper *k, const union keeper_request *request, size_t size,
                            int passed, struct op_reply *a) {
    (void)passed;
    (void)a;
    if (no_fields(request, size) < 0)
        return ERR_MALFORMED;
    end_child(&k->master);
    undo_early(k);
    keeper_become_plain(k->launch, "engine");
}

typedef int (*operation)(struct keeper *, const union keeper_request *, size_t, int,
                         struct op_reply *);

#define ROW_INIT(name, phase, next, times, function)
#define ROW_JANITOR(name, phase, next, times, function)
#define ROW_KEEPER(name, phase, next, times, function) {OP_##name, phase, next, times, function},
#define ROW_RPC(name, phase, next, times, function)

/* The rows of protocol.def that keeper serves. */
static const struct row {
    uint32_t op;
    enum phase phase, next_phase;
    uint32_t times;
    operation run;
} table[] = {
#define OP(name, number, server, phase, next, times, function)                                     \
    ROW_##server(name, phase, next, times, function)
#include "rows.h"
};

/* A launch of which nothing came is on record as such; while a container runs, and after it, there
 * is no right left to write with. */
static void record_failure(struct keeper *k) {
    if (k->closed || k->phase == RUN)
        return;
    k->closed = true;
    if (audit_launch(k->launch, &k->launch->plan, k->image, "failed") < 0)
        report("WARNING: ", "the audit record cannot be written; tell your administrator");
}

/* Master first: it would tell the user of the container's end, which is no news here. */
static void end_all(struct keeper *k) {
    if (k->master_alive)
        (void)kill(k->master, SIGKILL);
    if (k->container_alive)
        (void)kill(k->container, SIGKILL);
}

NO_RETURN static void abandon(struct keeper *k, uint32_t op, int code) {
    trace_operation(op, trace_now(), code, 0, "the launch is abandoned");
    report("FATAL:   ", code == ERR_PHASE   ? "a request came outside its phase; the launch is "
                                              "abandoned"
                        : code == ERR_TIMES ? "a request came once too often; the launch is "
                                              "abandoned"
                                            : "a request is malformed; the launch is abandoned");
    end_all(k);
    record_failure(k);
    _exit(255);
}

static const struct row *find_row(struct keeper *k, uint32_t op) {
    for (size_t i = 0; i < ARRAY_SIZE(table); i++) {
        if (table[i].op != op)
            continue;
        if (table[i].phase != k->phase)
            abandon(k, op, ERR_PHASE);
        if (k->uses[i]++ >= table[i].times)
            abandon(k, op, ERR_TIMES);
        return &table[i];
    }
    abandon(k, op, ERR_MALFORMED);
}

static void serve(struct keeper *k) {
    static union keeper_request q;
    int passed;
    ssize_t got = wire_receive(k->launch->keeper_socket[0], &q, sizeof(q), &passed);
    if (got < 0 && errno == EMSGSIZE)
        abandon(k, 0, ERR_MALFORMED);
    if (got <= 0) {
        close_fd(&k->launch->keeper_socket[0]); /* master is gone or going: its exit says more */
        return;
    }
    if (got < (ssize_t)sizeof(uint32_t))
        abandon(k, 0, ERR_MALFORMED);
    if (k->phase == ENDED) { /* master has been told already, and asks for no other reason */
        close_fd(&passed);
        return;
    }
    struct op_reply a = {.op = q.plain.op};
    uint64_t start = trace_now();
    const struct row *row = find_row(k, q.plain.op);
    step_operation(q.plain.op, false);
    a.code = row->run(k, &q, (size_t)got, passed, &a);
    if (a.code == ERR_MALFORMED)
        abandon(k, q.plain.op, ERR_MALFORMED);
    if (a.code == ERR_OK)
        k->phase = row->next_phase;
    trace_operation(q.plain.op, start, a.code, a.error, NULL);
    step_operation(q.plain.op, true);
    if (passed >= 0)
        close(passed);
    if (wire_send(k->launch->keeper_socket[0], &a, sizeof(a), -1) < 0)
        close_fd(&k->launch->keeper_socket[0]);
}

/* ---- what the children do ---- */

static void tell_master(struct keeper *k, enum event event, pid_t pid, int status) {
    struct event_frame frame = {.event = event, .pid = pid, .status = status};
    if (k->launch->keeper_socket[0] >= 0)
        (void)send(k->launch->keeper_socket[0], &frame, sizeof(frame), MSG_NOSIGNAL | MSG_DONTWAIT);
}

/* Our shell waits for us: it must see the job stopped, and by which signal. */
static void stop_by(int number) {
    sigset_t one;
    sigemptyset(&one);
    sigaddset(&one, number);
    (void)kill(getpid(), number);
    sigprocmask(SIG_UNBLOCK, &one, NULL); /* it stops here, unless nobody could continue it */
    sigprocmask(SIG_BLOCK, &one, NULL);
}

static void child_stopped(struct keeper *k, pid_t pid, int number) {
    /* An instance is nobody's job: who would let us go on? */
    bool job = !(k->launch->plan.flags & PLAN_INSTANCE);
    if (job && pid == k->container && k->phase == RUN && getpgid(pid) == getpgrp())
        stop_by(number);
    /* It has a session of its own, so this is no job's stop, and would hang all that read it. */
    for (size_t i = 0; i < LIMIT_FUSE_DEVICES; i++)
        if (pid == k->servers[i])
            (void)kill(pid, SIGCONT);
}

static void tell_of_lent(struct keeper *k) {
    tell_master(k, EVENT_SERVER_ENDED, 0, loan_server_status(k->launch, &k->loan));
}

static void child_ended(struct keeper *k, pid_t pid, int status) {
    if (pid == k->master) {
        k->master_alive = false;
        k->master = 0; /* a reaped number may be somebody else's next */
        k->master_status = status;
        /* What has no payload behind it any more, as a shim, may take longer to end than master. */
        k->told_failure = k->container_alive && WIFEXITED(status) && WEXITSTATUS(status) != 0;
        if (k->container_alive)
            (void)kill(k->container, SIGKILL);
    } else if (pid == k->container && k->phase == PREPARE) {
        k->container_alive = false; /* begun early, and gone: it will be started again */
        k->container = 0;
    } else if (pid == k->container) {
        step_begin(STEP_PAYLOAD_ENDED);
        k->container_alive = false;
        k->container = 0;
        k->container_status = status;
        if (k->lent_ended)
            tell_of_lent(k);
        tell_master(k, EVENT_PAYLOAD_ENDED, pid, status);
        step_end(STEP_PAYLOAD_ENDED);
    }
    for (size_t i = 0; i < LIMIT_FUSE_DEVICES; i++)
        if (pid == k->servers[i]) {
            k->servers[i] = 0;
            if (i == 0 && k->early_server)
                continue; /* nobody relies on it yet */
            tell_master(k, EVENT_SERVER_ENDED, pid, status);
            /* Without its image nothing in the container can go on. */
            if (k->container_alive)
                (void)kill(k->container, SIGKILL);
        }
}

static bool watches_lent(const struct keeper *k) {
    return k->loan.taken && !k->lent_ended;
}

/* The server of a mount that was taken is another launch's child.  Why it has ended is asked when
 * the container has, too: it may be that very end.  A payload that missed a page may be first. */
static void lent_server_ended(struct keeper *k) {
    k->lent_ended = true;
    if (k->container_alive)
        (void)kill(k->container, SIGKILL);
    else if (k->phase != PREPARE)
        tell_of_lent(k);
}

static void reap(struct keeper *k) {
    int status;
    pid_t pid;
    while ((pid = waitpid(-1, &status, WNOHANG | WUNTRACED)) > 0) {
        if (WIFSTOPPED(status))
            child_stopped(k, pid, WSTOPSIG(status));
        else
            child_ended(k, pid, status);
    }
}

/* ---- signals ---- */

NO_RETURN static void die_by(int number) {
    struct sigaction standard = {.sa_handler = SIG_DFL};
    (void)sigaction(number, &standard, NULL);
    sigset_t one;
    sigemptyset(&one);
    sigaddset(&one, number);
    (void)kill(getpid(), number);
    sigprocmask(SIG_UNBLOCK, &one, NULL);
    _exit(128 + number);
}

NO_RETURN static void give_up(struct keeper *k, int number) {
    end_all(k);
    record_failure(k);
    die_by(number);
}

static void on_signal(struct keeper *k, const struct signalfd_siginfo *info) {
    int number = (int)info->ssi_signo;
    bool from_terminal = info->ssi_code == SI_KERNEL;
    bool ends_us = number == SIGINT || number == SIGTERM || number == SIGHUP || number == SIGQUIT;
    if (number == SIGCHLD || number == SIGPIPE || number == SIGURG)
        return;
    if (k->phase != RUN) {
        if (ends_us && k->phase != ENDED)
            give_up(k, number);
        return;
    }
    /* A hangup comes to the session's leader alone, which may be us: it is always passed on. */
    bool payload_has_it = from_terminal && number != SIGHUP;
    if (!payload_has_it && k->container_alive)
        (void)kill(k->container, number);
    /* Behind a shim nobody sees the payload stop. */
    bool stops = number == SIGTSTP || number == SIGTTIN || number == SIGTTOU;
    if (stops && k->launch->plan.flags & PLAN_SHIM)
        stop_by(number);
}

static void read_signals(struct keeper *k) {
    struct signalfd_siginfo info;
    while (read(k->signals, &info, sizeof(info)) == (ssize_t)sizeof(info))
        on_signal(k, &info);
}

/* One turn: sleeps until something happens and deals with it. */
static void turn(struct keeper *k) {
    struct launch *l = k->launch;
    struct pollfd fds[] = {{.fd = k->signals, .events = POLLIN},
                           {.fd = l->keeper_socket[0], .events = POLLIN},
                           {.fd = k->phase == SETUP ? l->ready_pipe[0] : -1, .events = POLLIN},
                           {.fd = l->waiter_fd, .events = 0},
                           {.fd = k->loan.listener, .events = POLLIN},
                           {.fd = watches_lent(k) ? k->loan.server_fd : -1, .events = POLLIN},
                           {.fd = k->loan.holder, .events = POLLIN}};
    if (poll(fds, ARRAY_SIZE(fds), -1) < 0 && errno != EINTR)
        fail("poll", errno);
    if (fds[0].revents) {
        read_signals(k);
        reap(k);
    }
    if (fds[1].revents && l->keeper_socket[0] >= 0)
        serve(k);
    if (fds[4].revents && k->loan.listener >= 0)
        loan_serve(l, &k->loan);
    if (fds[5].revents && watches_lent(k))
        lent_server_ended(k);
    if (fds[6].revents)
        loan_listen(l, &k->loan);
    if (fds[3].revents && l->waiter_fd >= 0) {
        close_fd(&l->waiter_fd); /* nobody waits for this instance any more */
        give_up(k, SIGTERM);
    }
    if (fds[2].revents) {
        char byte;
        ssize_t got = read(l->ready_pipe[0], &byte, 1);
        close_fd(&l->ready_pipe[0]);
        if (got != 1)
            return; /* the container has ended before, which shows as an ended child */
        if (k->early_server)
            abandon(k, OP_SERVE_IMAGE, ERR_PHASE); /* an image is in use that nobody has judged */
        k->phase = RUN; /* rpc has gone; drop_and_go() follows */
    }
}

/* ---- the steps ---- */

static void wait_until_ready(struct keeper *k) {
    while (k->phase != RUN && k->master_alive && (k->phase == PREPARE || k->container_alive))
        turn(k);
}

static void drop_and_go(struct keeper *k) {
    struct launch *l = k->launch;
    struct target_identity target = {.uid = l->uid, .gid = l->gid, .no_new_privs = true};
    if (k->phase != RUN)
        return;
    /* Outside of the container's namespace it cannot be trimmed; no_new_privs makes it void. */
    target.keep_bounding = l->flow == FLOW_USERNS && fakeroot_wanted(l);
    step_begin(STEP_DROP_KEEPER);
    /* SAFE: irrevocable and verified, before the payload may exist. */
    if (l->flow != FLOW_ROOT && privs_drop(&target) < 0) {
        (void)kill(k->container, SIGKILL);
        fail("cannot give up privileges", errno);
    }
    step_end(STEP_DROP_KEEPER);
    trace_process();
    close_fuse(l);
    close_fd(&l->life_pipe[0]);
    sanitize_close_inherited(l);
    close_fd(&l->request_fd);
    close_fd(&l->config_fd);
    close_fd(&l->trace_file);
    if (l->plan.flags & PLAN_INSTANCE)
        detach_streams(l);
    step_begin(STEP_GO);
    tell_master(k, EVENT_GO, k->container, 0);
    /* One for stage 2, one for bearer; a dead reader shows as an ended child. */
    ssize_t ignored = send(l->go_socket[1], "GG", 2, MSG_NOSIGNAL);
    (void)ignored;
    step_end(STEP_GO);
    loan_listen(l, &k->loan);
}

static void wait_for_the_end(struct keeper *k) {
    bool ran = k->phase == RUN;
    while (k->container_alive) {
        if (!ran && !k->master_alive)
            (void)kill(k->container, SIGKILL);
        turn(k);
    }
    k->phase = ENDED;
    /* After a payload it is enough that master has done all its work: its own end takes a while,
     * and comes with ours. */
    while (k->master_alive && (!ran || k->launch->keeper_socket[0] >= 0))
        turn(k);
    step_begin(STEP_MASTER_ENDED);
    step_end(STEP_MASTER_ENDED);
}

static bool writers_live(const struct keeper *k) {
    for (size_t i = 0; i < LIMIT_FUSE_DEVICES; i++)
        if (k->writers & (uint32_t)1 << i && k->servers[i] > 0)
            return true;
    return false;
}

/* Whoever reads the image next shall find all that was written.  What the payload has left in the
 * background keeps its root, and nobody waits for that for long. */
static void wait_for_writers(struct keeper *k) {
    struct pollfd signals = {.fd = k->signals, .events = POLLIN};
    uint64_t until = trace_now() + (uint64_t)SERVER_PATIENCE_MS * 1000000;
    while (writers_live(k)) {
        uint64_t now = trace_now();
        if (now >= until || poll(&signals, 1, (int)((until - now) / 1000000) + 1) < 0)
            return;
        struct signalfd_siginfo info;
        while (read(k->signals, &info, sizeof(info)) == (ssize_t)sizeof(info))
            ;
        reap(k);
    }
}

/* The payload's own status; or master's, where no payload ever ran or master has told a failure. */
NO_RETURN static void end_as_payload(struct keeper *k, bool ran) {
    int status = ran && !k->told_failure ? k->container_status : k->master_status;
    if (!ran && (k->recorded || status != 0))
        record_failure(k);
    step_begin(STEP_KEEPER_END);
    step_end(STEP_KEEPER_END);
    if (!ran && WIFSIGNALED(status)) {
        report("FATAL:   ", "a process of the launch was killed");
        _exit(255);
    }
    if (WIFSIGNALED(status))
        die_by(WTERMSIG(status));
    _exit(WEXITSTATUS(status));
}

NO_RETURN void keeper_main(struct launch *l) {
    static struct keeper keeper;
    struct keeper *k = &keeper;
    k->launch = l;
    l->caller_pid = getppid();
    k->host_device = -1;
    loan_init(l, &k->loan);
    loan_ask(l, &k->loan);
    open_channels(l);
    k->signals = block_signals();
    if (k->signals < 0)
        fail("cannot watch signals", errno);
    start_master(k);
    begin_early(k);
    close_fd(&l->loan_asked);
    turn_give(); /* to master: rpc and image server have been set to work */
    wait_until_ready(k);
    bool ran = k->phase == RUN;
    drop_and_go(k);
    wait_for_the_end(k);
    wait_for_writers(k);
    end_as_payload(k, ran);
}
