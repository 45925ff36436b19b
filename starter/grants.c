/* capability.json as Apptainer writes it: who was granted which capabilities.  One strict form, and
 * anything else is an error; run without any privilege. */
#include <string.h>

#include "starter.h"

enum { WORD_BYTES = 256 };

struct reading {
    const char *at, *end;
    grants_match matches;
    const void *whose;
    uint64_t granted;
};

static bool take(struct reading *r, char c) {
    while (r->at < r->end && memchr(" \t\r\n", *r->at, 4))
        r->at++;
    if (r->at == r->end || *r->at != c)
        return false;
    r->at++;
    return true;
}

static bool at_end(struct reading *r) {
    return !take(r, '\0') && r->at == r->end;
}

/* No escapes: what they would mean is not worth a rule, and no name needs them. */
static bool take_word(struct reading *r, char word[WORD_BYTES]) {
    if (!take(r, '"'))
        return false;
    for (size_t length = 0; r->at < r->end && length < WORD_BYTES; r->at++) {
        if (*r->at == '"') {
            word[length] = '\0';
            r->at++;
            return true;
        }
        if ((unsigned char)*r->at < ' ' || *r->at == '\\' || *r->at == 0x7f)
            return false;
        word[length++] = *r->at;
    }
    return false;
}

static bool take_null(struct reading *r) {
    const char *start = r->at;
    if (take(r, 'n') && r->end - r->at >= 3 && memcmp(r->at, "ull", 3) == 0) {
        r->at += 3;
        return true;
    }
    r->at = start;
    return false;
}

/* A name that this version does not know gives nothing. */
static uint64_t capability(const char *word) {
    static const char *const names[] = {
#define CAPABILITY(name, number) [number] = "CAP_" #name,
#include "rows.h"
    };
    for (size_t cap = 0; cap < ARRAY_SIZE(names); cap++)
        if (strcmp(names[cap], word) == 0)
            return CAP_BIT(cap);
    return 0;
}

/* ["CAP_X", ...] */
static bool take_list(struct reading *r, bool ours) {
    char word[WORD_BYTES];
    if (take_null(r))
        return true;
    if (!take(r, '['))
        return false;
    if (take(r, ']'))
        return true;
    do {
        if (!take_word(r, word))
            return false;
        if (ours)
            r->granted |= capability(word);
    } while (take(r, ','));
    return take(r, ']');
}

/* {"name": ["CAP_X", ...], ...}; a name that is there twice has what both say. */
static bool take_names(struct reading *r, bool group) {
    char word[WORD_BYTES];
    if (take_null(r))
        return true;
    if (!take(r, '{'))
        return false;
    if (take(r, '}'))
        return true;
    do {
        if (!take_word(r, word) || !take(r, ':') ||
            !take_list(r, r->matches(word, group, r->whose)))
            return false;
    } while (take(r, ','));
    return take(r, '}');
}

/* {"users": ..., "groups": ...}, each at most once. */
static bool take_file(struct reading *r) {
    char word[WORD_BYTES];
    bool seen[2] = {false, false};
    if (!take(r, '{'))
        return false;
    if (take(r, '}'))
        return at_end(r);
    do {
        if (!take_word(r, word) || !take(r, ':'))
            return false;
        bool group = strcmp(word, "groups") == 0;
        if ((!group && strcmp(word, "users") != 0) || seen[group] || !take_names(r, group))
            return false;
        seen[group] = true;
    } while (take(r, ','));
    return take(r, '}') && at_end(r);
}

/* 0 and the mask, or -1: the text has another form.  An empty file grants nothing. */
int grants_read(const char *text, size_t size, grants_match matches, const void *whose,
                uint64_t *granted) {
    struct reading r = {.at = text, .end = text + size, .matches = matches, .whose = whose};
    *granted = 0;
    if (at_end(&r))
        return 0;
    if (!take_file(&r))
        return -1;
    *granted = r.granted;
    return 0;
}
