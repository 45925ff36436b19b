/* What a directive's value may be, and which directive was meant. */

#include "config_value.h"

#include <stdio.h>
#include <string.h>

const struct config_row config_rows[CONFIG_COUNT] = {
#define CONFIG(id, key, kind, value, allowed, ...) {key, #kind, value, allowed, KIND_##kind},
#include "config.def"
#undef CONFIG
};

/* A table that outgrows its places does not compile. */
#define CONFIG(id, key, kind, value, allowed, ...) +sizeof(value)
enum {
    DEFAULT_BYTES = 0
#include "config.def"
};
#undef CONFIG
_Static_assert(DEFAULT_BYTES <= CONFIG_DEFAULT_BYTES, "the defaults outgrow their place");

#define KEY_BYTES sizeof(((struct config_problem *)0)->nearest)
#define CONFIG(id, key, ...) _Static_assert(sizeof(key) <= KEY_BYTES, "this key is too long");
#include "config.def"
#undef CONFIG

/* Finds `word` in "yes|no|minimal": its place, or -1. */
static int place_of(const char *word, size_t length, const char *words)
{
    int place = 0;

    for (const char *start = words;; place++) {
        size_t span = strcspn(start, "|");

        if (span == length && span > 0 && memcmp(start, word, span) == 0)
            return place;
        if (start[span] == '\0')
            return -1;
        start += span + 1;
    }
}

static unsigned digit_of(char c)
{
    if (c >= '0' && c <= '9')
        return (unsigned)(c - '0');
    c = (char)(c | 0x20);
    return c >= 'a' && c <= 'f' ? (unsigned)(c - 'a') + 10 : 99;
}

/* A leading 0x, 0o, 0b or 0 sets the base, as Go's ParseUint(text, 0, 64) has it: files that
 * Apptainer accepts mean the same here. */
static const char *skip_base(const char *text, unsigned *base)
{
    char mark = (char)(text[0] == '0' ? text[1] | 0x20 : 0);

    *base = mark == 'x' ? 16 : mark == 'o' ? 8 : mark == 'b' ? 2 : 10;
    if (*base != 10)
        return text + 2;
    if (text[0] == '0' && text[1] != '\0')
        *base = 8;
    return text;
}

static bool parse_uint(const char *text, uint64_t *out)
{
    unsigned base;
    uint64_t number = 0;
    const char *digits = skip_base(text, &base);
    bool wants_digit = digits == text;

    if (*digits == '\0')
        return false;
    for (; *digits; digits++) {
        if (*digits == '_' && !wants_digit) {
            wants_digit = true;
            continue;
        }
        if (digit_of(*digits) >= base || __builtin_mul_overflow(number, base, &number) ||
            __builtin_add_overflow(number, digit_of(*digits), &number))
            return false;
        wants_digit = false;
    }
    *out = number;
    return !wants_digit;
}

static bool uint_allowed(const char *value, const char *range, uint64_t *out)
{
    char least[24];
    uint64_t low;
    uint64_t high;
    size_t span = strcspn(range, "|");

    if (span >= sizeof(least) || range[span] == '\0')
        return false;
    memcpy(least, range, span);
    least[span] = '\0';
    return parse_uint(least, &low) && parse_uint(range + span + 1, &high) &&
           parse_uint(value, out) && *out >= low && *out <= high;
}

static char folded(char c)
{
    return (char)(c >= 'A' && c <= 'Z' ? c | 0x20 : c == '_' || c == '-' ? ' ' : c);
}

/* Levenshtein's distance; letter case and the kind of separator count for nothing. */
static size_t distance(const char *a, const char *b)
{
    size_t row[KEY_BYTES + 1];
    size_t width = strlen(b);

    for (size_t j = 0; j <= width; j++)
        row[j] = j;
    for (size_t i = 0; a[i]; i++) {
        size_t corner = row[0]++;

        for (size_t j = 0; j < width; j++) {
            size_t best = corner + (folded(a[i]) != folded(b[j]));

            corner = row[j + 1];
            if (corner + 1 < best)
                best = corner + 1;
            if (row[j] + 1 < best)
                best = row[j] + 1;
            row[j + 1] = best;
        }
    }
    return row[width];
}

const char *config_nearest_key(const char *key)
{
    const char *nearest = NULL;
    size_t best = strlen(key) / 2 + 1;

    if (strlen(key) >= KEY_BYTES)
        return NULL;
    for (size_t id = 0; id < CONFIG_COUNT; id++) {
        size_t d = distance(key, config_rows[id].key);

        if (d < best) {
            best = d;
            nearest = config_rows[id].key;
        }
    }
    return nearest;
}

enum config_id config_id_of(const char *key)
{
    unsigned id = 0;

    while (id < CONFIG_COUNT && strcmp(config_rows[id].key, key) != 0)
        id++;
    return (enum config_id)id;
}

static bool path_allowed(const char *value, const char *words)
{
    return value[0] == '/' || place_of(value, strlen(value), words) >= 0;
}

static bool pathlist_allowed(const char *value, const char *words)
{
    for (;; value++) {
        size_t span = strcspn(value, ":");

        if (value[0] != '/' && place_of(value, span, words) < 0)
            return false;
        value += span;
        if (*value == '\0')
            return true;
    }
}

bool config_value_allowed(const struct config_row *row, const char *value, uint64_t *number)
{
    int place;

    switch (row->kind) {
    case KIND_BOOL:
    case KIND_ENUM:
        place = place_of(value, strlen(value), row->allowed);
        *number = (uint64_t)(row->kind == KIND_BOOL ? place == 0 : place);
        return place >= 0;
    case KIND_UINT:
        return uint_allowed(value, row->allowed, number);
    case KIND_PATH:
        return path_allowed(value, row->allowed);
    case KIND_PATHLIST:
        return pathlist_allowed(value, row->allowed);
    case KIND_LIST: /* one of its items */
        return strcmp(row->allowed, "paths") != 0 || value[0] == '/';
    case KIND_STRING:
    default:
        return true;
    }
}

void config_value_expected(const struct config_row *row, char *text, size_t size)
{
    static const char *const expected[] = {
        [KIND_BOOL] = "one of",
        [KIND_ENUM] = "one of",
        [KIND_UINT] = "a number within",
        [KIND_STRING] = "a text",
        [KIND_PATH] = "an absolute path",
        [KIND_PATHLIST] = "absolute directories with colons between",
        [KIND_LIST] = "an absolute path",
    };
    bool in_words = row->kind != KIND_LIST && row->allowed[0] != '\0';
    bool more = row->kind == KIND_PATH || row->kind == KIND_PATHLIST;

    (void)snprintf(text, size, "%s%s%s%s%s", expected[row->kind],
                   in_words && more ? " or one of" : "", in_words ? " [" : "",
                   in_words ? row->allowed : "", in_words ? "]" : "");
    for (char *p = strchr(text, '['); p && *p; p++)
        if (*p == '|')
            *p = ' ';
}
