/* Checks and walks the PROCESS memfd; see process.h. */
#include "process.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "generated/build.h"

/* A file that could still change would pass every check and then be another one. */
#define SEALS (F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE)

/* Of one part: the size of an element (0: strings), and how many there may be. */
static const struct {
    uint32_t size, most;
} parts[PROCESS_PART_COUNT] = {
    [PROCESS_GROUPS] = {sizeof(uint32_t), PROCESS_GROUPS_MAX},
    [PROCESS_FILTER] = {sizeof(struct sock_filter), PROCESS_FILTER_MAX},
    [PROCESS_ARGS] = {0, PROCESS_STRINGS_MAX},
    [PROCESS_ENV] = {0, PROCESS_STRINGS_MAX},
    [PROCESS_CWD] = {0, 1},
    [PROCESS_LABEL] = {0, 1},
    [PROCESS_HOOKS] = {1, 1},
};

static uint32_t start_of(const struct process_header *h, size_t part) {
    uint32_t before = part == 0 ? (uint32_t)sizeof(*h) : h->end[part - 1];
    return (before + 7) & ~(uint32_t)7;
}

static int check_header(const struct process_header *h, size_t size) {
    static const char own[PROCESS_BUILD_ID_BYTES] = APY_BUILD_ID;
    if (memcmp(h->magic, PROCESS_MAGIC, sizeof(h->magic)) != 0 || h->total != size ||
        memcmp(h->build_id, own, sizeof(own)) != 0)
        return -1;
    if (h->flags & ~(uint32_t)PROCESS_FLAGS_ALL || h->umask > 0777 || h->reserved != 0 ||
        h->keep_fds > PROCESS_FDS_MAX || h->uid == UINT32_MAX || h->gid == UINT32_MAX)
        return -1;
    return h->count[PROCESS_ARGS] == 0 ? -1 : 0;
}

static int check_strings(const char *at, const char *end, uint32_t count) {
    for (; count > 0; count--) {
        const char *nul = memchr(at, '\0', (size_t)(end - at));
        if (nul == NULL)
            return -1;
        at = nul + 1;
    }
    return at == end ? 0 : -1;
}

static int check_part(const char *base, const struct process_header *h, size_t part) {
    uint32_t before = part == 0 ? (uint32_t)sizeof(*h) : h->end[part - 1];
    uint32_t start = start_of(h, part), end = h->end[part];
    if (before > h->total || start > h->total || end < start || end > h->total ||
        h->count[part] > parts[part].most)
        return -1;
    for (uint32_t i = before; i < start; i++)
        if (base[i] != '\0')
            return -1;
    if (parts[part].size == 0)
        return check_strings(base + start, base + end, h->count[part]);
    if (part == PROCESS_HOOKS)
        return (h->count[part] == 0) == (end == start) ? 0 : -1;
    return end - start == h->count[part] * parts[part].size ? 0 : -1;
}

int process_check(const void *bytes, size_t size, struct process *out) {
    struct process_header *h = &out->header;
    if (size < sizeof(*h) || size > PROCESS_BYTES_MAX)
        return -1;
    memcpy(h, bytes, sizeof(*h));
    if (check_header(h, size) < 0)
        return -1;
    for (size_t part = 0; part < PROCESS_PART_COUNT; part++)
        if (check_part(bytes, h, part) < 0)
            return -1;
    out->base = bytes;
    return h->end[PROCESS_PART_COUNT - 1] == size ? 0 : -1;
}

int process_map(int fd, struct process *out) {
    struct stat st;
    int seals = fcntl(fd, F_GET_SEALS);
    if (seals < 0 || (seals & SEALS) != SEALS || fstat(fd, &st) < 0 || st.st_size <= 0 ||
        st.st_size > (off_t)PROCESS_BYTES_MAX) {
        errno = EINVAL;
        return -1;
    }
    void *bytes = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (bytes == MAP_FAILED)
        return -1;
    if (process_check(bytes, (size_t)st.st_size, out) == 0)
        return 0;
    (void)munmap(bytes, (size_t)st.st_size);
    errno = EINVAL;
    return -1;
}

const char *process_bytes(const struct process *p, enum process_part part, size_t *size) {
    uint32_t start = start_of(&p->header, part);
    *size = p->header.end[part] - start;
    return p->base + start;
}

const char *process_string(const struct process *p, enum process_part part) {
    size_t size;
    const char *text = process_bytes(p, part, &size);
    return p->header.count[part] == 0 ? NULL : text;
}

void process_strings(const struct process *p, enum process_part part, char **out) {
    size_t size;
    const char *at = process_bytes(p, part, &size);
    for (uint32_t i = 0; i < p->header.count[part]; i++) {
        memcpy(&out[i], &at, sizeof(at)); /* execve(2) takes as char * what it never writes */
        at += strlen(at) + 1;
    }
    out[p->header.count[part]] = NULL;
}
