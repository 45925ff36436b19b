/* Hostile words for the control socket: read under the sanitizers, whole and piece by piece. */
#include "../../starter/monitor_json.c"

#include "fuzz.h"

static uint64_t accepted;
static char text[1024];

static size_t add(size_t at, const char *more) {
    size_t length = strlen(more);
    memcpy(text + at, more, length);
    return at + length;
}

static size_t make_command(void) {
    static const char *const members[] = {
        "\"reopenLog\":true", "\"startContainer\": false", "\"pause\":true ", "\"resume\":null",
        "\"consoleSize\":{\"height\":24,\"width\":80}", "\"consoleSize\":null",
        "\"consoleSize\":{\"x\":[1,{}],\"width\":65535}", "\"other\":[[1.5e3,-2],\"a\\\"b\",{}]",
        "\"\\u0041\":\"\\\\\"", "\"\":{\"deep\":[[[true]]]}"};
    size_t at = add(0, "{");
    for (uint32_t n = dice(5); n > 0; n--) {
        at = add(at, members[dice(COUNT(members))]);
        at = add(at, n > 1 ? " ,\n" : "");
    }
    return add(at, "}");
}

static enum json_found read_exact(size_t size, struct command *out) {
    char *exact = malloc(size + 1); /* so that the sanitizer sees a step behind its end */
    must(exact != NULL, "there is memory");
    memmove(exact, text, size);
    char *place = exact + 1; /* and one before it */
    memmove(place, exact, size);
    enum json_found found = command_read(place, size, out);
    free(exact);
    return found;
}

static void once(void) {
    struct command whole, part;
    size_t size = make_command();
    must(read_exact(size, &whole) == JSON_OBJECT, "what is right is taken");
    must(read_exact(dice((uint32_t)size), &part) == JSON_MORE, "its beginning asks for more");
    for (uint32_t n = 1 + dice(3); n > 0; n--)
        mutate(text, size);
    if (read_exact(size, &part) == JSON_OBJECT)
        accepted++;
}

int main(int argc, char **argv) {
    fuzz_main(argc, argv, once, &accepted);
    return 0;
}
