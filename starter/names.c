/* User and group names of the configuration.  The lookup may load any library that nsswitch.conf
 * names, so it happens in a forked child that has dropped for ever; a yes or no comes back, or the
 * path of a directory, which the asker opens as the caller. */
#include <errno.h>
#include <fcntl.h>
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

/* The child that asks; returns as fork(2) does. */
pid_t names_fork_asker(const struct launch *l) {
    struct target_identity target;
    pid_t pid = fork();
    if (pid != 0)
        return pid;
    trace_fd = -1;
    stage_target(l, ROLE_TRACER, &target);
    /* The mounting process asks too, which has no right to trim its bounding set; without a
     * way to gain anything the set is of no use. */
    target.keep_bounding = true;
    /* SAFE: name services run with nothing but the caller's rights; one small answer comes back. */
    if (privs_drop(&target) < 0)
        _exit(2);
    return 0;
}

/* Its exit status, or -1. */
int names_wait_for_asker(pid_t pid) {
    int status;
    while (waitpid(pid, &status, 0) < 0)
        if (errno != EINTR)
            return -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

/* 1 yes, 0 no, -1 it could not be found out (which callers treat as no). */
int names_match(const struct launch *l, enum config_id key, bool group, const gid_t *ids,
                size_t count) {
    pid_t pid = names_fork_asker(l);
    if (pid == 0)
        _exit(any_match(&l->config, key, group, ids, count) ? 1 : 0);
    int answer = pid < 0 ? -1 : names_wait_for_asker(pid);
    return answer == 0 || answer == 1 ? answer : -1;
}

/* The caller's home directory as the account has it, absolute; 0 or -1. */
int names_home(const struct launch *l, char *out, size_t size) {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) < 0)
        return -1;
    pid_t pid = names_fork_asker(l);
    if (pid == 0) {
        const struct passwd *p = getpwuid(l->uid);
        size_t length = p ? strlen(p->pw_dir) : 0;
        bool fits = length > 0 && length < size && p->pw_dir[0] == '/' &&
                    write(ends[1], p->pw_dir, length) == (ssize_t)length;
        _exit(fits ? 1 : 0);
    }
    close(ends[1]);
    bool found = pid > 0 && names_wait_for_asker(pid) == 1;
    ssize_t got = found ? read(ends[0], out, size - 1) : -1;
    close(ends[0]);
    if (got <= 0)
        return -1;
    out[got] = '\0';
    return 0;
}

/* Whose grants count: the account's own name, and the groups that the kernel knows of. */
struct grantee {
    const char *user;
    size_t count;
    gid_t held[1024];
};

static bool is_grantee(const char *name, bool group, const void *whose) {
    const struct grantee *who = whose;
    if (!group)
        return who->user && strcmp(who->user, name) == 0;
    const struct group *found = getgrnam(name);
    for (size_t i = 0; found && i < who->count; i++)
        if (who->held[i] == found->gr_gid)
            return true;
    return false;
}

static int read_grants(uid_t uid, int fd, uint64_t *granted) {
    static char text[CONFIG_FILE_BYTES + 1];
    static struct grantee who;
    ssize_t got = pread(fd, text, sizeof(text), 0);
    if (got < 0 || (size_t)got == sizeof(text))
        return -1;
    const struct passwd *account = getpwuid(uid);
    char name[256] = "";
    /* A copy: the next look-up writes to the same place. */
    if (account && append_text(name, sizeof(name), account->pw_name) == strlen(account->pw_name))
        who.user = name;
    int count = getgroups((int)ARRAY_SIZE(who.held), who.held);
    who.count = count > 0 ? (size_t)count : 0;
    return grants_read(text, (size_t)got, is_grantee, &who, granted);
}

