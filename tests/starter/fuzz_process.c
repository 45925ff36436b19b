/* A PROCESS frame of any bytes: checked within its bounds, and what passes can be walked. */
#include "../../starter/process.c"

#include "fuzz.h"

static uint64_t accepted;

static void walk(const struct process *p, const char *begin, size_t size) {
    static char *strings[PROCESS_STRINGS_MAX + 1];
    for (int part = 0; part < PROCESS_PART_COUNT; part++) {
        size_t length;
        const char *at = process_bytes(p, (enum process_part)part, &length);
        must(at >= begin && length <= size && at + length <= begin + size, "a part is inside");
        must(((size_t)(at - begin) & 7) == 0, "a part is aligned");
    }
    const enum process_part lists[] = {PROCESS_ARGS, PROCESS_ENV};
    for (int i = 0; i < 2; i++) {
        process_strings(p, lists[i], strings);
        for (char **at = strings; *at; at++)
            must(*at >= begin && *at + strlen(*at) < begin + size, "a string is inside");
    }
    const char *cwd = process_string(p, PROCESS_CWD);
    must(cwd == NULL || cwd + strlen(cwd) < begin + size, "the directory is inside");
    const char *label = process_string(p, PROCESS_LABEL);
    must(label == NULL || label + strlen(label) < begin + size, "the label is inside");
    must(p->header.count[PROCESS_ARGS] > 0, "there is a program");
}

static uint32_t add(char *bytes, uint32_t *at, const void *content, uint32_t size) {
    while (*at & 7)
        bytes[(*at)++] = '\0';
    if (size > 0)
        memcpy(bytes + *at, content, size);
    *at += size;
    return *at;
}

static uint32_t make(char *bytes) {
    static const uint32_t groups[] = {1, 2, 3};
    static const char filter[16], args[] = "sh\0-c\0true", env[] = "PATH=/bin\0X=", cwd[] = "/";
    struct process_header h = {.magic = PROCESS_MAGIC,
                               .build_id = APY_BUILD_ID,
                               .flags = PROCESS_SET_GROUPS,
                               .count = {3, 2, 3, 2, 1, 0, 1}};
    uint32_t at = sizeof(h);
    h.end[PROCESS_GROUPS] = add(bytes, &at, groups, sizeof(groups));
    h.end[PROCESS_FILTER] = add(bytes, &at, filter, sizeof(filter));
    h.end[PROCESS_ARGS] = add(bytes, &at, args, sizeof(args));
    h.end[PROCESS_ENV] = add(bytes, &at, env, sizeof(env));
    h.end[PROCESS_CWD] = add(bytes, &at, cwd, sizeof(cwd));
    h.end[PROCESS_LABEL] = add(bytes, &at, NULL, 0);
    h.end[PROCESS_HOOKS] = add(bytes, &at, "hooks", 5);
    h.total = at;
    memcpy(bytes, &h, sizeof(h));
    return at;
}

static void once(void) {
    char bytes[1024] = "";
    uint32_t size = make(bytes);
    for (uint32_t n = dice(4); n > 0; n--) {
        /* Mostly the numbers that say where things are. */
        size_t from = dice(2) ? offsetof(struct process_header, count) : 0;
        mutate(bytes + from, (dice(2) ? sizeof(struct process_header) : size) - from);
    }
    size -= dice(8) == 0 ? dice(size) : 0;
    char *exact = malloc(size); /* the sanitizer sees a read past the end */
    must(exact != NULL, "there is memory");
    memcpy(exact, bytes, size);
    struct process p;
    if (process_check(exact, size, &p) == 0) {
        accepted++;
        walk(&p, exact, size);
    }
    free(exact);
}

int main(int argc, char **argv) {
    fuzz_main(argc, argv, once, &accepted);
    return 0;
}
