/* What the files of apptainer-py-oci share.  It has the caller's rights, and no interpreter. */
#ifndef APY_LEAN_H
#define APY_LEAN_H

#include <limits.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "protocol.h"
#include "record.h"

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))
#define CLIENT_FIFO "exec.fifo"

enum lean_command {
    LEAN_OTHER,          /* the interpreter answers */
    LEAN_LAUNCH,         /* create, run, exec: a request to the starter */
    LEAN_STATE,
    LEAN_START,
    LEAN_KILL,
    LEAN_DELETE,
    LEAN_VERSION,
    LEAN_MONITORED,      /* create, run of Apptainer's: somebody stays with the container */
    LEAN_ATTACH
};

/* The command line and the little of the environment that counts. */
struct lean {
    const char *argv0;
    char *const *envp;
    const char *root;        /* --root, or NULL: the default */
    const char *log;         /* --log, or NULL */
    int log_fd;              /* of it, or -1 */
    bool json;               /* --log-format json */
    bool debug;
    bool apptainer;          /* called as `apptainer-py oci` */
    bool force;              /* delete --force */
    bool all;                /* kill --all */
    bool makes;              /* create or run: of a bundle */
    enum lean_command command;
    const char *id;
    const char *signal;      /* kill's second word, or NULL */
};

/* How a command ended: an exit status, or what only the interpreter can do. */
enum { LEAN_DONE = 0, LEAN_FAILED = 1, LEAN_TO_PYTHON = -1 };

enum status { STATUS_CREATING, STATUS_CREATED, STATUS_RUNNING, STATUS_PAUSED, STATUS_STOPPED };

/* A container as its state directory describes it. */
struct container {
    const struct lean *lean;
    char root[PATH_MAX];
    int root_fd, dir_fd;     /* or -1 */
    char *data;              /* the record's file */
    struct record record;
    int init_pidfd;          /* of the very process that the record names, or -1: it has ended */
};

/* lean.c: becomes the interpreter, with these words */
__attribute__((noreturn)) void lean_interpreter(struct lean *l, int argc, char *const argv[]);

/* lean_scan.c */
void lean_scan(struct lean *l, int argc, char *const argv[]);
const char *lean_variable(char *const envp[], const char *name);

/* lean_forecast.c: whether the container will probably have a network of its own */
bool lean_forecast_network(const struct lean *l, int argc, char *const argv[]);

/* lean_log.c: messages in runc's three forms */
int lean_log_open(struct lean *l);
#define LIKE_PRINTF __attribute__((format(printf, 2, 3)))
LIKE_PRINTF void lean_error(const struct lean *l, const char *format, ...);
LIKE_PRINTF void lean_warning(const struct lean *l, const char *format, ...);
const char *lean_errno_text(int error);

/* lean_container.c; tell: LEAN_DONE, LEAN_FAILED after a message, or LEAN_TO_PYTHON */
enum found { FOUND, FOUND_NOTHING, FOUND_NO_RECORD, FOUND_LOCKED, FOUND_NO_ID, FOUND_BAD_ID,
             FOUND_FOREIGN, FOUND_OTHER_VERSION };
enum found container_find(const struct lean *l, struct container *c);
enum found container_lock(struct container *c, bool wait);
int container_tell(const struct lean *l, enum found found);
void container_unlock(const struct container *c);
enum status container_status(const struct container *c);
const char *container_status_text(enum status status);
bool container_creator(const struct container *c, int *pidfd);
bool container_remove_files(const struct container *c);

/* lean_cgroup.c */
bool cgroup_frozen(const struct record *r);
void cgroup_thaw(const struct record *r);
bool cgroup_kill_all(const struct record *r);
int cgroup_remove_all(const struct lean *l, const struct record *r);

/* lean_steps.c */
void lean_step_begin(enum step step);
void lean_step_end(enum step step);

/* lean_start.c, lean_kill.c, lean_delete.c: the commands */
int lean_state(struct lean *l);
int lean_start(struct lean *l);
int lean_kill(struct lean *l);
int lean_delete(struct lean *l);
/* A container whose first process was that child of ours, unless another has deleted it. */
void lean_delete_own(struct lean *l, pid_t init);
int lean_attach(struct lean *l);
int lean_signal(const struct container *c, int number);
bool lean_wait_end(int pidfd, int timeout_ms);

/* lean_attach.c */
/* A socket in the container's directory; -1: nobody is there. */
int container_connect(const struct container *c, const char *name);
struct attached {
    int fd;                  /* connected to attach.sock */
    bool terminal, silent;   /* silent: what comes is only waited for */
};
/* What keeps from attaching, or NULL. */
const char *attach_open(const struct container *c, struct attached *a);
/* Until the other side ends it; the container's status, or -1 after a message. */
int attach_stay(const struct container *c, const struct attached *a);

/* lean_run.c: the starter in a process of its own, which becomes the monitor.  It says:
 *   'c' nothing more is to be done, 'd' it is to be started, 'r' started, waited for and deleted;
 *   then the root directory, NUL, the id, NUL */
/* does not return */
typedef void lean_launch(struct lean *l, int argc, char *const argv[], int ready);
int lean_run(struct lean *l, int argc, char *const argv[], lean_launch *launch);

/* lean_watch.c: master's successor, which is called by this name */
#define LEAN_WATCH_NAME "apptainer-py-oci: watch"
bool lean_watch_asked(int argc, char *const argv[]);
int lean_watch(struct lean *l, int argc, char *const argv[]);

#endif