/* What the administrator's own file grants this caller; nothing, where that cannot be found out. */
uint64_t names_granted_caps(const struct launch *l) {
    static struct config_error why;
    uint64_t granted = 0;
    int answer[2];
    memset(&why, 0, sizeof(why));
    /* SAFE: as the caller, who may read it; only root can have written it, which is checked. */
    int fd = config_open(APY_CAPABILITY_FILE, true, &why);
    if (fd < 0)
        return 0;
    if (pipe2(answer, O_CLOEXEC) < 0) {
        close(fd);
        return 0;
    }
    pid_t pid = names_fork_asker(l);
    if (pid == 0)
        _exit(read_grants(l->uid, fd, &granted) == 0 &&
                      write(answer[1], &granted, sizeof(granted)) == (ssize_t)sizeof(granted)
                  ? 0
                  : 1);
    close(answer[1]);
    close(fd);
    ssize_t got = pid < 0 ? -1 : read(answer[0], &granted, sizeof(granted));
    close(answer[0]);
    if (pid < 0 || names_wait_for_asker(pid) != 0 || got != (ssize_t)sizeof(granted))
        return 0;
    return granted;
}

/* A file of accounts or ranges that nobody but root could have written. */
static char *read_trusted(const char *path, size_t *size) {
    static struct config_error why;
    char *text = malloc(SUBIDS_FILE_BYTES);
    int fd = text ? config_open_trusted(path, SUBIDS_FILE_BYTES, &why) : -1;
    ssize_t got = 0;
    *size = 0;
    while (fd >= 0 && (got = read(fd, text + *size, SUBIDS_FILE_BYTES - *size)) > 0)
        *size += (size_t)got;
    if (fd >= 0 && got == 0 && *size < SUBIDS_FILE_BYTES)
        return text;
    free(text);
    return NULL;
}

/* One of the two ranges; -1: there is none that is the caller's alone. */
static int read_subids(const char *file, const char *accounts, const char *name, uint32_t id,
                       uint32_t own, struct subid_range *range) {
    size_t size, others;
    char *text = read_trusted(file, &size), *table = read_trusted(accounts, &others);
    int result = -1;
    if (text && table && subids_find(text, size, name, id, range) == SUBIDS_FOUND &&
        range->first > 0 && !subids_taken(text, size, name, id, range) &&
        !subids_accounts(table, others, range) &&
        (own < range->first || own - range->first >= range->count))
        result = 0;
    free(text);
    free(table);
    return result;
}

static int read_both(const struct launch *l, struct subid_range range[2]) {
    const struct passwd *account = getpwuid(l->uid);
    const char *name = account ? account->pw_name : "";
    return read_subids(SUBUID_FILE, "/etc/passwd", name, l->uid, l->uid, &range[0]) == 0 &&
                   read_subids(SUBGID_FILE, "/etc/group", name, l->uid, l->gid, &range[1]) == 0
               ? 0
               : -1;
}

/* The child that has dropped reads the files; what comes back is judged once more. */
int names_subids(const struct launch *l, struct subid_range range[2]) {
    int answer[2];
    if (pipe2(answer, O_CLOEXEC) < 0)
        return -1;
    pid_t pid = names_fork_asker(l);
    if (pid == 0) {
        bool told = read_both(l, range) == 0 &&
                    write(answer[1], range, 2 * sizeof(*range)) == (ssize_t)(2 * sizeof(*range));
        _exit(told ? 0 : 1);
    }
    close(answer[1]);
    ssize_t got = pid < 0 ? -1 : read(answer[0], range, 2 * sizeof(*range));
    close(answer[0]);
    if (pid < 0 || names_wait_for_asker(pid) != 0 || got != (ssize_t)(2 * sizeof(*range)))
        return -1;
    for (int i = 0; i < 2; i++) {
        uint32_t own = i == 0 ? l->uid : l->gid;
        if (range[i].first == 0 || range[i].count < SUBIDS_WANTED ||
            (uint64_t)range[i].first + range[i].count > UINT32_MAX ||
            (own >= range[i].first && own - range[i].first < range[i].count))
            return -1;
    }
    return 0;
}
