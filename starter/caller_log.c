/* The log of the flow CALLER: what C has to say goes where the call's --log wants it, in runc's
 * form, as the interpreter's messages do.  The words of the request are the caller's own, whose
 * rights are all that this process has. */
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "starter.h"

static char *const *words;
static struct {
    bool read;
    bool other;              /* Apptainer's own command line, whose messages have another form */
    const char *file;        /* --log, or NULL */
    const char *prefix;      /* what a failure of this command is called */
    bool json;
    int status;
} told = {.prefix = "", .status = 1};

/* The value of a flag of the program, at `word` or behind it; NULL: another flag. */
static const char *value_of(const char *word, const char *next, const char *name) {
    size_t length = strlen(name);
    word += word[1] == '-' ? 2 : 1;
    if (strncmp(word, name, length) != 0 || (word[length] != '\0' && word[length] != '='))
        return NULL;
    return word[length] == '=' ? word + length + 1 : next;
}

static bool takes_value(const char *word) {
    static const char *const names[] = {"log", "log-format", "root", "criu", "rootless",
                                        "cgroup-manager", "log-level"};
    for (size_t i = 0; i < ARRAY_SIZE(names); i++)
        if (strchr(word, '=') == NULL && value_of(word, "", names[i]) != NULL)
            return true;
    return false;
}

static void read_command(const char *word) {
    bool more = strcmp(word, "exec") == 0;
    told.status = more ? 255 : 1;
    told.prefix = more                           ? "exec failed: "
                  : strcmp(word, "create") == 0  ? "runc create failed: "
                  : strcmp(word, "run") == 0     ? "runc run failed: "
                  : strcmp(word, "restore") == 0 ? "runc restore failed: "
                                                 : "";
}

/* Flags of the program stand before the command. */
static void read_words(const char *at, const char *end, uint32_t count) {
    for (uint32_t i = 0; i < count && at < end; i++) {
        const char *next = at + strlen(at) + 1;
        if (at[0] != '-') {
            read_command(at);
            return;
        }
        const char *value = next < end ? next : "";
        const char *file = value_of(at, value, "log"), *form = value_of(at, value, "log-format");
        told.file = file != NULL ? file : told.file;
        told.json = form != NULL ? strcmp(form, "json") == 0 : told.json;
        if (takes_value(at) && next < end) {
            next += strlen(next) + 1;
            i++;
        }
        at = next;
    }
}

static void now_text(char *out, size_t size) {
    struct tm parts;
    time_t now = time(NULL);
    out[0] = '\0';
    if (gmtime_r(&now, &parts) != NULL)
        (void)strftime(out, size, "%Y-%m-%dT%H:%M:%SZ", &parts);
}

static void put(int fd, const char *text) {
    ssize_t ignored = write(fd, text, strlen(text));
    (void)ignored;
}

static void write_line(int fd, const char *text) {
    char line[2048] = "", when[40];
    now_text(when, sizeof(when));
    append_text(line, sizeof(line), told.json ? "{\"level\":\"error\",\"msg\":\"" : "time=\"");
    if (!told.json) {
        append_text(line, sizeof(line), when);
        append_text(line, sizeof(line), "\" level=error msg=\"");
    }
    append_escaped(line, sizeof(line), told.prefix, strlen(told.prefix));
    append_escaped(line, sizeof(line), text, strlen(text));
    if (told.json) {
        append_text(line, sizeof(line), "\",\"time\":\"");
        append_text(line, sizeof(line), when);
    }
    append_text(line, sizeof(line), told.json ? "\"}\n" : "\"\n");
    put(fd, line);
}

/* The request may be malformed: it is what may have been complained of. */
static void read_request(void) {
    struct stat st;
    const struct request_header *h;
    int fd = words[1][0] >= '0' && words[1][0] <= '9' ? atoi(words[1]) : -1;
    if (fd < 3 || request_check_seals(fd, &st) < 0 || st.st_size <= (off_t)sizeof(*h))
        return;
    char *all = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (all == MAP_FAILED || all[st.st_size - 1] != '\0')
        return;
    const void *start = all;
    h = start;
    const char *at = all + sizeof(*h), *end = all + h->env_off;
    const char *slash = strrchr(at, '/');
    told.other = strcmp(slash != NULL ? slash + 1 : at, "apptainer-py") == 0;
    if (h->env_off > sizeof(*h) && h->env_off <= (uint64_t)st.st_size && end[-1] == '\0')
        read_words(at + strlen(at) + 1, end, h->argc - 1);
}

static void write_both(int fd, const char *text) {
    char line[1024] = "";
    append_text(line, sizeof(line) - 1, told.prefix);
    append_text(line, sizeof(line) - 1, text);
    append_text(line, sizeof(line), "\n");
    write_line(fd, text);
    put(STDERR_FILENO, line);
    close(fd);
}

static int tell(const char *text) {
    if (!told.read)
        read_request();
    told.read = true;
    if (told.other) {
        put(STDERR_FILENO, "FATAL:   ");
        put(STDERR_FILENO, text);
        put(STDERR_FILENO, "\n");
        return 255;
    }
    const int flags = O_CREAT | O_WRONLY | O_APPEND | O_CLOEXEC;
    int fd = told.file == NULL || told.file[0] == '\0' ? -1 : open(told.file, flags, 0644);
    if (fd >= 0)
        write_both(fd, text);
    else
        write_line(STDERR_FILENO, text);
    return told.status;
}

void caller_log_begin(int argc, char *const argv[]) {
    /* SAFE: the kernel says that this execve gave nothing: a file is opened as the caller. */
    if (!caller_asked(argc, argv) || getauxval(AT_SECURE) != 0)
        return;
    words = argv;
    report_elsewhere(tell);
}
