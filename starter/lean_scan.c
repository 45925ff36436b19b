/* The command line of runc, as far as it is plain: whatever is not goes to the interpreter. */
#include <string.h>

#include "lean.h"

struct words {
    int left;
    char *const *at;
};

enum flag_kind { FLAG_NONE, FLAG_ROOT, FLAG_LOG, FLAG_LOG_FORMAT, FLAG_DEBUG, FLAG_VERSION,
                 FLAG_FORCE, FLAG_ALL, FLAG_PASSED };

struct flag {
    const char *name;
    enum flag_kind kind;
    bool value;
};

static const struct flag global_flags[] = {
    {"root", FLAG_ROOT, true},         {"log", FLAG_LOG, true},
    {"log-format", FLAG_LOG_FORMAT, true}, {"debug", FLAG_DEBUG, false},
    {"version", FLAG_VERSION, false},  {"v", FLAG_VERSION, false},
    {"rootless", FLAG_PASSED, true},   {"systemd-cgroup", FLAG_PASSED, false},
    {"criu", FLAG_PASSED, true},       {"cgroup-manager", FLAG_PASSED, true},
    {"log-level", FLAG_PASSED, true},
};
/* Of the program apptainer-py, before the word `oci`. */
static const struct flag apptainer_flags[] = {
    {"debug", FLAG_DEBUG, false},     {"d", FLAG_DEBUG, false},
    {"quiet", FLAG_PASSED, false},    {"q", FLAG_PASSED, false},
    {"silent", FLAG_PASSED, false},   {"s", FLAG_PASSED, false},
    {"verbose", FLAG_PASSED, false},  {"v", FLAG_PASSED, false},
    {"nocolor", FLAG_PASSED, false},
};
static const struct flag delete_flags[] = {{"force", FLAG_FORCE, false}, {"f", FLAG_FORCE, false}};
static const struct flag kill_flags[] = {{"all", FLAG_ALL, false}, {"a", FLAG_ALL, false}};

struct command {
    const char *name;
    enum lean_command command;
    int fewest, most;
    const struct flag *flags;
    size_t count;
};

static const struct command commands[] = {
    {"create", LEAN_LAUNCH, 0, 0, NULL, 0},
    {"run", LEAN_LAUNCH, 0, 0, NULL, 0},
    {"exec", LEAN_LAUNCH, 0, 0, NULL, 0},
    {"state", LEAN_STATE, 1, 1, NULL, 0},
    {"start", LEAN_START, 1, 1, NULL, 0},
    {"kill", LEAN_KILL, 1, 2, kill_flags, COUNT(kill_flags)},
    {"delete", LEAN_DELETE, 1, 1, delete_flags, COUNT(delete_flags)},
};
/* Of Apptainer's command line: the others differ in more than their words. */
static const struct command apptainer_commands[] = {
    {"create", LEAN_MONITORED, 0, 0, NULL, 0}, {"run", LEAN_MONITORED, 0, 0, NULL, 0},
    {"exec", LEAN_LAUNCH, 0, 0, NULL, 0},      {"start", LEAN_START, 1, 1, NULL, 0},
    {"attach", LEAN_ATTACH, 1, 1, NULL, 0},
};

const char *lean_variable(char *const envp[], const char *name) {
    size_t length = strlen(name);
    for (; *envp != NULL; envp++)
        if (strncmp(*envp, name, length) == 0 && (*envp)[length] == '=')
            return *envp + length + 1;
    return NULL;
}

static int to_bool(const char *text) {
    static const char *const yes[] = {"1", "t", "T", "TRUE", "true", "True"};
    static const char *const no[] = {"0", "f", "F", "FALSE", "false", "False"};
    for (size_t i = 0; i < COUNT(yes); i++) {
        if (strcmp(text, yes[i]) == 0)
            return 1;
        if (strcmp(text, no[i]) == 0)
            return 0;
    }
    return -1;
}

