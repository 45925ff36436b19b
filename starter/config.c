/* Reading the administrator's file, line by line. */

#include "config_value.h"

#include <errno.h>
#include <stddef.h>
#include <string.h>
#include <unistd.h>

_Static_assert(CONFIG_ITEMS <= UINT16_MAX && CONFIG_COUNT <= UINT16_MAX, "an index has 16 bits");

static bool is_blank(char c)
{
    return c == ' ' || c == '\t' || c == '\r' || c == '\f' || c == '\v';
}

static char *trimmed(char *text)
{
    size_t length;

    while (is_blank(*text))
        text++;
    length = strlen(text);
    while (length > 0 && is_blank(text[length - 1]))
        length--;
    text[length] = '\0';
    return text;
}

struct reading {
    struct config *config;
    struct config_error *why;
    uint32_t line;
};

static void wrong_value(const struct reading *r, enum config_id id, const char *value)
{
    char expected[128];

    config_value_expected(&config_rows[id], expected, sizeof(expected));
    config_problem_add(r->why, r->line, config_rows[id].key, NULL, "\"%.60s\" is not %s", value,
                       expected);
}

static bool set_scalar(struct config *c, enum config_id id, const char *value)
{
    uint64_t number = 0;

    if (!config_value_allowed(&config_rows[id], value, &number))
        return false;
    c->number[id] = number;
    c->text[id] = (uint32_t)(value - c->bytes);
    return true;
}

static void add_item(const struct reading *r, enum config_id id, const char *item)
{
    struct config *c = r->config;
    uint64_t unused;

    if (!config_value_allowed(&config_rows[id], item, &unused)) {
        wrong_value(r, id, item);
    } else if (c->item_count == CONFIG_ITEMS) {
        config_problem_add(r->why, r->line, config_rows[id].key, NULL,
                           "there are more than %u values in all lists", CONFIG_ITEMS);
    } else {
        c->item_of[c->item_count] = (uint16_t)id;
        c->item_text[c->item_count++] = (uint32_t)(item - c->bytes);
    }
}

static void add_items(const struct reading *r, enum config_id id, char *value)
{
    while (value) {
        char *comma = strchr(value, ',');
        char *item;

        if (comma)
            *comma = '\0';
        item = trimmed(value);
        if (*item)
            add_item(r, id, item);
        value = comma ? comma + 1 : NULL;
    }
}

/* Lists arrive in pieces; afterwards the pieces of one directive lie side by side, in order. */
static void group_items(struct config *c)
{
    uint16_t next = 0;

    memset(c->items, 0, sizeof(c->items));
    for (uint32_t i = 0; i < c->item_count; i++)
        c->items[c->item_of[i]]++;
    for (size_t id = 0; id < CONFIG_COUNT; id++) {
        c->first[id] = next;
        next = (uint16_t)(next + c->items[id]);
        c->items[id] = 0;
    }
    for (uint32_t i = 0; i < c->item_count; i++) {
        size_t id = c->item_of[i];

        c->order[c->first[id] + c->items[id]++] = (uint16_t)i;
    }
}

static void set_defaults(struct config *c, bool lists)
{
    static struct config_error none;
    const struct reading r = {c, &none, 0};

    /* What lies behind these is written before it is read: clearing it would touch each page. */
    memset(c, 0, offsetof(struct config, order));
    c->item_count = 0;
    c->bytes[0] = '\0';
    c->used = 1;
    for (unsigned id = 0; id < CONFIG_COUNT; id++) {
        size_t size = strlen(config_rows[id].value) + 1;
        char *value = c->bytes + c->used;

        memcpy(value, config_rows[id].value, size);
        c->used += (uint32_t)size;
        if (config_rows[id].kind == KIND_LIST && lists)
            add_items(&r, (enum config_id)id, value);
        if (config_rows[id].kind == KIND_LIST)
            continue;
        /* An empty path is none, yet a default: it stands for what is compiled in. */
        (void)config_value_allowed(&config_rows[id], value, &c->number[id]);
        c->text[id] = (uint32_t)(value - c->bytes);
    }
    group_items(c);
}

static void assign(const struct reading *r, enum config_id id, char *value)
{
    struct config *c = r->config;

    for (const char *p = value; *p; p++) {
        if ((*p >= 0 && *p < ' ' && *p != '\t') || *p == 0x7f) {
            config_problem_add(r->why, r->line, config_rows[id].key, NULL,
                               "the value holds a control character");
            return;
        }
    }
    if (c->line[id] != 0 && config_rows[id].kind != KIND_LIST) {
        config_problem_add(r->why, r->line, config_rows[id].key, NULL,
                           "is given already in line %u", (unsigned)c->line[id]);
        return;
    }
    if (c->line[id] == 0)
        c->line[id] = r->line;
    if (config_rows[id].kind == KIND_LIST)
        add_items(r, id, value);
    else if (*value && !set_scalar(c, id, value))
        wrong_value(r, id, value);
}

/* Looking for what was meant costs more than the rest: not for a file of nothing but nonsense. */
static void unknown_key(const struct reading *r, const char *key)
{
    const char *nearest = r->why->count < CONFIG_PROBLEMS ? config_nearest_key(key) : NULL;

    config_problem_add(r->why, r->line, key, nearest, "is not a directive");
}

