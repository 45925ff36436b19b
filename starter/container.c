/* clone(namespaces), and what the child does before it is shim or stage 2. */
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/magic.h>
#include <net/if.h>
#include <sched.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "starter.h"

pid_t container_pid; /* as its children see it */
pid_t stage_rpc_pid; /* without a shim stage 2 waits for rpc itself */

static const struct {
    enum space space;
    int flag;
} spaces[] = {
    {SPACE_PID, CLONE_NEWPID}, {SPACE_IPC, CLONE_NEWIPC},       {SPACE_UTS, CLONE_NEWUTS},
    {SPACE_NET, CLONE_NEWNET}, {SPACE_CGROUP, CLONE_NEWCGROUP},
};

static void close_fd(int *fd) {
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

static void close_fuse(struct launch *l) {
    close_fd(&l->overlay_socket[0]);
    close_fd(&l->loan_socket[1]);
    close_fd(&l->loan_mount);
    for (size_t i = 0; i < LIMIT_FUSE_DEVICES; i++)
        close_fd(&l->fuse_fds[i]);
}

/* What neither rpc, shim nor stage 2 may hold: keeper's and master's ends. */
void container_close_outer_ends(struct launch *l) {
    close_fd(&l->keeper_socket[0]);
    close_fd(&l->keeper_socket[1]);
    close_fd(&l->fakeroot_socket[0]);
    close_fd(&l->rpc_socket[1]);
    close_fd(&l->start_socket[1]);
    close_fd(&l->methods_socket[1]);
    close_fd(&l->go_socket[1]);
    close_fd(&l->waiter_fd);
    close_fd(&l->ready_pipe[0]);
    close_fd(&l->life_pipe[0]);
    close_fd(&l->serve_pipe[0]);
    close_fd(&l->probe_pipe[0]);
    close_fd(&l->probe_pipe[1]);
    close_fd(&l->loan_socket[0]);
    close_fd(&l->loan_asked);
    for (int i = 0; i < 2; i++) {
        close_fd(&l->loan_kept[i]);
        close_fd(&l->helper_sockets[i][0]);
        close_fd(&l->helper_sockets[i][1]);
    }
}

/* Nothing that is mounted from now on is seen outside. */
static int make_mounts_private(const struct launch *l) {
    unsigned long propagation = l->plan.flags & PLAN_SLAVE ? MS_SLAVE : MS_PRIVATE;
    /* SAFE: changes the propagation of this process's own new namespace only. */
    return mount(NULL, "/", NULL, MS_REC | propagation, NULL);
}

/* pivot_root(2) exchanges no root that lies on nothing, as an initramfs does.  A copy that lies on
 * it can be exchanged, and all that is forked from here on has that one for its root.  What is left
 * beneath the container's has no name: "..", from there, ends at the container's own.  Only who has
 * SYS_ADMIN over this very mount namespace can take that one away; a namespace below cannot. */
static int make_root_a_mount(void) {
    struct statfs fs;
    if (statfs("/", &fs) < 0)
        return -1;
    if ((fs.f_type != RAMFS_MAGIC && fs.f_type != TMPFS_MAGIC) || !policy_root_lies_on_nothing())
        return 0; /* a memory file system that lies on another is exchanged, lock and all */
    const struct raised *raised = privs_raise(CAP_BIT(CAP_SYS_ADMIN) | CAP_BIT(CAP_SYS_CHROOT));
    if (!raised) {
        errno = EPERM;
        return -1;
    }
    /* SAFE: in this process's own new namespace, from "/" to "/"; nothing of the caller's. */
    int tree = (int)syscall(SYS_open_tree, AT_FDCWD, "/",
                            OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | (unsigned)AT_RECURSIVE);
    int result = tree < 0 ? -1
                          : (int)syscall(SYS_move_mount, tree, "", AT_FDCWD, "/",
                                         MOVE_MOUNT_F_EMPTY_PATH);
    if (result == 0 && (fchdir(tree) < 0 || chroot(".") < 0))
        result = -1;
    int error = errno;
    close_fd(&tree);
    privs_lower(raised);
    errno = error;
    return result;
}

/* A new network namespace has its loopback down. */
static int loopback_up(void) {
    struct ifreq request = {.ifr_name = "lo"};
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -1;
    int result = ioctl(fd, SIOCGIFFLAGS, &request);
    request.ifr_flags |= IFF_UP;
    if (result == 0)
        result = ioctl(fd, SIOCSIFFLAGS, &request); /* SAFE: the container's own network only */
    close(fd);
    return result;
}

static pid_t fork_rpc(struct launch *l) {
    step_begin(STEP_FORK_RPC);
    pid_t pid = fork();
    if (pid != 0) {
        step_end(STEP_FORK_RPC);
        return pid;
    }
    trace_set_role(ROLE_RPC);
    close_fd(&l->start_socket[0]);
    close_fd(&l->methods_socket[0]);
    close_fd(&l->seal_pipe[1]);
    close_fd(&l->ready_pipe[1]);
    close_fd(&l->go_socket[0]);
    sanitize_close_inherited(l);
    rpc_main(l);
}

/* Methods of an engine that is not built in: Python as rpc, never in the setuid flow. */
static int fork_methods(struct launch *l) {
    step_begin(STEP_FORK_METHODS);
    pid_t pid = fork();
    if (pid == 0) {
        close_fd(&l->start_socket[0]);
        close_fd(&l->rpc_socket[0]);
        close_fd(&l->seal_pipe[0]);
        close_fd(&l->seal_pipe[1]);
        close_fd(&l->ready_pipe[1]);
        sanitize_close_inherited(l);
        close_fuse(l);
        (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
        stage_run(l, STAGE_METHODS);
    }
    step_end(STEP_FORK_METHODS);
    close_fd(&l->methods_socket[0]);
    return pid < 0 ? -1 : 0;
}

NO_RETURN static void become_stage2(struct launch *l) {
    trace_set_role(ROLE_STAGE2);
    close_fd(&l->rpc_socket[0]);
    close_fd(&l->serve_pipe[1]);
    close_fd(&l->seal_pipe[0]);
    close_fuse(l);
    if (chdir("/") < 0) /* pivot_root moves only those whose directory is the root itself */
        _exit(255);
    label_open(l);
    /* SAFE: a namespace of the caller's own, below one that is; no id but the caller's is in it. */
    if (stage_takes_names(l) && privs_take_names(l) < 0)
        fail("the ids of the payload cannot be had", errno);
    if (l->plan.flags & PLAN_LEAN)
        stage_serve(l);
    if (bearer_needed(l))
        bearer_split(l);
    stage_run(l, STAGE_START);
}

NO_RETURN static void become_shim(struct launch *l, pid_t rpc) {
    step_begin(STEP_FORK_STAGE2);
    pid_t stage2 = fork();
    if (stage2 < 0)
        _exit(255);
    if (stage2 == 0) {
        close_fd(&l->ready_pipe[1]);
        become_stage2(l);
    }
    step_end(STEP_FORK_STAGE2);
    close_fd(&l->rpc_socket[0]);
    close_fd(&l->start_socket[0]);
    close_fd(&l->serve_pipe[1]);
    close_fd(&l->seal_pipe[0]);
    close_fd(&l->seal_pipe[1]);
    close_fuse(l);
    if (chdir("/") < 0)
        _exit(255);
    shim_main(l, rpc, stage2);
}

NO_RETURN static void container_main(struct launch *l) {
    trace_set_role(ROLE_CONTAINER);
    container_pid = getpid();
    (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
    container_close_outer_ends(l);
    if (fakeroot_wanted(l) && fakeroot_enter(l) < 0)
        _exit(255);
    const struct raised *raised = privs_raise(CAP_BIT(CAP_SYS_ADMIN) | CAP_BIT(CAP_NET_ADMIN));
    if (!raised)
        raised = privs_raise(CAP_BIT(CAP_SYS_ADMIN));
    if (!raised || make_mounts_private(l) < 0)
        fail("cannot make the container's mounts private", errno);
    /* SAFE: the caller's own network, or one that the administrator lists: policy_netns(). */
    if (l->plan.flags & PLAN_JOIN_NET && setns(l->netns_fd, CLONE_NEWNET) < 0)
        fail("cannot join the network namespace", errno);
    close_fd(&l->netns_fd);
    if (l->plan.spaces & SPACE_NET && !(l->plan.flags & PLAN_JOIN_NET) && loopback_up() < 0)
        report("WARNING: ", "the loopback interface could not be brought up");
    privs_lower(raised);
    if (make_root_a_mount() < 0)
        fail("cannot make a mount of the root", errno);
    turn_make(l->early_fuse);
    pid_t rpc = fork_rpc(l);
    if (rpc < 0 || (l->plan.flags & PLAN_METHODS && fork_methods(l) < 0))
        fail("cannot start the container's processes", errno);
    close_fd(&l->methods_socket[0]); /* a call without a server must see the end */
    if (l->plan.flags & PLAN_SHIM)
        become_shim(l, rpc);
    stage_rpc_pid = rpc;
    become_stage2(l);
}

static pid_t clone_container(struct launch *l, unsigned long flags, int *err) {
    /* Who makes a user namespace needs no right, but for having root mapped in it later. */
    bool needs_none = fakeroot_wanted(l) && l->flow == FLOW_USERNS;
    uint64_t caps = CAP_BIT(CAP_SYS_ADMIN);
    if (fakeroot_wanted(l) && l->uid == 0)
        caps |= CAP_BIT(CAP_SETFCAP);
    const struct raised *raised = needs_none ? NULL : privs_raise(caps);
    if (!raised && !needs_none) {
        *err = EPERM;
        return -1;
    }
    step_begin(STEP_FORK_CONTAINER);
    /* SAFE: new namespaces only, from a mask of six known kinds; a single-threaded process. */
    pid_t pid = (pid_t)syscall(SYS_clone, flags, NULL, NULL, NULL, NULL);
    *err = errno;
    if (pid == 0) {
        privs_lower(raised);
        container_main(l);
    }
    step_end(STEP_FORK_CONTAINER);
    privs_lower(raised);
    return pid;
}

pid_t container_start(struct launch *l, int *err) {
    unsigned long flags = CLONE_NEWNS | SIGCHLD;
    for (size_t i = 0; i < ARRAY_SIZE(spaces); i++)
        if (l->plan.spaces & spaces[i].space &&
            !(spaces[i].space == SPACE_NET && l->plan.flags & PLAN_JOIN_NET))
            flags |= (unsigned long)spaces[i].flag;
    if (!fakeroot_wanted(l))
        return clone_container(l, flags, err);
    step_begin(STEP_OWN_NAMESPACE);
    /* SAFE: a right less, for as long as the clone takes. */
    pid_t pid = -1;
    if (privs_own_as_caller(l) < 0)
        *err = errno;
    else
        pid = clone_container(l, flags | CLONE_NEWUSER, err);
    privs_own_as_before(l);
    step_end(STEP_OWN_NAMESPACE);
    return pid;
}
