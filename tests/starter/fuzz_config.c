/*
 * Hostile text for the parser of the administrator's file.
 *
 *     fuzz_config FILE...                      each file once (- is stdin)
 *     fuzz_config SEED ITERATIONS FILE...      files mutated at random, the same for the same seed
 *
 * With -DAPY_LIBFUZZER it is a target for libFuzzer instead.
 */

#define _GNU_SOURCE
#include "../../starter/config.c"
#include "../../starter/config_open.c"
#include "../../starter/config_value.c"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#define INPUT_BYTES (CONFIG_FILE_BYTES + 4096)
#define SEEDS 64

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static struct config config;
static struct config_error why;

static void must(bool holds, const char *what)
{
    if (!holds) {
        fprintf(stderr, "fuzz_config: not so: %s\n", what);
        abort();
    }
}

static void check_text(const char *text, size_t size, bool empty_allowed)
{
    must(memchr(text, '\0', size) != NULL, "a text ends in its place");
    must(empty_allowed || *text, "it says something");
    for (; *text; text++)
        must(*text < 0 || (*text >= ' ' && *text != 0x7f), "it is printable");
}

static void check_value(enum config_id id)
{
    const char *item;
    size_t count = config_list_count(&config, id);

    must(strlen(config_string(&config, id)) < sizeof(config.bytes), "a value has an end");
    for (size_t n = 0; (item = config_list_item(&config, id, n)) != NULL; n++) {
        must(n < count && *item && !strchr(item, ',') && !strchr(item, '\n'), "an item is one");
        must(strcmp(config_rows[id].allowed, "paths") != 0 || *item == '/', "a path is absolute");
    }
    if (config_rows[id].kind == KIND_UINT)
        must(config_uint(&config, id) <= INT64_MAX, "a number is in its range");
    (void)config_bool(&config, id);
    (void)config_enum(&config, id);
    (void)config_list_has(&config, id, "root", 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    int fd = memfd_create("config", MFD_CLOEXEC);
    int result;

    must(fd >= 0 && write(fd, data, size) == (ssize_t)size, "there is a file");
    memset(&why, 0, sizeof(why));
    result = config_parse_fd(fd, &config, &why);
    close(fd);
    must((result == 0) == (why.count == 0), "a failure has a reason");
    for (uint32_t n = 0; n < why.count && n < CONFIG_PROBLEMS; n++) {
        check_text(why.problem[n].key, sizeof(why.problem[n].key), true);
        check_text(why.problem[n].text, sizeof(why.problem[n].text), false);
        check_text(why.problem[n].nearest, sizeof(why.problem[n].nearest), true);
    }
    for (unsigned id = 0; id < CONFIG_COUNT; id++)
        check_value((enum config_id)id);
    return 0;
}

#ifndef APY_LIBFUZZER

static uint8_t seeds[SEEDS][INPUT_BYTES];
static size_t seed_bytes[SEEDS];
static size_t seed_count;
static uint64_t state;

/* xorshift64*: the same everywhere, unlike rand(). */
static uint32_t dice(uint32_t sides)
{
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return (uint32_t)((state * 2685821657736338717u) >> 33) % sides;
}

static void load(const char *name)
{
    FILE *file = strcmp(name, "-") == 0 ? stdin : fopen(name, "rb");

    must(file != NULL && seed_count < SEEDS, "every file can be read");
    seed_bytes[seed_count] = fread(seeds[seed_count], 1, INPUT_BYTES, file);
    seed_count++;
    if (file != stdin)
        fclose(file);
}

static size_t insert(uint8_t *data, size_t size, const void *text, size_t length)
{
    size_t at = dice((uint32_t)size + 1);

    if (size + length > INPUT_BYTES)
        return size;
    memmove(data + at + length, data + at, size - at);
    memcpy(data + at, text, length);
    return size + length;
}

static size_t cut(uint8_t *data, size_t size)
{
    size_t at = dice((uint32_t)size + 1);
    size_t length = dice((uint32_t)(size - at) + 1);

    memmove(data + at, data + at + length, size - at - length);
    return size - length;
}

static size_t mutate(uint8_t *data, size_t size)
{
    static const char *const words[] = {"\n", "=", ",", "#", "\r\n", " = ", "yes", "no", "0x", "_",
                                        "/", "$PATH", "18446744073709551616", "\xef\xbb\xbf", ":"};
    const char *word = words[dice(sizeof(words) / sizeof(words[0]))];
    const char *key = config_rows[dice(CONFIG_COUNT)].key;
    uint8_t byte = (uint8_t)dice(256);

    switch (dice(8)) {
    case 0:
        return insert(data, size, &byte, 1);
    case 1:
        return insert(data, size, word, strlen(word));
    case 2:
        return insert(data, size, key, strlen(key));
    case 3:
        return size ? cut(data, size) : 0;
    case 4: /* a piece once more */
        return size ? insert(data, size, seeds[0], dice((uint32_t)seed_bytes[0] + 1)) : 0;
    default:
        if (size)
            data[dice((uint32_t)size)] = byte;
        return size;
    }
}

static void mutate_all(uint64_t iterations)
{
    static uint8_t data[INPUT_BYTES];

    for (uint64_t i = 0; i < iterations; i++) {
        size_t which = dice((uint32_t)seed_count);
        size_t size = seed_bytes[which];

        memcpy(data, seeds[which], size);
        for (uint32_t n = dice(16) + 1; n > 0; n--)
            size = mutate(data, size);
        (void)LLVMFuzzerTestOneInput(data, size);
    }
}

int main(int argc, char **argv)
{
    bool random = argc > 3 && strspn(argv[1], "0123456789") == strlen(argv[1]);

    for (int n = random ? 3 : 1; n < argc; n++)
        load(argv[n]);
    for (size_t n = 0; n < seed_count; n++)
        (void)LLVMFuzzerTestOneInput(seeds[n], seed_bytes[n]);
    if (random) {
        state = strtoull(argv[1], NULL, 10) | 1u << 20;
        mutate_all(strtoull(argv[2], NULL, 10));
    }
    return 0;
}

#endif
