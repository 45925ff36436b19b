/* trace.c's steps for starter-init, which has no trace: master writes down each row.  In the build
 * for tests a process can be told to die at one. */
#include "init.h"

#ifdef APY_TEST_STEPS
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

/* APY_TEST_DIE="STEP:ROLE:END", as trace.c reads it; CONTAINER is the forerunner's role here. */
static long die_step = -1, die_role = -1, die_at_end;
static enum role own_role = ROLE_CONTAINER;

void test_read_environment(void) {
    char *at = getenv("APY_TEST_DIE");
    if (at == NULL)
        return;
    die_step = strtol(at, &at, 10);
    if (*at == ':')
        die_role = strtol(at + 1, &at, 10);
    if (*at == ':')
        die_at_end = strtol(at + 1, &at, 10);
}

void trace_set_role(enum role role) {
    own_role = role;
}

static void die_here(uint32_t step, bool end) {
    if ((long)step != die_step || end != (die_at_end != 0) ||
        (die_role >= 0 && die_role != (long)own_role))
        return;
    report("STEPS:   ", "a process dies here"); /* a test must know that it was reached */
    (void)kill(getpid(), SIGKILL);
}
#else
void trace_set_role(enum role role) {
    (void)role;
}

static void die_here(uint32_t step, bool end) {
    (void)step;
    (void)end;
}
#endif

void step_begin(enum step step) {
    die_here((uint32_t)step, false);
}

void step_end(enum step step) {
    die_here((uint32_t)step, true);
}

void step_operation(uint32_t op, bool end) {
    die_here(100 + op, end);
}
