/* The command line, read with the parser's table: only to find out what is asked for. */
#include <string.h>
#include <sys/stat.h>

#include "launcher.h"
#include "options.h"

#define INSTANCE "instance://"

/* The words that are left.  A false answer means: the plain interpreter answers, or complains. */
struct words {
    int left;
    char *const *at;
};

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

static bool applies(const struct option_row *row, unsigned mask) {
    return mask == 0 ? row->commands == 0 : (row->commands & mask) != 0;
}

static const struct option_row *find_long(const char *name, size_t length, unsigned mask) {
    for (size_t i = 0; i < COUNT(option_rows); i++) {
        const struct option_row *row = &option_rows[i];
        if (applies(row, mask) && strncmp(row->name, name, length) == 0 &&
            row->name[length] == '\0')
            return row;
    }
    return NULL;
}

static const struct option_row *find_letter(char letter, unsigned mask) {
    for (size_t i = 0; i < COUNT(option_rows); i++) {
        const struct option_row *row = &option_rows[i];
        if (applies(row, mask) && letter != '\0' && row->letter == letter)
            return row;
    }
    return NULL;
}

static bool take(struct scan *s, const struct option_row *row, const char *value) {
    if ((row->flags & OPT_TRACE) != 0)
        s->trace = value;
    if ((row->flags & OPT_VALUE) != 0) {
        s->given |= row->flags;
        if (*value != '\0')
            s->on |= row->flags;
        return true;
    }
    int on = to_bool(value);
    s->given |= row->flags;
    if (on == 1)
        s->on |= row->flags;
    else
        s->on &= ~row->flags;
    return on >= 0;
}

static bool take_next(struct scan *s, const struct option_row *row, struct words *w) {
    if (w->left == 0)
        return false;
    w->left--;
    return take(s, row, *w->at++);
}

static bool read_long(struct scan *s, const char *word, struct words *w, unsigned mask) {
    size_t length = strcspn(word, "=");
    const struct option_row *row = length == 0 ? NULL : find_long(word, length, mask);
    if (row == NULL)
        return false;
    if (word[length] == '=')
        return take(s, row, word + length + 1);
    return (row->flags & OPT_VALUE) != 0 ? take_next(s, row, w) : take(s, row, "true");
}

static bool read_letters(struct scan *s, const char *letters, struct words *w, unsigned mask) {
    while (*letters != '\0') {
        const struct option_row *row = find_letter(*letters++, mask);
        if (row == NULL)
            return false;
        if (letters[0] == '=' && letters[1] != '\0')
            return take(s, row, letters + 1);
        if ((row->flags & OPT_VALUE) != 0)
            return *letters != '\0' ? take(s, row, letters) : take_next(s, row, w);
        if (!take(s, row, "true"))
            return false;
    }
    return true;
}

static bool read_options(struct scan *s, struct words *w, unsigned mask) {
    while (w->left > 0) {
        const char *word = *w->at;
        if (word[0] != '-' || word[1] == '\0')
            return true;
        w->at++;
        w->left--;
        if (strcmp(word, "--") == 0)
            return true;
        bool understood = word[1] == '-' ? read_long(s, word + 2, w, mask)
                                         : read_letters(s, word + 1, w, mask);
        if (!understood)
            return false;
    }
    return true;
}

/* "oci:" and the like: an image of the other format, and none that would have to be fetched. */
static bool is_layout(const char *image) {
    size_t length = strcspn(image, ":");
    if (image[length] == '\0' || strncmp(image + length + 1, "//", 2) == 0)
        return false;
    for (size_t i = 0; i < COUNT(layouts); i++)
        if (strncmp(layouts[i], image, length) == 0 && layouts[i][length] == '\0')
            return true;
    return false;
}

static bool is_path(const char *image) {
    size_t length = strcspn(image, ":");
    if (image[length] == '\0' || length == 0)
        return true;
    if (strncmp(image + length + 1, "//", 2) == 0)
        return false;
    for (size_t i = 0; i < COUNT(transports); i++) {
        if (strncmp(transports[i], image, length) == 0 && transports[i][length] == '\0')
            return false;
    }
    return true;
}

/* How many words of the line a command's name takes, one or two; 0: it is another command. */
static int words_of(const char *name, const struct words *w) {
    size_t length = strcspn(name, " ");
    if (strncmp(name, *w->at, length) != 0 || (*w->at)[length] != '\0')
        return 0;
    if (name[length] == '\0')
        return 1;
    return w->left > 1 && strcmp(name + length + 1, w->at[1]) == 0 ? 2 : 0;
}

static bool read_command(struct scan *s, struct words *w) {
    for (size_t i = 0; i < COUNT(action_commands); i++) {
        int length = words_of(action_commands[i].name, w);
        if (length == 0)
            continue;
        w->at += length;
        w->left -= length;
        s->is_exec = strcmp(action_commands[i].name, "exec") == 0;
        bool good = read_options(s, w, 1U << i) && w->left >= action_commands[i].arguments;
        s->instance = good && length > 1 ? w->at[1] : NULL;
        return good;
    }
    return false;
}

