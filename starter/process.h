/*
 * What ends in execve, as one sealed memfd: argv, environment and seccomp program may be megabytes,
 * and half of it is only used when nothing can be asked any more.
 *
 *   struct process_header
 *   one part after another, in the order of enum process_part; each starts at a multiple of 8, and
 *   the bytes between two parts are 0.  end[] is where a part ends, count[] how many things it has.
 *
 * Strings end in NUL.  model/process_frame.py writes it; process_check() trusts no byte of it.
 */
#ifndef APY_PROCESS_H
#define APY_PROCESS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PROCESS_MAGIC "APYPRC1"          /* 8 bytes with its NUL */
#define PROCESS_BUILD_ID_BYTES 64
#define PROCESS_BYTES_MAX (16u << 20)
#define PROCESS_STRINGS_MAX 65536u       /* arguments; variables have the same bound */
#define PROCESS_GROUPS_MAX 65536u        /* NGROUPS_MAX */
#define PROCESS_FILTER_MAX 4096u         /* BPF_MAXINSNS */
#define PROCESS_FDS_MAX 65536u
#define PROCESS_NODES 1024u              /* of the memory policy */

enum process_flag {
    PROCESS_NO_NEW_PRIVS = 1,
    PROCESS_SET_GROUPS = 2,
    PROCESS_SET_CAPS = 4,
    PROCESS_SET_UMASK = 8,
    PROCESS_SET_SCHEDULER = 16,
    PROCESS_SET_IO_PRIORITY = 32,
    PROCESS_SET_PERSONALITY = 64,
    PROCESS_SET_MEMORY_POLICY = 128,
    PROCESS_TENANT = 256,
    PROCESS_USERNS = 512,                /* it is in a user namespace that is not master's */
    PROCESS_LISTENER = 1024,             /* master takes the filter's listener and says so */
    PROCESS_EMPTY = 2048,                /* no program: init stays, and reaps */
    PROCESS_TIED = 4096,                 /* it ends with master, as what runs in an image does */
    PROCESS_FLAGS_ALL = 8191
};

enum process_part {
    PROCESS_GROUPS,                      /* uint32_t[] */
    PROCESS_FILTER,                      /* struct sock_filter[] */
    PROCESS_ARGS,                        /* strings */
    PROCESS_ENV,                         /* strings */
    PROCESS_CWD,                         /* one string, or none */
    PROCESS_LABEL,                       /* one string for attr/exec, or none */
    PROCESS_HOOKS,                       /* count 0 or 1: bytes of hook.h, for startContainer */
    PROCESS_PART_COUNT
};

struct process_header {
    char magic[8];
    uint32_t total;                      /* bytes of the file */
    uint32_t flags;                      /* enum process_flag */
    char build_id[PROCESS_BUILD_ID_BYTES];
    uint32_t uid, gid;
    uint32_t umask;
    uint32_t keep_fds;                   /* the payload has 0 .. 2 and so many more */
    uint64_t caps[5];                    /* in the order of enum cap_set */
    uint32_t filter_flags;               /* of seccomp(2) */
    uint32_t personality;
    uint32_t io_priority;                /* as ioprio_set(2) takes it */
    uint32_t policy_mode;                /* of set_mempolicy(2), with its flags */
    uint64_t policy_nodes[PROCESS_NODES / 64];
    uint32_t sched_policy;
    int32_t sched_nice;
    uint32_t sched_priority;
    uint32_t reserved;
    uint64_t sched_flags, sched_runtime, sched_deadline, sched_period;
    uint32_t count[PROCESS_PART_COUNT];
    uint32_t end[PROCESS_PART_COUNT];
};

_Static_assert(sizeof(struct process_header) == 384, "no padding, whole multiples of 8");

/* A frame that was checked; `base` is the mapping of the sealed file. */
struct process {
    const char *base;
    struct process_header header;
};

/* 0, or -1 for bytes that no build of ours has written. */
int process_check(const void *bytes, size_t size, struct process *out);
/* Checks the seals, maps and checks the file; 0 or -1 with errno. */
int process_map(int fd, struct process *out);
const char *process_bytes(const struct process *p, enum process_part part, size_t *size);
/* The string of a part that has at most one; NULL if it has none. */
const char *process_string(const struct process *p, enum process_part part);
/* Writes count+1 pointers, the last NULL.  The strings lie in the mapping, never to be written. */
void process_strings(const struct process *p, enum process_part part, char **out);

#endif
