/* The payload's own seccomp filter (--security seccomp:FILE), loaded last of all before execve: who
 * loads it is the payload but for its program, and has no right that a filter could turn against
 * anybody else. */
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "starter.h"

static struct {
    uint32_t size, flags;
    bool loaded;
    struct sock_filter code[LIMIT_FILTER_BYTES / sizeof(struct sock_filter)];
} filter;

/* Copies the program; -1 if it is none.  The kernel checks what it does. */
int filter_set(const void *code, size_t size, uint32_t flags) {
    const uint32_t known = SECCOMP_FILTER_FLAG_LOG | SECCOMP_FILTER_FLAG_SPEC_ALLOW;
    if (filter.size != 0 || size == 0 || size > sizeof(filter.code) ||
        size % sizeof(filter.code[0]) != 0 || flags & ~known)
        return -1;
    memcpy(filter.code, code, size);
    filter.size = (uint32_t)size;
    filter.flags = flags;
    return 0;
}

const void *filter_get(size_t *size, uint32_t *flags) {
    *size = filter.size;
    *flags = filter.flags;
    return filter.code;
}

/* A payload without the filter that was asked for never starts; a second try at another program
 * finds the filter loaded. */
void filter_load(void) {
    struct sock_fprog program = {
        .len = (unsigned short)(filter.size / sizeof(filter.code[0])), .filter = filter.code};
    if (filter.size == 0 || filter.loaded)
        return;
    /* SAFE: binds this process alone, which becomes the payload; no_new_privs is set, or the caller
     * is root of its namespace, else the kernel refuses. */
    if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, filter.flags, &program) != 0)
        fail("cannot load the seccomp filter that was asked for", errno);
    filter.loaded = true;
}
