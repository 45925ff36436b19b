/*
 * Hooks of a container as bytes, and the one who runs them: init (createContainer, startContainer),
 * master through the Cython module (prestart, createRuntime, poststart), the launcher (poststart,
 * poststop).  Made by apptainer_py/model/hook_frame.py.
 *
 *   struct hook_header
 *   state                      the JSON for stdin, state_before + state_after bytes; the pid goes
 *                              between them, unless state_after is 0
 *   count times
 *     struct hook_entry
 *     path, argc arguments, envc variables     each ends in NUL
 *
 * No gaps, no alignment: read with memcpy.
 */
#ifndef APY_HOOK_H
#define APY_HOOK_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define HOOK_MAGIC "APYHOK1"         /* 8 bytes with its NUL */
#define HOOK_COUNT_MAX 1024u
#define HOOK_STRINGS_MAX 65536u      /* argc, envc: each */
#define HOOK_OUTPUT_BYTES 4096       /* of stdout and of stderr, each; the rest is read and lost */
#define HOOK_TEXT_BYTES (2 * HOOK_OUTPUT_BYTES + 512)

struct hook_header {
    char magic[8];
    uint32_t total;                  /* bytes of the frame */
    uint32_t count;
    uint32_t state_before;
    uint32_t state_after;
};

struct hook_entry {
    uint32_t size;                   /* of this entry with its strings */
    uint32_t timeout_ms;             /* 0: none */
    uint32_t argc, envc;
    uint32_t own_environment;        /* 1: exactly envc variables; 0: the runner's */
};

/* How the first hook that failed did so, in runc's words. */
struct hook_result {
    uint32_t failed;                 /* its number, from 1; 0: none did */
    char text[HOOK_TEXT_BYTES];      /* "exit status 1, stdout: , stderr: " */
};

_Static_assert(sizeof(struct hook_header) == 24 && sizeof(struct hook_entry) == 20, "no padding");

/* 0, or -1 if the bytes are not such a frame. */
int hook_check(const char *frame, size_t size);
/* Runs them in order until one fails; 0 if all are fine, else -1 with *result. */
int hook_run(const char *frame, size_t size, pid_t pid, char *const environment[],
             struct hook_result *result);
/* The same without the first so many hooks: to go on after one that failed. */
int hook_run_after(const char *frame, size_t size, uint32_t skipped, pid_t pid,
                   char *const environment[], struct hook_result *result);

#endif
