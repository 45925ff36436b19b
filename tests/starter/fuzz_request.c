/* Hostile headers for the launcher's memfd: what is accepted must hold for every later reader. */
#include "../../starter/request.c"

#include "fuzz.h"

static uint64_t accepted;

static void accepted_header_holds(const struct request_header *h, off_t size) {
    must(memcmp(h->magic, REQUEST_MAGIC, 8) == 0 && h->version == REQUEST_VERSION, "it is ours");
    must((off_t)h->total == size && h->total <= LIMIT_REQUEST_BYTES, "it is as long as it says");
    must(h->argv_off == sizeof(*h) && h->argv_off <= h->env_off && h->env_off <= h->cwd_off &&
             h->cwd_off <= h->engine_off && h->engine_off <= h->engine_file_off &&
             h->engine_file_off <= h->total, "its parts lie in order, inside");
    must(h->engine_off - h->cwd_off <= REQUEST_CWD_MAX, "the directory is bounded");
    must(h->engine_file_off - h->engine_off <= REQUEST_ENGINE_MAX, "so is the engine's name");
    must(h->argc >= 1 && h->argc <= REQUEST_ARGC_MAX && h->envc <= REQUEST_ENVC_MAX, "so is argc");
    must((h->flags & ~(uint32_t)(REQUEST_TRACE | REQUEST_INSTANCE)) == 0, "no unknown flag is left");
    must(h->image_arg < h->argc, "the image is one of the arguments");
}

static void once(void) {
    uint32_t part = dice(64);
    struct request_header h = {
        .magic = REQUEST_MAGIC, .version = REQUEST_VERSION, .header_size = sizeof(h),
        .build_id = APY_BUILD_ID, .flow = FLOW_SETUID, .trace_fd = -1, .argc = 1 + dice(4),
        .envc = dice(4), .argv_off = sizeof(h), .env_off = (uint32_t)sizeof(h) + part,
        .cwd_off = (uint32_t)sizeof(h) + 2 * part, .engine_off = (uint32_t)sizeof(h) + 3 * part,
        .engine_file_off = (uint32_t)sizeof(h) + 4 * part,
        .total = (uint32_t)sizeof(h) + 4 * part + 1,
    };
    off_t size = (off_t)h.total;
    for (uint32_t n = dice(5); n > 0; n--) {
        size_t numbers = offsetof(struct request_header, flow);
        if (dice(2) == 0)
            mutate((char *)&h + numbers, sizeof(h) - numbers);
        else
            mutate(&h, sizeof(h));
    }
    if (dice(4) == 0)
        size = (off_t)odd_number();
    else if (dice(4) == 0)
        size = (off_t)h.total;
    if (check_header(&h, size) == 0) {
        accepted++;
        accepted_header_holds(&h, size);
    }
}

int main(int argc, char **argv) {
    fuzz_main(argc, argv, once, &accepted);
    return 0;
}
