/* What happened, as fixed frames to an unprivileged writer; privileged processes never write to
 * a descriptor that the user gave. */
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "starter.h"
#include "steps.h"

#define TRACE_PATIENCE_MS 300

int trace_fd = -1;
enum role trace_role = ROLE_KEEPER;

#ifdef APY_TEST_STEPS
static const char *role_name(uint32_t role);
#endif

void trace_set_role(enum role role) {
    trace_role = role;
#ifdef APY_TEST_STEPS
    (void)prctl(PR_SET_NAME, role_name(role)); /* so that a test sees who is who */
#endif
}

uint64_t trace_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void emit(struct trace_event *event, const char *text) {
    event->role = trace_role;
    event->pid = getpid();
    event->end_ns = trace_now();
    append_escaped(event->text, sizeof(event->text), text ? text : "", text ? strlen(text) : 0);
    if (privs_identify(&event->who, true) < 0)
        return;
    /* A reader that does not keep up loses lines; it must never stop a privileged process. */
    (void)send(trace_fd, event, sizeof(*event), MSG_NOSIGNAL | MSG_DONTWAIT);
}

void trace_process(void) {
    if (trace_fd < 0)
        return;
    struct trace_event event = {.kind = TRACE_PROCESS, .start_ns = trace_now()};
    emit(&event, NULL);
}

void trace_hook(uint32_t hook, uint64_t start_ns, int failed) {
    if (trace_fd < 0)
        return;
    struct trace_event event = {.kind = TRACE_HOOK, .number = hook, .start_ns = start_ns,
                                .code = failed};
    emit(&event, NULL);
}

void trace_operation(uint32_t op, uint64_t start_ns, int code, int error, const char *text) {
    if (trace_fd < 0)
        return;
    struct trace_event event = {.kind = TRACE_OPERATION, .number = op, .start_ns = start_ns,
                                .code = code, .error = error};
    emit(&event, text);
}

/* The steps before there is a writer; they are told when there is one. */
static struct {
    uint32_t step;
    uint64_t at_ns;
} early[4];
static size_t early_count;

static void trace_launch(const struct launch *l) {
    struct trace_event event = {.kind = TRACE_LAUNCH, .number = l->flow,
                                .start_ns = early_count ? early[0].at_ns : trace_now(),
                                .code = (int)l->reason};
    emit(&event, APY_VERSION);
    for (size_t i = 0; i < early_count; i++) {
        struct trace_event step = {.kind = TRACE_STEP, .number = early[i].step,
                                   .start_ns = early[i].at_ns};
        emit(&step, NULL);
    }
}

static void trace_step(uint32_t step) {
    if (trace_fd < 0) {
        if (early_count < ARRAY_SIZE(early)) {
            early[early_count].step = step;
            early[early_count++].at_ns = trace_now();
        }
        return;
    }
    struct trace_event event = {.kind = TRACE_STEP, .number = step, .start_ns = trace_now()};
    emit(&event, NULL);
}

static void at_step(uint32_t step, bool end) {
#ifdef APY_TEST_STEPS
    test_here(step, (int)trace_role, end);
#else
    (void)step;
    (void)end;
#endif
}

void step_begin(enum step step) {
    trace_step(step);
    at_step(step, false);
}

void step_end(enum step step) {
    at_step(step, true);
}

void step_operation(uint32_t op, bool end) {
    at_step(100 + op, end);
}

/* ---- the writer: forked, dropped, holds the user's file ---- */

static const char *name_of(uint32_t kind, uint32_t number) {
    switch ((enum trace_kind)kind) {
    case TRACE_HOOK:
        switch (number) {
#define HOOK(name, number, stage) case number: return #name;
#include "rows.h"
        default: return "?";
        }
    case TRACE_OPERATION:
        switch (number) {
#define OP(name, number, ...) case number: return #name;
#include "rows.h"
        default: return "?";
        }
    case TRACE_STEP:
        switch (number) {
#define STEP(name, number) case number: return #name;
#include "rows.h"
        default: return "?";
        }
    case TRACE_LAUNCH:
        switch (number) {
#define FLOW(name, number) case number: return #name;
#include "rows.h"
        default: return "?";
        }
    case TRACE_PROCESS:
    default:
        return "";
    }
}

static const char *role_name(uint32_t role) {
    switch (role) {
#define ROLE(name, number) case number: return #name;
#include "rows.h"
    default: return "?";
    }
}

struct line {
    char text[3072];
};

static void put(struct line *line, const char *key, const char *value) {
    append_text(line->text, sizeof(line->text), line->text[0] == '{' && line->text[1] ? "," : "");
    append_text(line->text, sizeof(line->text), "\"");
    append_text(line->text, sizeof(line->text), key);
    append_text(line->text, sizeof(line->text), "\":\"");
    append_text(line->text, sizeof(line->text), value);
    append_text(line->text, sizeof(line->text), "\"");
}

