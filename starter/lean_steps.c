/* The numbered steps of the launcher: nothing, but in the build for tests, where it can be told to
 * die at one. */
#include "lean.h"
#include "steps.h"

#ifdef APY_TEST_STEPS
static void here(enum step step, bool end) {
    test_here((uint32_t)step, (int)ROLE_LAUNCHER, end);
}
#else
static void here(enum step step, bool end) {
    (void)step;
    (void)end;
}
#endif

void lean_step_begin(enum step step) {
    here(step, false);
}

void lean_step_end(enum step step) {
    here(step, true);
}
