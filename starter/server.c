/* The image server: squashfuse as the user, outside the container's mount namespace. */
#include <errno.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "starter.h"

static const char server_program[] = APY_LIBEXECDIR "/bin/squashfuse_ll";
#define SERVER_UNPACK APY_LIBEXECDIR "/bin/unpack.so"
enum { SERVER_IMAGE_FD = 3, SERVER_FUSE_FD = 4, LOOK_PATIENCE_MS = 5000 };

/* Both descriptors at fixed numbers, everything else closed, no stream of the caller's. */
static int arrange_descriptors(int image_fd, int fuse_fd) {
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    int image = fcntl(image_fd, F_DUPFD_CLOEXEC, 16), fuse = fcntl(fuse_fd, F_DUPFD_CLOEXEC, 16);
    if (null < 0 || image < 0 || fuse < 0)
        return -1;
    for (int fd = 0; fd < 3; fd++)
        if (dup2(null, fd) < 0)
            return -1;
    if (dup2(image, SERVER_IMAGE_FD) < 0 || dup2(fuse, SERVER_FUSE_FD) < 0)
        return -1;
    return close_range(SERVER_FUSE_FD + 1, ~0U, 0);
}

NO_RETURN static void serve(const struct launch *l, int image_fd, int fuse_fd, uint64_t offset) {
    char options[64] = "ro,offset=";
    append_number(options, sizeof(options), offset);
    step_begin(STEP_EXEC_SERVER);
    if (arrange_descriptors(image_fd, fuse_fd) < 0)
        _exit(255);
    sanitize_restore_for_payload(l);
    static char program[] = "squashfuse_ll", single[] = "-s", foreground[] = "-f", o[] = "-o";
    static char image[] = "/proc/self/fd/3", target_fd[] = "/dev/fd/4";
    char *const argv[] = {program, single, foreground, o, options, image, target_fd, NULL};
    /* Root's file, as the program is; a loader that cannot have it serves without. */
    static char preload[] = "LD_PRELOAD=" SERVER_UNPACK;
    char *const envp[] = {preload, NULL};
    server_filter(server_program);
    execve(server_program, argv, envp);
    _exit(127);
}

/* SAFE: the user's own rights and no_new_privs; the programs are root-owned copies that the user
 * may run but not read, so that the kernel keeps the user's hands off the processes. */
void server_drop(const struct launch *l) {
    struct target_identity target;
    trace_set_role(ROLE_IMAGE_SERVER);
    step_begin(STEP_DROP_SERVER);
    stage_target(l, ROLE_IMAGE_SERVER, &target);
    if (privs_drop(&target) < 0 || setsid() < 0 || chdir("/") < 0)
        _exit(255);
    step_end(STEP_DROP_SERVER);
    trace_process();
}

NO_RETURN static void server_main(const struct launch *l, int image_fd, int fuse_fd,
                                  uint64_t offset) {
    server_drop(l);
    serve(l, image_fd, fuse_fd, offset);
}

/* Nothing else may stay open here: an end of a pipe in these hands would never show its end. */
static int keep_only(const struct launch *l, int *image, int *answer, int *go) {
    enum { FIRST = SERVER_IMAGE_FD, COUNT = 5, APART = 64 };
    const int wanted[COUNT] = {*image, l->fuse_fds[0], l->probe_pipe[1], l->serve_pipe[0],
                               trace_fd};
    int copies[COUNT];
    for (int i = 0; i < COUNT; i++)
        copies[i] = wanted[i] < 0 ? -1 : fcntl(wanted[i], F_DUPFD_CLOEXEC, APART);
    for (int i = 0; i < COUNT; i++) {
        close(FIRST + i);
        if (copies[i] >= 0 && dup3(copies[i], FIRST + i, O_CLOEXEC) < 0)
            return -1;
    }
    *image = FIRST;
    *answer = FIRST + 2;
    *go = FIRST + 3;
    trace_fd = copies[4] < 0 ? -1 : FIRST + 4;
    return close_range(FIRST + COUNT, ~0U, 0);
}

