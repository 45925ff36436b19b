/* Hooks that belong into the container: createContainer before its root is entered, startContainer
 * at the last moment. */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "hook.h"
#include "init.h"

#define HOOKS_BYTES_MAX (16 << 20)

static struct hook_result result;

/* What the hook has said, for master to print. */
static int hand_over_text(struct init *s) {
    size_t length = strnlen(result.text, sizeof(result.text));
    s->fd_out = memfd_create("hook-output", MFD_CLOEXEC);
    if (s->fd_out < 0)
        return -1;
    return write(s->fd_out, result.text, length) == (ssize_t)length &&
                   lseek(s->fd_out, 0, SEEK_SET) == 0
               ? 0
               : -1;
}

/* Paths are the host's still; the directory is the container's root, as with runc. */
static int run_at_root(const struct init *s, const char *frame, size_t size) {
    char *const environment[] = {NULL};
    if (s->root_fd >= 0 && fchdir(s->root_fd) < 0) {
        result.failed = 1;
        append_text(result.text, sizeof(result.text), "the root cannot be entered");
        return -1;
    }
    int failed = hook_run(frame, size, getpid(), environment, &result);
    if (chdir("/") < 0)
        return -1;
    return failed;
}

/* RUN_HOOKS(memfd with a frame of hook.h).  The value of a failed one is its number, from 1. */
int init_run_hooks(struct init *s, const struct op_request *q, struct op_reply *a) {
    struct stat st;
    if (s->passed < 0 || q->flags != 0)
        return ERR_MALFORMED;
    if (fstat(s->passed, &st) < 0 || st.st_size <= 0 || st.st_size > HOOKS_BYTES_MAX)
        return ERR_MALFORMED;
    void *frame = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, s->passed, 0);
    if (frame == MAP_FAILED)
        return init_failed(a);
    int failed = run_at_root(s, frame, (size_t)st.st_size);
    (void)munmap(frame, (size_t)st.st_size);
    if (failed == 0)
        return ERR_OK;
    a->value = result.failed;
    return hand_over_text(s) < 0 ? init_failed(a) : ERR_SYSTEM;
}

int hooks_before_start(const struct process *p, char *const envp[]) {
    size_t size;
    const char *frame = process_bytes(p, PROCESS_HOOKS, &size);
    if (p->header.count[PROCESS_HOOKS] == 0 ||
        hook_run(frame, size, getpid(), envp, &result) == 0)
        return 0;
    static char text[HOOK_TEXT_BYTES + 128] = "error running startContainer hook #";
    append_number(text, sizeof(text), result.failed - 1);
    append_text(text, sizeof(text), ": ");
    append_text(text, sizeof(text), result.text);
    append_text(text, sizeof(text), "\n");
    ssize_t ignored = write(STDERR_FILENO, text, strlen(text));
    (void)ignored;
    return -1;
}
