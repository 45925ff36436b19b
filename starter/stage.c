/* The stages that run Python: the identity each one must have, and the way to CPython after it. */
#include <dlfcn.h>
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "starter.h"

#ifdef APY_TEST_STEPS
#define WATCHER_FILE APY_LIBEXECDIR "/apptainer-py-oci-steps"
#else
#define WATCHER_FILE APY_BINDIR "/apptainer-py-oci"
#endif

static struct launch *stage_launch;
static enum role stage_role;
static uint64_t hook_start;
static struct identity caller_identity; /* flow CALLER: at the start, and in each hook */

/* What a user was granted on the host is the payload's alone.  It becomes effective with the
 * payload's execve, by the ambient set. */
static void limit_to_bearer(const struct launch *l, enum role role, struct target_identity *t) {
    if (l->flow != FLOW_SETUID || fakeroot_wanted(l))
        return; /* there it is worth nothing outside of the container's namespace */
    t->caps[CAP_SET_EFFECTIVE] = 0;
    if (role != ROLE_BEARER)
        memset(t->caps, 0, sizeof(t->caps));
}

/* Stage 2 alone has the payload's ids in a user namespace below that of the launch. */
bool stage_takes_names(const struct launch *l) {
    return l->flow == FLOW_USERNS && !fakeroot_wanted(l) && policy_gives_names(l, &l->plan);
}

/* With --fakeroot the container's processes are root of its namespace, which is the caller. */
static bool is_inside(enum role role) {
    return role == ROLE_RPC || role == ROLE_METHODS || role == ROLE_READER ||
           (role == ROLE_TRACER && container_pid != 0);
}

/* The identity table of docs/architecture.md, section "Identities". */
void stage_target(const struct launch *l, enum role role, struct target_identity *t) {
    memset(t, 0, sizeof(*t));
    t->uid = l->uid;
    t->gid = l->gid;
    t->no_new_privs = true;
    if (fakeroot_wanted(l) && is_inside(role))
        t->uid = t->gid = 0;
    switch (role) {
    case ROLE_STAGE2:
    case ROLE_SHIM:
    case ROLE_BEARER:
        t->uid = l->plan.uid;
        t->gid = l->plan.gid;
        t->set_groups = l->flow == FLOW_ROOT &&
                        (l->plan.group_count > 0 || l->plan.flags & PLAN_GROUPS);
        t->group_count = l->plan.group_count;
        for (size_t i = 0; i < l->plan.group_count && i < LIMIT_GROUPS; i++)
            t->groups[i] = l->plan.groups[i];
        memcpy(t->caps, l->plan.caps, sizeof(t->caps));
        t->no_new_privs = (l->plan.flags & PLAN_NO_NEW_PRIVS) != 0;
        if (role == ROLE_SHIM && stage_takes_names(l)) {
            t->uid = l->uid;
            t->gid = l->gid;
        }
        limit_to_bearer(l, role, t);
        break;
    case ROLE_RPC:
    case ROLE_METHODS: {
        uint64_t caps = CAP_BIT(21) /* SYS_ADMIN */;
        const uint32_t layers = PLAN_WRITABLE_LAYER | PLAN_USER_LAYER;
        if (l->plan.flags & (layers | PLAN_KERNEL_IMAGE | PLAN_KERNEL_EXTFS))
            caps |= CAP_BIT(1) /* DAC_OVERRIDE */;
        if (l->flow == FLOW_ROOT && l->plan.flags & layers)
            caps |= ROOT_LAYER_CAPS & l->permitted;
        t->caps[CAP_SET_EFFECTIVE] = CAP_BIT(21);
        /* Root of the container's own namespace: files of the caller's ranges are its own. */
        if (fakeroot_wanted(l))
            caps = t->caps[CAP_SET_EFFECTIVE] = privs_last_cap_mask();
        t->caps[CAP_SET_PERMITTED] = t->caps[CAP_SET_BOUNDING] = caps;
        t->no_new_privs = false;
        break;
    }
    case ROLE_HOST_HELPER:
        t->keep_bounding = true;
        t->caps[CAP_SET_BOUNDING] = l->bounding;
        t->no_new_privs = false;
        break;
    case ROLE_MASTER:
        /* Before the user namespace exists there is no right to trim the bounding set. */
        t->keep_bounding = l->flow == FLOW_USERNS;
        break;
    case ROLE_TRACER:
        /* Also who asks name services, before the user namespace exists. */
        t->keep_bounding = l->flow == FLOW_USERNS;
        break;
    case ROLE_READER:
        t->keep_bounding = true; /* a child of rpc, which cannot trim; no_new_privs makes it void */
        t->caps[CAP_SET_BOUNDING] = l->flow == FLOW_ROOT ? l->permitted : CAP_BIT(21);
        break;
    case ROLE_IMAGE_SERVER:
        /* A caller without that right cannot trim it; no_new_privs makes it void. */
        t->keep_bounding =
            (l->flow == FLOW_CALLER || (l->flow == FLOW_USERNS && fakeroot_wanted(l))) &&
            !(l->permitted & CAP_BIT(8) /* SETPCAP */);
        break;
    case ROLE_KEEPER:
    case ROLE_CONTAINER:
    case ROLE_INIT:
    case ROLE_LAUNCHER:
    default:
        break;
    }
    if (l->flow == FLOW_ROOT && l->uid == 0 && !(fakeroot_wanted(l) && role == ROLE_RPC) &&
        (role == ROLE_MASTER || role == ROLE_HOST_HELPER || role == ROLE_RPC)) {
        /* root's own hooks keep root's rights: there is nobody above to protect.  So does whoever
         * mounts for root, who may bind what is closed to others and copies files up as their
         * owners'. */
        for (int set = 0; set < CAP_SETS; set++)
            t->caps[set] = set == CAP_SET_INHERITABLE || set == CAP_SET_AMBIENT ? 0 : l->permitted;
        t->keep_bounding = true;
        t->no_new_privs = false;
    }
}

