/*
 * starter-init: all that ever enters a container of the oci engine.  A copy of it (the forerunner)
 * joins and prepares on the host's side and clones init, which serves the rows of server INIT in
 * protocol.def to master, then becomes the payload.
 *
 *   starter-init SOCKET [network]
 *                            the number of its end of a SOCK_SEQPACKET pair, from its parent;
 *                            whether to make a network before somebody asks for it
 *
 * It holds what its caller holds, no more; a row it refuses ends the launch.
 */
#ifndef APY_INIT_H
#define APY_INIT_H

#include "process.h"
#include "starter.h"

/* In the order of a launch; rows name the phases that they belong to, and where they lead. */
enum init_phase {
    SPACES = 1,
    BORN = 2,
    SETUP = 4,
    ASSEMBLE = 8,
    INSIDE = 16,
    READY = 32,
    DONE = 64
};

#define INIT_JOINS 16

struct init {
    int socket;                        /* to master */
    bool root;                         /* what it was started as: maps make it 0 at any moment */
    mode_t umask;                      /* the caller's, for a payload that asks for none */
    int phase;                         /* one bit of enum init_phase */
    bool failed;                       /* later rows are answered, not done */
    bool forerunner_ends;              /* SPACES is done: init serves from here */
    int born_pipe[2];                  /* forerunner → init: master knows of it */
    bool silent;                       /* this row is answered by another process */
    /* of the row at hand */
    int passed;                        /* came with it; a row that keeps it puts -1 */
    int fd_out;                        /* goes with the reply and is closed, or -1 */
    /* init_spaces.c */
    int joins[INIT_JOINS];             /* namespaces that wait for the user namespace */
    int join_kinds[INIT_JOINS];
    size_t join_count;
    bool offsets_given;
    int64_t offsets[4];                /* monotonic s, ns, boottime s, ns */
    int late_spaces;                   /* CLONE_NEW* kinds that init makes when it has its ids */
    int own_net_fd;                    /* the network to go back to, or -1: it was not left */
    int host_proc_fd;                  /* the host's procfs, pinned before any join, or -1 */
    bool tenant;                       /* one more process in a container (exec) */
    /* of the container */
    int proc_fd;                       /* procfs that no mount of the container covers, or -1 */
    int root_fd;                       /* O_PATH of the container's root, or -1 */
    /* init_mounts.c: at most one of the two is open */
    int context_fd;                    /* file system that is being configured, or -1 */
    int mount_fd;                      /* detached mount in hand, or -1 */
    /* init_process.c */
    struct process process;
};

/* A row: returns enum err; ERR_MALFORMED ends the launch. */
typedef int init_row(struct init *s, const struct op_request *q, struct op_reply *a);

/* init.c */
/* Puts errno into the reply. */
MUST_USE int init_failed(struct op_reply *a);
/* The same, with a number that tells which of several calls it was. */
MUST_USE int init_failed_at(struct op_reply *a, uint32_t value);
/* Dies with its parent, shows nothing to a tracer; again after each change of credentials. */
void init_shield(const struct init *s);
MUST_USE int init_send_reply(const struct init *s, const struct op_reply *a, int fd);
void init_close(int *fd);

/* init_spaces.c, init_mapped.c */
void init_network_ahead(struct init *s);
init_row init_join, init_cgroup, init_prep, init_spaces, init_mapped, init_keyring, init_tenant;

/* init_console.c */
init_row init_console, init_stream;

/* init_process.c */
init_row init_apparmor, init_process;

/* init_go.c: in this order, each with its errno; *step says which of its calls failed */
init_row init_go;
/* init_identity.c */
MUST_USE int identity_enter_cwd(const struct process *p, bool again, enum go_step *step);
MUST_USE int identity_take(const struct init *s, enum go_step *step);
/* init_lookup.c: the program's path in out; 0 or -1 */
MUST_USE int lookup_program(char *const argv[], char *const envp[], char *out, size_t size,
                            enum go_step *step);

/* init_hooks.c */
init_row init_run_hooks;
/* The startContainer hooks; a failure is reported on stderr. */
MUST_USE int hooks_before_start(const struct process *p, char *const envp[]);

/* init_mounts.c */
init_row init_propagation, init_root_bundle, init_fs, init_fsopt, init_tree, init_attr, init_copyup,
    init_place, init_remount, init_enter, init_root_readonly;

/* init_image.c */
init_row init_image, init_overlay;

/* init_dev.c */
init_row init_mknod, init_link;

/* init_paths.c */
init_row init_readonly_path, init_mask_path;

/* init_proc.c */
init_row init_name, init_sysctl;
/* The procfs to reach /proc through; opened before the root is changed.  -1 with errno. */
MUST_USE int init_proc(struct init *s);

/* init_net.c */
init_row init_netdev;
MUST_USE int init_link_up(const char *name);

#endif
