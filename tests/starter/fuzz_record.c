/* Hostile records and hook frames: what is accepted is read through once, under the sanitizers. */
#include "../../starter/hook.c"
#include "../../starter/record.c"

#include "fuzz.h"

static uint64_t accepted;
static char file[2048];

static size_t add(size_t at, const char *text) {
    size_t length = strlen(text) + 1;
    memcpy(file + at, text, length);
    return at + length;
}

static size_t make_record(void) {
    static const char *const words[] = {"id", "{", ",", "}", "/sys/fs/x", "/a/b", "/a"};
    struct record_header h = {.magic = RECORD_MAGIC, .version = RECORD_VERSION,
                              .phase = 1 + dice(2), .flags = dice(8), .init_pid = 42,
                              .count = {1, 3, 1, 2, 0, 0}};
    size_t at = sizeof(h), word = 0;
    for (enum record_part p = RECORD_ID; p < RECORD_PARTS; p++) {
        for (uint32_t i = 0; i < h.count[p]; i++)
            at = add(at, words[word++]);
        if (p >= RECORD_POSTSTART)
            at += dice(32);
        h.end[p] = (uint32_t)at;
    }
    h.total = (uint32_t)at;
    memcpy(file, &h, sizeof(h));
    return at;
}

static size_t make_hooks(void) {
    struct hook_header h = {.magic = HOOK_MAGIC, .count = dice(3), .state_before = dice(16),
                            .state_after = dice(16)};
    size_t at = sizeof(h) + h.state_before + h.state_after;
    for (uint32_t i = 0; i < h.count; i++) {
        struct hook_entry e = {.argc = 1 + dice(3), .envc = dice(3), .own_environment = dice(2)};
        size_t start = at;
        at = add(at + sizeof(e), "/bin/true");
        for (uint32_t k = 0; k < e.argc + e.envc; k++)
            at = add(at, "A=b");
        e.size = (uint32_t)(at - start);
        memcpy(file + start, &e, sizeof(e));
    }
    h.total = (uint32_t)at;
    memcpy(file, &h, sizeof(h));
    return at;
}

static void damage(size_t *size) {
    for (uint32_t n = dice(4); n > 0; n--)
        mutate(file, *size);
    if (dice(8) == 0)
        *size = dice((uint32_t)*size + 1);
}

static size_t read_all_strings(const struct record *r) {
    size_t sum = 0, size;
    for (enum record_part p = RECORD_ID; p < RECORD_POSTSTART; p++)
        for (uint32_t i = 0; i < r->head.count[p]; i++)
            sum += strlen(record_string(r, p, i));
    for (enum record_part p = RECORD_POSTSTART; p < RECORD_PARTS; p++) {
        const char *bytes = record_bytes(r, p, &size);
        must(bytes >= r->data && bytes + size <= r->data + r->head.total, "a part lies inside");
        sum += size;
    }
    return sum;
}

static void try_record(void) {
    struct record r;
    size_t size = make_record();
    damage(&size);
    char *exact = malloc(size + 1); /* so that the sanitizer sees a step behind its end */
    must(exact != NULL, "there is memory");
    memcpy(exact, file, size);
    if (record_check(&r, exact, size) == 0) {
        accepted++;
        must(read_all_strings(&r) <= size, "strings do not overlap");
    }
    free(exact);
}

static void read_entries(const char *frame, size_t size) {
    const char *strings[64];
    struct hook_header h;
    struct hook_entry e;
    memcpy(&h, frame, sizeof(h));
    const char *at = frame + sizeof(h) + h.state_before + h.state_after;
    for (uint32_t i = 0; i < h.count; i++, at += e.size) {
        memcpy(&e, at, sizeof(e));
        struct hook_strings k = {.arguments = strings, .environment = strings};
        must(at + e.size <= frame + size, "an entry lies inside");
        if (e.argc < 64 && e.envc < 64)
            must(walk_entry(at + sizeof(e), at + e.size, &e, &k) == 0, "it can be read again");
    }
    must(at == frame + size, "nothing lies behind the entries");
}

static void try_hooks(void) {
    size_t size = make_hooks();
    damage(&size);
    char *exact = malloc(size + 1);
    must(exact != NULL, "there is memory");
    memcpy(exact, file, size);
    if (hook_check(exact, size) == 0) {
        accepted++;
        read_entries(exact, size);
    }
    free(exact);
}

static void once(void) {
    memset(file, 0, sizeof(file));
    if (dice(2) == 0)
        try_record();
    else
        try_hooks();
}

int main(int argc, char **argv) {
    fuzz_main(argc, argv, once, &accepted);
    return 0;
}
