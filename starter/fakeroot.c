/* --fakeroot: the container is cloned with a user namespace of its own, whose root the caller is;
 * keeper and all that serves it stay outside.  With ranges of subordinate ids keeper maps them, by
 * its own right or by newuidmap; without, the container maps its one id itself. */
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/mount.h>
#include <poll.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <unistd.h>

#include "starter.h"

enum { PATIENCE_MS = 10000, FUSE_MAJOR = 10, FUSE_MINOR = 229, MAP_BYTES = 128 };

static bool by_tool(const struct launch *l) {
    return l->flow == FLOW_USERNS;
}

static void close_fd(int *fd) {
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

/* ---- the FUSE device ---- */

/* The kernel lets a namespace mount FUSE by a device that was opened inside, where nobody passes
 * over the mode of /dev/fuse.  A node of our own, in nameless memory, can be opened there. */
static int make_node(const struct launch *l) {
    const struct raised *raised = privs_raise(CAP_BIT(CAP_SYS_ADMIN) | CAP_BIT(CAP_MKNOD) |
                                              CAP_BIT(CAP_CHOWN) | CAP_BIT(CAP_DAC_OVERRIDE));
    if (!raised)
        return -1;
    int fs = (int)syscall(SYS_fsopen, "tmpfs", FSOPEN_CLOEXEC), tree = -1, node = -1;
    /* SAFE: one fixed device on a file system of ours that is attached nowhere. */
    if (fs >= 0 && syscall(SYS_fsconfig, fs, FSCONFIG_CMD_CREATE, NULL, NULL, 0) == 0)
        tree = (int)syscall(SYS_fsmount, fs, FSMOUNT_CLOEXEC,
                            MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC);
    if (tree >= 0 &&
        mknodat(tree, "fuse", S_IFCHR | 0600, makedev(FUSE_MAJOR, FUSE_MINOR)) == 0 &&
        fchownat(tree, "fuse", l->uid, l->gid, AT_SYMLINK_NOFOLLOW) == 0)
        node = openat(tree, "fuse", O_PATH | O_CLOEXEC | O_NOFOLLOW);
    privs_lower(raised);
    close_fd(&fs);
    close_fd(&tree);
    return node;
}

static int open_inside(const struct launch *l) {
    char link[32] = "/proc/self/fd/";
    int fd = open("/dev/fuse", O_RDWR | O_CLOEXEC);
    if (fd >= 0 || l->fuse_node < 0)
        return fd;
    append_number(link, sizeof(link), (uint64_t)l->fuse_node);
    return open(link, O_RDWR | O_CLOEXEC);
}

/* ---- keeper's side ---- */

/* Before the clone: a channel to the container, and a node for the device where that is closed. */
int fakeroot_prepare(struct launch *l, int *error) {
    l->fuse_node = -1;
    if (wire_pair(l->fakeroot_socket) < 0) {
        *error = errno;
        return ERR_SETUP;
    }
    if (l->plan.fuse_count > 0 && l->flow != FLOW_USERNS)
        l->fuse_node = make_node(l);
    return ERR_OK;
}

/* Keeper's ends, after the clone or for want of one. */
void fakeroot_close(struct launch *l) {
    close_fd(&l->fakeroot_socket[0]);
    close_fd(&l->fakeroot_socket[1]);
    close_fd(&l->fuse_node);
}

static int take_devices(struct launch *l, int *error) {
    for (uint32_t i = 0; i <= l->plan.fuse_count; i++) {
        struct pollfd there = {.fd = l->fakeroot_socket[0], .events = POLLIN};
        int32_t failed = EIO;
        int *device = i < l->plan.fuse_count ? &l->fuse_fds[i] : NULL;
        if (poll(&there, 1, PATIENCE_MS) != 1 ||
            wire_receive(l->fakeroot_socket[0], &failed, sizeof(failed), device) !=
                (ssize_t)sizeof(failed) ||
            failed != 0 || (device && *device < 0)) {
            *error = failed;
            return device ? ERR_FUSE : ERR_NAMESPACE;
        }
    }
    return ERR_OK;
}

static void map_text(char out[MAP_BYTES], uint32_t own, const struct subid_range *range) {
    out[0] = '\0';
    append_text(out, MAP_BYTES, "0 ");
    append_number(out, MAP_BYTES, own);
    append_text(out, MAP_BYTES, " 1\n1 ");
    append_number(out, MAP_BYTES, range->first);
    append_text(out, MAP_BYTES, " ");
    append_number(out, MAP_BYTES, range->count);
    append_text(out, MAP_BYTES, "\n");
}

static bool is_tool(const char *path) {
    struct stat st;
    return stat(path, &st) == 0 && S_ISREG(st.st_mode) && st.st_uid == 0 &&
           (st.st_mode & (S_IWGRP | S_IWOTH)) == 0 && (st.st_mode & S_IXOTH) != 0;
}

static const char *find_tool(const char *name, char path[64]) {
    static const char *const folders[] = {"/usr/bin/", "/bin/", "/usr/sbin/", "/sbin/",
                                          "/usr/local/bin/"};
    for (size_t i = 0; i < ARRAY_SIZE(folders); i++) {
        path[0] = '\0';
        append_text(path, 64, folders[i]);
        append_text(path, 64, name);
        if (is_tool(path))
            return path;
    }
    return NULL;
}

/* newuidmap and newgidmap of shadow, which have a right that we have not in this flow. */
static int run_tool(const struct launch *l, const char *name, pid_t container, uint32_t own,
                    const struct subid_range *range) {
    char path[64], words[6][16] = {"", "0", "", "1", "1", ""}, count[16] = "";
    char title[16] = "";
    if (!find_tool(name, path)) {
        errno = ENOENT;
        return -1;
    }
    append_text(title, sizeof(title), name);
    append_number(words[0], sizeof(words[0]), (uint64_t)container);
    append_number(words[2], sizeof(words[2]), own);
    append_number(words[5], sizeof(words[5]), range->first);
    append_number(count, sizeof(count), range->count);
    char *const argv[] = {title,    words[0], words[1], words[2], words[3],
                          words[4], words[5], count,    NULL};
    char *const envp[] = {NULL};
    step_begin(STEP_FORK_ID_MAPPER);
    pid_t pid = fork();
    if (pid == 0) {
        sigset_t none;
        sigemptyset(&none);
        sigprocmask(SIG_SETMASK, &none, NULL);
        sanitize_close_inherited(l);
        /* SAFE: root's own program, by its absolute path; this process has the caller's rights. */
        execve(path, argv, envp);
        _exit(127);
    }
    step_end(STEP_FORK_ID_MAPPER);
    int status = -1;
    while (pid > 0 && waitpid(pid, &status, 0) < 0)
        if (errno != EINTR)
            return -1;
    errno = EPERM;
    return pid > 0 && WIFEXITED(status) && WEXITSTATUS(status) == 0 ? 0 : -1;
}

static int map_ranges(const struct launch *l, pid_t container) {
    struct subid_range range[2];
    char uid_map[MAP_BYTES], gid_map[MAP_BYTES];
    if (names_subids(l, range) < 0)
        return ERR_SUBIDS;
    if (by_tool(l))
        return run_tool(l, "newuidmap", container, l->uid, &range[0]) == 0 &&
                       run_tool(l, "newgidmap", container, l->gid, &range[1]) == 0
                   ? ERR_OK
                   : ERR_ID_MAP;
    map_text(uid_map, l->uid, &range[0]);
    map_text(gid_map, l->gid, &range[1]);
    /* SAFE: the caller's own id and ranges that root's files give the caller alone, looked up by a
     * child without privilege and judged again in names_subids(). */
    return privs_map_ids(container, uid_map, gid_map, l->uid == 0) == 0 ? ERR_OK : ERR_ID_MAP;
}

/* After the clone: devices come back, the maps are written, the container goes on. */
int fakeroot_map(struct launch *l, pid_t container, int *error) {
    close_fd(&l->fakeroot_socket[1]);
    close_fd(&l->fuse_node);
    int code = take_devices(l, error);
    if (code == ERR_OK && l->plan.flags & PLAN_SUBIDS) {
        step_begin(STEP_MAP_IDS);
        errno = 0;
        code = map_ranges(l, container);
        *error = errno;
        step_end(STEP_MAP_IDS);
    }
    if (code == ERR_OK && wire_send(l->fakeroot_socket[0], "M", 1, -1) < 0) {
        *error = errno;
        code = ERR_SETUP;
    }
    fakeroot_close(l);
    return code;
}

/* ---- the container's side, in the new namespaces ---- */

static int hand_over(struct launch *l) {
    int32_t failed = 0;
    for (uint32_t i = 0; i < l->plan.fuse_count; i++) {
        l->fuse_fds[i] = open_inside(l);
        failed = l->fuse_fds[i] < 0 ? errno : 0;
        if (wire_send(l->fakeroot_socket[1], &failed, sizeof(failed), l->fuse_fds[i]) < 0 || failed)
            return -1;
    }
    close_fd(&l->fuse_node);
    if (!(l->plan.flags & PLAN_SUBIDS) && privs_map_self(l->uid, l->gid) < 0)
        failed = errno;
    return wire_send(l->fakeroot_socket[1], &failed, sizeof(failed), -1) < 0 || failed ? -1 : 0;
}

/* Hands the devices to keeper, waits for the maps, and is root; -1: keeper has been told why. */
int fakeroot_enter(struct launch *l) {
    char byte = 0;
    bool shown = by_tool(l) && l->plan.flags & PLAN_SUBIDS;
    close_fd(&l->fakeroot_socket[0]);
    if (shown)
        privs_show_maps(true);
    if (hand_over(l) < 0 || wire_receive(l->fakeroot_socket[1], &byte, 1, NULL) != 1)
        return -1;
    if (shown)
        privs_show_maps(false);
    close_fd(&l->fakeroot_socket[1]);
    step_begin(STEP_BECOME_ROOT);
    /* SAFE: root of a namespace that its own caller owns; no id of the host's root is mapped for
     * anybody who is not that root. */
    int result = privs_become_inner_root();
    step_end(STEP_BECOME_ROOT);
    return result;
}
