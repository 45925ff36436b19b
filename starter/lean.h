/* What the files of apptainer-py-oci share.  It has the caller's rights, and no interpreter. */
#ifndef APY_LEAN_H
#define APY_LEAN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

enum lean_command {
    LEAN_OTHER,          /* the interpreter answers */
    LEAN_LAUNCH,         /* create, run, exec: a request to the starter */
    LEAN_STATE,
    LEAN_START,
    LEAN_KILL,
    LEAN_DELETE,
    LEAN_VERSION
};

/* The command line and the little of the environment that counts. */
struct lean {
    const char *argv0;
    char *const *envp;
    const char *root;        /* --root, or NULL: the default */
    const char *log;         /* --log, or NULL */
    bool json;               /* --log-format json */
    bool debug;
    bool apptainer;          /* called as `apptainer-py oci` */
    bool force;              /* delete --force */
    bool all;                /* kill --all */
    enum lean_command command;
    const char *id;
    const char *signal;      /* kill's second word, or NULL */
};

/* lean_scan.c */
void lean_scan(struct lean *l, int argc, char *const argv[]);
const char *lean_variable(char *const envp[], const char *name);

#endif
