/* Mutation of frames at random, the same for the same seed; included once by each fuzzer. */
#ifndef APY_FUZZ_H
#define APY_FUZZ_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint64_t fuzz_state;

/* xorshift64*: the same everywhere, unlike rand(). */
static uint32_t dice(uint32_t sides) {
    fuzz_state ^= fuzz_state >> 12;
    fuzz_state ^= fuzz_state << 25;
    fuzz_state ^= fuzz_state >> 27;
    return (uint32_t)((fuzz_state * 2685821657736338717u) >> 33) % sides;
}

static void must(int holds, const char *what) {
    if (!holds) {
        fprintf(stderr, "not so: %s\n", what);
        abort();
    }
}

/* Numbers at which comparisons go wrong. */
static uint64_t odd_number(void) {
    static const uint64_t odd[] = {0,     1,          2,         3,          7,       8,
                                   255,   256,        4095,      4096,       4097,    65535,
                                   65536, INT32_MAX,  1u << 31,  UINT32_MAX, 1 << 20, 8388608,
                                   128,   UINT64_MAX, INT64_MAX, 1ull << 63, 8384,    8448};
    uint64_t number = odd[dice(sizeof(odd) / sizeof(odd[0]))];
    return dice(4) == 0 ? number + dice(3) - 1 : number;
}

/* Overwrites a byte, a word of 2, 4 or 8 bytes, or a stretch. */
static void mutate(void *data, size_t size) {
    unsigned char *bytes = data;
    size_t width = (size_t)1 << dice(4);
    uint64_t number = odd_number();
    if (size == 0)
        return;
    if (dice(8) == 0) {
        size_t at = dice((uint32_t)size), length = dice((uint32_t)(size - at)) + 1;
        memset(bytes + at, (int)dice(256), length);
    } else if (dice(3) == 0 || size < width) {
        bytes[dice((uint32_t)size)] = (unsigned char)dice(256);
    } else {
        size_t at = dice((uint32_t)(size / width)) * width;
        memcpy(bytes + at, &number, width);
    }
}

/* fuzz_x SEED ITERATIONS: prints how many inputs were accepted. */
static void fuzz_main(int argc, char **argv, void (*once)(void), const uint64_t *accepted) {
    must(argc == 3, "there are a seed and a number of iterations");
    fuzz_state = strtoull(argv[1], NULL, 10) | 1u << 20;
    for (uint64_t rounds = strtoull(argv[2], NULL, 10); rounds > 0; rounds--)
        once();
    printf("%llu\n", (unsigned long long)*accepted);
}

#endif
