/* One record a launch of the setuid flow, where the administrator wants it.  A user's bytes are
 * escaped and bounded, so a record can be neither forged nor split. */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "starter.h"

static void add_number(char *line, size_t size, const char *key, uint64_t number) {
    append_text(line, size, ",\"");
    append_text(line, size, key);
    append_text(line, size, "\":");
    append_number(line, size, number);
}

static void add_text(char *line, size_t size, const char *key, const char *text) {
    append_text(line, size, ",\"");
    append_text(line, size, key);
    append_text(line, size, "\":\"");
    append_escaped(line, size - 2, text, strlen(text));
    append_text(line, size, "\"");
}

static void compose(char *line, size_t size, const struct launch *l,
                    const struct container_plan *plan, const char *image, const char *decision) {
    append_text(line, size, "{\"program\":\"apptainer-py\"");
    add_number(line, size, "time", (uint64_t)time(NULL));
    add_number(line, size, "pid", (uint64_t)getpid());
    add_number(line, size, "uid", l->uid);
    add_number(line, size, "gid", l->gid);
    add_text(line, size, "decision", decision);
    add_number(line, size, "namespaces", plan->spaces);
    add_number(line, size, "flags", plan->flags);
    add_number(line, size, "payload_caps", plan->caps[CAP_SET_PERMITTED]);
    char cut[1536] = "";
    append_escaped(cut, 1024, image, strlen(image));
    append_text(line, size, ",\"image\":\"");
    append_text(line, size - 4, cut);
    append_text(line, size, "\"}");
}

/* The logger notes the sender's real uid, which is the caller's; as root nobody else can send. */
static void send_as_root(int fd, char *message) {
    union {
        char space[CMSG_SPACE(sizeof(struct ucred))];
        struct cmsghdr align;
    } control = {{0}};
    struct ucred who = {.pid = getpid(), .uid = 0, .gid = getegid()};
    struct iovec io = {.iov_base = message, .iov_len = strlen(message)};
    struct msghdr datagram = {.msg_iov = &io, .msg_iovlen = 1, .msg_control = control.space,
                              .msg_controllen = sizeof(control.space)};
    struct cmsghdr *head = CMSG_FIRSTHDR(&datagram);
    head->cmsg_level = SOL_SOCKET;
    head->cmsg_type = SCM_CREDENTIALS;
    head->cmsg_len = CMSG_LEN(sizeof(who));
    memcpy(CMSG_DATA(head), &who, sizeof(who));
    if (sendmsg(fd, &datagram, MSG_NOSIGNAL | MSG_DONTWAIT) < 0)
        report("WARNING: ", "the audit record did not reach the system log");
}

static int to_syslog(const char *line) {
    struct sockaddr_un log = {.sun_family = AF_UNIX, .sun_path = "/dev/log"};
    char message[4096] = "<85>apptainer-py: "; /* authpriv.notice */
    append_text(message, sizeof(message), line);
    int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return -1;
    /* SAFE: a fixed address; a logger that hangs or is absent must not stop anybody. */
    if (connect(fd, (const struct sockaddr *)&log, sizeof(log)) == 0)
        send_as_root(fd, message);
    close(fd);
    return 0;
}

/* A caller's limit on file sizes would cut the record, and glue the next one to it. */
static bool has_room(const struct stat *st, size_t length) {
    struct rlimit limit;
    return getrlimit(RLIMIT_FSIZE, &limit) == 0 &&
           (limit.rlim_cur == RLIM_INFINITY ||
            (uint64_t)st->st_size + length <= (uint64_t)limit.rlim_cur);
}

static int to_file(const char *path, char *line, size_t size) {
    struct stat st;
    append_text(line, size, "\n");
    /* SAFE: the path stands in the administrator's file; opened as root, links refused. */
    int fd = privs_open_as_root(path, O_WRONLY | O_APPEND | O_CREAT | O_NOFOLLOW | O_NONBLOCK |
                                          O_CLOEXEC | O_NOCTTY, 0600);
    if (fd < 0)
        return -1;
    bool good = fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && st.st_uid == 0 &&
                !(st.st_mode & (S_IWGRP | S_IWOTH)) && has_room(&st, strlen(line)) &&
                write(fd, line, strlen(line)) == (ssize_t)strlen(line);
    close(fd);
    return good ? 0 : -1;
}

int audit_launch(const struct launch *l, const struct container_plan *plan, const char *image,
                 const char *decision) {
    char line[3072] = "";
    const char *sink = config_string(&l->config, CONFIG_AUDIT_LOG);
    if (l->flow != FLOW_SETUID || strcmp(sink, "none") == 0)
        return 0;
    compose(line, sizeof(line), l, plan, image, decision);
    return strcmp(sink, "syslog") == 0 ? to_syslog(line) : to_file(sink, line, sizeof(line));
}
