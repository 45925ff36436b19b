/* What the files of the launcher share.  It holds no privilege: it looks, and execs. */
#ifndef APY_LAUNCHER_H
#define APY_LAUNCHER_H

#include <stdbool.h>
#include <stddef.h>

#include "protocol.h"
#include "request.h"

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

/* What the command line says, as far as the launcher needs it. */
struct scan {
    const char *image;   /* NULL: not a launch, or not of a local image */
    const char *layout;  /* an image that only the oci engine can start, or NULL */
    const char *instance; /* the name that it will have, if it will be one; or NULL */
    const char *trace;   /* file name or NULL */
    unsigned given;      /* enum option_flag: was on the command line */
    unsigned on;         /* ... and its last value was true, or not empty */
    unsigned image_arg;  /* which argument the image is */
    bool is_oci;         /* `oci` ...: another program's */
    bool is_exec;        /* the word after it is a program of the image */
    bool joins;          /* the image is `instance://NAME` */
};

/* What stage 1 will probably plan (request.h). */
struct forecast {
    unsigned what, spaces, flags;
};

/* What goes into the request beside arguments and environment. */
struct choice {
    enum flow flow;
    enum reason reason;
    const char *engine;
    int trace_fd;        /* or -1 */
    bool instance;
    unsigned image_arg;
    struct forecast forecast;
};

/* What --fakeroot shall act as if it were not there. */
struct fakeroot_options {
    bool no_subids, no_userns;
};

/* launcher_scan.c */
void scan_arguments(struct scan *s, int argc, char *const argv[]);
struct forecast scan_forecast(const struct scan *s);
bool scan_asks_userns(const struct scan *s, char *const envp[]);
bool scan_asks_fakeroot(const struct scan *s, char *const envp[], struct fakeroot_options *o);
bool scan_asks_oci(const struct scan *s, char *const envp[]);
bool scan_asks_sharing(const struct scan *s, char *const envp[]);
bool scan_asks_unsquash(const struct scan *s, char *const envp[]);
bool scan_is_rank(char *const envp[]);

/* launcher_account.c: returns in a program that knows the account, if any does */
void account_needed(char *const argv[], char *const envp[]);

/* launcher_fakeroot.c */
bool fakeroot_by_userns(const struct fakeroot_options *o);

/* launcher_flow.c */
void flow_choose(struct choice *c, bool userns_asked);

/* launcher_request.c: a descriptor, or -1 with *why */
int request_make(const struct choice *c, int argc, char *const argv[], char *const envp[],
                 const char **why);

#endif