static bool same_identity(const struct target_identity *t, const struct identity *who) {
    for (int i = 0; i < 4; i++)
        if (who->uid[i] != t->uid || who->gid[i] != t->gid)
            return false;
    for (int set = 0; set < CAP_SETS; set++)
        if (who->caps[set] != t->caps[set] && !(set == CAP_SET_BOUNDING && t->keep_bounding))
            return false;
    if (t->no_new_privs && !who->no_new_privs)
        return false;
    return who->dumpable == 0 && (who->securebits & 0xff) == 0;
}

/* user mnt pid ipc uts net cgroup time: must each differ from the host's, or equal it. */
static bool right_spaces(const struct launch *l, const struct identity *who) {
    const uint32_t wanted[8] = {0, 1, l->plan.spaces & SPACE_PID, l->plan.spaces & SPACE_IPC,
                                l->plan.spaces & SPACE_UTS, l->plan.spaces & SPACE_NET,
                                l->plan.spaces & SPACE_CGROUP, 0};
    bool inside = stage_role == ROLE_STAGE2 || stage_role == ROLE_METHODS;
    for (int i = 0; i < 8; i++) {
        bool userns = l->flow == FLOW_USERNS || fakeroot_wanted(l);
        bool differs = inside && (i == 0 ? userns : wanted[i] != 0);
        if (who->spaces[i] != 0 && l->host_spaces[i] != 0 &&
            differs != (who->spaces[i] != l->host_spaces[i]))
            return false;
    }
    return true;
}

static bool hook_belongs(uint32_t hook, enum stage stage) {
    switch (hook) {
#define HOOK(name, number, owner)                                                                  \
    case number:                                                                                   \
        return STAGE_##owner == STAGE_ANY || STAGE_##owner == stage;
#include "rows.h"
    default: return false;
    }
}

