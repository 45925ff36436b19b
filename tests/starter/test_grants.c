/* What capability.json grants, as C reads it: 0, or abort with the line. */
#define _GNU_SOURCE
#include "../../starter/grants.c"

#include <linux/capability.h>
#include <stdio.h>
#include <stdlib.h>

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);                \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

#define RAW CAP_BIT(CAP_NET_RAW)
#define OWN CAP_BIT(CAP_CHOWN)
#define REFUSED (~(uint64_t)0)

/* The caller is alice, and in the group staff. */
static bool is_alice(const char *name, bool group, const void *whose) {
    CHECK(whose == &is_alice);
    return strcmp(name, group ? "staff" : "alice") == 0;
}

static uint64_t read_size(const char *text, size_t size) {
    uint64_t granted = 77;
    char *exact = malloc(size); /* so that a read past the end is seen */
    CHECK(exact != NULL || size == 0);
    if (size > 0)
        memcpy(exact, text, size);
    int result = grants_read(exact, size, is_alice, (const void *)&is_alice, &granted);
    free(exact);
    CHECK(result == 0 || granted == 0);
    return result == 0 ? granted : REFUSED;
}

static uint64_t read_text(const char *text) {
    return read_size(text, strlen(text));
}

static void test_what_is_granted(void) {
    CHECK(read_text("{\n\t\"users\": {\n\t\t\"alice\": [\n\t\t\t\"CAP_NET_RAW\"\n\t\t]\n\t}\n}") == RAW);
    CHECK(read_text("{\"users\":{\"alice\":[\"CAP_NET_RAW\",\"CAP_CHOWN\"]}}") == (RAW | OWN));
    CHECK(read_text("{\"users\":{\"bob\":[\"CAP_NET_RAW\"]}}") == 0);
    CHECK(read_text("{\"users\":{\"staff\":[\"CAP_NET_RAW\"]}}") == 0);
    CHECK(read_text("{\"groups\":{\"alice\":[\"CAP_NET_RAW\"]}}") == 0);
    CHECK(read_text("{\"groups\":{\"staff\":[\"CAP_NET_RAW\"]},\"users\":{\"alice\":[\"CAP_CHOWN\"]}}")
          == (RAW | OWN));
    CHECK(read_text("{\"users\":{\"bob\":[\"CAP_NET_RAW\"],\"alice\":[\"CAP_CHOWN\"]}}") == OWN);
    CHECK(read_text("{\"users\":{\"alice\":[\"CAP_CHOWN\"],\"alice\":[\"CAP_NET_RAW\"]}}") == (RAW | OWN));
}

static void test_nothing_is_granted(void) {
    const char *const texts[] = {
        "", " \n\t\r", "{}", " { } ", "{\"users\":{}}", "{\"users\":null,\"groups\":null}",
        "{\"users\":{\"alice\":[]}}", "{\"users\":{\"alice\":null}}",
        "{\"users\":{\"alice\":[\"CAP_FOO\"]}}", "{\"users\":{\"alice\":[\"NET_RAW\"]}}",
        "{\"users\":{\"alice\":[\"cap_net_raw\"]}}", "{\"users\":{\"alice\":[\"all\"]}}",
        "{\"users\":{\"alice\":[\"CAP_NET_RAW \"]}}", "{\"users\":{\"alice\":[\"\"]}}",
        "{\"users\":{\"alice \":[\"CAP_NET_RAW\"]}}", "{\"users\":{\"\":[\"CAP_NET_RAW\"]}}",
        "{\"users\":{\"Alice\":[\"CAP_NET_RAW\"]}}",
    };
    for (size_t i = 0; i < ARRAY_SIZE(texts); i++)
        CHECK(read_text(texts[i]) == 0);
}

static void test_another_form_is_refused(void) {
    const char *const texts[] = {
        "x", "[]", "null", "{", "}", "{\"users\"", "{\"users\":", "{\"users\":{\"alice\":[\"CAP_NET_RAW\"]}",
        "{\"users\":{\"alice\":[\"CAP_NET_RAW\"]}}}", "{\"users\":{\"alice\":[\"CAP_NET_RAW\"]}} x",
        "{\"users\":{\"alice\":[\"CAP_NET_RAW\",]}}", "{\"users\":{\"alice\":[\"CAP_NET_RAW\"],}}",
        "{\"users\":{\"alice\":[\"CAP_NET_RAW\"]},}", "{\"users\":{\"alice\":\"CAP_NET_RAW\"}}",
        "{\"users\":{\"alice\":[7]}}", "{\"users\":{\"alice\":[[\"CAP_NET_RAW\"]]}}",
        "{\"users\":[\"alice\"]}", "{\"Users\":{\"alice\":[\"CAP_NET_RAW\"]}}",
        "{\"others\":{}}", "{\"users\":{},\"users\":{\"alice\":[\"CAP_NET_RAW\"]}}",
        "{\"users\":{\"ali\\u0063e\":[\"CAP_NET_RAW\"]}}", "{\"users\":{\"ali\nce\":[]}}",
        "{'users':{}}", "{users:{}}", "{\"users\":{\"alice\":[\"CAP_NET_RAW\"]}}//", "nul", "{\"users\":nul}",
        "{\"users\":{\"alice\":[\"CAP_NET_RAW\"}}", "{\"users\" {}}",
    };
    for (size_t i = 0; i < ARRAY_SIZE(texts); i++)
        CHECK(read_text(texts[i]) == REFUSED);
    CHECK(read_size("{}\0", 3) == REFUSED);
    CHECK(read_size("{\"users\":{\"alice\0x\":[]}}", 24) == REFUSED);
    static char lengthy[600];
    memset(lengthy, 'a', sizeof(lengthy));
    memcpy(lengthy, "{\"users\":{\"", 11);
    CHECK(read_size(lengthy, sizeof(lengthy)) == REFUSED);
    memcpy(lengthy + 11 + 255, "\":[]}}", 6);
    CHECK(read_size(lengthy, 11 + 255 + 6) == 0);
    memset(lengthy + 11, 'a', 300);
    memcpy(lengthy + 11 + 256, "\":[]}}", 6);
    CHECK(read_size(lengthy, 11 + 256 + 6) == REFUSED);
}

int main(void) {
    test_what_is_granted();
    test_nothing_is_granted();
    test_another_form_is_refused();
    return 0;
}
