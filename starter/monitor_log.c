/* The log of a container: each line of its output, with the time and the stream's name. */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "monitor.h"

/* A longer line is written in parts; who reads such logs expects about this much. */
#define LINE_BYTES 16384
#define LOG_MODE 0640

struct line {
    const char *stream;
    size_t used;
    bool split;                          /* its first part has been written */
    char bytes[LINE_BYTES];
};

static struct line lines[2] = {{.stream = "stdout"}, {.stream = "stderr"}};
static char record[6 * LINE_BYTES + 256];
static int log_fd = -1;
static const char *log_path;
static enum log_format log_format;

/* As Go's RFC3339Nano: local time, and no zeros at the end of the fraction. */
static size_t put_time(char *out, size_t size) {
    struct timespec now;
    struct tm parts;
    char fraction[16], zone[8];
    clock_gettime(CLOCK_REALTIME, &now);
    localtime_r(&now.tv_sec, &parts);
    size_t used = strftime(out, size, "%Y-%m-%dT%H:%M:%S", &parts);
    (void)snprintf(fraction, sizeof(fraction), ".%09ld", now.tv_nsec);
    size_t length = strlen(fraction);
    while (length > 1 && fraction[length - 1] == '0')
        length--;
    fraction[length > 1 ? length : 0] = '\0';
    (void)strftime(zone, sizeof(zone), "%z", &parts);
    if (parts.tm_gmtoff == 0)
        return used + (size_t)snprintf(out + used, size - used, "%sZ", fraction);
    return used + (size_t)snprintf(out + used, size - used, "%s%.3s:%s", fraction, zone, zone + 3);
}

static size_t put_bytes(char *out, const char *bytes, size_t size) {
    memcpy(out, bytes, size);
    return size;
}

/* Bytes that are no UTF-8 stay as they are: it is the container's text, not ours. */
static size_t put_escaped(char *out, const char *bytes, size_t size) {
    size_t used = 0;
    for (size_t i = 0; i < size; i++) {
        unsigned char c = (unsigned char)bytes[i];
        if (c == '"' || c == '\\')
            out[used++] = '\\';
        if (c >= 0x20 && c != 0x7f)
            out[used++] = (char)c;
        else if (c == '\t' || c == '\r')
            used += (size_t)snprintf(out + used, 3, "\\%c", c == '\t' ? 't' : 'r');
        else
            used += (size_t)snprintf(out + used, 7, "\\u%04x", c);
    }
    return used;
}

/* A disk that is full or gone is no reason to end a container. */
static void write_record(size_t size) {
    size_t done = 0;
    while (log_fd >= 0 && done < size) {
        ssize_t wrote = write(log_fd, record + done, size - done);
        if (wrote <= 0)
            return;
        done += (size_t)wrote;
    }
}

static void end_line(struct line *l, bool whole) {
    size_t size = l->used;
    if (whole && size > 0 && l->bytes[size - 1] == '\r')
        size--;
    size_t used = 0;
    if (log_format == LOG_JSON)
        used = (size_t)snprintf(record, sizeof(record), "{\"time\":\"");
    used += put_time(record + used, 64);
    if (log_format == LOG_JSON) {
        used += (size_t)snprintf(record + used, 64, "\",\"stream\":\"%s\",\"log\":\"", l->stream);
        used += put_escaped(record + used, l->bytes, size);
        used += put_bytes(record + used, "\"}\n", 3);
    } else {
        const char *mark = log_format == LOG_BASIC ? "" : whole ? "F " : "P ";
        used += (size_t)snprintf(record + used, 64, " %s %s", l->stream, mark);
        used += put_bytes(record + used, l->bytes, size);
        used += put_bytes(record + used, "\n", 1);
    }
    write_record(used);
    l->used = 0;
    l->split = !whole;
}

void log_bytes(const char *bytes, size_t size, bool is_error) {
    struct line *l = &lines[is_error];
    while (size > 0) {
        const char *end = memchr(bytes, '\n', size);
        size_t length = end != NULL ? (size_t)(end - bytes) : size;
        size_t space = sizeof(l->bytes) - l->used;
        bool whole = end != NULL && length <= space;
        if (length > space)
            length = space;
        memcpy(l->bytes + l->used, bytes, length);
        l->used += length;
        if (whole || l->used == sizeof(l->bytes))
            end_line(l, whole);
        length += whole;
        bytes += length;
        size -= length;
    }
}

void log_end(void) {
    for (size_t i = 0; i < COUNT(lines); i++)
        if (lines[i].used > 0 || lines[i].split)
            end_line(&lines[i], true);
    if (log_fd >= 0)
        close(log_fd);
    log_fd = -1;
}

void log_open(int fd, const char *path, enum log_format format) {
    log_fd = fd;
    log_path = path;
    log_format = format;
}

void log_reopen(void) {
    const int flags = O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOCTTY | O_NONBLOCK;
    int fd = open(log_path, flags, LOG_MODE);
    if (fd < 0)
        return;
    close(log_fd);
    log_fd = fd;
}