static enum stage current_stage;

static bool right_identity(const struct identity *who) {
    struct target_identity target;
    if (stage_launch->flow == FLOW_CALLER)
        return memcmp(who, &caller_identity, sizeof(*who)) == 0;
    stage_target(stage_launch, stage_role, &target);
    return same_identity(&target, who) && right_spaces(stage_launch, who);
}

static void at_step(uint32_t step, int end) {
    if (end)
        step_end((enum step)step);
    else
        step_begin((enum step)step);
}

static void enter_hook(uint32_t hook) {
    struct identity who;
    memset(&who, 0, sizeof(who)); /* it is compared as bytes */
    hook_start = trace_now();
    if (!hook_belongs(hook, current_stage) || privs_identify(&who, true) < 0 ||
        !right_identity(&who)) {
        report("FATAL:   ", "a hook was about to run with an identity that is not its stage's; "
                            "the launch is abandoned");
        _exit(255);
    }
}

static void leave_hook(uint32_t hook, int failed) {
    trace_hook(hook, hook_start, failed);
}

/* Keeper alone holds the other end of the pipe. */
bool stage_keeper_lives(const struct launch *l) {
    struct pollfd go = {.fd = l->go_socket[0], .events = 0};
    return poll(&go, 1, 0) >= 0 && !(go.revents & (POLLHUP | POLLERR));
}

/* The parent-death signal does not survive a change of credentials, so it is set here, last;
 * a parent that died before is seen by its end of the pipe. */
int stage_die_with_keeper(const struct launch *l) {
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) < 0)
        fail("cannot be bound to the life of the launch", errno);
    return stage_keeper_lives(l) ? 0 : -1;
}

int stage_wait_for_rpc(struct launch *l, pid_t rpc) {
    int status = 0;
    while (waitpid(rpc, &status, 0) < 0)
        if (errno != EINTR)
            return -1;
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
        return -1;
    step_begin(STEP_RPC_DONE);
    if (write(l->ready_pipe[1], "R", 1) != 1)
        return -1;
    step_end(STEP_RPC_DONE);
    close(l->ready_pipe[1]);
    return 0;
}

/* Keeper alone holds the other end, and writes once it has nothing left.  Stage 2 has no payload to
 * decide about once bearer has ended. */
int stage_wait_for_go(const struct launch *l) {
    struct pollfd fds[] = {{.fd = l->go_socket[0], .events = POLLIN},
                           {.fd = l->bearer_socket[0], .events = 0}};
    char byte = 0;
    while (poll(fds, ARRAY_SIZE(fds), -1) < 0)
        if (errno != EINTR)
            return -1;
    if (fds[1].revents)
        return -1;
    ssize_t got;
    do
        got = read(l->go_socket[0], &byte, 1);
    while (got < 0 && errno == EINTR);
    return got == 1 && byte == 'G' ? stage_die_with_keeper(l) : -1;
}

static int tell_sealed(void) {
    struct launch *l = stage_launch;
    step_begin(STEP_SEALED);
    if (write(l->seal_pipe[1], "S", 1) != 1)
        return -1;
    step_end(STEP_SEALED);
    close(l->seal_pipe[1]);
    return 0;
}

static int wait_for_go(void) {
    struct launch *l = stage_launch;
    if (stage_rpc_pid > 0 && stage_wait_for_rpc(l, stage_rpc_pid) < 0)
        return -1;
    return stage_wait_for_go(l);
}

static int exec_payload(const char *path, char *const argv[], char *const envp[]) {
    stage_leave_start(0);
    if (stage_launch->bearer_socket[0] >= 0)
        return bearer_ask(stage_launch, path, argv, envp);
    step_begin(STEP_EXEC_PAYLOAD);
    label_check(stage_launch);
    sanitize_restore_for_payload(stage_launch);
    /* Behind a shim keeper's death comes by way of the shim's, and that may take a while. */
    if (!stage_keeper_lives(stage_launch))
        _exit(255);
    filter_load();
    (void)execve(path, argv, envp);
    return errno;
}

