/* The underlay: a directory of binds, where there is no overlay. */
#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <unistd.h>

#include "mountcalls.h"

/* UNDERLAY_BIND(path in the image, path in the underlay): one entry of the image shown again. */
int op_underlay_bind(struct rpc *r, const struct op_request *q, struct op_reply *a, int *fd_out) {
    (void)fd_out;
    if (no_fields_but(q, 0, 0, true, true) < 0 || r->root_fd < 0)
        return ERR_MALFORMED;
    int source = open2(r->root_fd, without_slash(wire_string(q, 0)), O_PATH | O_NOFOLLOW,
                       RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS);
    if (source < 0)
        return answer(a, ERR_SOURCE, errno);
    int target = open2(r->places[PLACE_UNDERLAY], without_slash(wire_string(q, 1)),
                       O_PATH | O_NOFOLLOW,
                       RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS);
    int code = ERR_OK;
    /* SAFE: both ends lie in the container's own trees; flags of the image's mount are kept. */
    int tree = target < 0 ? -1 : clone_tree(source, 0, 0, true);
    if (target < 0 || kinds_match(source, target) < 0)
        code = answer(a, ERR_TARGET, errno);
    else if (tree < 0 || attach(tree, target) < 0)
        code = answer(a, ERR_MOUNT, errno);
    close(source);
    if (target >= 0)
        close(target);
    if (tree >= 0)
        close(tree);
    return code;
}