static bool take(struct lean *l, const struct flag *flag, const char *value) {
    int on = flag->value ? 0 : to_bool(value);
    switch (flag->kind) {
    case FLAG_ROOT:
        l->root = value;
        return *value != '\0';
    case FLAG_LOG:
        l->log = *value != '\0' ? value : NULL;
        return true;
    case FLAG_LOG_FORMAT:
        l->json = strcmp(value, "json") == 0;
        return l->json || strcmp(value, "text") == 0;
    case FLAG_DEBUG:
        l->debug = on == 1;
        return on >= 0;
    case FLAG_FORCE:
        l->force = on == 1;
        return on >= 0;
    case FLAG_ALL:
        l->all = on == 1;
        return on >= 0;
    case FLAG_VERSION:
        if (on == 1)
            l->command = LEAN_VERSION;
        return on >= 0;
    case FLAG_PASSED:
        return flag->value || on >= 0;
    case FLAG_NONE:
    default:
        return false;
    }
}

/* As Go's flag package: one dash or two, `=` or the next word. */
static bool read_flag(struct lean *l, struct words *w, const struct flag *flags, size_t count) {
    const char *word = *w->at++ + 1;
    w->left--;
    word += *word == '-';
    size_t length = strcspn(word, "=");
    for (size_t i = 0; i < count; i++) {
        const struct flag *flag = &flags[i];
        if (strncmp(flag->name, word, length) != 0 || flag->name[length] != '\0')
            continue;
        if (word[length] == '=')
            return take(l, flag, word + length + 1);
        if (!flag->value)
            return take(l, flag, "true");
        if (w->left == 0)
            return false;
        w->left--;
        return take(l, flag, *w->at++);
    }
    return false;
}

static bool is_flag(const char *word) {
    return word[0] == '-' && word[1] != '\0';
}

static bool read_flags(struct lean *l, struct words *w, const struct flag *flags, size_t count) {
    while (w->left > 0 && is_flag(*w->at)) {
        if (strcmp(*w->at, "--") == 0 || !read_flag(l, w, flags, count))
            return false;
    }
    return true;
}

static const struct command *find_command(const struct command *all, size_t count,
                                          const char *name) {
    for (size_t i = 0; i < count; i++)
        if (strcmp(all[i].name, name) == 0)
            return &all[i];
    return NULL;
}

/* Then there is nothing to be made, and nobody stays. */
static bool asks_for_help(const struct words *w) {
    for (int i = 0; i < w->left && strcmp(w->at[i], "--") != 0; i++)
        if (strcmp(w->at[i], "-h") == 0 || strcmp(w->at[i], "--help") == 0)
            return true;
    return false;
}

static void read_command(struct lean *l, struct words *w) {
    const struct command *c =
        l->apptainer ? find_command(apptainer_commands, COUNT(apptainer_commands), *w->at)
                     : find_command(commands, COUNT(commands), *w->at);
    if (c == NULL)
        return;
    w->at++;
    w->left--;
    if (c->command == LEAN_MONITORED && asks_for_help(w))
        return;
    if (c->command == LEAN_LAUNCH || c->command == LEAN_MONITORED) {
        l->command = c->command;
        l->makes = strcmp(c->name, "exec") != 0;
        return;
    }
    if (!read_flags(l, w, c->flags, c->count) || w->left < c->fewest || w->left > c->most)
        return;
    for (int k = 0; k < w->left; k++)
        if (is_flag(w->at[k])) /* urfave/cli takes flags behind the words too */
            return;
    l->id = w->at[0];
    l->signal = w->left > 1 ? w->at[1] : NULL;
    l->command = c->command;
}

static const char *base_name(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash != NULL ? slash + 1 : path;
}

void lean_scan(struct lean *l, int argc, char *const argv[]) {
    struct words w = {.left = argc > 0 ? argc - 1 : 0, .at = argv + 1};
    l->argv0 = argc > 0 ? argv[0] : "apptainer-py-oci";
    l->apptainer = strcmp(base_name(l->argv0), "apptainer-py") == 0;
    if (l->apptainer) {
        if (!read_flags(l, &w, apptainer_flags, COUNT(apptainer_flags)) || w.left == 0 ||
            strcmp(*w.at, "oci") != 0)
            return;
        w.at++;
        w.left--;
        if (!read_flags(l, &w, global_flags, COUNT(global_flags)) ||
            l->command == LEAN_VERSION) {
            l->command = LEAN_OTHER;
            return;
        }
    } else if (!read_flags(l, &w, global_flags, COUNT(global_flags)) ||
               l->command == LEAN_VERSION) {
        if (l->command == LEAN_VERSION && w.left > 0)
            l->command = LEAN_OTHER;
        return;
    }
    if (w.left > 0)
        read_command(l, &w);
}
