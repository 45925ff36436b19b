/* Ranges of subordinate ids, read from the administrator's files.  Changes nothing and opens
 * nothing; whoever asks has no privilege. */
#include "subids.h"

#include <string.h>

struct line {
    const char *name;
    size_t name_length;
    bool off;                          /* `!name:...`: switched off by `config fakeroot -d` */
    struct subid_range range;
};

/* A number of one spelling that fits; what follows it must be `end`. */
static bool to_number(const char *text, size_t length, uint64_t *number) {
    *number = 0;
    if (length == 0 || length > 10)
        return false;
    for (size_t i = 0; i < length; i++) {
        if (text[i] < '0' || text[i] > '9')
            return false;
        *number = *number * 10 + (uint64_t)(text[i] - '0');
    }
    return *number <= UINT32_MAX;
}

/* What lies before the next colon, if there must be one or not; then `text` is behind it. */
static bool take_field(const char **text, const char *end, bool colon, const char **field,
                       size_t *length) {
    const char *stop = memchr(*text, ':', (size_t)(end - *text));
    if (!stop && colon)
        return false;
    *field = *text;
    *length = (size_t)((stop ? stop : end) - *text);
    *text = stop ? stop + 1 : end;
    return true;
}

/* name:first:count; the last id that there is stands for none.  Fields behind these are nobody's,
 * as for shadow's newuidmap: what it reads as a range is one. */
static bool read_line(const char *text, size_t length, struct line *out) {
    const char *end = text + length, *first, *second;
    size_t first_length, second_length;
    uint64_t start, count;
    memset(out, 0, sizeof(*out));
    if (!take_field(&text, end, true, &out->name, &out->name_length) ||
        !take_field(&text, end, true, &first, &first_length) ||
        !take_field(&text, end, false, &second, &second_length))
        return false;
    if (!to_number(first, first_length, &start) || !to_number(second, second_length, &count) ||
        count == 0 || start + count > UINT32_MAX)
        return false;
    out->range = (struct subid_range){(uint32_t)start, (uint32_t)count};
    if (out->name_length > 0 && out->name[0] == '!') {
        out->off = true;
        out->name++;
        out->name_length--;
    }
    return out->name_length > 0;
}

static bool is_owner(const struct line *l, const char *name, uint32_t id) {
    uint64_t number;
    if (strlen(name) == l->name_length && memcmp(name, l->name, l->name_length) == 0)
        return true;
    return to_number(l->name, l->name_length, &number) && number == id;
}

static const char *next_line(const char **at, const char *end, size_t *length) {
    const char *line = *at;
    if (line >= end)
        return NULL;
    const char *stop = memchr(line, '\n', (size_t)(end - line));
    *length = (size_t)((stop ? stop : end) - line);
    *at = stop ? stop + 1 : end;
    if (*length > 0 && line[*length - 1] == '\r')
        --*length; /* of an editor on another system; it hides nobody's range */
    return line;
}

/* As Apptainer chooses: the first range of just the wanted size, else the largest.  Lines that are
 * switched off take part: who has such a one first has none, whatever else there is. */
enum subids_answer subids_find(const char *text, size_t size, const char *name, uint32_t id,
                               struct subid_range *found) {
    const char *at = text, *end = text + size, *line;
    size_t length;
    struct line l, chosen = {.off = false};
    bool any = false;
    while ((line = next_line(&at, end, &length)) != NULL) {
        if (!read_line(line, length, &l) || !is_owner(&l, name, id))
            continue;
        any = true;
        if (chosen.range.count != SUBIDS_WANTED &&
            (l.range.count == SUBIDS_WANTED || l.range.count > chosen.range.count))
            chosen = l;
    }
    if (chosen.range.count < SUBIDS_WANTED)
        return any ? SUBIDS_SMALL : SUBIDS_NONE;
    *found = chosen.range;
    return chosen.off ? SUBIDS_NONE : SUBIDS_FOUND;
}

static bool overlap(const struct subid_range *a, const struct subid_range *b) {
    return a->first < (uint64_t)b->first + b->count && b->first < (uint64_t)a->first + a->count;
}

/* Does somebody else's line, switched off or not, have an id of this range? */
bool subids_taken(const char *text, size_t size, const char *name, uint32_t id,
                  const struct subid_range *range) {
    const char *at = text, *end = text + size, *line;
    size_t length;
    struct line l;
    while ((line = next_line(&at, end, &length)) != NULL)
        if (read_line(line, length, &l) && !is_owner(&l, name, id) && overlap(&l.range, range))
            return true;
    return false;
}

/* Does an account of /etc/passwd, or a group of /etc/group, have an id of this range? */
bool subids_accounts(const char *text, size_t size, const struct subid_range *range) {
    const char *at = text, *end = text + size, *line;
    size_t length;
    while ((line = next_line(&at, end, &length)) != NULL) {
        const char *stop = line + length, *field = line;
        uint64_t number;
        for (int skipped = 0; field && skipped < 2; skipped++) {
            field = memchr(field, ':', (size_t)(stop - field));
            field = field ? field + 1 : NULL;
        }
        if (!field)
            continue;
        const char *close = memchr(field, ':', (size_t)(stop - field));
        size_t digits = (size_t)((close ? close : stop) - field);
        if (to_number(field, digits, &number) && number >= range->first &&
            number < (uint64_t)range->first + range->count)
            return true;
    }
    return false;
}
