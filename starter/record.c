/* Takes a container's record apart; no field is used that has not been checked. */
#include <stdbool.h>
#include <string.h>

#include "record.h"

static uint32_t part_start(const struct record_header *h, enum record_part part) {
    return part == RECORD_ID ? (uint32_t)sizeof(*h) : h->end[part - 1];
}

static bool right_strings(const char *at, size_t size, uint32_t count) {
    uint32_t found = 0;
    for (size_t i = 0; i < size; i++)
        found += at[i] == '\0';
    return found == count && (size == 0 || at[size - 1] == '\0');
}

static bool right_count(enum record_part part, uint32_t count) {
    switch (part) {
    case RECORD_ID:
        return count == 1;
    case RECORD_STATE:
        return count == 3;
    case RECORD_FREEZER:
        return count <= 1;
    case RECORD_CGROUPS:
        return count <= RECORD_STRINGS_MAX;
    case RECORD_POSTSTART:
    case RECORD_POSTSTOP:
        return count == 0;
    case RECORD_PARTS:
    default:
        return false;
    }
}

int record_check(struct record *r, const char *data, size_t size) {
    struct record_header *h = &r->head;
    if (size < sizeof(*h) || size > RECORD_BYTES_MAX)
        return -1;
    memcpy(h, data, sizeof(*h));
    r->data = data;
    if (memcmp(h->magic, RECORD_MAGIC, sizeof(h->magic)) != 0 || h->version != RECORD_VERSION ||
        h->total != size || h->end[RECORD_PARTS - 1] != size || h->creator_pid < 0 ||
        h->init_pid < 0 || (h->phase != RECORD_CREATING && h->phase != RECORD_CREATED))
        return -1;
    for (enum record_part p = RECORD_ID; p < RECORD_PARTS; p++) {
        uint32_t start = part_start(h, p);
        if (h->end[p] < start || h->end[p] > size || !right_count(p, h->count[p]))
            return -1;
        if (p < RECORD_POSTSTART && !right_strings(data + start, h->end[p] - start, h->count[p]))
            return -1;
    }
    return 0;
}

const char *record_string(const struct record *r, enum record_part part, uint32_t number) {
    const char *at = r->data + part_start(&r->head, part);
    for (; number > 0; number--)
        at += strlen(at) + 1;
    return at;
}

const char *record_bytes(const struct record *r, enum record_part part, size_t *size) {
    uint32_t start = part_start(&r->head, part);
    *size = r->head.end[part] - start;
    return r->data + start;
}
