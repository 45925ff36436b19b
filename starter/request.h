/*
 * What the launcher hands to the starter: one sealed memfd, inherited by number
 * (argv[1]).  A setuid program gets a trimmed environment, so the caller's
 * arguments, environment and directory travel here.
 *
 *   struct request_header
 *   argc strings      the caller's arguments, the program's name first
 *   envc strings      the caller's environment, as it was
 *   cwd               getcwd(2), "" if it has no path
 *   engine            name of the engine: "apptainer" or "oci" from the launchers
 *   engine_file       Python file that registers it, "" if it is built in
 *
 * Every string ends in NUL.  The parts lie in this order without gaps: argv_off
 * is sizeof(header), the next offset is where the part before it ends, total is
 * the end of engine_file and the size of the file.  All bytes are the caller's:
 * the reader checks every field, and the seals before it trusts a second read.
 */
#ifndef APY_REQUEST_H
#define APY_REQUEST_H

#include <stdint.h>

#define REQUEST_MAGIC "APYREQ1"          /* 8 bytes with its NUL */
#define REQUEST_VERSION 3u
#define REQUEST_BUILD_ID_BYTES 64
#define REQUEST_ARGC_MAX (1u << 20)      /* 1 ≤ argc; more than execve(2) takes, as for envc */
#define REQUEST_ENVC_MAX (1u << 20)
#define REQUEST_CWD_MAX 4096u            /* with its NUL */
#define REQUEST_ENGINE_MAX 64u
/* Size: at most LIMIT_REQUEST_BYTES.  F_SEAL_EXEC (0x20) may be set beside these. */
#define REQUEST_SEALS (F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE)

enum request_flag {
    REQUEST_TRACE = 1,                   /* trace_fd is open for writing, opened as the caller */
    REQUEST_INSTANCE = 2                 /* keeper leaves its caller's session once all stands */
};

enum forecast_kind {
    FORECAST_CONTAINER = 1,              /* namespaces and flags are probably these */
    FORECAST_FUSE = 2,                   /* the image is a regular file */
    FORECAST_COMMAND = 4,                /* the word after the image is a program in it; of the
                                            oci engine: one more process, in a container */
    FORECAST_RANK = 8                    /* one of several that may share a container */
};

struct request_header {
    char magic[8];
    uint32_t version;
    uint32_t header_size;                /* sizeof(struct request_header) */
    char build_id[REQUEST_BUILD_ID_BYTES]; /* APY_BUILD_ID, padded with NULs */
    uint32_t flow;                       /* enum flow: what the launcher chose */
    uint32_t reason;                     /* enum reason: why not setuid */
    uint32_t flags;                      /* enum request_flag; other bits are refused */
    int32_t trace_fd;                    /* or -1 */
    uint32_t argc;
    uint32_t envc;
    uint32_t argv_off;
    uint32_t env_off;
    uint32_t cwd_off;
    uint32_t engine_off;
    uint32_t engine_file_off;
    uint32_t total;
    /* What the launcher expects stage 1 to plan, so that it is begun at once; stage 1 decides. */
    uint32_t forecast;                   /* enum forecast_kind; 0: nothing is begun */
    uint32_t forecast_spaces;            /* enum space */
    uint32_t forecast_flags;             /* enum plan_flag */
    uint32_t image_arg;                  /* which argument is the image; the command follows it */
    uint64_t stack_limit;                /* soft, in bytes: execve of a setuid program lowers it */
};

_Static_assert(sizeof(struct request_header) == 152, "no padding");

#endif
