/* What the files of the starter share.  Only starter.c, keeper.c and the ends of children exit. */
#ifndef APY_STARTER_H
#define APY_STARTER_H

#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/types.h>

#include "generated/build.h"

#include "config.h"
#include "protocol.h"
#include "request.h"
#include "subids.h"

#define MUST_USE __attribute__((warn_unused_result))
#define NO_RETURN __attribute__((noreturn))
/* What root keeps of each file that a writable layer of its own copies up, as numbers of
 * capabilities(7): CHOWN, DAC_READ_SEARCH, FOWNER, FSETID, MKNOD, SETFCAP. */
#define ROOT_LAYER_CAPS                                                                            \
    (CAP_BIT(0) | CAP_BIT(2) | CAP_BIT(3) | CAP_BIT(4) | CAP_BIT(27) | CAP_BIT(31))
#define CAP_BIT(cap) ((uint64_t)1 << (cap))
#define ARRAY_SIZE(a) (sizeof(a) / sizeof((a)[0]))

/* Word of starter-init's: the container will probably have a network of its own. */
#define INIT_NETWORK "network"

/* What the caller's process had and the payload gets back. */
struct inherited {
    struct rlimit limits[RLIM_NLIMITS];
    sigset_t blocked;
    uint64_t ignored;                  /* bit n-1: signal n was ignored */
    mode_t umask;
    int fds[LIMIT_INHERITED_FDS];      /* the caller's, 3 and up */
    size_t fd_count;
};

/* One launch.  Filled by keeper before it forks; each child has its own copy. */
struct launch {
    enum flow flow;
    enum reason reason;
    uid_t uid;
    gid_t gid;
    uint64_t permitted;                /* capabilities that this flow can have at all */
    uint64_t bounding;                 /* the caller's own bounding set */
    struct inherited inherited;
    pid_t caller_pid;                  /* who has started us, as getppid() says; 0: not seen here */
    int request_fd;
    int trace_file;                    /* the caller's, or -1 */
    struct request_header request;
    int config_fd;                     /* -1: there is no file */
    struct config config;
    uint64_t host_spaces[8];
    int keeper_socket[2];              /* [0] keeper, [1] master */
    int rpc_socket[2];                 /* [0] rpc, [1] master */
    int start_socket[2];               /* [0] stage 2, [1] master */
    int methods_socket[2];             /* [0] methods, [1] master; -1 without */
    int helper_sockets[2][2];          /* post_start_host, cleanup_host: [0] helper, [1] master */
    int bearer_socket[2];              /* [0] stage 2, [1] bearer; -1 without */
    int init_socket[2];                /* flow CALLER: [0] starter-init, [1] master; -1 without */
    pid_t init_pid;
    int server_socket[2];              /* flow CALLER: [0] image server, [1] master; -1 without */
    pid_t server_pid;
    int ready_fd;                      /* flow CALLER: who called waits for it; -1 without */
    int seal_pipe[2];                  /* stage 2 → rpc: nothing more will be loaded */
    int ready_pipe[2];                 /* container → keeper: rpc is gone */
    /* keeper → stage 2, bearer: nothing privileged is left.  No pipe: whoever holds the end of one
     * for reading may open it for writing (/proc/self/fd), and say it in keeper's place. */
    int go_socket[2];
    int waiter_fd;                     /* of an instance: who called waits at its other end; -1 */
    int fuse_fds[LIMIT_FUSE_DEVICES];
    int fakeroot_socket[2];            /* [0] keeper, [1] container; -1 without --fakeroot */
    int fuse_node;                     /* a device node of ours for that container, or -1 */
    bool early_fuse;                   /* the image is mounted and served before it is asked for */
    int life_pipe[2];                  /* closes when the last process of the container ends */
    int serve_pipe[2];                 /* rpc → early image server: the mount is there */
    int loan_socket[2];               /* [0] keeper, [1] rpc: a copy of the image's mount */
    int loan_mount;                   /* that copy, or one of another launch; -1 without */
    int loan_kept[2];                 /* keeper's own of what was taken: mount and word; -1 */
    int loan_asked;                   /* keeper's socket to who offers the mount; -1 */
    int overlay_socket[2];             /* rpc → overlay server: its directories; -1 without */
    int netns_fd;                      /* the network that the container joins, or -1 */
    int probe_pipe[2];                 /* early image server → keeper: what it opened */
    struct container_plan plan;
};