static void read_line(const struct reading *r, char *line)
{
    char *key = trimmed(line);
    char *equals = strchr(key, '=');
    enum config_id id;

    if (*key == '\0' || *key == '#')
        return;
    if (!equals || equals == key) {
        config_problem_add(r->why, r->line, key, NULL,
                           "is neither a comment nor \"directive = value\"");
        return;
    }
    *equals = '\0';
    key = trimmed(key);
    id = config_id_of(key);
    if (id == CONFIG_COUNT)
        unknown_key(r, key);
    else
        assign(r, id, trimmed(equals + 1));
}

static void read_lines(struct reading *r, char *text)
{
    while (text) {
        char *end = strchr(text, '\n');

        r->line++;
        if (end)
            *end = '\0';
        read_line(r, text);
        text = end ? end + 1 : NULL;
    }
}

/* Reads what is there into the free part of c->bytes, which has one byte more than a file may. */
static int read_text(int fd, struct config *c, struct config_error *why, size_t *length)
{
    char *text = c->bytes + c->used;

    *length = 0;
    while (*length <= CONFIG_FILE_BYTES) {
        ssize_t n = pread(fd, text + *length, CONFIG_FILE_BYTES + 1 - *length, (off_t)*length);

        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0) {
            int error = errno;

            config_problem_add(why, 0, NULL, NULL, "cannot be read: %s", strerror(error));
            return -error;
        }
        if (n == 0)
            break;
        *length += (size_t)n;
    }
    if (*length <= CONFIG_FILE_BYTES) {
        text[*length] = '\0';
        return 0;
    }
    memset(text, 0, CONFIG_FILE_BYTES + 1);
    config_problem_add(why, 0, NULL, NULL, "is larger than %u bytes", CONFIG_FILE_BYTES);
    return -EFBIG;
}

/* Whatever follows a NUL would be seen by some readers and not by others. */
static bool holds_nul(const char *text, size_t length, struct config_error *why)
{
    const char *nul = memchr(text, '\0', length);
    uint32_t line = 1;

    if (!nul)
        return false;
    for (const char *p = text; p < nul; p++)
        line += *p == '\n';
    config_problem_add(why, line, NULL, NULL, "holds a NUL byte");
    return true;
}

int config_parse_fd(int fd, struct config *out, struct config_error *why)
{
    struct reading r = {out, why, 0};
    uint32_t before = why->count;
    size_t length;
    int result;

    set_defaults(out, false);
    result = read_text(fd, out, why, &length);
    if (result != 0)
        return result;
    if (holds_nul(out->bytes + out->used, length, why))
        return -EINVAL;
    read_lines(&r, out->bytes + out->used);
    out->used += (uint32_t)length + 1;
    group_items(out);
    return why->count == before ? 0 : -EINVAL;
}

void config_defaults(struct config *out)
{
    set_defaults(out, true);
}

static bool is_kind(enum config_id id, enum config_kind kind)
{
    return (unsigned)id < CONFIG_COUNT && config_rows[id].kind == kind;
}

bool config_bool(const struct config *c, enum config_id id)
{
    return is_kind(id, KIND_BOOL) && c->number[id] != 0;
}

unsigned config_enum(const struct config *c, enum config_id id)
{
    return is_kind(id, KIND_ENUM) ? (unsigned)c->number[id] : 0;
}

uint64_t config_uint(const struct config *c, enum config_id id)
{
    return is_kind(id, KIND_UINT) ? c->number[id] : 0;
}

const char *config_string(const struct config *c, enum config_id id)
{
    return (unsigned)id < CONFIG_COUNT ? c->bytes + c->text[id] : "";
}

size_t config_list_count(const struct config *c, enum config_id id)
{
    return is_kind(id, KIND_LIST) ? c->items[id] : 0;
}

const char *config_list_item(const struct config *c, enum config_id id, size_t n)
{
    if (n >= config_list_count(c, id))
        return NULL;
    return c->bytes + c->item_text[c->order[c->first[id] + n]];
}

static bool is_decimal(const char *text, uint64_t number)
{
    uint64_t value = 0;

    if (*text == '\0')
        return false;
    for (; *text; text++) {
        if (*text < '0' || *text > '9' || __builtin_mul_overflow(value, 10u, &value) ||
            __builtin_add_overflow(value, (unsigned)(*text - '0'), &value))
            return false;
    }
    return value == number;
}

bool config_list_has(const struct config *c, enum config_id id, const char *name, uint64_t number)
{
    const char *item;

    for (size_t n = 0; (item = config_list_item(c, id, n)) != NULL; n++) {
        if ((name && strcmp(item, name) == 0) || is_decimal(item, number))
            return true;
    }
    return false;
}

unsigned config_line(const struct config *c, enum config_id id)
{
    return (unsigned)id < CONFIG_COUNT ? c->line[id] : 0;
}

const char *config_key(enum config_id id)
{
    return (unsigned)id < CONFIG_COUNT ? config_rows[id].key : "";
}

const char *config_type(enum config_id id)
{
    return (unsigned)id < CONFIG_COUNT ? config_rows[id].type : "";
}