void scan_arguments(struct scan *s, int argc, char *const argv[]) {
    struct words w = {.left = argc > 0 ? argc - 1 : 0, .at = argv + 1};
    *s = (struct scan){0};
    if (!read_options(s, &w, 0) || w.left == 0 || (s->on & (OPT_HELP | OPT_VERSION)) != 0)
        return;
    s->is_oci = strcmp(*w.at, "oci") == 0;
    if (read_command(s, &w) && (s->on & OPT_HELP) == 0) {
        s->joins = s->instance == NULL && strncmp(*w.at, INSTANCE, strlen(INSTANCE)) == 0;
        s->image = s->joins || is_path(*w.at) ? *w.at : NULL;
        s->layout = is_layout(*w.at) ? *w.at : NULL;
    }
    s->image_arg = (unsigned)(w.at - argv);
}

/* Variables of the environment are left out: where they change the plan, stage 1 says so. */
struct forecast scan_forecast(const struct scan *s) {
    struct forecast f = {.what = FORECAST_CONTAINER};
    struct stat st;
    bool all = (s->on & (OPT_CONTAINALL | OPT_COMPAT)) != 0;
    if ((s->on & OPT_UNFORESEEN) != 0 || s->joins)
        return (struct forecast){0};
    if ((all || (s->on & OPT_PID) != 0) && (s->on & OPT_NO_PID) == 0) {
        f.spaces |= SPACE_PID;
        if ((s->on & (OPT_NO_INIT | OPT_COMPAT)) == 0)
            f.flags |= PLAN_SHIM;
    }
    if (s->instance != NULL) {
        f.spaces |= SPACE_PID;
        f.flags |= PLAN_SHIM | PLAN_INSTANCE;
    } else if ((s->on & (OPT_FAKEROOT | OPT_INTERPRETER)) == 0) {
        f.flags |= PLAN_LEAN;
    }
    if (all || (s->on & OPT_IPC) != 0)
        f.spaces |= SPACE_IPC;
    if ((s->on & OPT_UTS) != 0)
        f.spaces |= SPACE_UTS;
    if ((s->on & (OPT_WRITABLE_TMPFS | OPT_COMPAT)) != 0)
        f.flags |= PLAN_WRITABLE_LAYER;
    if (s->is_exec)
        f.what |= FORECAST_COMMAND;
    if (stat(s->image, &st) == 0 && S_ISREG(st.st_mode))
        f.what |= FORECAST_FUSE;
    return f;
}

/* As getenv(3), of prefix + key. */
static const char *variable(char *const envp[], const char *prefix, const char *key) {
    size_t first = strlen(prefix), second = strlen(key);
    for (; *envp != NULL; envp++) {
        const char *entry = *envp;
        if (strncmp(entry, prefix, first) == 0 && strncmp(entry + first, key, second) == 0 &&
            entry[first + second] == '=')
            return entry + first + second + 1;
    }
    return NULL;
}

static bool is_on(const char *text) {
    char word[8] = "";
    text += strspn(text, " \t\r\n\v\f");
    size_t length = strcspn(text, " \t\r\n\v\f");
    if (length < sizeof(word))
        memcpy(word, text, length);
    /* What is no boolean is an error that the parser reports: without privilege, then. */
    return to_bool(word) != 0;
}

/* The parser's order: the preferred prefix first, its blank value hides the other one's. */
static bool variable_on(char *const envp[], const char *const keys[], size_t count) {
    for (size_t p = 0; p < COUNT(prefixes); p++) {
        for (size_t k = 0; k < count; k++) {
            const char *text = variable(envp, prefixes[p], keys[k]);
            if (text == NULL || (p > 0 && variable(envp, prefixes[0], keys[k]) != NULL))
                continue;
            if (text[strspn(text, " \t\r\n\v\f")] != '\0')
                return is_on(text);
        }
    }
    return false;
}

static bool asks(const struct scan *s, char *const envp[], unsigned flag,
                 const char *const keys[], size_t count) {
    return (s->on & flag) != 0 || ((s->given & flag) == 0 && variable_on(envp, keys, count));
}

bool scan_asks_userns(const struct scan *s, char *const envp[]) {
    return asks(s, envp, OPT_USERNS, userns_keys, COUNT(userns_keys));
}

bool scan_asks_fakeroot(const struct scan *s, char *const envp[], struct fakeroot_options *o) {
    if (!asks(s, envp, OPT_FAKEROOT, fakeroot_keys, COUNT(fakeroot_keys)))
        return false;
    o->no_subids = asks(s, envp, OPT_IGNORE_SUBUID, ignore_subuid_keys, COUNT(ignore_subuid_keys));
    o->no_userns = asks(s, envp, OPT_IGNORE_USERNS, ignore_userns_keys, COUNT(ignore_userns_keys));
    return true;
}

bool scan_asks_sharing(const struct scan *s, char *const envp[]) {
    return s->instance == NULL && asks(s, envp, OPT_SHARENS, sharens_keys, COUNT(sharens_keys));
}

/* A directory needs nothing of the kind, and an instance that is joined has its root. */
bool scan_asks_unsquash(const struct scan *s, char *const envp[]) {
    return !s->joins && asks(s, envp, OPT_UNSQUASH, unsquash_keys, COUNT(unsquash_keys));
}

/* Has something like mpirun(1) started us, as one of several? */
bool scan_is_rank(char *const envp[]) {
    for (size_t i = 0; i < COUNT(rank_variables); i++)
        if (variable(envp, rank_variables[i], "") != NULL)
            return true;
    return false;
}

bool scan_asks_oci(const struct scan *s, char *const envp[]) {
    if ((s->given & OPT_OCI) != 0)
        return (s->on & OPT_OCI) != 0;
    return (s->image != NULL || s->layout != NULL) &&
           variable_on(envp, oci_keys, COUNT(oci_keys));
}
