/* What the files that assemble a container's root share.  Nothing of the container is reached by a
 * path of the host: every look-up starts at a descriptor and cannot leave it. */
#ifndef APY_INIT_ROOT_H
#define APY_INIT_ROOT_H

#include <linux/mount.h>

#include "init.h"

/* init_target.c */
MUST_USE int target_open(int root, const char *path, uint64_t flags);
/* Makes what lacks: directories, and at the end one more or an empty file; an O_PATH descriptor. */
MUST_USE int target_make(int root, const char *path, bool directory, bool *made);
/* The directory that holds the last component, made if it lacks, and that component. */
MUST_USE int target_parent(int root, const char *path, char *name, size_t size);
MUST_USE int target_same(int one, int other);

/* init_mounts.c */
MUST_USE int mount_clone(int dir, const char *path, bool recursive);
MUST_USE int mount_attach(int mount_fd, int target_fd);
MUST_USE int mount_attributes(int fd, bool recursive, uint64_t set, uint64_t clear);
MUST_USE int mount_propagation(int fd, uint64_t ms_flags);
/* Where to look up a path that may lie in the container's procfs or sysfs; what is left of it. */
MUST_USE int mount_below(const struct init *s, const char *path, const char **rest);

/* init_fs.c */
void hand_drop(struct init *s);
/* A detached mount of the context in hand; `writable` leaves read-only for later. */
MUST_USE int hand_make(struct init *s, bool writable);
MUST_USE int hand_finish(struct init *s);
void hand_change(uint64_t set, uint64_t clear, uint64_t propagation);
MUST_USE int hand_mode(struct init *s, mode_t mode);
bool hand_is(const struct init *s, const char *type);

/* init_copyup.c */
MUST_USE int copy_tree(int source, int target);

/* init_dev.c */
bool is_null_device(int fd);

/* init_paths.c */
void paths_before_enter(void);

/* init_proc.c */
MUST_USE int open_again(struct init *s, int fd, int flags);

/* Fields that a row does not have must be absent. */
bool row_is_plain(const struct op_request *q, uint32_t flags, int nums, bool first, bool second);

#endif