static void put_numbers(struct line *line, const char *key, const uint64_t *values, size_t count) {
    append_text(line->text, sizeof(line->text), ",\"");
    append_text(line->text, sizeof(line->text), key);
    append_text(line->text, sizeof(line->text), count == 1 ? "\":" : "\":[");
    for (size_t i = 0; i < count; i++) {
        if (i > 0)
            append_text(line->text, sizeof(line->text), ",");
        append_number(line->text, sizeof(line->text), values[i]);
    }
    append_text(line->text, sizeof(line->text), count == 1 ? "" : "]");
}

static void put_number(struct line *line, const char *key, uint64_t value) {
    put_numbers(line, key, &value, 1);
}

static void put_four(struct line *line, const char *key, const uint32_t ids[4]) {
    const uint64_t wide[4] = {ids[0], ids[1], ids[2], ids[3]};
    put_numbers(line, key, wide, 4);
}

static void format(struct line *line, const struct trace_event *e, uint64_t zero) {
    static const char *const kinds[] = {"", "process", "hook", "operation", "step", "launch"};
    append_text(line->text, sizeof(line->text), "{");
    put(line, "event", kinds[e->kind]);
    put(line, e->kind == TRACE_LAUNCH ? "flow" : "name", name_of(e->kind, e->number));
    put_number(line, "number", e->kind == TRACE_OPERATION ? 100 + e->number : e->number);
    put(line, "process", role_name(e->role));
    put_number(line, "pid", (uint64_t)(uint32_t)e->pid);
    put_number(line, "at_us", (e->start_ns - zero) / 1000);
    put_number(line, "took_us", (e->end_ns - e->start_ns) / 1000);
    put_number(line, "code", (uint64_t)(uint32_t)e->code);
    put_number(line, "errno", (uint64_t)(uint32_t)e->error);
    put_four(line, "uid", e->who.uid);
    put_four(line, "gid", e->who.gid);
    put_numbers(line, "caps", e->who.caps, CAP_SETS);
    put_number(line, "securebits", e->who.securebits);
    put_number(line, "no_new_privs", e->who.no_new_privs);
    put_number(line, "dumpable", e->who.dumpable);
    put_numbers(line, "namespaces", e->who.spaces, 8);
    put(line, "text", e->text);
    append_text(line->text, sizeof(line->text), "}\n");
}

/* A reader that stands still ends the trace, not the launch: no line may be cut in its middle. */
static int write_all(int fd, const char *text, size_t size) {
    struct pollfd file = {.fd = fd, .events = POLLOUT};
    while (size > 0) {
        ssize_t wrote = write(fd, text, size);
        if (wrote < 0 && errno == EAGAIN && poll(&file, 1, TRACE_PATIENCE_MS) == 1)
            continue;
        if (wrote <= 0)
            return -1;
        text += wrote;
        size -= (size_t)wrote;
    }
    return 0;
}

NO_RETURN static void tracer_main(int from, int file) {
    /* The first frame to arrive need not be the earliest: the launch began with the first step. */
    uint64_t zero = early_count ? early[0].at_ns : 0;
    for (;;) {
        struct trace_event event;
        ssize_t got = recv(from, &event, sizeof(event), 0);
        if (got <= 0)
            _exit(0);
        if (got != (ssize_t)sizeof(event) || event.kind < 1 || event.kind > TRACE_LAUNCH)
            continue;
        event.text[sizeof(event.text) - 1] = '\0';
        if (zero == 0)
            zero = event.start_ns;
        struct line line = {""};
        format(&line, &event, zero);
        if (write_all(file, line.text, strlen(line.text)) < 0)
            _exit(0);
    }
}

int trace_start(struct launch *l, int file_fd) {
    int pair[2];
    if (wire_pair(pair) < 0)
        return -1;
    int size = 4 << 20;
    (void)setsockopt(pair[1], SOL_SOCKET, SO_SNDBUF, &size, sizeof(size));
    step_begin(STEP_FORK_TRACER);
    trace_fd = pair[1];
    trace_launch(l); /* into the channel before there is a reader, so that it is the first line */
    pid_t pid = fork();
    if (pid < 0)
        return -1;
    if (pid == 0) {
        struct target_identity target;
        trace_set_role(ROLE_TRACER);
        step_begin(STEP_DROP_TRACER);
        stage_target(l, ROLE_TRACER, &target);
        /* SAFE: from here on only the caller's own rights, and the caller's own file. */
        if (privs_drop(&target) < 0)
            _exit(255);
        step_end(STEP_DROP_TRACER);
        close(pair[1]);
        sanitize_close_inherited(l);
        for (int i = 0; i < 3; i++)
            close(i); /* a pipe of the caller's must see its end when the payload closes it */
        (void)fcntl(file_fd, F_SETFL, O_NONBLOCK | O_APPEND);
        sigset_t all; /* it ends when the last of the others does */
        sigfillset(&all);
        (void)sigprocmask(SIG_SETMASK, &all, NULL);
        tracer_main(pair[0], file_fd);
    }
    step_end(STEP_FORK_TRACER);
    close(pair[0]);
    return 0;
}
