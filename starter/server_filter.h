/* What the filters of the image server are written with: a list of system calls, the end for all
 * others.  Calls of the server's inner loop look at no argument, so that the kernel answers them
 * from a table; it fills that by trying each number there is, hence the groups. */
#ifndef APY_SERVER_FILTER_H
#define APY_SERVER_FILTER_H

#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__x86_64__)
#define FILTER_MACHINE AUDIT_ARCH_X86_64
#define FILTER_TIMER SYS_alarm, SYS_time /* the latter where the kernel was started with vdso=0 */
#elif defined(__aarch64__)
#define FILTER_MACHINE AUDIT_ARCH_AARCH64
#define FILTER_TIMER SYS_setitimer
#else
#error "the image server's filters do not know this machine"
#endif

enum { FILTER_MOST = 128, FILTER_GROUP = 6 };
#define FILTER_COUNT(array) (sizeof(array) / sizeof((array)[0]))
struct filter_code {
    unsigned short length;
    struct sock_filter code[FILTER_MOST];
};

#define FILTER_LOAD(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
#define FILTER_ALLOW BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)
#define FILTER_KILL BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS)
#define FILTER_REFUSE(error) BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | (error))
#define FILTER_UNLESS(value, skipped) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (value), 0, (skipped))
/* Another machine's numbers would mean other calls. */
#define FILTER_BEGIN                                                                              \
    FILTER_LOAD(arch), BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, FILTER_MACHINE, 1, 0), FILTER_KILL,    \
        FILTER_LOAD(nr)

/* What serving takes, once everything is open: memory, the device, the image, signals, the end. */
#define FILTER_SERVING                                                                            \
    SYS_read, SYS_writev, SYS_pread64, SYS_write, SYS_brk, SYS_mmap, SYS_munmap, SYS_mremap,      \
        SYS_madvise, SYS_mprotect, SYS_futex, SYS_close, SYS_rt_sigaction, SYS_rt_sigprocmask,    \
        SYS_rt_sigreturn, SYS_restart_syscall, SYS_clock_gettime, SYS_getpid, SYS_exit,           \
        SYS_exit_group, FILTER_TIMER

/* Two instructions a call, two a group: a filter that lost its end would be another one. */
#define FILTER_FITS(first, calls)                                                                 \
    _Static_assert(FILTER_COUNT(first) + 2 * FILTER_COUNT(calls) +                                \
                           2 * ((FILTER_COUNT(calls) + FILTER_GROUP - 1) / FILTER_GROUP) <=       \
                       FILTER_MOST,                                                               \
                   "the filter is longer than FILTER_MOST")

/* Its callers state FILTER_FITS() of all that they add. */
static inline void filter_add(struct filter_code *f, const struct sock_filter *code, size_t count) {
    for (size_t i = 0; i < count; i++)
        f->code[f->length++] = code[i];
}

static inline void filter_sort(int *calls, size_t count) {
    for (size_t i = 1; i < count; i++)
        for (size_t j = i; j > 0 && calls[j - 1] > calls[j]; j--) {
            int later = calls[j];
            calls[j] = calls[j - 1];
            calls[j - 1] = later;
        }
}

/* The last part of a filter: these are allowed, in groups that are left out as a whole. */
static inline void filter_allow(struct filter_code *f, int *calls, size_t count) {
    filter_sort(calls, count);
    for (size_t first = 0; first < count; first += FILTER_GROUP) {
        size_t next = first + FILTER_GROUP < count ? first + FILTER_GROUP : count;
        const struct sock_filter kill = FILTER_KILL,
                                 leave_out = BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K,
                                                      (uint32_t)calls[next < count ? next : 0],
                                                      (uint8_t)(2 * (next - first) + 1), 0);
        if (next < count)
            filter_add(f, &leave_out, 1);
        for (size_t i = first; i < next; i++) {
            const struct sock_filter one[] = {FILTER_UNLESS((uint32_t)calls[i], 1), FILTER_ALLOW};
            filter_add(f, one, 2);
        }
        filter_add(f, &kill, 1);
    }
}

/* SAFE: binds the image server alone, which has dropped everything, or never had it.  A kernel that
 * has no filters leaves it as it is: the user's own, with no_new_privs. */
static inline void filter_bind(struct filter_code *f) {
    const struct sock_fprog program = {.len = f->length, .filter = f->code};
    (void)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_SPEC_ALLOW, &program);
}

#endif
