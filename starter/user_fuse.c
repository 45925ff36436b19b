/* USER_FUSE: a file system that a program of the user's serves, on the host or inside. */
#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include "mountcalls.h"

/* USER_FUSE(target; device): mounted empty-handed; the answer carries the device, for whoever
 * serves it.  Only another mount below its own place is looked up in it: its server may never
 * answer, and then this launch waits. */
int op_user_fuse(struct rpc *r, const struct op_request *q, struct op_reply *a, int *fd_out) {
    struct launch *l = r->launch;
    if (no_fields_but(q, 0, 1, true, false) < 0 || wire_string(q, 0)[0] != '/' ||
        q->num[0] >= LIMIT_FUSE_DEVICES || l->fuse_fds[q->num[0]] < 0)
        return ERR_MALFORMED;
    if (!policy_user_fuse(l))
        return ERR_REFUSED;
    int target = open_target(r, wire_string(q, 0));
    if (target < 0)
        return answer(a, ERR_TARGET, errno);
    int device = fcntl(l->fuse_fds[q->num[0]], F_DUPFD_CLOEXEC, 3);
    /* SAFE: the caller could mount it in a user namespace of their own; nosuid and nodev, never
     * part of an overlay, whose place was before, and closed to all other users, root too: a server
     * that does not answer must not hold up who looks into /proc.  Root's payload may be somebody
     * else. */
    int mount_fd = device < 0 ? -1
                              : image_fuse(l, q->num[0], "fuse", BIND_WRITABLE,
                                           l->flow == FLOW_ROOT ? REACH_OTHERS : REACH_USER);
    int code = mount_fd < 0 || attach(mount_fd, target) < 0 ? answer(a, ERR_MOUNT, errno) : ERR_OK;
    close(target);
    if (mount_fd >= 0)
        close(mount_fd);
    if (code == ERR_OK)
        *fd_out = device;
    else if (device >= 0)
        close(device);
    return code;
}
