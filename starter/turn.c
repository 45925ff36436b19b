/* Whose turn it is on the processors.  A launch is two interpreters that load for milliseconds, and
 * short steps of others that set the image server to work.  The kernel puts a new process behind
 * one that loads and moves it only with the next tick, so whoever is about to load lets those go
 * first whose work others wait for. */
#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "starter.h"

enum { TURN_PATIENCE_MS = 20 }; /* it is a courtesy: whoever should give it may have died */

static int turn_fd = -1;

static void turn_close(void) {
    if (turn_fd >= 0)
        close(turn_fd);
    turn_fd = -1;
}

/* One of our own, for a child that is forked next, in place of one that was a parent's. */
void turn_make(bool wanted) {
    turn_close();
    if (wanted)
        turn_fd = eventfd(0, EFD_CLOEXEC);
}

void turn_give(void) {
    const uint64_t one = 1;
    if (turn_fd >= 0) {
        ssize_t ignored = write(turn_fd, &one, sizeof(one)); /* then its patience will end */
        (void)ignored;
    }
    turn_close();
}

void turn_wait(void) {
    struct pollfd turn = {.fd = turn_fd, .events = POLLIN};
    if (turn_fd >= 0)
        (void)poll(&turn, 1, TURN_PATIENCE_MS);
    turn_close();
}
