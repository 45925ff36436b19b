/* What the image server may ask of the kernel from its first instruction on.  It is the user's own
 * process, which reads what others have made: an image that takes it over gets no socket, no other
 * program, no process, no file that it makes or writes to.  To open one for writing is refused and
 * not its end: libfuse asks for /dev/null, and goes on without.  What it serves with is narrower:
 * unpack_filter.c. */
#include "server_filter.h"

#include <errno.h>
#include <fcntl.h>

#include "starter.h"

enum { MAKES = O_CREAT | O_TRUNC | (O_TMPFILE & ~O_DIRECTORY), WORD_BITS = 32, WORD_BYTES = 4 };

/* One word of a pointer, for which any other is the end. */
#define ADDRESS(argument, offset, word)                                                           \
    BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[argument]) + (offset)), \
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (word), 1, 0), FILTER_KILL

/* To be called before the one execve of this path: a program that is there afterwards does not know
 * where in the memory of this one the path lay, and a wrong guess is its end. */
void server_filter(const char *path) {
    const uint64_t address = (uintptr_t)path;
    const struct sock_filter judged[] = {
        FILTER_BEGIN,
        FILTER_UNLESS(SYS_openat, 6),
        FILTER_LOAD(args[2]),
        BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, MAKES, 0, 1),
        FILTER_KILL,
        BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, O_ACCMODE, 0, 1),
        FILTER_REFUSE(EACCES),
        FILTER_ALLOW,
        FILTER_UNLESS(SYS_execve, 7),
        ADDRESS(0, 0, (uint32_t)address),
        ADDRESS(0, WORD_BYTES, (uint32_t)(address >> WORD_BITS)),
        FILTER_ALLOW,
    };
    int loading[] = {
#if defined(__x86_64__)
        SYS_arch_prctl, SYS_access,
#endif
        FILTER_SERVING, SYS_newfstatat, SYS_fstat, SYS_faccessat, SYS_fcntl, SYS_chdir, SYS_getuid,
        SYS_lseek, SYS_getrandom, SYS_prlimit64, SYS_set_tid_address, SYS_set_robust_list, SYS_rseq,
        SYS_seccomp};
    FILTER_FITS(judged, loading);
    struct filter_code filter = {.length = 0};
    filter_add(&filter, judged, FILTER_COUNT(judged));
    filter_allow(&filter, loading, FILTER_COUNT(loading));
    filter_bind(&filter);
}
