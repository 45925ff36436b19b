/* A file of a CNI network of any bytes: read within its bounds, and what comes of it can be handed
 * over and used. */
#include "../../starter/network_file.c"

#include "fuzz.h"

static uint64_t accepted;

pid_t names_fork_asker(const struct launch *l) {
    (void)l;
    return -1;
}

int names_wait_for_asker(pid_t pid) {
    return (int)pid;
}

const char *config_string(const struct config *c, enum config_id id) {
    (void)c;
    (void)id;
    return "";
}

int config_open_trusted(const char *path, uint32_t most, struct config_error *why) {
    (void)path;
    (void)most;
    (void)why;
    return -1;
}

static const char *const pieces[] = {
    "{", "}", "[", "]", ":", ",", "\"name\"", "\"type\"", "\"plugins\"", "\"cniVersion\"", "\"lan\"",
    "\"1.0.0\"", "\"bridge\"", "\"ipam\"", "\"capabilities\"", "true", "null", "-1.5e3", "\"",
    "\\", "\\\"", " ", "\n", "{\"type\":\"host-local\"}", "{\"portMappings\":true}",
    "{\"name\":\"lan\",\"type\":\"ptp\"}", "\"../x\"", "[[[[[[[[[[[[[[[[", "\"cniVersion\":\"\\n\"",
};

static void look(const char *text, size_t size) {
    static struct network_file file, other;
    int found = network_read(text, size, "lan", &file);
    must(found >= -1 && found <= 1, "one of three answers");
    must((network_read(text, size, "x", &other) < 0) == (found < 0), "the form is one");
    if (found < 0)
        return;
    must(network_fits(&file), "what is found can be used");
    for (size_t i = 0; i < file.plugin_count; i++) {
        const struct network_plugin *one = &file.plugins[i];
        must(strchr(one->type, '/') == NULL && one->type[0] != '\0', "a program's name");
        must(one->length > 0 && memchr(file.text + one->from, '"', one->length), "and its text");
    }
    accepted += found == 1;
}

static void once(void) {
    static const char good[] =
        "{\"cniVersion\":\"1.0.0\",\"name\":\"lan\",\"plugins\":[{\"type\":\"bridge\",\"ipam\":"
        "{\"type\":\"host-local\"}},{\"type\":\"portmap\",\"capabilities\":{\"portMappings\":true}}]}";
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
    char *exact = malloc(size + 1); /* the sanitizer sees a read past the end */
    must(exact != NULL, "there is memory");
    memcpy(exact + 1, text, size);
    look(exact + 1, size);
    free(exact);
}

int main(int argc, char **argv) {
    fuzz_main(argc, argv, once, &accepted);
    return 0;
}
