/* Also loaded into the image server: from the first question that the kernel asks, it can no more
 * open anything.  Its device, its image and its libraries are open; what is wrong with an image
 * then reaches memory and a few descriptors. */
#include <dlfcn.h>

#include "server_filter.h"
#include "unpack.h"

int fuse_session_loop(void *session);

static void narrow(void) {
    const struct sock_filter begin[] = {FILTER_BEGIN};
    int serving[] = {FILTER_SERVING};
    FILTER_FITS(begin, serving);
    struct filter_code filter = {.length = 0};
    filter_add(&filter, begin, FILTER_COUNT(begin));
    filter_allow(&filter, serving, FILTER_COUNT(serving));
    filter_bind(&filter);
}

int fuse_session_loop(void *session) {
    union { void *in; int (*out)(void *); } next = {.in = dlsym(RTLD_NEXT, "fuse_session_loop")};
    if (next.out == NULL)
        _exit(127); /* libfuse is there, or nothing had been looked up */
    unpack_prepare(image_is_gzip());
    narrow();
    return next.out(session);
}
