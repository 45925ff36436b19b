/* A payload in the foreground: signals, and the terminal, between it and the caller. */
#ifndef APY_RELAY_H
#define APY_RELAY_H

#include <sys/types.h>

/* From here on no signal is lost: they wait for relay_run().  0 or -1. */
int relay_begin(void);

/* Until `pid`, a child, has ended: passes signals on to it and, if pty_fd is not -1, copies between
 * the standard streams and that master end, with the caller's terminal raw meanwhile.  Other
 * children are reaped.  0 with *status as waitpid(2) gives it, or -1. */
int relay_run(pid_t pid, int pty_fd, int *status);

#endif
