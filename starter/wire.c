/* Frames over sequenced-packet sockets: one message is one frame, with at most one descriptor. */
#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "starter.h"

int wire_pair(int pair[2]) {
    return socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair);
}

static int send_frame(int fd, const void *frame, size_t size, int passed, int flags) {
    union {
        char space[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control = {{0}};
    char *bytes = NULL;
    memcpy(&bytes, &frame, sizeof(bytes)); /* iovec is not const-correct */
    struct iovec io = {.iov_base = bytes, .iov_len = size};
    struct msghdr message = {.msg_iov = &io, .msg_iovlen = 1};
    if (passed >= 0) {
        message.msg_control = control.space;
        message.msg_controllen = sizeof(control.space);
        struct cmsghdr *head = CMSG_FIRSTHDR(&message);
        head->cmsg_level = SOL_SOCKET;
        head->cmsg_type = SCM_RIGHTS;
        head->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(head), &passed, sizeof(int));
    }
    ssize_t sent;
    do
        sent = sendmsg(fd, &message, MSG_NOSIGNAL | flags);
    while (sent < 0 && errno == EINTR);
    return sent == (ssize_t)size ? 0 : -1;
}

int wire_send(int fd, const void *frame, size_t size, int passed) {
    return send_frame(fd, frame, size, passed, 0);
}

/* To a reader who may never read. */
int wire_send_now(int fd, const void *frame, size_t size, int passed) {
    return send_frame(fd, frame, size, passed, MSG_DONTWAIT);
}

/* Keeps the first descriptor of a message and closes whatever else a forger attached. */
static void take_descriptors(struct msghdr *message, int *passed) {
    for (struct cmsghdr *head = CMSG_FIRSTHDR(message); head; head = CMSG_NXTHDR(message, head)) {
        if (head->cmsg_level != SOL_SOCKET || head->cmsg_type != SCM_RIGHTS)
            continue;
        size_t count = (head->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < count; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(head) + i * sizeof(int), sizeof(int));
            if (passed && *passed < 0)
                *passed = fd;
            else
                close(fd);
        }
    }
}

ssize_t wire_receive(int fd, void *frame, size_t size, int *passed) {
    union {
        char space[CMSG_SPACE(sizeof(int) * 4)];
        struct cmsghdr align;
    } control;
    struct iovec io = {.iov_base = frame, .iov_len = size};
    struct msghdr message = {.msg_iov = &io, .msg_iovlen = 1, .msg_control = control.space,
                             .msg_controllen = sizeof(control.space)};
    if (passed)
        *passed = -1;
    ssize_t got;
    do
        got = recvmsg(fd, &message, MSG_CMSG_CLOEXEC);
    while (got < 0 && errno == EINTR);
    if (got < 0)
        return -1;
    take_descriptors(&message, passed);
    if (message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) {
        if (passed && *passed >= 0) {
            close(*passed);
            *passed = -1;
        }
        errno = EMSGSIZE;
        return -1;
    }
    return got;
}

/* Sizes and terminators of an operation; every later reader relies on this check. */
int wire_check_request(const struct op_request *q, size_t size) {
    size_t head = offsetof(struct op_request, tail), strings = 0;
    if (size < head || size > sizeof(*q) || q->reserved != 0)
        return -1;
    for (int i = 0; i < 2; i++) {
        size_t length = q->length[i];
        if (length > LIMIT_PATH_BYTES || strings + length > size - head)
            return -1;
        if (length > 0 && strnlen(q->tail + strings, length) != length - 1)
            return -1; /* no terminator, or a NUL inside */
        strings += length;
    }
    return strings == size - head ? 0 : -1;
}

const char *wire_string(const struct op_request *q, int which) {
    if (q->length[which] == 0)
        return NULL;
    return q->tail + (which == 0 ? 0 : q->length[0]);
}
