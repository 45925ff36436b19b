/* Prints what process.c finds in a PROCESS frame, for test_process_frame.py. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "../../starter/process.c"

static void print_strings(const char *name, const struct process *p, enum process_part part) {
    char **strings = calloc(p->header.count[part] + 1, sizeof(char *));
    if (strings == NULL)
        exit(3);
    process_strings(p, part, strings);
    for (char **at = strings; *at; at++)
        printf("%s=%s\n", name, *at);
    free(strings);
}

static void print_numbers(const struct process_header *h) {
    printf("flags=%u\nids=%u %u\numask=%o\nkeep=%u\n", h->flags, h->uid, h->gid, h->umask,
           h->keep_fds);
    for (int i = 0; i < 5; i++)
        printf("caps=%" PRIx64 "\n", h->caps[i]);
    printf("filter_flags=%u\npersonality=%u\nio=%u\n", h->filter_flags, h->personality,
           h->io_priority);
    printf("policy=%u %" PRIx64 " %" PRIx64 "\n", h->policy_mode, h->policy_nodes[0],
           h->policy_nodes[15]);
    printf("sched=%u %d %u %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 "\n", h->sched_policy,
           h->sched_nice, h->sched_priority, h->sched_flags, h->sched_runtime, h->sched_deadline,
           h->sched_period);
}

static void print_bytes(const struct process *p) {
    size_t size;
    const char *groups = process_bytes(p, PROCESS_GROUPS, &size);
    for (uint32_t i = 0; i < p->header.count[PROCESS_GROUPS]; i++) {
        uint32_t group;
        memcpy(&group, groups + i * sizeof(group), sizeof(group));
        printf("group=%u\n", group);
    }
    (void)process_bytes(p, PROCESS_FILTER, &size);
    printf("filter=%u %zu\n", p->header.count[PROCESS_FILTER], size);
    (void)process_bytes(p, PROCESS_HOOKS, &size);
    printf("hooks=%u %zu\n", p->header.count[PROCESS_HOOKS], size);
}

static void print_all(const struct process *p) {
    print_numbers(&p->header);
    print_bytes(p);
    print_strings("arg", p, PROCESS_ARGS);
    print_strings("env", p, PROCESS_ENV);
    if (process_string(p, PROCESS_CWD))
        printf("cwd=%s\n", process_string(p, PROCESS_CWD));
    if (process_string(p, PROCESS_LABEL))
        printf("label=%s\n", process_string(p, PROCESS_LABEL));
}

int main(int argc, char **argv) {
    struct process p;
    int fd = argc == 2 ? open(argv[1], O_RDONLY) : -1;
    struct stat st;
    if (fd < 0 || fstat(fd, &st) < 0)
        return 2;
    char *bytes = malloc((size_t)st.st_size);
    if (bytes == NULL || read(fd, bytes, (size_t)st.st_size) != st.st_size)
        return 2;
    int result = process_check(bytes, (size_t)st.st_size, &p) < 0 ? 1 : 0;
    if (result == 0)
        print_all(&p);
    free(bytes);
    close(fd);
    return result;
}
