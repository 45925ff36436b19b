/* What is begun while stage 1 still starts its interpreter: the launcher's forecast, cut down to
 * what this caller may have.  A forecast decides nothing; a plan that differs starts again. */
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "starter.h"

static uint32_t permitted_spaces(const struct launch *l, uint32_t wanted) {
    const struct config *c = &l->config;
    uint32_t spaces = 0;
    if (config_bool(c, CONFIG_ALLOW_PID_NS))
        spaces |= SPACE_PID;
    if (config_bool(c, CONFIG_ALLOW_IPC_NS))
        spaces |= SPACE_IPC;
    if (config_bool(c, CONFIG_ALLOW_UTS_NS))
        spaces |= SPACE_UTS;
    return wanted & spaces;
}

/* Root's plan has capabilities that only stage 1 knows, so root gets no forecast in any flow. */
bool early_plan(const struct launch *l, struct container_plan *plan) {
    const struct request_header *h = &l->request;
    bool builtin = h->total - h->engine_file_off == 1;
    if (!(h->forecast & FORECAST_CONTAINER) || l->flow == FLOW_ROOT || l->uid == 0 ||
        !builtin)
        return false;
    /* Another rank's container may be there already, and who owns a namespace enters no other. */
    if (h->forecast & FORECAST_RANK && l->flow == FLOW_USERNS)
        return false;
    /* The image is mounted outside, by helpers that keeper starts while it is there itself. */
    if (h->forecast & FORECAST_FUSE && l->flow == FLOW_USERNS &&
        !config_bool(&l->config, CONFIG_ALLOW_USERNS_MOUNT_FUSE))
        return false;
    memset(plan, 0, sizeof(*plan));
    plan->uid = l->uid;
    plan->gid = l->gid;
    plan->spaces = permitted_spaces(l, h->forecast_spaces);
    const uint32_t foreseen = PLAN_SHIM | PLAN_WRITABLE_LAYER | PLAN_INSTANCE | PLAN_LEAN;
    plan->flags = PLAN_NO_NEW_PRIVS | (h->forecast_flags & foreseen);
    if (!(plan->spaces & SPACE_PID))
        plan->flags &= ~(uint32_t)(PLAN_SHIM | PLAN_INSTANCE);
    if (config_bool(&l->config, CONFIG_MOUNT_SLAVE))
        plan->flags |= PLAN_SLAVE;
    if (h->forecast & FORECAST_FUSE)
        plan->fuse_count = 1;
    return policy_plan(l, plan) == ERR_OK;
}

/* One argument of the request; callers have dropped, or use it as a name for a look-up that has. */
const char *early_word(const struct launch *l, uint32_t which, char *out, size_t size) {
    off_t at = l->request.argv_off;
    char piece[LIMIT_PATH_BYTES];
    if (which >= l->request.argc)
        return NULL;
    for (uint32_t n = 0;; n++) {
        ssize_t got = pread(l->request_fd, piece, sizeof(piece), at);
        if (got <= 0)
            return NULL;
        size_t length = strnlen(piece, (size_t)got);
        if (length == (size_t)got)
            return NULL; /* longer than a path */
        if (n == which) {
            if (length == 0 || length + 1 > size)
                return NULL;
            memcpy(out, piece, length + 1);
            return out;
        }
        at += (off_t)length + 1;
    }
}

/* The kernel tells a path of the mount namespace in which a file was found, which may be one of the
 * caller's, with any file in any place. */
static bool leads_to(const char *path, int fd) {
    struct stat there, open;
    return lstat(path, &there) == 0 && fstat(fd, &open) == 0 && there.st_dev == open.st_dev &&
           there.st_ino == open.st_ino;
}

/* The image's path for the audit record: as the kernel knows it, if the caller can open it; marked
 * as image/detect.py does where nothing leads to it. */
void early_image(const struct launch *l, char *out, size_t size) {
    char word[LIMIT_PATH_BYTES], link[32] = "/proc/self/fd/";
    if (!early_word(l, l->request.image_arg, word, sizeof(word)))
        return;
    append_text(out, size, word);
    int fd = open(word, O_PATH | O_CLOEXEC); /* SAFE: with the caller's fsuid; opens no contents */
    if (fd < 0)
        return;
    append_number(link, sizeof(link), (uint64_t)fd);
    ssize_t length = readlink(link, word, sizeof(word) - 1);
    if (length > 0 && (size_t)length < size) {
        word[length] = '\0';
        out[0] = '\0';
        if (!leads_to(word, fd))
            append_text(out, size, "(unreachable)");
        append_text(out, size, word);
    }
    close(fd);
}
