/* Messages of the C side: fixed texts; what a user chose is escaped before it is shown. */
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "starter.h"

size_t append_text(char *out, size_t size, const char *text) {
    size_t used = strnlen(out, size), more = strlen(text);
    if (used + 1 >= size)
        return used;
    if (more > size - used - 1)
        more = size - used - 1;
    memcpy(out + used, text, more);
    out[used + more] = '\0';
    return used + more;
}

/* JSON's rules, so that one text serves stderr, the trace and the audit record. */
size_t append_escaped(char *out, size_t size, const char *text, size_t length) {
    static const char hex[] = "0123456789abcdef";
    for (size_t i = 0; i < length; i++) {
        unsigned char c = (unsigned char)text[i];
        char piece[8] = {(char)c, '\0'};
        if (c < 0x20 || c >= 0x7f) {
            memcpy(piece, "\\u00", 4);
            piece[4] = hex[c >> 4];
            piece[5] = hex[c & 15];
            piece[6] = '\0';
        } else if (c == '"' || c == '\\') {
            piece[0] = '\\';
            piece[1] = (char)c;
            piece[2] = '\0';
        }
        if (strnlen(out, size) + strlen(piece) + 1 > size)
            break;
        append_text(out, size, piece);
    }
    return strnlen(out, size);
}

size_t append_number(char *out, size_t size, uint64_t number) {
    char digits[24];
    size_t at = sizeof(digits);
    digits[--at] = '\0';
    do {
        digits[--at] = (char)('0' + number % 10);
        number /= 10;
    } while (number != 0);
    return append_text(out, size, digits + at);
}

static int (*elsewhere)(const char *text);
static int failure_status = 255;

void report_elsewhere(int (*tell)(const char *text)) {
    elsewhere = tell;
}

void report(const char *level, const char *text) {
    char line[1024] = "";
    if (elsewhere != NULL && level[0] == 'F') {
        failure_status = elsewhere(text);
        return;
    }
    append_text(line, sizeof(line), level);
    append_text(line, sizeof(line) - 1, text);
    append_text(line, sizeof(line), "\n");
    ssize_t ignored = write(STDERR_FILENO, line, strlen(line));
    (void)ignored;
}

void report_error(const char *what, int error) {
    char text[768] = "";
    append_text(text, sizeof(text), what);
    if (error != 0) {
        append_text(text, sizeof(text), ": ");
        append_text(text, sizeof(text), strerrordesc_np(error) ? strerrordesc_np(error) : "error");
    }
    report("FATAL:   ", text);
}

NO_RETURN void fail(const char *what, int error) {
    report_error(what, error);
    _exit(failure_status);
}
