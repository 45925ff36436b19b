/* The frames between the processes of a launch; shared with Python by kernel/_starter.pyx. */
#ifndef APY_PROTOCOL_H
#define APY_PROTOCOL_H

#include <stddef.h>
#include <stdint.h>

/* Each X-macro row becomes one enumerator; the other kinds of rows vanish. */
enum flow {
#define FLOW(name, number) FLOW_##name = (number),
#include "rows.h"
};
enum reason {
#define REASON(name, number, text) REASON_##name = (number),
#include "rows.h"
};
enum stage {
#define STAGE(name, number) STAGE_##name = (number),
#include "rows.h"
};
enum role {
#define ROLE(name, number) ROLE_##name = (number),
#include "rows.h"
};
enum hook {
#define HOOK(name, number, stage) HOOK_##name = (number),
#include "rows.h"
};
enum op {
#define OP(name, number, ...) OP_##name = (number),
#include "rows.h"
};
enum layer_kind {
#define LAYERKIND(name, number) LAYER_##name = (number),
#include "rows.h"
};
enum kernel_fs {
#define KERNELFS(name, number) KERNELFS_##name = (number),
#include "rows.h"
};
enum area {
#define AREA(name, number) AREA_##name = (number),
#include "rows.h"
};
enum bind_flag {
#define BINDFLAG(name, bit) BIND_##name = (bit),
#include "rows.h"
};
enum space {
#define SPACE(name, bit) SPACE_##name = (bit),
#include "rows.h"
};
enum plan_flag {
#define PLANFLAG(name, bit) PLAN_##name = (bit),
#include "rows.h"
};
enum event {
#define EVENT(name, number) EVENT_##name = (number),
#include "rows.h"
};
enum err {
#define ERR(name, number, text) ERR_##name = (number),
#include "rows.h"
};
enum go_step {
#define GOSTEP(name, number, text) GOSTEP_##name = (number),
#include "rows.h"
};
enum limit {
#define LIMIT(name, number) LIMIT_##name = (number),
#include "rows.h"
};
enum step {
#define STEP(name, number) STEP_##name = (number),
#include "rows.h"
};
enum trace_kind {
#define TRACEKIND(name, number) TRACE_##name = (number),
#include "rows.h"
};

enum label_kind {
#define LABELKIND(name, number) LABEL_##name = (number),
#include "rows.h"
};
enum bearer_part {
#define BEARERPART(name, number) BEARER_##name = (number),
#include "rows.h"
};

/* What a stage asks.  Strings lie in `tail`, one after another, each with its NUL. */
struct op_request {
    uint32_t op;          /* enum op */
    uint32_t flags;       /* meaning depends on the operation; unknown bits are refused */
    uint64_t num[6];
    uint16_t length[2];   /* of each string, NUL included; 0 = absent */
    uint32_t reserved;    /* 0 */
    char tail[LIMIT_FRAME_BYTES - 64];
};

struct op_reply {
    uint32_t op;
    int32_t code;         /* enum err */
    int32_t error;        /* errno of the call that failed, or 0 */
    uint32_t value;
};

/* What CONTAINER asks for: fixed size, no strings. */
struct container_plan {
    uint32_t spaces;      /* enum space */
    uint32_t flags;       /* enum plan_flag */
    uint32_t fuse_count;
    uint32_t group_count; /* 0 = the caller's groups are kept */
    uint32_t uid, gid;    /* payload's; only root may ask for others than its own */
    uint32_t groups[LIMIT_GROUPS];
    uint64_t caps[5];     /* effective, permitted, inheritable, bounding, ambient */
};

struct container_request {
    uint32_t op;          /* OP_CONTAINER */
    uint32_t image_length;
    struct container_plan plan;
    char image[1024];     /* for the audit record: the path that was judged, maybe cut */
};

/* Stage 2 → bearer, or master → lean stage 2 or joiner, each with one descriptor; the other
 * answers. */
struct bearer_request {
    uint32_t part;        /* enum bearer_part */
    uint32_t number;      /* STREAM: which one; PROGRAM: the umask; FILTER: its flags; else 0 */
    uint32_t argc, envc;  /* PROGRAM: a sealed memfd holds path, arguments, environment; else 0 */
};