static int set_label(uint32_t kind, const char *text, size_t size) {
    return label_set(stage_launch, kind, text, size);
}

/* Nothing of a launch may outlive keeper, and a change of credentials takes the signal away. */
static int die_with_parent(const struct launch *l, enum stage stage) {
    if (stage == STAGE_START || stage == STAGE_METHODS)
        return stage_die_with_keeper(l);
    if (stage != STAGE_MASTER)
        return 0; /* the host pair cleans up after everybody's death */
    struct pollfd keeper = {.fd = l->keeper_socket[1], .events = 0};
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) < 0)
        fail("cannot be bound to the life of the launch", errno);
    return poll(&keeper, 1, 0) >= 0 && !(keeper.revents & (POLLHUP | POLLERR)) ? 0 : -1;
}

static const struct {
    enum stage stage;
    enum role role;
    enum step drop, load;
} stages[] = {
    {STAGE_MASTER, ROLE_MASTER, STEP_DROP_MASTER, STEP_LOAD_MASTER},
    {STAGE_START, ROLE_STAGE2, STEP_DROP_STAGE2, STEP_LOAD_STAGE2},
    {STAGE_POST_START_HOST, ROLE_HOST_HELPER, STEP_DROP_HELPER, STEP_LOAD_HELPER},
    {STAGE_CLEANUP_HOST, ROLE_HOST_HELPER, STEP_DROP_HELPER, STEP_LOAD_HELPER},
    {STAGE_METHODS, ROLE_METHODS, STEP_DROP_METHODS, STEP_LOAD_METHODS},
};

static struct stage_info describe(const struct launch *l, enum stage stage) {
    bool master = stage == STAGE_MASTER;
    struct stage_info info = {
        .build_id = APY_BUILD_ID,
        .stage = stage, .flow = l->flow, .reason = l->reason, .uid = l->uid, .gid = l->gid,
        .umask = l->inherited.umask, .caller_pid = l->caller_pid,
        .request_fd = l->request_fd, .config_fd = l->config_fd,
        .keeper_fd = master ? l->keeper_socket[1] : -1, .rpc_fd = master ? l->rpc_socket[1] : -1,
        .start_fd = stage == STAGE_START ? l->start_socket[0] : master ? l->start_socket[1] : -1,
        .methods_fd = stage == STAGE_METHODS ? l->methods_socket[0]
                      : master              ? l->methods_socket[1]
                                            : -1,
        .trigger_fd = stage == STAGE_POST_START_HOST ? l->helper_sockets[0][0]
                      : stage == STAGE_CLEANUP_HOST  ? l->helper_sockets[1][0]
                                                     : -1,
        .helper_fds = {master ? l->helper_sockets[0][1] : -1,
                       master ? l->helper_sockets[1][1] : -1},
        .init_fd = l->flow == FLOW_CALLER ? l->init_socket[1] : -1, .init_pid = l->init_pid,
        .server_fd = l->flow == FLOW_CALLER ? l->server_socket[1] : -1,
        .server_pid = l->server_pid,
        .ready_fd = l->flow == FLOW_CALLER ? l->ready_fd : master ? l->waiter_fd : -1,
        .watcher = l->flow == FLOW_CALLER ? WATCHER_FILE : NULL,
        .forecast = l->request.forecast,
        .trace_fd = trace_fd, .permitted = l->permitted, .enter_hook = enter_hook,
        .leave_hook = leave_hook, .at_step = at_step, .tell_sealed = tell_sealed,
        .wait_for_go = wait_for_go, .exec_payload = exec_payload, .set_filter = filter_set,
        .set_label = set_label,
    };
    return info;
}

