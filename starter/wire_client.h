/* The unprivileged ends of the channels: wire.c again, for the Cython module. */
#ifndef APY_WIRE_CLIENT_H
#define APY_WIRE_CLIENT_H

#include <errno.h>
#include <link.h>
#include <linux/magic.h>
#include <linux/openat2.h>
#include <poll.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "protocol.h"
#include "stagehost.h"

#pragma weak stagehost_get

#define APY_WIRE_CLIENT
#include "wire.c"

static const struct stage_info *wire_stage(void) {
    return stagehost_get ? stagehost_get() : NULL;
}

/* openat2(2) asks for another try where something was renamed or mounted, anywhere, while it went
 * through a path with "..". */
static int wire_openat2(int directory, const char *path, uint64_t flags, uint64_t resolve) {
    struct open_how how = {.flags = flags | 02000000 /* O_CLOEXEC */, .resolve = resolve};
    int fd = -1;
    for (int tries = 0; tries < 256; tries++) {
        fd = (int)syscall(SYS_openat2, directory, path, &how, sizeof(how));
        if (fd >= 0 || errno != EAGAIN)
            break;
    }
    return fd;
}

static int wire_is_proc(int fd) {
    struct statfs fs;
    return fstatfs(fd, &fs) == 0 && fs.f_type == PROC_SUPER_MAGIC;
}

/* One loaded object's read-only segments: the page cache has them when they are wanted again. */
static int release_segments(struct dl_phdr_info *object, size_t size, void *unused) {
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE) - 1;
    (void)size;
    (void)unused;
    for (int i = 0; i < object->dlpi_phnum; i++) {
        const ElfW(Phdr) *segment = &object->dlpi_phdr[i];
        uintptr_t start = (object->dlpi_addr + segment->p_vaddr) & ~page;
        uintptr_t end = (object->dlpi_addr + segment->p_vaddr + segment->p_memsz + page) & ~page;
        if (segment->p_type == PT_LOAD && !(segment->p_flags & PF_W))
            (void)madvise((void *)start, end - start, MADV_DONTNEED);
    }
    return 0;
}

/* Before a sleep that may last for days; a short one would only have the pages mapped again.  Who
 * has waited that long already asks for no descriptor (-1). */
enum { SLEEP_IS_LONG_MS = 100 };

static void wire_release_code(int fd) {
    struct pollfd first = {.fd = fd, .events = POLLIN};
    if (fd < 0 || poll(&first, 1, SLEEP_IS_LONG_MS) == 0)
        (void)dl_iterate_phdr(release_segments, NULL);
}

static uint64_t wire_bounding(void) {
    uint64_t set = 0;
    for (int cap = 0; cap < 64; cap++)
        if (prctl(PR_CAPBSET_READ, cap) == 1)
            set |= (uint64_t)1 << cap;
    return set;
}

#endif
