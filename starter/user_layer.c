/* An overlay that is written to a directory of the user's, in the setuid flow.  The kernel acts in
 * the layers with the rights of whoever makes the mount.  So a child makes it that has none but in
 * a user namespace of its own, where nobody but the user is mapped: what the overlay does, the user
 * could do.  The child never leaves this program, and stays closed to the user. */
#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "layers.h"

enum { FIRST_FD = 3 };

/* A mount namespace of the child's own has copies of all mounts, and overlay wants its layers from
 * there.  The names lead through the session, which the user owns: what they lead to must be what
 * was pinned before. */
static int open_again(const char *name, int pinned) {
    struct stat was, is;
    int fd = open2(AT_FDCWD, name, O_PATH | O_DIRECTORY | O_NOFOLLOW,
                   RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS);
    if (fd < 0 || fstat(pinned, &was) < 0 || fstat(fd, &is) < 0)
        return -1;
    if (was.st_dev != is.st_dev || was.st_ino != is.st_ino) {
        errno = ESTALE;
        return -1;
    }
    return fd;
}

static int open_image(size_t number, const char *inside, int pinned) {
    char name[48] = "image";
    append_number(name, sizeof(name), number);
    append_text(name, sizeof(name), inside);
    return open_again(name, pinned);
}

static int open_layers(const struct rpc *r, struct layers *out) {
    out->count = 0;
    for (size_t i = r->layer_count; i-- > 0;) {
        const struct used_layer *layer = &r->layers[i];
        out->lowers[out->count] =
            open_image(layer->image, layer->inside ? "/upper" : "", layer->fd);
        if (out->lowers[out->count++] < 0)
            return -1;
    }
    out->lowers[out->count++] = open_again("lower", r->places[PLACE_LOWER]);
    out->lowers[out->count++] = open_again("rootfs", r->root_fd);
    out->upper = open_image(r->upper_image, "/upper", r->upper_fd);
    out->work = open_image(r->upper_image, "/work", r->work_fd);
    return out->lowers[out->count - 2] < 0 || out->lowers[out->count - 1] < 0 || out->upper < 0 ||
                   out->work < 0
               ? -1
               : 0;
}

NO_RETURN static void child_main(const struct rpc *r, int socket) {
    struct layers these;
    char byte = 'U';
    int mount_fd = -1, error = 0, passed, own = -1;
    close(r->launch->rpc_socket[0]);
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) < 0 || fchdir(r->session_fd) < 0)
        error = errno;
    else if (privs_enter_layer_userns() < 0)
        error = EUSERS;
    else if ((own = open("/proc/self", O_RDONLY | O_DIRECTORY | O_CLOEXEC)) < 0)
        error = errno;
    if (wire_send(socket, error ? "E" : "U", 1, own) < 0 ||
        (!error && wire_receive(socket, &byte, 1, &passed) != 1))
        _exit(255);
    if (!error && open_layers(r, &these) == 0)
        mount_fd = layers_mount(r->launch, &these, true, 0);
    if (!error && mount_fd < 0)
        error = errno;
    _exit(wire_send(socket, &error, sizeof(error), mount_fd) < 0 ? 255 : 0);
}

/* The mount comes as a descriptor; a child that ends says nothing. */
static int ask_child(int socket) {
    int mount_fd = -1, error = 0, process = -1;
    char byte = 0;
    if (wire_receive(socket, &byte, 1, &process) != 1) {
        errno = ECHILD;
        return -1;
    }
    if (byte == 'U' && privs_map_layer_userns(process) < 0)
        error = errno;
    if (process >= 0)
        close(process);
    if (error) {
        errno = error;
        return -1;
    }
    if (byte == 'U' && wire_send(socket, "M", 1, -1) < 0)
        return -1;
    if (wire_receive(socket, &error, sizeof(error), &mount_fd) != (ssize_t)sizeof(error))
        error = ECHILD;
    errno = error;
    return mount_fd;
}

int layers_in_userns(struct rpc *r) {
    int pair[2], status;
    if (wire_pair(pair) < 0)
        return -1;
    step_begin(STEP_FORK_LAYER);
    /* SAFE: the child holds what rpc holds until it enters a namespace in which it has no right
     * over anything but the user's; then a detached mount comes back. */
    pid_t pid = fork();
    if (pid == 0) {
        close(pair[0]);
        child_main(r, pair[1]);
    }
    close(pair[1]);
    int mount_fd = pid < 0 ? -1 : ask_child(pair[0]), error = errno;
    close(pair[0]);
    if (pid > 0)
        (void)waitpid(pid, &status, 0);
    step_end(STEP_FORK_LAYER);
    errno = error;
    return mount_fd;
}
