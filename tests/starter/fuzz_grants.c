/* A capability.json of any bytes: read within its bounds, and never a grant for a stranger. */
#include "../../starter/grants.c"

#include "fuzz.h"

static uint64_t accepted;

static bool is_alice(const char *name, bool group, const void *whose) {
    (void)whose;
    must(strnlen(name, WORD_BYTES) < WORD_BYTES, "a name is bounded");
    return strcmp(name, group ? "staff" : "alice") == 0;
}

static bool is_nobody(const char *name, bool group, const void *whose) {
    (void)name;
    (void)group;
    (void)whose;
    return false;
}

static const char *const pieces[] = {
    "{", "}", "[", "]", ":", ",", "\"users\"", "\"groups\"", "\"alice\"", "\"staff\"", "\"bob\"",
    "\"CAP_NET_RAW\"", "\"CAP_CHOWN\"", "null", "\"", "\\", " ", "\n", "\t", "\"CAP_FOO\"", "nul",
    "{\"users\":{\"alice\":[\"CAP_NET_RAW\"]}}", "{\"groups\":{\"staff\":null}}",
};

static void once(void) {
    static const char good[] = "{\"users\":{\"alice\":[\"CAP_NET_RAW\"],\"bob\":[\"CAP_CHOWN\"]},"
                               "\"groups\":{\"staff\":[\"CAP_KILL\"]}}";
    char text[512];
    size_t size = 0;
    if (dice(2) == 0) {
        size = sizeof(good) - 1;
        memcpy(text, good, size);
        for (uint32_t n = dice(4); n > 0; n--)
            mutate(text, size);
        size -= dice(8) == 0 ? dice((uint32_t)size) : 0;
    } else {
        for (uint32_t n = dice(24); n > 0; n--) {
            const char *piece = pieces[dice(ARRAY_SIZE(pieces))];
            if (size + strlen(piece) < sizeof(text)) {
                memcpy(text + size, piece, strlen(piece));
                size += strlen(piece);
            }
        }
    }
    uint64_t granted = 1, to_nobody = 1;
    char *exact = malloc(size + 1); /* the sanitizer sees a read past the end */
    must(exact != NULL, "there is memory");
    memcpy(exact + 1, text, size);
    int result = grants_read(exact + 1, size, is_alice, NULL, &granted);
    must(grants_read(exact + 1, size, is_nobody, NULL, &to_nobody) == result, "the form is one");
    must(to_nobody == 0, "a stranger has nothing");
    must(result == 0 || granted == 0, "what is refused grants nothing");
    accepted += result == 0;
    free(exact);
}

int main(int argc, char **argv) {
    fuzz_main(argc, argv, once, &accepted);
    return 0;
}
