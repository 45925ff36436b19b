/* Between the parts of what is loaded into the image server. */
#ifndef APY_UNPACK_H
#define APY_UNPACK_H

#include <stdbool.h>

#define APART __attribute__((visibility("hidden")))

/* unpack.c: opens what unpacking needs; afterwards no library is looked for. */
APART void unpack_prepare(bool is_gzip);
/* unpack_fuse.c: whether the image's blocks are zlib's. */
APART bool image_is_gzip(void);

#endif
