/* loan.c: the mount of an image that is in use, for the next launch of it. */
#ifndef APY_LOAN_H
#define APY_LOAN_H

#include <linux/mount.h>

#include "starter.h"

/* All that two launches must have in common; no padding, as it is compared byte by byte. */
struct loan_key {
    char build_id[64];
    uint64_t flow, uid, gid, userns, pidns, group;
    uint64_t dev, ino, size, modified[2], changed[2];
};
struct loan_token {
    struct loan_key key;
    uint64_t offset, mount;
};
_Static_assert(sizeof(struct loan_token) == 64 + 15 * 8, "no padding");

struct loan {
    bool taken;                        /* from another launch; else it is ours to hand out */
    struct loan_key wanted;            /* what another launch was asked for */
    int token_fd, server_fd, listener;
    int holder;                        /* who offers it now: when that ends, it is our turn */
    struct loan_token token;
};

void loan_init(struct launch *l, struct loan *s);
void loan_close(struct launch *l, struct loan *s);
bool loan_allowed(const struct launch *l);
/* Asks who offers the image; master is forked while the answer comes, and must not have it. */
void loan_ask(struct launch *l, struct loan *s);
MUST_USE bool loan_take(struct launch *l, struct loan *s);
/* Is the mount that was taken of this very file, with its file system at this offset? */
MUST_USE bool loan_is(const struct loan *s, const struct stat *st, uint64_t offset);
void loan_spare(struct launch *l, int mount_fd);
void loan_forget(struct launch *l);
void loan_seal(struct launch *l, struct loan *s, pid_t server, const struct stat *st,
                uint64_t offset);
/* As waitpid(2) has it; 0 if that is not known. */
int loan_server_status(const struct launch *l, const struct loan *s);
void loan_listen(struct launch *l, struct loan *s);
void loan_serve(const struct launch *l, const struct loan *s);

#endif
