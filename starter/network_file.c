/* The administrator's file of a CNI network, which is JSON: it is read in a child that has dropped,
 * and only cut up.  What a plugin is to read is handed on as it was written. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "networks.h"

enum { NESTED_MAX = 32, FILES_MAX = 128, NAME_BYTES = 256 };

struct part {
    const char *at, *end;
};

static void skip_space(struct part *s) {
    while (s->at < s->end && memchr(" \t\r\n", *s->at, 4))
        s->at++;
}

static bool take(struct part *s, char c) {
    skip_space(s);
    if (s->at == s->end || *s->at != c)
        return false;
    s->at++;
    return true;
}

static bool skip_string(struct part *s) {
    if (!take(s, '"'))
        return false;
    for (; s->at < s->end && (unsigned char)*s->at >= ' '; s->at++) {
        if (*s->at == '"') {
            s->at++;
            return true;
        }
        if (*s->at == '\\' && ++s->at == s->end)
            return false;
    }
    return false;
}

static bool skip_value(struct part *s, int depth);

/* [value, ...] or {"key": value, ...} */
static bool skip_group(struct part *s, bool object, int depth) {
    char close = object ? '}' : ']';
    s->at++;
    if (take(s, close))
        return true;
    do {
        if ((object && (!skip_string(s) || !take(s, ':'))) || !skip_value(s, depth + 1))
            return false;
    } while (take(s, ','));
    return take(s, close);
}

static bool skip_value(struct part *s, int depth) {
    static const char bare[] = "+-.0123456789eEtrufalsn";
    skip_space(s);
    if (s->at == s->end || depth > NESTED_MAX)
        return false;
    if (*s->at == '"')
        return skip_string(s);
    if (*s->at == '{' || *s->at == '[')
        return skip_group(s, *s->at == '{', depth);
    const char *start = s->at;
    while (s->at < s->end && *s->at != '\0' && strchr(bare, *s->at))
        s->at++;
    return s->at > start;
}

/* The next value, without the white space before it. */
static bool take_value(struct part *s, struct part *value) {
    skip_space(s);
    value->at = s->at;
    if (!skip_value(s, 0))
        return false;
    value->end = s->at;
    return true;
}

typedef bool (*member)(void *whose, struct part key, struct part value);

/* Hands each member of an object to `each`; false if it is none, or `each` says so. */
static bool each_member(struct part object, member each, void *whose) {
    struct part key, value;
    if (!take(&object, '{'))
        return false;
    if (take(&object, '}'))
        return true;
    do {
        if (!take_value(&object, &key) || *key.at != '"' || !take(&object, ':') ||
            !take_value(&object, &value) || !each(whose, key, value))
            return false;
    } while (take(&object, ','));
    return take(&object, '}');
}

static bool part_is(struct part p, const char *text) {
    size_t length = strlen(text);
    return (size_t)(p.end - p.at) == length && memcmp(p.at, text, length) == 0;
}

/* The text of a string that has no escape; what one would mean is not worth a rule. */
static bool take_word(struct part p, char *word, size_t size) {
    size_t length = (size_t)(p.end - p.at);
    if (length < 3 || *p.at != '"' || length - 2 >= size || memchr(p.at, '\\', length) ||
        word[0] != '\0')
        return false; /* twice, too: two readers could take different ones */
    memcpy(word, p.at + 1, length - 2);
    word[length - 2] = '\0';
    return true;
}