/* report.c: fixed texts on stderr; bytes of the user are never printed as they are */
void report(const char *level, const char *text);
void report_error(const char *what, int error);
NO_RETURN void fail(const char *what, int error);
/* What is FATAL goes to `tell` instead, which returns the status that fail() ends with. */
void report_elsewhere(int (*tell)(const char *text));
size_t append_text(char *out, size_t size, const char *text);
size_t append_escaped(char *out, size_t size, const char *text, size_t length);
size_t append_number(char *out, size_t size, uint64_t number);

/* sanitize.c */
void sanitize_start(struct launch *l);
void sanitize_descriptors(struct launch *l);
void sanitize_close_inherited(const struct launch *l);
void sanitize_restore_for_payload(const struct launch *l);

/* turn.c */
void turn_make(bool wanted);
void turn_give(void);
void turn_wait(void);

/* privs.c: every change of identity, and nothing else */
struct raised;
struct target_identity {
    uid_t uid;
    gid_t gid;
    bool set_groups;
    size_t group_count;
    gid_t groups[LIMIT_GROUPS];
    uint64_t caps[CAP_SETS];
    bool keep_bounding;                /* the caller's own is kept */
    bool no_new_privs;
};
MUST_USE int privs_check_start(struct launch *l);
MUST_USE int privs_enter_keeper(const struct launch *l);
const struct raised *privs_raise(uint64_t caps);
void privs_lower(const struct raised *token);
MUST_USE int privs_drop(const struct target_identity *target);
MUST_USE int privs_identify(struct identity *who, bool with_spaces);
MUST_USE int privs_make_userns(const struct launch *l);
MUST_USE int privs_take_names(const struct launch *l);
MUST_USE int privs_own_as_caller(const struct launch *l);
void privs_own_as_before(const struct launch *l);
MUST_USE int privs_map_ids(pid_t pid, const char *uid_map, const char *gid_map, bool with_root);
MUST_USE int privs_map_self(uid_t uid, gid_t gid);
void privs_show_maps(bool shown);
MUST_USE int privs_become_inner_root(void);
MUST_USE int privs_enter_inner_userns(int space);
MUST_USE int privs_enter_layer_userns(void);
MUST_USE int privs_map_layer_userns(int process);
void privs_new_keyring(void);
MUST_USE int privs_open_as_root(const char *path, int flags, mode_t mode);
MUST_USE int privs_memory_as_root(const char *name);
uint64_t privs_last_cap_mask(void);

/* request.c */
void request_open(struct launch *l, int argc, char *const argv[]);
struct stat;
MUST_USE int request_check_seals(int fd, struct stat *st);

/* wire.c */
MUST_USE int wire_pair(int pair[2]);
MUST_USE int wire_send(int fd, const void *frame, size_t size, int passed);
MUST_USE int wire_send_now(int fd, const void *frame, size_t size, int passed);
/* Returns bytes, 0 at the end, -1 with errno; *passed is -1 or a descriptor (close-on-exec). */
MUST_USE ssize_t wire_receive(int fd, void *frame, size_t size, int *passed);
MUST_USE int wire_check_request(const struct op_request *q, size_t size);
const char *wire_string(const struct op_request *q, int which);

/* policy.c: decisions without side effects (names.c looks names up) */
MUST_USE int policy_caller(const struct launch *l, const char **why);
MUST_USE int policy_plan(const struct launch *l, const struct container_plan *plan);
bool policy_gives_names(const struct launch *l, const struct container_plan *plan);
MUST_USE int policy_image(const struct launch *l, int image_fd);
MUST_USE int policy_netns(const struct launch *l, int fd);
MUST_USE int policy_network(const struct launch *l, const char *name);
MUST_USE bool policy_made_for_it(const struct launch *l, int fd);
bool policy_limits_images(const struct launch *l);
bool policy_is_served(int fd);
MUST_USE bool policy_holds_mounts(int fd);
MUST_USE bool policy_root_lies_on_nothing(void);
MUST_USE int names_match(const struct launch *l, enum config_id key, bool group, const gid_t *ids,
                         size_t count);
/* A child that has dropped, and its exit status: for what keeper must not read itself. */
MUST_USE pid_t names_fork_asker(const struct launch *l);
MUST_USE int names_wait_for_asker(pid_t pid);
MUST_USE int names_home(const struct launch *l, char *out, size_t size);
uint64_t names_granted_caps(const struct launch *l);
/* The caller's ranges of subordinate ids: [0] of users, [1] of groups. */
MUST_USE int names_subids(const struct launch *l, struct subid_range range[2]);

