/* The steps of a launch.  Installed twice: `starter`, and setuid root as `starter-suid`. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "starter.h"
#include "steps.h"

static struct launch launch;

static void record_host_spaces(struct launch *l) {
    struct identity who;
    if (privs_identify(&who, true) == 0)
        memcpy(l->host_spaces, who.spaces, sizeof(who.spaces));
}

/* One line that names file, line, key and the likely spelling. */
static void report_config(const struct config_error *why) {
    const struct config_problem *p = &why->problem[0];
    char text[768] = "";
    append_text(text, sizeof(text), "the setuid flow is refused: " APY_CONFIG_FILE);
    if (p->line > 0) {
        append_text(text, sizeof(text), ":");
        append_number(text, sizeof(text), p->line);
    }
    append_text(text, sizeof(text), ": ");
    append_escaped(text, sizeof(text), p->key, strlen(p->key));
    append_text(text, sizeof(text), ": ");
    append_text(text, sizeof(text), p->text);
    if (p->nearest[0]) {
        append_text(text, sizeof(text), " (did you mean `");
        append_text(text, sizeof(text), p->nearest);
        append_text(text, sizeof(text), "`?)");
    }
    append_text(text, sizeof(text), "; see `apptainer-py config check`");
    report("FATAL:   ", text);
}

/* The setuid flow needs a file that it can trust in full; the others take what is readable. */
static void read_config(struct launch *l) {
    static struct config_error why;
    bool strict = l->flow == FLOW_SETUID;
    config_defaults(&l->config);
    l->config_fd = config_open(APY_CONFIG_FILE, strict, &why);
    if (l->config_fd < 0) {
        l->config_fd = -1;
        if (!strict)
            return;
        report_config(&why);
        _exit(255);
    }
    if (config_parse_fd(l->config_fd, &l->config, &why) < 0 && strict) {
        report_config(&why);
        _exit(255);
    }
}

/* Somebody to whom the setuid flow is not open gets the other one. */
static void check_caller(struct launch *l) {
    const char *why = "";
    static const struct container_plan nothing;
    if (l->flow != FLOW_SETUID || policy_caller(l, &why) == 0)
        return;
    if (audit_launch(l, &nothing, "", why) < 0)
        fail("the audit record cannot be written; tell your administrator", 0);
    keeper_become_plain(l, "policy");
}

int main(int argc, char *argv[]) {
    struct launch *l = &launch;
#ifdef APY_TEST_STEPS
    test_read_environment(environ);
    trace_set_role(ROLE_KEEPER);
#endif
    caller_log_begin(argc, argv);
    step_begin(STEP_KEEPER_START);
    sanitize_start(l);
    if (privs_check_start(l) < 0)
        fail("the starter does not have the identity that it needs; run apptainer-py", 0);
    if (caller_asked(argc, argv))
        caller_main(l, argc, argv);
    if (privs_enter_keeper(l) < 0)
        fail("cannot take the identity for the start", errno);
    step_end(STEP_KEEPER_START);
    step_begin(STEP_SANITIZED);
    request_open(l, argc, argv);
    sanitize_descriptors(l);
    step_end(STEP_SANITIZED);
    l->waiter_fd = -1;
    if (l->request.flags & REQUEST_INSTANCE)
        detach(l);
    record_host_spaces(l);
    read_config(l);
    if (l->trace_file >= 0 && trace_start(l, l->trace_file) < 0)
        fail("cannot start the trace", errno);
    check_caller(l);
    trace_process();
    keeper_main(l);
}