bool network_is_name(const char *text) {
    static const char letters[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
                                  "0123456789_-";
    size_t length = strnlen(text, NETWORK_NAME_BYTES);
    return length > 0 && length < NETWORK_NAME_BYTES && strspn(text, letters) == length;
}

static bool is_version(const char *text) {
    return strspn(text, "0123456789.") == strlen(text);
}

/* ---- one plugin ---- */

struct plugin_reading {
    struct network_plugin *plugin;
    bool host_local;
};

static bool of_ipam(void *whose, struct part key, struct part value) {
    struct plugin_reading *r = whose;
    if (part_is(key, "\"type\""))
        r->host_local = part_is(value, "\"host-local\"");
    return true;
}

static bool of_capabilities(void *whose, struct part key, struct part value) {
    struct plugin_reading *r = whose;
    if (part_is(key, "\"portMappings\""))
        r->plugin->maps_ports = part_is(value, "true");
    return true;
}

static bool of_plugin(void *whose, struct part key, struct part value) {
    struct plugin_reading *r = whose;
    if (part_is(key, "\"type\""))
        return take_word(value, r->plugin->type, sizeof(r->plugin->type));
    if (part_is(key, "\"ipam\""))
        return each_member(value, of_ipam, r);
    if (part_is(key, "\"capabilities\""))
        return each_member(value, of_capabilities, r);
    return true;
}

static bool read_plugin(struct network_file *out, struct part object, size_t *used) {
    if (out->plugin_count == PLUGINS_MAX)
        return false;
    struct network_plugin *plugin = &out->plugins[out->plugin_count];
    struct plugin_reading r = {.plugin = plugin};
    if (!each_member(object, of_plugin, &r) || !network_is_name(plugin->type))
        return false;
    /* Without the braces: what follows is added. */
    size_t length = (size_t)(object.end - object.at) - 2;
    if (length > sizeof(out->text) - *used)
        return false;
    memcpy(out->text + *used, object.at + 1, length);
    plugin->from = (uint32_t)*used;
    plugin->length = (uint32_t)length;
    *used += length;
    if (out->plugin_count++ == 0)
        out->host_local = r.host_local;
    return true;
}

/* ---- the file ---- */

struct file_reading {
    struct network_file *out;
    char name[NETWORK_NAME_BYTES];
    struct part plugins;
};

static bool of_file(void *whose, struct part key, struct part value) {
    struct file_reading *r = whose;
    if (part_is(key, "\"name\""))
        return take_word(value, r->name, sizeof(r->name));
    if (part_is(key, "\"cniVersion\""))
        return take_word(value, r->out->version, sizeof(r->out->version));
    if (part_is(key, "\"plugins\"")) {
        if (r->plugins.at)
            return false;
        r->plugins = value;
    }
    return true;
}

static bool read_plugins(struct network_file *out, struct part list) {
    struct part one;
    size_t used = 0;
    if (!take(&list, '['))
        return false;
    do {
        if (!take_value(&list, &one) || !read_plugin(out, one, &used))
            return false;
    } while (take(&list, ','));
    return take(&list, ']');
}

int network_read(const char *text, size_t size, const char *name, struct network_file *out) {
    struct part all = {text, text + size}, file;
    struct file_reading r = {.out = out};
    size_t used = 0;
    memset(out, 0, sizeof(*out));
    if (!take_value(&all, &file) || !each_member(file, of_file, &r))
        return -1;
    skip_space(&all);
    if (all.at != all.end || !network_is_name(r.name) || !is_version(out->version))
        return -1;
    if (out->version[0] == '\0')
        append_text(out->version, sizeof(out->version), "0.2.0");
    if (!(r.plugins.at ? read_plugins(out, r.plugins) : read_plugin(out, file, &used)))
        return -1;
    return strcmp(r.name, name) == 0 ? 1 : 0;
}

bool network_fits(const struct network_file *file) {
    if (strnlen(file->version, sizeof(file->version)) == sizeof(file->version) ||
        !is_version(file->version) || file->plugin_count == 0 || file->plugin_count > PLUGINS_MAX)
        return false;
    for (size_t i = 0; i < file->plugin_count; i++) {
        const struct network_plugin *one = &file->plugins[i];
        if (!network_is_name(one->type) || one->from > sizeof(file->text) ||
            one->length > sizeof(file->text) - one->from)
            return false;
    }
    return true;
}

/* ---- the directory ---- */

static bool is_ours(const char *name) {
    static const char *const endings[] = {".conflist", ".conf", ".json"};
    size_t length = strlen(name);
    for (size_t i = 0; i < ARRAY_SIZE(endings); i++) {
        size_t end = strlen(endings[i]);
        if (length > end && strcmp(name + length - end, endings[i]) == 0)
            return true;
    }
    return false;
}

static int by_name(const void *one, const void *other) {
    return strcmp(one, other);
}

/* More than there is room for, if there are too many. */
static size_t list(const char *folder, char names[FILES_MAX][NAME_BYTES]) {
    size_t count = 0;
    DIR *open = opendir(folder);
    const struct dirent *entry;
    while (open && count <= FILES_MAX && (entry = readdir(open)) != NULL)
        if (is_ours(entry->d_name) && count++ < FILES_MAX) {
            names[count - 1][0] = '\0';
            append_text(names[count - 1], NAME_BYTES, entry->d_name);
        }
    if (open)
        closedir(open);
    if (count <= FILES_MAX)
        qsort(names, count, NAME_BYTES, by_name);
    return count;
}

/* In the child.  Nobody but root can have written the file, nor moved it there. */
static int search(const char *folder, const char *name, struct network_file *out) {
    static char names[FILES_MAX][NAME_BYTES], text[NETWORK_FILE_BYTES], path[LIMIT_PATH_BYTES];
    static struct config_error why;
    size_t count = list(folder, names);
    int found = count > FILES_MAX ? -1 : 0;
    for (size_t i = 0; i < count && found == 0; i++) {
        path[0] = '\0';
        append_text(path, sizeof(path), folder);
        append_text(path, sizeof(path), "/");
        append_text(path, sizeof(path), names[i]);
        int fd = config_open_trusted(path, sizeof(text), &why);
        ssize_t got = fd < 0 ? -1 : pread(fd, text, sizeof(text), 0);
        found = got < 0 ? -1 : network_read(text, (size_t)got, name, out);
        if (fd >= 0)
            close(fd);
    }
    return found;
}

static int hand_over(int fd, const struct network_file *file) {
    return write(fd, file, sizeof(*file)) == (ssize_t)sizeof(*file) ? 0 : 1;
}

/* All of it, or nothing. */
static bool read_whole(int fd, struct network_file *file) {
    char *at = (char *)file;
    size_t used = 0;
    ssize_t got;
    while (used < sizeof(*file) && (got = read(fd, at + used, sizeof(*file) - used)) > 0)
        used += (size_t)got;
    return used == sizeof(*file);
}

/* The network of that name; 0 or -1. */
int network_find(const struct launch *l, const char *name, struct network_file *out) {
    const char *folder = config_string(&l->config, CONFIG_CNI_CONFIGURATION_PATH);
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) < 0)
        return -1;
    pid_t pid = names_fork_asker(l);
    if (pid == 0)
        _exit(search(*folder ? folder : APY_SYSCONFDIR "/network", name, out) == 1
                  ? hand_over(ends[1], out)
                  : 1);
    close(ends[1]);
    bool told = pid > 0 && read_whole(ends[0], out);
    close(ends[0]);
    told = pid > 0 && names_wait_for_asker(pid) == 0 && told;
    return told && network_fits(out) ? 0 : -1;
}