/* policy_mounts.c: decisions about single mounts, for rpc */
bool policy_bind(const struct launch *l, const char *source, const char *target, int source_fd);
bool policy_image_bind(const struct launch *l);
bool policy_user_fuse(const struct launch *l);
bool policy_kernel_mount(const struct launch *l, enum kernel_fs kind, const char *target);
bool policy_layer(const struct launch *l, enum layer_kind kind);

/* grants.c */
typedef bool (*grants_match)(const char *name, bool group, const void *whose);
MUST_USE int grants_read(const char *text, size_t size, grants_match matches, const void *whose,
                         uint64_t *granted);

/* trace.c */
extern int trace_fd;
extern enum role trace_role;
void trace_set_role(enum role role);
void trace_process(void);
void trace_hook(uint32_t hook, uint64_t start_ns, int failed);
void trace_operation(uint32_t op, uint64_t start_ns, int code, int error, const char *text);
uint64_t trace_now(void);
void step_begin(enum step step);
void step_end(enum step step);
void step_operation(uint32_t op, bool end);
MUST_USE int trace_start(struct launch *l, int file_fd);

/* audit.c */
MUST_USE int audit_launch(const struct launch *l, const struct container_plan *plan,
                          const char *image, const char *decision);

extern pid_t stage_rpc_pid, container_pid;

/* container.c: clone(namespaces) and what the child does before it is the payload */
void container_close_outer_ends(struct launch *l);
MUST_USE pid_t container_start(struct launch *l, int *err);

/* fakeroot.c: a user namespace of the container's own, in which the caller is root */
static inline bool fakeroot_wanted(const struct launch *l) {
    return (l->plan.flags & PLAN_FAKEROOT) != 0;
}
MUST_USE int fakeroot_prepare(struct launch *l, int *error);
MUST_USE int fakeroot_map(struct launch *l, pid_t container, int *error);
void fakeroot_close(struct launch *l);
MUST_USE int fakeroot_enter(struct launch *l);

/* rpc.c, and the files with its operations: mounts.c, images.c, layers.c, underlay.c */
NO_RETURN void rpc_main(struct launch *l);
enum place { PLACE_ROOTFS, PLACE_FINAL, PLACE_LOWER, PLACE_UNDERLAY, PLACE_UPPER, PLACE_WORK,
             PLACE_MERGED, PLACE_COUNT };
struct shown_image {
    int fd;
    bool there, writable, directory;
};
struct used_layer {
    int fd;
    size_t image;
    bool inside;                       /* it is the image's directory upper */
};
struct rpc {
    struct launch *launch;
    int session_fd, root_fd, final_fd;
    bool root_directory;               /* not an image of our own mounting */
    struct shown_image images[LIMIT_IMAGES];
    struct used_layer layers[LIMIT_IMAGES];
    size_t layer_count, upper_image;
    int upper_fd, work_fd, merged_fd;  /* 0: there is none */
    int places[PLACE_COUNT];           /* pinned before anybody else could replace them */
    int phase;
    uint32_t uses[40];
    uint32_t kernel_mounts;            /* that were asked for: a bit for each row */
    uint64_t layer_caps;
};
int op_session(struct rpc *r, const struct op_request *q, struct op_reply *a, int *fd_out);
int op_root_fuse(struct rpc *r, const struct op_request *q, struct op_reply *a, int *fd_out);
int op_root_squashfs(struct rpc *r, const struct op_request *q, struct op_reply *a, int *fd_out);
int op_root_directory(struct rpc *r, const struct op_request *q, struct op_reply *a, int *fd_out);
int op_image_fuse(struct rpc *r, const struct op_request *q, struct op_reply *a, int *fd_out);
int op_image_kernel(struct rpc *r, const struct op_request *q, struct op_reply *a, int *fd_out);
int op_image_directory(struct rpc *r, const struct op_request *q, struct op_reply *a, int *fd_out);
int op_image_layer(struct rpc *r, const struct op_request *q, struct op_reply *a, int *fd_out);
int op_underlay_bind(struct rpc *r, const struct op_request *q, struct op_reply *a, int *fd_out);
int op_layer(struct rpc *r, const struct op_request *q, struct op_reply *a, int *fd_out);
int op_bind(struct rpc *r, const struct op_request *q, struct op_reply *a, int *fd_out);
int op_mount(struct rpc *r, const struct op_request *q, struct op_reply *a, int *fd_out);
int op_hostname(struct rpc *r, const struct op_request *q, struct op_reply *a, int *fd_out);
int op_user_fuse(struct rpc *r, const struct op_request *q, struct op_reply *a, int *fd_out);
int op_space(struct rpc *r, const struct op_request *q, struct op_reply *a, int *fd_out);
int op_pivot(struct rpc *r, const struct op_request *q, struct op_reply *a, int *fd_out);
enum rpc_phase { PHASE_SESSION = 1, PHASE_ROOT, PHASE_LAYER, PHASE_ASSEMBLE, PHASE_DONE };