/* The only place where an interpreter enters a process; it cannot be reached before the drop. */
static int load_and_run(const struct stage_info *info, enum step step) {
    /* SAFE: absolute, root-owned, compiled in; the process has only its stage's identity. */
    if (!dlopen(APY_LIBPYTHON, RTLD_LAZY | RTLD_GLOBAL)) {
        report("FATAL:   ", "cannot load " APY_LIBPYTHON "; reinstall libpython and then "
                            "apptainer-py (./install)");
        return 255;
    }
    void *host = dlopen(APY_STAGEHOST, RTLD_LAZY | RTLD_GLOBAL);
    int (*run)(const struct stage_info *) = NULL;
    if (host)
        *(void **)&run = dlsym(host, "stagehost_run");
    if (!run) {
        report("FATAL:   ", "cannot load " APY_STAGEHOST "; reinstall apptainer-py (./install)");
        return 255;
    }
    step_end(step);
    return run(info);
}

static void take_identity(const struct launch *l, enum stage stage) {
    struct target_identity target;
    /* SAFE: a caller without privilege of ours, or root itself, keeps what it has. */
    if (l->flow == FLOW_CALLER) {
        if (privs_identify(&caller_identity, true) < 0)
            fail("cannot find out the identity of this process", errno);
        return;
    }
    stage_target(l, stage_role, &target);
    /* SAFE: irrevocable, verified; all that follows runs with the stage's own identity. */
    if (privs_drop(&target) < 0)
        fail("cannot give up privileges", errno);
    if (die_with_parent(l, stage) < 0)
        _exit(255);
}

/* All is done; an interpreter's end takes a while, and keeper, whom the caller waits for, shall not
 * queue behind it on a processor. */
static void let_keeper_end(const struct launch *l) {
    char byte;
    ssize_t got;
    (void)shutdown(l->keeper_socket[1], SHUT_WR);
    do
        got = read(l->keeper_socket[1], &byte, 1);
    while (got > 0 || (got < 0 && errno == EINTR));
}

/* Returns how it will load. */
static enum step become(struct launch *l, enum stage stage) {
    size_t row = 0;
    while (row < ARRAY_SIZE(stages) && stages[row].stage != stage)
        row++;
    if (row == ARRAY_SIZE(stages))
        fail("there is no such stage", 0);
    stage_launch = l;
    current_stage = stage;
    stage_role = stages[row].role;
    trace_set_role(stage_role);
    step_begin(stages[row].drop);
    take_identity(l, stage);
    step_end(stages[row].drop);
    trace_process();
    return stages[row].load;
}

/* Stage 2 without an interpreter: master says what the payload is, as it does for who joins.  What
 * start_process would be here is data, carried out with the same identity. */
NO_RETURN void stage_serve(struct launch *l) {
    (void)become(l, STAGE_START);
    if (tell_sealed() < 0)
        _exit(255);
    if (stage_rpc_pid > 0) { /* else the shim waits, and keeper alone tells of a changed root */
        if (stage_wait_for_rpc(l, stage_rpc_pid) < 0)
            _exit(255);
        bearer_enter_early(l->start_socket[0]);
    }
    if (stage_wait_for_go(l) < 0)
        _exit(255);
    enter_hook(HOOK_START_PROCESS);
    bearer_serve(l, l->start_socket[0]);
}

/* Before the execve, behind which nothing can be told; a bearer runs no hook. */
void stage_leave_start(int failed) {
    if (stage_launch)
        leave_hook(HOOK_START_PROCESS, failed);
}

NO_RETURN void stage_run(struct launch *l, enum stage stage) {
    enum step load = become(l, stage);
    struct stage_info info = describe(l, stage);
    turn_wait();
    step_begin(load);
    int status = load_and_run(&info, load);
    if (stage == STAGE_MASTER && l->flow != FLOW_CALLER)
        let_keeper_end(l);
    if (stage == STAGE_START)
        bearer_dismiss(l);
    _exit(status);
}
