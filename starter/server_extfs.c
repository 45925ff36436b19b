/* Servers of what can be written: fuse2fs for ext3 images, and fuse-overlayfs for an overlay that
 * is written to one, which the kernel's overlay cannot do.  Both want to mount by themselves, and
 * find with fusefd.so that it is done. */
#include <fcntl.h>
#include <poll.h>
#include <string.h>
#include <unistd.h>

#include "starter.h"

#define EXTFS_PROGRAM APY_LIBEXECDIR "/bin/fuse2fs"
#define OVERLAY_PROGRAM APY_LIBEXECDIR "/bin/fuse-overlayfs"
#define PRELOAD "LD_PRELOAD=" APY_LIBEXECDIR "/bin/fusefd.so"

enum { FIRST_FD = 3, FUSE_FD = 4, MOST_FDS = 4, APART = 64 };

/* The descriptors at fixed numbers from 3 on, everything else closed, no stream of the caller's. */
static int arrange(const int *wanted, int count) {
    int copies[MOST_FDS], null = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (null < 0 || count > MOST_FDS)
        return -1;
    for (int i = 0; i < count; i++)
        if ((copies[i] = fcntl(wanted[i], F_DUPFD_CLOEXEC, APART)) < 0)
            return -1;
    for (int fd = 0; fd < FIRST_FD; fd++)
        if (dup2(null, fd) < 0)
            return -1;
    for (int i = 0; i < count; i++)
        if (dup2(copies[i], FIRST_FD + i) < 0)
            return -1;
    return close_range((unsigned)(FIRST_FD + count), ~0U, 0);
}

NO_RETURN static void run(const struct launch *l, const char *path, char *const argv[]) {
    static char preload[] = PRELOAD;
    char *const envp[] = {preload, NULL};
    step_begin(STEP_EXEC_SERVER);
    sanitize_restore_for_payload(l);
    umask(0); /* the kernel has applied that of who makes a file */
    execve(path, argv, envp);
    _exit(127);
}

/* The mount point is a formality; "nonempty" spares it a look. */
NO_RETURN static void extfs_main(const struct launch *l, int image_fd, int fuse_fd,
                                 const struct extfs_place *place) {
    static char program[] = "fuse2fs", image[] = "/proc/self/fd/3", target[] = "/";
    static char foreground[] = "-f", single[] = "-s", o[] = "-o";
    char options[80] = "nonempty,offset=";
    const int fds[] = {image_fd, fuse_fd};
    append_number(options, sizeof(options), place->offset);
    append_text(options, sizeof(options), place->writable ? ",rw" : ",ro");
    server_drop(l);
    if (arrange(fds, 2) < 0)
        _exit(255);
    char *const argv[] = {program, image, target, foreground, single, o, options, NULL};
    run(l, EXTFS_PROGRAM, argv);
}

pid_t server_start_extfs(const struct launch *l, int image_fd, int fuse_fd,
                         const struct extfs_place *place) {
    step_begin(STEP_FORK_SERVER);
    pid_t pid = fork();
    if (pid == 0)
        extfs_main(l, image_fd, fuse_fd, place);
    step_end(STEP_FORK_SERVER);
    return pid;
}

/* With --fakeroot owners are those of the container's user namespace, which nobody outside can
 * give a file; one more message has it. */
static void go_inside(int socket) {
    int space = -1;
    char byte;
    if (wire_receive(socket, &byte, 1, &space) != 1 || space < 0)
        _exit(0);
    /* SAFE: takes no privilege: the user owns that namespace, and is root of it as before; the
     * rights are worth what they are worth to the payload, and the program cannot be traced. */
    if (privs_enter_inner_userns(space) < 0)
        _exit(255);
    close(space);
}

/* Device, what lies below, upper and work: one message each, from rpc. */
NO_RETURN static void overlay_main(const struct launch *l, int socket) {
    static char program[] = "fuse-overlayfs", target[] = "/", foreground[] = "-f", o[] = "-o";
    static char options[] = "lowerdir=/proc/self/fd/3,upperdir=/proc/self/fd/5,"
                            "workdir=/proc/self/fd/6,noacl";
    int fds[MOST_FDS];
    char byte;
    server_drop(l);
    for (int i = 0; i < MOST_FDS; i++)
        if (wire_receive(socket, &byte, 1, &fds[i]) != 1 || fds[i] < 0)
            _exit(0); /* the launch has failed, or ended */
    if (fakeroot_wanted(l))
        go_inside(socket);
    if (arrange(fds, MOST_FDS) < 0)
        _exit(255);
    char *const argv[] = {program, foreground, o, options, target, NULL};
    run(l, OVERLAY_PROGRAM, argv);
}

/* Nothing else may stay open while it waits: an end of a pipe here would never show its end. */
static int keep_only(int socket) {
    int copy = fcntl(socket, F_DUPFD_CLOEXEC, APART);
    int trace = trace_fd < 0 ? -1 : fcntl(trace_fd, F_DUPFD_CLOEXEC, APART);
    if (copy < 0 || dup3(copy, FIRST_FD, O_CLOEXEC) < 0 ||
        (trace >= 0 && dup3(trace, FIRST_FD + 1, O_CLOEXEC) < 0))
        return -1;
    trace_fd = trace < 0 ? -1 : FIRST_FD + 1;
    return close_range(FIRST_FD + (trace < 0 ? 1u : 2u), ~0U, 0);
}

pid_t server_start_overlay(struct launch *l) {
    step_begin(STEP_FORK_SERVER);
    pid_t pid = fork();
    if (pid == 0) {
        if (keep_only(l->overlay_socket[1]) < 0)
            _exit(255);
        overlay_main(l, FIRST_FD);
    }
    step_end(STEP_FORK_SERVER);
    return pid;
}
