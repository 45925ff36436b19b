/* User and group names of the configuration.  The lookup may load any library that nsswitch.conf
 * names, so it happens in a forked child that has dropped for ever; only a yes or no comes back. */
#include <errno.h>
#include <grp.h>
#include <pwd.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "starter.h"

static bool resolve(const char *name, bool group, gid_t *id) {
    char *end;
    errno = 0;
    unsigned long number = strtoul(name, &end, 10);
    /* A number has one spelling: what 010 means, two readers could judge differently. */
    bool plain = name[0] >= '0' && name[0] <= '9' && (name[0] != '0' || name[1] == '\0');
    if (plain && *end == '\0' && errno == 0 && number < 0xffffffffUL) {
        *id = (gid_t)number;
        return true;
    }
    const struct group *g = group ? getgrnam(name) : NULL;
    const struct passwd *p = group ? NULL : getpwnam(name);
    if (g)
        *id = g->gr_gid;
    if (p)
        *id = p->pw_uid;
    return g || p;
}

static bool any_match(const struct config *c, enum config_id key, bool group, const gid_t *ids,
                      size_t count) {
    for (size_t i = 0; i < config_list_count(c, key); i++) {
        gid_t wanted;
        if (!resolve(config_list_item(c, key, i), group, &wanted))
            continue;
        for (size_t k = 0; k < count; k++)
            if (ids[k] == wanted)
                return true;
    }
    return false;
}

/* 1 yes, 0 no, -1 it could not be found out (which callers treat as no). */
int names_match(const struct launch *l, enum config_id key, bool group, const gid_t *ids,
                size_t count) {
    pid_t pid = fork();
    if (pid < 0)
        return -1;
    if (pid == 0) {
        struct target_identity target;
        trace_fd = -1;
        stage_target(l, ROLE_TRACER, &target);
        /* The mounting process asks too, which has no right to trim its bounding set; without a
         * way to gain anything the set is of no use. */
        target.keep_bounding = true;
        /* SAFE: name services run with nothing but the caller's rights, and answer one bit. */
        if (privs_drop(&target) < 0)
            _exit(2);
        _exit(any_match(&l->config, key, group, ids, count) ? 1 : 0);
    }
    int status;
    while (waitpid(pid, &status, 0) < 0)
        if (errno != EINTR)
            return -1;
    if (!WIFEXITED(status) || WEXITSTATUS(status) > 1)
        return -1;
    return WEXITSTATUS(status);
}
