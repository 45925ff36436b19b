/* Messages as runc's logger writes them: key=value, JSON, or short on a terminal. */
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "lean.h"

#define MESSAGE_BYTES 10240
#define LINE_BYTES (6 * MESSAGE_BYTES + 128)

static void put(int fd, const char *text, size_t size) {
    while (size > 0) {
        ssize_t wrote = write(fd, text, size);
        if (wrote < 0 && errno == EINTR)
            continue;
        if (wrote <= 0)
            return;
        text += wrote;
        size -= (size_t)wrote;
    }
}

static void now_text(char *out, size_t size) {
    char zone[8];
    time_t now = time(NULL);
    struct tm parts;
    localtime_r(&now, &parts);
    size_t used = strftime(out, size, "%Y-%m-%dT%H:%M:%S", &parts);
    if (parts.tm_gmtoff == 0) {
        (void)snprintf(out + used, size - used, "Z");
        return;
    }
    (void)strftime(zone, sizeof(zone), "%z", &parts);
    (void)snprintf(out + used, size - used, "%.3s:%s", zone, zone + 3);
}

/* One character as Go's %q, or as encoding/json, which keeps <, > and & from HTML. */
static size_t escape(char *out, size_t size, unsigned char c, bool json) {
    static const char letters[] = "\aa\bb\ff\nn\rr\tt\vv";
    if (c == '"' || c == '\\')
        return (size_t)snprintf(out, size, "\\%c", c);
    const char *found = c == '\0' ? NULL : strchr(letters, c);
    bool control = found != NULL && (found - letters) % 2 == 0;
    if (control && (!json || (c != '\a' && c != '\v')))
        return (size_t)snprintf(out, size, "\\%c", found[1]);
    if (c < 0x20 || c == 0x7f)
        return (size_t)snprintf(out, size, json ? c == 0x7f ? "%c" : "\\u%04x" : "\\x%02x", c);
    if (json && (c == '<' || c == '>' || c == '&'))
        return (size_t)snprintf(out, size, "\\u%04x", c);
    return (size_t)snprintf(out, size, "%c", c);
}

static void quote(char *out, size_t size, const char *text, bool json) {
    size_t used = (size_t)snprintf(out, size, "\"");
    for (; *text != '\0' && used + 8 < size; text++)
        used += escape(out + used, size - used, (unsigned char)*text, json);
    (void)snprintf(out + used, size - used, "\"");
}

/* The logger leaves a value bare that is one plain word. */
static bool is_word(const char *text) {
    if (*text == '\0')
        return true;
    for (; *text != '\0'; text++)
        if (!isalnum((unsigned char)*text) && strchr("-._/@^+", *text) == NULL)
            return false;
    return true;
}

static void format_line(const struct lean *l, char *line, size_t size, const char *level,
                        const char *message) {
    static char quoted[6 * MESSAGE_BYTES];
    char when[48];
    now_text(when, sizeof(when));
    quote(quoted, sizeof(quoted), message, l->json);
    if (l->json)
        (void)snprintf(line, size, "{\"level\":\"%s\",\"msg\":%s,\"time\":\"%s\"}\n", level,
                       quoted, when);
    else
        (void)snprintf(line, size, "time=\"%s\" level=%s msg=%s\n", when, level,
                       is_word(message) ? message : quoted);
}

static void say(const struct lean *l, const char *level, const char *format, va_list arguments) {
    static char message[MESSAGE_BYTES], line[LINE_BYTES];
    bool error = strcmp(level, "error") == 0;
    (void)vsnprintf(message, sizeof(message), format, arguments);
    if (l->apptainer)
        (void)snprintf(line, sizeof(line), "%s%s\n", error ? "FATAL:   " : "WARNING: ", message);
    else if (l->log_fd < 0 && !l->json && isatty(STDERR_FILENO))
        (void)snprintf(line, sizeof(line), "\x1b[%dm%s\x1b[0m[0000] %-44s \n", error ? 31 : 33,
                       error ? "ERRO" : "WARN", message);
    else
        format_line(l, line, sizeof(line), level, message);
    put(l->log_fd >= 0 ? l->log_fd : STDERR_FILENO, line, strlen(line));
    if (l->log_fd < 0 || !error)
        return;
    (void)snprintf(line, sizeof(line), "%s\n", message);
    put(STDERR_FILENO, line, strlen(line));
}

void lean_error(const struct lean *l, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    say(l, "error", format, arguments);
    va_end(arguments);
}

void lean_warning(const struct lean *l, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    say(l, "warning", format, arguments);
    va_end(arguments);
}

/* Go's texts, which clients look for, are the C library's with a small first letter. */
const char *lean_errno_text(int error) {
    static char text[128];
    (void)snprintf(text, sizeof(text), "%s", strerror(error));
    text[0] = (char)tolower((unsigned char)text[0]);
    return text;
}

int lean_log_open(struct lean *l) {
    l->log_fd = -1;
    if (l->log == NULL || l->apptainer)
        return 0;
    int fd = open(l->log, O_CREAT | O_WRONLY | O_APPEND | O_SYNC | O_CLOEXEC, 0644);
    if (fd < 0) {
        lean_error(l, "open %s: %s", l->log, lean_errno_text(errno));
        return -1;
    }
    l->log_fd = fd;
    return 0;
}
