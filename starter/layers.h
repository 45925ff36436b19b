/* layers.c, user_layer.c: the layers of an overlay, as descriptors. */
#ifndef APY_LAYERS_H
#define APY_LAYERS_H

#include "mountcalls.h"

struct layers {
    int lowers[LIMIT_IMAGES + 2];      /* from the top down */
    size_t count;
    int upper, work;                   /* -1: read-only */
};

/* A detached mount, or -1 with errno; without `caps` with what this process has. */
MUST_USE int layers_mount(const struct launch *l, const struct layers *these, bool of_user,
                          uint64_t caps);
void layers_below(const struct rpc *r, struct layers *out);
MUST_USE int layers_merge(struct rpc *r);
/* user_layer.c: the same by a child that has the user's rights alone. */
MUST_USE int layers_in_userns(struct rpc *r);

#endif
