/* In the janitor: rules of a container's network that its plugins have left.  They look in the
 * container's network for what to undo, where its own root can have taken it away.  All that bears
 * the container's number, which nobody has chosen, is the container's. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "networks.h"

enum { CHAINS_MAX = 64, CHAIN_BYTES = 32, TOOL_LOST = 127 };

struct table_rules {
    const char *text, *end, *container;
    char chains[CHAINS_MAX][CHAIN_BYTES]; /* of the container's own */
    size_t chain_count;
    int out;
    bool any, good;
};

static void put(struct table_rules *t, const char *bytes, size_t length) {
    t->good = t->good && write(t->out, bytes, length) == (ssize_t)length;
}

static void put_text(struct table_rules *t, const char *text) {
    put(t, text, strlen(text));
}

static const char *end_of_line(const char *at, const char *end) {
    const char *found = memchr(at, '\n', (size_t)(end - at));
    return found ? found : end;
}

static const char *find(const char *at, const char *end, const char *text) {
    return memmem(at, (size_t)(end - at), text, strlen(text));
}

static bool begins(const char *at, const char *end, const char *text) {
    size_t length = strlen(text);
    return (size_t)(end - at) >= length && memcmp(at, text, length) == 0;
}

/* Of this number, and of no longer one. */
static bool is_of_container(const struct table_rules *t, const char *at, const char *end) {
    const char *found = find(at, end, t->container);
    if (!found || !begins(at, end, "-A "))
        return false;
    found += strlen(t->container);
    return found == end || *found < '0' || *found > '9';
}

/* The chain that a rule sends to: one of the container's own, or one that all share. */
static void note_chain(struct table_rules *t, const char *at, const char *end) {
    const char *name = find(at, end, " -j CNI-");
    if (!name || t->chain_count == CHAINS_MAX)
        return;
    name += 4;
    const char *stop = memchr(name, ' ', (size_t)(end - name));
    size_t length = (size_t)((stop ? stop : end) - name);
    if (length >= CHAIN_BYTES || begins(name, end, "CNI-HOSTPORT-"))
        return;
    char *chain = t->chains[t->chain_count];
    memcpy(chain, name, length);
    chain[length] = '\0';
    for (size_t i = 0; i < t->chain_count; i++)
        if (strcmp(t->chains[i], chain) == 0)
            return;
    t->chain_count++;
}

/* One table, from its name on: rules first, then the chains that nothing leads to any more. */
static void clear_table(struct table_rules *t, const char *at, const char *end) {
    const char *name = at, *name_end = end_of_line(at, end);
    bool any = false;
    t->chain_count = 0;
    for (const char *next; at < end; at = next) {
        const char *stop = end_of_line(at, end);
        next = stop < end ? stop + 1 : end;
        if (!is_of_container(t, at, stop))
            continue;
        if (!any) {
            put(t, name, (size_t)(name_end - name));
            put_text(t, "\n");
        }
        any = true;
        note_chain(t, at, stop);
        put_text(t, "-D ");
        put(t, at + 3, (size_t)(stop - at - 3));
        put_text(t, "\n");
    }
    for (size_t i = 0; i < t->chain_count; i++)
        for (int delete = 0; delete < 2; delete++) {
            put_text(t, delete ? "-X " : "-F ");
            put_text(t, t->chains[i]);
            put_text(t, "\n");
        }
    if (any)
        put_text(t, "COMMIT\n");
    t->any = t->any || any;
}

bool rules_find(const char *text, size_t size, const char *container, int out) {
    static struct table_rules t;
    t = (struct table_rules){.container = container, .out = out, .good = true};
    const char *end = text + size;
    for (const char *at = text, *next; at < end; at = next) {
        next = find(at + 1, end, "\n*");
        next = next ? next + 1 : end;
        if (*at == '*')
            clear_table(&t, at, next);
    }
    return t.any && t.good;
}

/* ---- the administrator's tools ---- */

/* Where there is none, no plugin has used it. */
NO_RETURN static void become_tool(char *const argv[]) {
    static const char *const folders[] = {"/usr/sbin/", "/sbin/"};
    char search[] = "PATH=/usr/sbin:/usr/bin:/sbin:/bin";
    char *const envp[] = {search, NULL};
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    for (size_t i = 0; i < ARRAY_SIZE(folders); i++) {
        char path[64] = "";
        append_text(path, sizeof(path), folders[i]);
        append_text(path, sizeof(path), argv[0]);
        /* SAFE: a fixed name in a directory of the system's own, as plugins run it. */
        (void)execve(path, argv, envp);
    }
    _exit(errno == ENOENT ? 0 : TOOL_LOST);
}

static int run(char *const argv[], int in, int out) {
    pid_t self = getpid(), pid = fork();
    if (pid == 0) {
        if (networks_be_child(self) < 0 || dup2(0, 2) < 0 || dup2(in, 0) < 0 ||
            dup2(out, 1) < 0) /* 0 is /dev/null */
            _exit(TOOL_LOST);
        become_tool(argv);
    }
    if (pid < 0)
        return -errno;
    (void)setpgid(pid, pid); /* whoever comes first */
    return networks_wait_for(pid);
}

/* Whether what there is has rules of the container's; then `out` says how they go. */
static bool are_left(int all, const char *container, int out) {
    struct stat st;
    if (fstat(all, &st) < 0 || st.st_size == 0)
        return false;
    void *text = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, all, 0);
    if (text == MAP_FAILED)
        return false;
    bool any = rules_find(text, (size_t)st.st_size, container, out);
    munmap(text, (size_t)st.st_size);
    return any && lseek(out, 0, SEEK_SET) == 0;
}

/* Of one protocol. */
static bool clear(char *save, char *restore, const char *container) {
    char keep[] = "--noflush", wait[] = "--wait=5";
    char *const saving[] = {save, NULL}, *const restoring[] = {restore, keep, wait, NULL};
    int all = memfd_create("rules", MFD_CLOEXEC), out = memfd_create("undo", MFD_CLOEXEC);
    bool good = all >= 0 && out >= 0 && run(saving, 0, all) == 0 &&
                (!are_left(all, container, out) || run(restoring, out, 0) == 0);
    if (all >= 0)
        close(all);
    if (out >= 0)
        close(out);
    return good;
}

void rules_clear(const char *container) {
    char save[] = "iptables-save", restore[] = "iptables-restore";
    char save6[] = "ip6tables-save", restore6[] = "ip6tables-restore";
    bool cleared = clear(save, restore, container);
    if (!clear(save6, restore6, container) || !cleared)
        report("WARNING: ", "rules of the container's network may be left: iptables has failed");
}
