/* trace.c's steps for starter-init, which has no trace: master writes down each row.  In the build
 * for tests a process can be told to die at one; CONTAINER is the forerunner's role there. */
#include "init.h"
#include "steps.h"

#ifdef APY_TEST_STEPS
static enum role own_role = ROLE_CONTAINER;

void trace_set_role(enum role role) {
    own_role = role;
}

static void here(uint32_t step, bool end) {
    test_here(step, (int)own_role, end);
}
#else
void trace_set_role(enum role role) {
    (void)role;
}

static void here(uint32_t step, bool end) {
    (void)step;
    (void)end;
}
#endif

void step_begin(enum step step) {
    here((uint32_t)step, false);
}

void step_end(enum step step) {
    here((uint32_t)step, true);
}

void step_operation(uint32_t op, bool end) {
    here(100 + op, end);
}
