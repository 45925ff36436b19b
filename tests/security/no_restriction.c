/* Preloaded into strace alone: its filter of system calls, which makes it cheap enough for a whole
 * suite, comes with no_new_privs, and under that no starter would have its bit.  Root needs none. */
#include <stdarg.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

int prctl(int option, ...) {
    unsigned long words[4];
    va_list rest;
    va_start(rest, option);
    for (int i = 0; i < 4; i++)
        words[i] = va_arg(rest, unsigned long);
    va_end(rest);
    if (option == PR_SET_NO_NEW_PRIVS)
        return 0;
    return (int)syscall(SYS_prctl, option, words[0], words[1], words[2], words[3]);
}
