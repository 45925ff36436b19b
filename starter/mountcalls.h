/* mountcalls.c: what the files with mount operations share. */
#ifndef APY_MOUNTCALLS_H
#define APY_MOUNTCALLS_H

#include "starter.h"

MUST_USE int sys_fsopen(const char *fs);
int set_string(int fs, const char *key, const char *value);
int set_flag(int fs, const char *key);
int set_number(int fs, const char *key, uint64_t number);
unsigned nosuid(const struct launch *l);
MUST_USE int make_mount(int fs, unsigned flags);
MUST_USE int make_mount_with(uint64_t caps, int fs, unsigned flags);
MUST_USE int attach(int mount_fd, int target_fd);
MUST_USE int attach_at(int mount_fd, const char *path);
MUST_USE int open2(int dir, const char *path, uint64_t flags, uint64_t resolve);
int answer(struct op_reply *a, int code, int error);
MUST_USE int no_fields_but(const struct op_request *q, uint32_t flags, int nums, bool first,
                           bool second);
MUST_USE int keep_mount(int mount_fd, int *kept, int *fd_out);
MUST_USE int open_judged(const struct op_request *q, uint64_t flags, struct op_reply *a, int *code);
MUST_USE int clone_tree(int fd, uint64_t set, uint64_t clear, bool recursive);
uint64_t bind_attributes(const struct launch *l, uint32_t flags);
/* images.c */
enum fuse_reach { REACH_USER, REACH_OTHERS, REACH_INSIDE };
MUST_USE int image_fuse(struct launch *l, uint64_t device, const char *source, uint32_t flags,
                        enum fuse_reach reach);
/* mounts.c */
MUST_USE int open_target(const struct rpc *r, const char *path);
const char *without_slash(const char *path);
MUST_USE int kinds_match(int source, int target);

#endif
