/* What the C side writes of a user's bytes: bounded, escaped, one line: 0, or abort. */
#define _GNU_SOURCE
#include "../../starter/report.c"

#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);                \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

static void test_append_text_is_bounded(void) {
    char small[6] = "";
    CHECK(append_text(small, sizeof(small), "abc") == 3);
    CHECK(append_text(small, sizeof(small), "defg") == 5 && strcmp(small, "abcde") == 0);
    CHECK(append_text(small, sizeof(small), "x") == 5 && strcmp(small, "abcde") == 0);
    char full[3] = {'a', 'b', 'c'}; /* no terminator: nothing is written, nothing read past it */
    CHECK(append_text(full, sizeof(full), "x") == 3 && memcmp(full, "abc", 3) == 0);
    char one[1] = "";
    CHECK(append_text(one, sizeof(one), "x") == 0 && one[0] == '\0');
}

static void test_numbers(void) {
    char text[64] = "";
    append_number(text, sizeof(text), 0);
    append_text(text, sizeof(text), " ");
    append_number(text, sizeof(text), UINT64_MAX);
    CHECK(strcmp(text, "0 18446744073709551615") == 0);
    char small[4] = "";
    append_number(small, sizeof(small), 123456);
    CHECK(strcmp(small, "123") == 0);
}

static void test_escapes(void) {
    char text[128] = "";
    append_escaped(text, sizeof(text), "a\"\\\n\x1b\x7f\xc3\0z", 9);
    CHECK(strcmp(text, "a\\\"\\\\\\u000a\\u001b\\u007f\\u00c3\\u0000z") == 0);
}

static void test_every_byte_stays_printable_and_in_one_piece(void) {
    for (int byte = 0; byte < 256; byte++) {
        char raw = (char)byte, text[16] = "";
        append_escaped(text, sizeof(text), &raw, 1);
        size_t length = strlen(text);
        CHECK(length == 1 || length == 2 || length == 6);
        for (size_t i = 0; i < length; i++)
            CHECK(text[i] >= ' ' && text[i] <= '~');
        CHECK(length > 1 || (text[0] != '"' && text[0] != '\\'));
    }
}

/* Half an escape would swallow the quote that ends the string. */
static void test_an_escape_is_never_cut(void) {
    for (size_t size = 1; size < 40; size++) {
        char *text = malloc(size);
        CHECK(text != NULL);
        text[0] = '\0';
        size_t used = append_escaped(text, size, "\n\n\n\n\n\n", 6);
        CHECK(used == strlen(text) && used < size && used % 6 == 0);
        CHECK(used == 36 || used + 6 >= size);
        free(text);
    }
}

/* Returns what the child wrote to stderr, and its status. */
static int stderr_of(void (*act)(void), char *said, size_t size) {
    int ends[2], status;
    CHECK(pipe(ends) == 0);
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        dup2(ends[1], STDERR_FILENO);
        act();
        _exit(0);
    }
    close(ends[1]);
    ssize_t got = read(ends[0], said, size - 1);
    CHECK(got >= 0 && waitpid(pid, &status, 0) == pid && WIFEXITED(status));
    said[got] = '\0';
    close(ends[0]);
    return WEXITSTATUS(status);
}

static void report_something_long(void) {
    static char text[4000];
    memset(text, 'x', sizeof(text) - 1);
    report("FATAL:   ", text);
}

static void fail_with_reason(void) {
    fail("cannot do it", EACCES);
}

static void fail_without_reason(void) {
    fail("cannot do it", 0);
}

static void fail_with_nonsense(void) {
    fail("cannot do it", 99999);
}

static void test_messages(void) {
    char said[8192];
    CHECK(stderr_of(report_something_long, said, sizeof(said)) == 0);
    CHECK(strlen(said) == 1023 && strncmp(said, "FATAL:   xxx", 12) == 0);
    CHECK(strchr(said, '\n') == said + 1022);
    CHECK(stderr_of(fail_with_reason, said, sizeof(said)) == 255);
    CHECK(strcmp(said, "FATAL:   cannot do it: Permission denied\n") == 0);
    CHECK(stderr_of(fail_without_reason, said, sizeof(said)) == 255);
    CHECK(strcmp(said, "FATAL:   cannot do it\n") == 0);
    CHECK(stderr_of(fail_with_nonsense, said, sizeof(said)) == 255);
    CHECK(strcmp(said, "FATAL:   cannot do it: error\n") == 0);
}

int main(void) {
    test_append_text_is_bounded();
    test_numbers();
    test_escapes();
    test_every_byte_stays_printable_and_in_one_piece();
    test_an_escape_is_never_cut();
    test_messages();
    return 0;
}
