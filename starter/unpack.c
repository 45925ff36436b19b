/* Loaded into the image server before all other libraries: its two usual ways to unpack a block,
 * made cheaper.  Whatever cannot be had, or will not unpack, goes to the library that was meant. */
#include <dlfcn.h>
#include <malloc.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "unpack.h"

/* Of zlib.h, libdeflate.h and zstd.h, whose packages nothing else here needs. */
enum { UNPACKED = 0, ZLIB_DATA_ERROR = -3 };
typedef int zlib_function(unsigned char *, unsigned long *, const unsigned char *, unsigned long);
typedef void *make_function(void);
typedef int deflate_function(void *, const void *, size_t, void *, size_t, size_t *);
typedef size_t zstd_function(void *, size_t, const void *, size_t);
typedef size_t zstd_context_function(void *, void *, size_t, const void *, size_t);

zlib_function uncompress;
zstd_function ZSTD_decompress;

#define DEFLATE_LIBRARY "libdeflate.so.0"
enum { HEAP_SLACK_BYTES = 4 << 20, HUGE_BYTES = 2 << 20 };

/* What one thread unpacks with; made once, where the libraries make one for each block. */
static _Thread_local struct {
    int tried;
    void *context;
    deflate_function *unpack;
} deflate;

static _Thread_local struct {
    int tried;
    void *context;
    zstd_context_function *unpack;
} zstd;

/* All that the image server allocates, in one page: one fault, where small pages take hundreds.
 * The heap up to there is given away untouched.  A system without huge pages gives small ones. */
static void *given_away[2];

static void use_huge_page(void) {
    char *first = given_away[0] = malloc(1);
    size_t gap = -(uintptr_t)first & (HUGE_BYTES - 1);
    char *whole = first == NULL ? NULL : malloc(gap + HUGE_BYTES);
    if (whole == NULL)
        return;
    /* While nothing in it has been written. */
    if (whole > first && whole < first + gap)
        (void)madvise(first + gap, HUGE_BYTES, MADV_HUGEPAGE);
    free(whole);
    given_away[1] = malloc(gap);
}

/* A read's buffers are as large as a block and freed at its end: left in the heap, they are not
 * asked of the kernel, and cleared page by page, for every block. */
__attribute__((constructor)) static void keep_heap(void) {
    (void)mallopt(M_MMAP_THRESHOLD, HEAP_SLACK_BYTES);
    (void)mallopt(M_TRIM_THRESHOLD, HEAP_SLACK_BYTES);
    use_huge_page();
}

/* The image server keeps eight blocks of inodes and names, and a launch walks to and fro between
 * some twenty: what was unpacked before is known by its packed bytes, all of them. */
enum { METADATA_BYTES = 8192, KEPT_BLOCKS = 32 };
static _Thread_local struct {
    size_t packed, unpacked;
    unsigned char *bytes;
} kept[KEPT_BLOCKS];
static _Thread_local unsigned next_kept;

static size_t recall(void *target, const void *source, size_t packed) {
    for (size_t i = 0; i < KEPT_BLOCKS; i++)
        if (kept[i].bytes != NULL && kept[i].packed == packed &&
            memcmp(kept[i].bytes, source, packed) == 0) {
            memcpy(target, kept[i].bytes + packed, kept[i].unpacked);
            return kept[i].unpacked;
        }
    return 0;
}

static void keep(const void *source, size_t packed, const void *target, size_t unpacked) {
    if (packed == 0 || packed > METADATA_BYTES || unpacked > METADATA_BYTES)
        return;
    unsigned char *bytes = malloc(packed + unpacked);
    if (bytes == NULL)
        return;
    memcpy(bytes, source, packed);
    memcpy(bytes + packed, target, unpacked);
    free(kept[next_kept].bytes);
    kept[next_kept].packed = packed;
    kept[next_kept].unpacked = unpacked;
    kept[next_kept].bytes = bytes;
    next_kept = (next_kept + 1) % KEPT_BLOCKS;
}

static void find_deflate(void) {
    deflate.tried = 1;
    void *library = dlopen(DEFLATE_LIBRARY, RTLD_NOW | RTLD_LOCAL);
    if (library == NULL)
        return;
    make_function *make = (make_function *)dlsym(library, "libdeflate_alloc_decompressor");
    deflate.unpack = (deflate_function *)dlsym(library, "libdeflate_zlib_decompress");
    if (make != NULL && deflate.unpack != NULL)
        deflate.context = make();
}

void unpack_prepare(bool is_gzip) {
    if (is_gzip && !deflate.tried)
        find_deflate();
    deflate.tried = 1;
}

static void find_zstd(void) {
    zstd.tried = 1;
    make_function *make = (make_function *)dlsym(RTLD_NEXT, "ZSTD_createDCtx");
    zstd.unpack = (zstd_context_function *)dlsym(RTLD_NEXT, "ZSTD_decompressDCtx");
    if (make != NULL && zstd.unpack != NULL)
        zstd.context = make();
}

/* Only a stream that libdeflate has unpacked, and found whole by its checksum, is answered here:
 * all that is wrong with another one is for zlib to say. */
int uncompress(unsigned char *target, unsigned long *target_bytes, const unsigned char *source,
               unsigned long source_bytes) {
    bool metadata = *target_bytes == METADATA_BYTES;
    size_t got = metadata ? recall(target, source, source_bytes) : 0;
    if (got > 0) {
        *target_bytes = got;
        return UNPACKED;
    }
    if (!deflate.tried)
        find_deflate();
    if (deflate.context != NULL && deflate.unpack(deflate.context, source, source_bytes, target,
                                                  *target_bytes, &got) == UNPACKED) {
        *target_bytes = got;
        if (metadata)
            keep(source, source_bytes, target, got);
        return UNPACKED;
    }
    zlib_function *next = (zlib_function *)dlsym(RTLD_NEXT, "uncompress");
    return next == NULL ? ZLIB_DATA_ERROR : next(target, target_bytes, source, source_bytes);
}

/* The image server calls ZSTD_isError() on the answer, so an error must be one of zstd's own. */
size_t ZSTD_decompress(void *target, size_t target_bytes, const void *source,
                       size_t source_bytes) {
    bool metadata = target_bytes == METADATA_BYTES;
    size_t got = metadata ? recall(target, source, source_bytes) : 0;
    if (got > 0)
        return got;
    if (!zstd.tried)
        find_zstd();
    if (zstd.context != NULL) {
        got = zstd.unpack(zstd.context, target, target_bytes, source, source_bytes);
        if (metadata && got > 0)
            keep(source, source_bytes, target, got); /* an error is larger than any block */
        return got;
    }
    zstd_function *next = (zstd_function *)dlsym(RTLD_NEXT, "ZSTD_decompress");
    return next == NULL ? (size_t)-1 : next(target, target_bytes, source, source_bytes);
}