struct bearer_reply {
    int32_t error;        /* errno of execve(2) */
};

struct place_reply {
    int32_t error;        /* errno of chdir(2) */
    char path[LIMIT_PATH_BYTES]; /* where that is, without a NUL; empty: it has no name */
};

/* keeper → master */
struct event_frame {
    uint32_t event;       /* enum event */
    int32_t pid;
    int32_t status;       /* as waitpid(2) gives it */
    uint32_t reserved;
};

#define CAP_SETS 5
enum cap_set { CAP_SET_EFFECTIVE, CAP_SET_PERMITTED, CAP_SET_INHERITABLE, CAP_SET_BOUNDING,
               CAP_SET_AMBIENT };

/* Who a process is, as it can find out about itself. */
struct identity {
    uint32_t uid[4], gid[4];    /* real, effective, saved, file system */
    uint64_t caps[CAP_SETS];
    uint32_t securebits;
    uint16_t no_new_privs;
    uint16_t dumpable;
    uint64_t spaces[8];         /* inode numbers: user mnt pid ipc uts net cgroup time; 0 unknown */
};

struct trace_event {
    uint32_t kind;        /* enum trace_kind */
    uint32_t number;      /* hook, operation or step */
    uint32_t role;
    int32_t pid;
    uint64_t start_ns, end_ns;   /* CLOCK_MONOTONIC */
    int32_t code, error;
    struct identity who;
    char text[256];
};

/* What the C side hands to the stage host; the Cython module reads it there. */
struct stage_info {
    char build_id[64];    /* the starter's; stays the first field for ever */
    uint32_t stage;       /* enum stage */
    uint32_t flow;        /* enum flow */
    uint32_t reason;      /* enum reason */
    uint32_t uid, gid;
    uint32_t umask;       /* the caller's */
    int32_t caller_pid;   /* who has started this launch; 0 where no number stands for it here */
    int32_t request_fd;   /* sealed memfd */
    int32_t config_fd;    /* the administrator's file, or -1 */
    int32_t keeper_fd;    /* master: operations and events */
    int32_t rpc_fd;       /* master: operations */
    int32_t start_fd;     /* master ↔ stage 2 */
    int32_t methods_fd;   /* master ↔ methods server, or -1 */
    int32_t trigger_fd;   /* host helper ↔ master, or -1 */
    int32_t helper_fds[2];/* master: post_start_host, cleanup_host, or -1 */
    int32_t init_fd;      /* master ↔ starter-init (flow CALLER), or -1 */
    int32_t init_pid;     /* starter-init's first process, or 0 */
    int32_t server_fd;    /* master ↔ image server that waits (flow CALLER), or -1 */
    int32_t server_pid;   /* ... or 0 */
    int32_t ready_fd;     /* whoever has called waits at its other end, or -1 */
    int32_t trace_fd;     /* tracer's socket, or -1 */
    const char *watcher;  /* flow CALLER: the program that stays in the foreground, or NULL */
    uint32_t forecast;    /* enum forecast_kind of the request */
    uint64_t permitted;   /* capabilities that root may hand out */
    /* Verifies the identity for a hook against the table; ends the process on a difference. */
    void (*enter_hook)(uint32_t hook);
    void (*leave_hook)(uint32_t hook, int failed);
    /* A numbered step begins, or has ended. */
    void (*at_step)(uint32_t step, int end);
    /* stage 2: says "sealed"; 0 or -1 */
    int (*tell_sealed)(void);
    /* ... then waits until keeper has dropped; 0 or -1 */
    int (*wait_for_go)(void);
    /* stage 2: restores what belongs to the user, then execve; returns errno */
    int (*exec_payload)(const char *path, char *const argv[], char *const envp[]);
    /* stage 2, before it: the seccomp filter that is loaded with the payload; 0 or -1 */
    int (*set_filter)(const void *code, size_t size, uint32_t flags);
    /* ... and its label, of enum label_kind; 0 or errno */
    int (*set_label)(uint32_t kind, const char *text, size_t size);
};

#endif
