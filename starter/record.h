/*
 * STATE/ID/record: what `state`, `start`, `kill` and `delete` must know of a container, so that
 * they need no interpreter.  Made by apptainer_py/model/record_frame.py.  The directory belongs to
 * whoever runs the commands; each field is checked all the same.
 *
 *   struct record_header
 *   parts in the order of enum record_part, without gaps: end[p] is where part p ends, counted
 *   from the start of the file.  A part of strings has count[p] of them, each ended by NUL; the
 *   two hook parts are frames of hook.h, or empty.
 */
#ifndef APY_RECORD_H
#define APY_RECORD_H

#include <stddef.h>
#include <stdint.h>

#define RECORD_MAGIC "APYREC1"       /* 8 bytes with its NUL */
#define RECORD_VERSION 1u
#define RECORD_BYTES_MAX 4194304u
#define RECORD_STRINGS_MAX 256u      /* in one part */

enum record_part {
    RECORD_ID,                       /* 1: the container's id */
    RECORD_STATE,                    /* 3: the JSON of `state`, around pid and status */
    RECORD_FREEZER,                  /* 0 or 1: freezer.state, cgroup.freeze */
    RECORD_CGROUPS,                  /* directories, a child before its parent */
    RECORD_POSTSTART,
    RECORD_POSTSTOP,
    RECORD_PARTS
};

enum record_phase { RECORD_CREATING = 1, RECORD_CREATED = 2 };

enum record_flag {
    RECORD_PIDNS = 1,                /* pid 1 of a namespace of its own: its end ends all */
    RECORD_CGROUP2 = 2,
    RECORD_PYTHON = 4,               /* start, delete are for the interpreter: systemd, resctrl */
    RECORD_SYSTEMD = 8,              /* a unit of systemd's: its name is the groups' last part */
    RECORD_ROOTLESS = 16,            /* made by an ordinary user, or in a user namespace */
    RECORD_MONITOR = 32,             /* who has made it stays with it, until it has ended */
    RECORD_TERMINAL = 64             /* that one holds the container's terminal */
};

struct record_header {
    char magic[8];
    uint32_t version;
    uint32_t total;                  /* bytes of the file */
    uint32_t phase;                  /* enum record_phase */
    uint32_t flags;                  /* enum record_flag */
    int32_t creator_pid;
    int32_t init_pid;                /* 0: there is none yet */
    uint64_t creator_start;          /* clock ticks since boot: field 22 of /proc/PID/stat */
    uint64_t init_start;
    uint64_t created_ns;             /* since 1970 */
    uint32_t count[RECORD_PARTS];
    uint32_t end[RECORD_PARTS];
};

_Static_assert(sizeof(struct record_header) == 56 + 8 * RECORD_PARTS, "no padding");

struct record {
    struct record_header head;
    const char *data;                /* the file */
};

/* 0, or -1: not a record that this build reads. */
int record_check(struct record *r, const char *data, size_t size);
/* The string of that number in a part; there must be so many. */
const char *record_string(const struct record *r, enum record_part part, uint32_t number);
const char *record_bytes(const struct record *r, enum record_part part, size_t *size);

#endif