/* Begun before stage 1 has judged the image: opened as the user, told to keeper, and served once
 * the mount is there.  What stage 1 finds must be the same file and offset. */
NO_RETURN static void early_main(struct launch *l) {
    struct target_identity target;
    struct probe found;
    char path[LIMIT_PATH_BYTES], byte;
    trace_set_role(ROLE_IMAGE_SERVER);
    step_begin(STEP_DROP_SERVER);
    stage_target(l, ROLE_IMAGE_SERVER, &target);
    /* SAFE: as in server_main(); the image is not even opened before the drop. */
    if (privs_drop(&target) < 0 || setsid() < 0)
        _exit(255);
    step_end(STEP_DROP_SERVER);
    trace_process();
    if (!early_word(l, l->request.image_arg, path, sizeof(path)))
        _exit(0);
    int image = open(path, O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    if (image < 0 || probe_image(image, &found) < 0 || chdir("/") < 0)
        _exit(0);
    int answer, go;
    if (keep_only(l, &image, &answer, &go) < 0 ||
        write(answer, &found, sizeof(found)) != (ssize_t)sizeof(found))
        _exit(0);
    if (read(go, &byte, 1) != 1)
        _exit(0);
    serve(l, image, SERVER_FUSE_FD, found.offset);
}

/* SIGKILL ends even who waits for a file system that does not answer; keeper's loop reaps it. */
static int answer_of(pid_t pid, int fd, struct image_facts *found) {
    struct pollfd answer = {.fd = fd, .events = POLLIN};
    bool told = pid > 0 && poll(&answer, 1, LOOK_PATIENCE_MS) == 1 &&
                read(fd, found, sizeof(*found)) == (ssize_t)sizeof(*found);
    if (pid > 0)
        (void)kill(pid, SIGKILL);
    return told ? 0 : -1;
}

int server_look(const struct launch *l, int image_fd, struct image_facts *found) {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) < 0)
        return -1;
    pid_t pid = fork();
    if (pid == 0) {
        struct target_identity target;
        trace_fd = -1;
        for (size_t i = 0; i < LIMIT_FUSE_DEVICES; i++)
            close(l->fuse_fds[i]); /* if it hangs, the mounts do not hang with it */
        stage_target(l, ROLE_IMAGE_SERVER, &target);
        /* SAFE: as in server_main(); looks at the descriptor that the caller has opened, and tells
         * what anybody's process with the caller's rights could find out. */
        if (privs_drop(&target) < 0 || fstat(image_fd, &found->st) < 0)
            _exit(255);
        found->code = policy_image(l, image_fd);
        bool told = write(ends[1], found, sizeof(*found)) == (ssize_t)sizeof(*found);
        _exit(told ? 0 : 255);
    }
    close(ends[1]);
    int result = answer_of(pid, ends[0], found);
    close(ends[0]);
    return result;
}

void server_wait(const struct launch *l, int socket) {
    uint64_t offset = 0;
    char byte;
    int image = -1, fuse = -1;
    /* Without both it is not wanted: the launch has failed, or ended. */
    if (wire_receive(socket, &offset, sizeof(offset), &image) != (ssize_t)sizeof(offset) ||
        wire_receive(socket, &byte, 1, &fuse) != 1 || image < 0 || fuse < 0)
        _exit(0);
    server_main(l, image, fuse, offset);
}

pid_t server_start_early(struct launch *l) {
    step_begin(STEP_FORK_SERVER);
    pid_t pid = fork();
    if (pid == 0)
        early_main(l);
    step_end(STEP_FORK_SERVER);
    return pid;
}

pid_t server_start(const struct launch *l, int image_fd, int fuse_fd, uint64_t offset) {
    step_begin(STEP_FORK_SERVER);
    pid_t pid = fork();
    if (pid == 0)
        server_main(l, image_fd, fuse_fd, offset);
    step_end(STEP_FORK_SERVER);
    return pid;
}
