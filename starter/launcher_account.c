/* Accounts.  apptainer-py is linked with a C library that starts quickly and knows /etc/passwd
 * alone; for others the same program, linked with the system's library, takes over. */
#include <pwd.h>
#include <unistd.h>

#include "build.h"
#include "launcher.h"

void account_needed(char *const argv[], char *const envp[]) {
#ifdef APY_NAME_SERVICES
    (void)argv;
    (void)envp;
#else
    if (getpwuid(getuid()) == NULL) /* without the other it has no name */
        (void)execve(APY_LIBEXECDIR "/launcher", argv, envp);
#endif
}
