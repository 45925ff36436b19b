/* What stage 2 may send to the process that becomes the payload: any counts, any bytes, any file. */
#include "../../starter/bearer.c"

#include "fuzz.h"

static uint64_t accepted;
pid_t stage_rpc_pid;
static bool sealed;

/* ---- what belongs to other files of the starter ---- */

int request_check_seals(int fd, struct stat *st) {
    return sealed && fstat(fd, st) == 0 ? 0 : -1;
}
int wire_pair(int pair[2]) {
    pair[0] = pair[1] = -1;
    return -1;
}
int wire_send(int fd, const void *frame, size_t size, int passed) {
    (void)fd;
    (void)frame;
    (void)size;
    (void)passed;
    return -1;
}
ssize_t wire_receive(int fd, void *frame, size_t size, int *passed) {
    (void)fd;
    memset(frame, 0, size);
    if (passed)
        *passed = -1;
    return -1;
}
void fail(const char *what, int error) {
    (void)what;
    _exit(error);
}
void report(const char *level, const char *text) {
    (void)level;
    (void)text;
}
void step_begin(enum step step) {
    (void)step;
}
void step_end(enum step step) {
    (void)step;
}
void trace_set_role(enum role role) {
    (void)role;
}
void trace_process(void) {
}
void stage_target(const struct launch *l, enum role role, struct target_identity *target) {
    (void)l;
    (void)role;
    (void)target;
}
int privs_drop(const struct target_identity *target) {
    (void)target;
    return -1;
}
void stage_leave_start(int failed) {
    (void)failed;
}

bool stage_keeper_lives(const struct launch *l) {
    (void)l;
    return false;
}
int stage_die_with_keeper(const struct launch *l) {
    (void)l;
    return -1;
}
int stage_wait_for_rpc(struct launch *l, pid_t rpc) {
    (void)l;
    (void)rpc;
    return -1;
}
int stage_wait_for_go(const struct launch *l) {
    (void)l;
    return -1;
}
int filter_set(const void *code, size_t size, uint32_t flags) {
    (void)code;
    (void)size;
    (void)flags;
    return -1;
}
const void *filter_get(size_t *size, uint32_t *flags) {
    *size = 0;
    *flags = 0;
    return NULL;
}
void filter_load(void) {
}
int label_write(uint32_t kind, const char *text, size_t size) {
    (void)kind;
    must(text != NULL && size > 0 && size < LIMIT_LABEL_BYTES, "a label has its bytes");
    return EINVAL;
}
const void *label_get(size_t *size, uint32_t *kind) {
    *size = 0;
    *kind = 0;
    return NULL;
}
void label_check(const struct launch *l) {
    (void)l;
}
void sanitize_restore_for_payload(const struct launch *l) {
    (void)l;
}

static void holds(const struct bearer_request *q, char **vector, const char *text, size_t size) {
    const char *at = text;
    must(vector[q->argc + 1] == NULL && vector[q->argc + q->envc + 2] == NULL, "lists end");
    for (size_t i = 0; i < (size_t)q->argc + q->envc + 2; i++) {
        if (i == (size_t)q->argc + 1)
            continue;
        must(vector[i] != NULL && strcmp(vector[i], at) == 0, "each string is where it was");
        at += strlen(at) + 1;
    }
    must(at == text + size, "all strings are used");
}

static void once(void) {
    static char text[2048];
    struct bearer_request q = {.part = BEARER_PROGRAM, .argc = 1 + dice(3), .envc = dice(4)};
    static char name[] = "/bin/x", word[] = "an argument", variable[] = "A=b", empty[] = "";
    char *path[] = {name, NULL}, *argv[8] = {NULL}, *envp[8] = {NULL};
    for (uint32_t i = 0; i < q.argc; i++)
        argv[i] = word;
    for (uint32_t i = 0; i < q.envc; i++)
        envp[i] = i % 2 ? empty : variable;
    int fd = pack_program(&q, path, argv, envp);
    must(fd >= 0, "a program can be packed");
    ssize_t got = pread(fd, text, sizeof(text), 0);
    close(fd);
    must(got > 0 && got < (ssize_t)sizeof(text), "it is small");
    size_t size = (size_t)got;
    sealed = dice(64) != 0;
    for (uint32_t n = dice(4); n > 0; n--) {
        if (dice(2) == 0)
            mutate(&q.argc, sizeof(q.argc) + sizeof(q.envc));
        else
            mutate(text, size);
    }
    if (dice(8) == 0)
        size -= dice((uint32_t)size);
    fd = memfd_create("fuzz", MFD_CLOEXEC);
    must(fd >= 0 && write(fd, text, size) == (ssize_t)size, "there is memory");
    if (dice(64) == 0)
        must(ftruncate(fd, (off_t)1 << 40) == 0, "a file may claim any size");
    struct program p = {NULL, NULL};
    int result = unpack_program(&q, dice(256) == 0 ? -1 : fd, &p);
    close(fd);
    if (result < 0) {
        must(!p.text && !p.vector, "nothing is left of it");
        return;
    }
    must(sealed, "what can change under our eyes is refused");
    accepted++;
    holds(&q, p.vector, text, size);
    forget(&p);
}

int main(int argc, char **argv) {
    fuzz_main(argc, argv, once, &accepted);
    return 0;
}
