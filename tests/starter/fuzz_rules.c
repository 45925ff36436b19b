/* What iptables-save may print, with comments that others have chosen: only rules with the whole
 * number go, only chains that they lead to, and all is read within its bounds. */
#include "../../starter/network_rules.c"

#include "fuzz.h"

static uint64_t accepted;

int networks_wait_for(pid_t pid) {
    return (int)pid;
}

int networks_be_child(pid_t parent) {
    return (int)parent;
}

#define NUMBER "apptainer-py-71"

static const char *const pieces[] = {
    "*nat\n", "*filter\n", "*", "\n*", "COMMIT\n", ":POSTROUTING ACCEPT [0:0]\n", "# by another\n",
    "-A POSTROUTING", "-A CNI-DN-0123456789abcdef01234", "-A ", "-A", "-D ", " -s 10.0.0.2/32",
    " -m comment --comment \"name: \\\"lan\\\" id: \\\"" NUMBER "\\\"\"", NUMBER, NUMBER "0",
    NUMBER "\"", "apptainer-py-7", "apptainer-py-171", " -j CNI-0123456789abcdef01234567",
    " -j CNI-", " -j CNI-HOSTPORT-SETMARK", " -j CNI-x\t",
    " -j CNI-00112233445566778899aabbccddeeff",
    " -j ACCEPT", " -j CNI-a", "\n", "\n", "\n", "\"", "\\", " ",
};

/* The input's line that begins with this, "-A " instead of "-D ". */
static bool is_line_of(const char *text, const char *end, const char *rule, size_t length) {
    for (const char *at = text; at < end; at = end_of_line(at, end) + 1)
        if (begins(at, end, "-A ") && (size_t)(end_of_line(at, end) - at) == length &&
            memcmp(at + 3, rule + 3, length - 3) == 0)
            return true;
    return false;
}

static bool has_number(const char *at, const char *end) {
    for (; (at = find(at, end, NUMBER)) != NULL; at++) {
        const char *next = at + sizeof(NUMBER) - 1;
        if (next == end || !memchr("0123456789", *next, 10))
            return true;
    }
    return false;
}

/* Some rule that goes sends there. */
static bool is_led_to(const char *said, const char *until, const char *chain, size_t length) {
    for (const char *at = said; at < until; at = end_of_line(at, until) + 1)
        for (const char *to = at; (to = find(to, end_of_line(at, until), " -j ")) != NULL; to++)
            if (begins(at, until, "-D ") && (size_t)(until - to) >= 4 + length &&
                memcmp(to + 4, chain, length) == 0)
                return true;
    return false;
}

static void judge(const char *text, const char *end, const char *said, const char *said_end,
                  bool any) {
    size_t removed = 0, open = 0;
    for (const char *at = said, *stop; at < said_end; at = stop + 1) {
        stop = end_of_line(at, said_end);
        size_t length = (size_t)(stop - at);
        must(stop < said_end, "every line has its end");
        if (*at == '*') {
            must(open++ == 0, "one table after another");
        } else if (begins(at, stop, "-D ")) {
            removed++;
            must(open == 1 && is_line_of(text, end, at, length), "it is a rule that there is");
            must(has_number(at, stop), "a rule of somebody else's stays");
        } else if (begins(at, stop, "-F CNI-") || begins(at, stop, "-X CNI-")) {
            must(length < 3 + CHAIN_BYTES && !memchr(at + 3, ' ', length - 3), "a chain's name");
            must(!begins(at + 3, stop, "CNI-HOSTPORT-"), "what all share stays");
            must(is_led_to(said, at, at + 3, length - 3), "a chain of the container's");
        } else {
            must(open-- == 1 && length == 6 && begins(at, stop, "COMMIT"), "nothing else is said");
        }
    }
    must(open == 0 && any == (removed > 0), "the answer tells whether there are any");
    accepted += any;
}

static void once(void) {
    static char said[1 << 18];
    static int out = -1;
    char text[1024];
    size_t size = 0;
    for (uint32_t n = dice(40); n > 0; n--) {
        const char *piece = pieces[dice(ARRAY_SIZE(pieces))];
        if (size + strlen(piece) < sizeof(text)) {
            memcpy(text + size, piece, strlen(piece));
            size += strlen(piece);
        }
    }
    if (dice(4) == 0)
        mutate(text, size);
    if (out < 0)
        out = memfd_create("undo", MFD_CLOEXEC);
    char *exact = malloc(size + 1); /* the sanitizer sees a read past the end */
    must(exact != NULL && out >= 0 && ftruncate(out, 0) == 0 && lseek(out, 0, SEEK_SET) == 0,
         "there is memory");
    memcpy(exact + 1, text, size);
    bool any = rules_find(exact + 1, size, NUMBER, out);
    ssize_t got = pread(out, said, sizeof(said), 0);
    must(got >= 0 && (size_t)got < sizeof(said), "it is no longer than that");
    judge(exact + 1, exact + 1 + size, said, said + got, any);
    free(exact);
}

int main(int argc, char **argv) {
    fuzz_main(argc, argv, once, &accepted);
    return 0;
}