/* early.c: what is begun before stage 1 has judged, to be confirmed by it */
bool early_plan(const struct launch *l, struct container_plan *plan);
void early_image(const struct launch *l, char *out, size_t size);
const char *early_word(const struct launch *l, uint32_t which, char *out, size_t size);

/* probe.c: run without any privilege */
struct probe {
    uint64_t dev, ino, offset;
};
MUST_USE int probe_image(int fd, struct probe *found);

/* prefetch.c: run without any privilege */
void prefetch_program(int root_fd, const char *name);

/* server.c */
struct image_facts {
    int code;                          /* enum err: what policy_image() says */
    struct stat st;
};
/* As the caller in every id, where keeper may not look itself; 0 or -1. */
MUST_USE int server_look(const struct launch *l, int image_fd, struct image_facts *found);
MUST_USE pid_t server_start_early(struct launch *l);
void server_drop(const struct launch *l);
/* server_extfs.c */
struct extfs_place {
    uint64_t offset;
    bool writable;
};
MUST_USE pid_t server_start_extfs(const struct launch *l, int image_fd, int fuse_fd,
                                  const struct extfs_place *place);
MUST_USE pid_t server_start_overlay(struct launch *l);
/* server_filter.c */
void server_filter(const char *path);
/* Waits for its image and its device, from the other end of a socket. */
NO_RETURN void server_wait(const struct launch *l, int socket);
MUST_USE pid_t server_start(const struct launch *l, int image_fd, int fuse_fd, uint64_t offset);

/* stage.c: after the drop, load CPython and hand over */
NO_RETURN void stage_run(struct launch *l, enum stage stage);
NO_RETURN void stage_serve(struct launch *l);
void stage_leave_start(int failed);
void stage_target(const struct launch *l, enum role role, struct target_identity *target);
bool stage_takes_names(const struct launch *l);
MUST_USE int stage_wait_for_rpc(struct launch *l, pid_t rpc);
MUST_USE int stage_wait_for_go(const struct launch *l);
MUST_USE bool stage_keeper_lives(const struct launch *l);
MUST_USE int stage_die_with_keeper(const struct launch *l);

/* filter.c: the payload's seccomp filter */
MUST_USE int filter_set(const void *code, size_t size, uint32_t flags);
const void *filter_get(size_t *size, uint32_t *flags);
void filter_load(void);

/* label.c: the payload's AppArmor profile or SELinux context */
void label_open(const struct launch *l);
MUST_USE int label_set(const struct launch *l, uint32_t kind, const char *text, size_t size);
MUST_USE int label_write(uint32_t kind, const char *text, size_t size);
const void *label_get(size_t *size, uint32_t *kind);
void label_check(const struct launch *l);

/* bearer.c: becomes the payload where that has capabilities that Python must not have */
bool bearer_needed(const struct launch *l);
void bearer_split(struct launch *l);
void bearer_dismiss(const struct launch *l);
MUST_USE int bearer_ask(const struct launch *l, const char *path, char *const argv[],
                        char *const envp[]);

void bearer_enter_early(int socket);
NO_RETURN void bearer_serve(const struct launch *l, int socket);
/* janitor.c: undoes what outlives a launch of root's */
MUST_USE pid_t janitor_start(struct launch *l, pid_t container, int socket, int signals);

/* shim.c */
NO_RETURN void shim_main(struct launch *l, pid_t rpc, pid_t stage2);

/* detach.c: an instance outlives its caller */
void detach(struct launch *l);
void detach_streams(struct launch *l);

/* join.c: a process in an instance's namespaces; enum err */
MUST_USE int join_start(struct launch *l, int process_fd, pid_t *pid, int *error);

/* share.c: an ERR_*; both are the caller's to close */
MUST_USE int share_open(const struct launch *l, int mounts_fd, int *user, int *mounts);

/* caller.c: the flow CALLER, where this process is master and starter-init its child */
bool caller_asked(int argc, char *const argv[]);
NO_RETURN void caller_main(struct launch *l, int argc, char *const argv[]);

/* caller_log.c: from here on failures of that flow are told in runc's form */
void caller_log_begin(int argc, char *const argv[]);

/* keeper.c */
NO_RETURN void keeper_main(struct launch *l);
NO_RETURN void keeper_become_plain(struct launch *l, const char *why);

#endif
