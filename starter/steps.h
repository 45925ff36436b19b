/*
 * Only in builds for tests, whose programs have "-steps" in their names: where a process is to die,
 * and where it is to wait until others have been killed.  No installed program has any of it.
 *
 *   APY_TEST_DIE="STEP:ROLE:END"        END 0: before the step, 1: after it; ROLE -1: whoever comes
 *   APY_TEST_WAIT="STEP:ROLE:END:FD"    FD is a page that the test shares
 *   APY_TEST_LIMIT_MS="NUMBER"          how long a CNI plugin may take
 */
#ifndef APY_STEPS_H
#define APY_STEPS_H

#ifdef APY_TEST_STEPS
#include <stdbool.h>
#include <stdint.h>

void test_read_environment(char *const envp[]);
/* What a program that is executed must find in its environment, to do the same. */
char *const *test_environment(void);
/* How long a network's plugin may take. */
int test_limit_ms(int usual);
void test_here(uint32_t step, int role, bool end);
#endif

#endif
