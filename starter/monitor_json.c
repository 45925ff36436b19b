/* What is sent to the control socket: one JSON object, of which a few members mean something. */
#include <string.h>

#include "monitor.h"

#define DEPTH_MAX 8
#define NAME_BYTES 32

/* A place in the text.  `more`: it ends too early; it may go on. */
struct reader {
    const char *at, *end;
    bool more;
};

static int peek(struct reader *r) {
    while (r->at < r->end && (*r->at == ' ' || *r->at == '\t' || *r->at == '\n' || *r->at == '\r'))
        r->at++;
    if (r->at < r->end)
        return (unsigned char)*r->at;
    r->more = true;
    return -1;
}

static bool take(struct reader *r, char wanted) {
    if (peek(r) != wanted)
        return false;
    r->at++;
    return true;
}

/* Names of ours have no escapes: one that has is none of ours, and its escapes need no sense. */
static bool read_string(struct reader *r, char *out, size_t size) {
    size_t used = 0;
    bool plain = true;
    if (!take(r, '"'))
        return false;
    while (r->at < r->end && *r->at != '"') {
        bool escape = *r->at == '\\';
        if ((unsigned char)*r->at < 0x20)
            return false;
        plain = plain && !escape;
        if (plain && used + 1 < size)
            out[used++] = *r->at;
        r->at += escape ? 2 : 1;
    }
    out[plain ? used : 0] = '\0';
    if (r->at >= r->end) {
        r->at = r->end;
        r->more = true;
        return false;
    }
    r->at++;
    return true;
}

static bool read_word(struct reader *r, const char *word) {
    size_t length = strlen(word), left = (size_t)(r->end - r->at);
    size_t shorter = left < length ? left : length;
    if (strncmp(r->at, word, shorter) != 0)
        return false;
    r->more = r->more || left < length;
    r->at += shorter;
    return left >= length;
}

/* A whole number: whatever has a sign, a fraction or an exponent is read, and is none. */
static bool read_number(struct reader *r, long *out) {
    bool whole = true;
    long value = 0;
    const char *start = r->at;
    for (; r->at < r->end && *r->at != '\0' && strchr("+-.eE0123456789", *r->at) != NULL; r->at++) {
        if (*r->at < '0' || *r->at > '9')
            whole = false;
        else if (value <= UINT16_MAX)
            value = value * 10 + (*r->at - '0');
    }
    *out = whole ? value : -1;
    r->more = r->more || r->at == r->end;
    return r->at > start && r->at < r->end;
}

static bool read_value(struct reader *r, int depth);

static bool read_list(struct reader *r, char close, int depth) {
    char name[NAME_BYTES];
    r->at++;
    if (take(r, close))
        return true;
    do {
        if (close == '}' && (!read_string(r, name, sizeof(name)) || !take(r, ':')))
            return false;
        if (!read_value(r, depth + 1))
            return false;
    } while (take(r, ','));
    return take(r, close);
}

/* Of members that mean nothing to us. */
static bool read_value(struct reader *r, int depth) {
    char text[NAME_BYTES];
    long number;
    if (depth > DEPTH_MAX)
        return false;
    switch (peek(r)) {
    case '{':
        return read_list(r, '}', depth);
    case '[':
        return read_list(r, ']', depth);
    case '"':
        return read_string(r, text, sizeof(text));
    case 't':
        return read_word(r, "true");
    case 'f':
        return read_word(r, "false");
    case 'n':
        return read_word(r, "null");
    default:
        return read_number(r, &number);
    }
}

static bool read_switch(struct reader *r, bool *out) {
    switch (peek(r)) {
    case 't':
        *out = read_word(r, "true");
        return *out;
    case 'f':
        *out = false;
        return read_word(r, "false");
    default:
        return read_word(r, "null");
    }
}

static bool read_side(struct reader *r, uint16_t *out) {
    long number = 0;
    if (peek(r) < 0 || !read_number(r, &number) || number < 0 || number > UINT16_MAX)
        return false;
    *out = (uint16_t)number;
    return true;
}

static bool read_size(struct reader *r, struct command *out) {
    char name[NAME_BYTES];
    if (peek(r) == 'n')
        return read_word(r, "null");
    if (!take(r, '{'))
        return false;
    out->has_size = true;
    if (take(r, '}'))
        return true;
    do {
        bool right = read_string(r, name, sizeof(name)) && take(r, ':');
        if (right && strcmp(name, "height") == 0)
            right = read_side(r, &out->rows);
        else if (right && strcmp(name, "width") == 0)
            right = read_side(r, &out->columns);
        else
            right = right && read_value(r, 1);
        if (!right)
            return false;
    } while (take(r, ','));
    return take(r, '}');
}

static bool read_member(struct reader *r, struct command *out) {
    char name[NAME_BYTES];
    const struct {
        const char *name;
        bool *on;
    } switches[] = {{"reopenLog", &out->reopen_log},
                    {"startContainer", &out->start},
                    {"pause", &out->pause},
                    {"resume", &out->resume}};
    if (!read_string(r, name, sizeof(name)) || !take(r, ':'))
        return false;
    if (strcmp(name, "consoleSize") == 0)
        return read_size(r, out);
    for (size_t i = 0; i < COUNT(switches); i++)
        if (strcmp(name, switches[i].name) == 0)
            return read_switch(r, switches[i].on);
    return read_value(r, 1);
}

enum json_found command_read(const char *bytes, size_t size, struct command *out) {
    struct reader r = {.at = bytes, .end = bytes + size};
    *out = (struct command){0};
    bool right = take(&r, '{');
    if (right && !take(&r, '}')) {
        do
            right = read_member(&r, out);
        while (right && take(&r, ','));
        right = right && take(&r, '}');
    }
    return right ? JSON_OBJECT : r.more ? JSON_MORE : JSON_WRONG;
}
