/* The unprivileged ends of the channels: wire.c again, for the Cython module. */
#ifndef APY_WIRE_CLIENT_H
#define APY_WIRE_CLIENT_H

#include <linux/openat2.h>
#include <stdint.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

#include "protocol.h"
#include "stagehost.h"

#pragma weak stagehost_get

#define APY_WIRE_CLIENT
#include "wire.c"

static const struct stage_info *wire_stage(void) {
    return stagehost_get ? stagehost_get() : NULL;
}

static int wire_openat2(int directory, const char *path, uint64_t flags, uint64_t resolve) {
    struct open_how how = {.flags = flags | 02000000 /* O_CLOEXEC */, .resolve = resolve};
    return (int)syscall(SYS_openat2, directory, path, &how, sizeof(how));
}

static uint64_t wire_bounding(void) {
    uint64_t set = 0;
    for (int cap = 0; cap < 64; cap++)
        if (prctl(PR_CAPBSET_READ, cap) == 1)
            set |= (uint64_t)1 << cap;
    return set;
}

#endif
