/* Frames and descriptors between the processes of a launch: 0, or abort with the line. */
#define _GNU_SOURCE
#include "../../starter/wire.c"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>

#define HEAD offsetof(struct op_request, tail)
#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);                \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

static struct op_request q;

/* Lays two strings into the request as the Python side does; returns the frame's size. */
static size_t compose(const char *first, size_t first_size, const char *second,
                      size_t second_size) {
    memset(&q, 0, sizeof(q));
    q.op = OP_BIND;
    q.length[0] = (uint16_t)first_size;
    q.length[1] = (uint16_t)second_size;
    memcpy(q.tail, first, first_size);
    memcpy(q.tail + first_size, second, second_size);
    return HEAD + first_size + second_size;
}

/* Bytes after the frame are another request's or nobody's: reading them is an error here. */
static int check_exactly(size_t size) {
    struct op_request *alone = malloc(size < HEAD ? HEAD : size);
    CHECK(alone != NULL);
    memcpy(alone, &q, size < HEAD ? HEAD : size);
    int result = wire_check_request(alone, size);
    free(alone);
    return result;
}

static void test_good_frames(void) {
    CHECK(check_exactly(compose("", 0, "", 0)) == 0);
    CHECK(wire_string(&q, 0) == NULL && wire_string(&q, 1) == NULL);
    CHECK(check_exactly(compose("/a", 3, "", 0)) == 0);
    CHECK(strcmp(wire_string(&q, 0), "/a") == 0 && wire_string(&q, 1) == NULL);
    CHECK(check_exactly(compose("/a", 3, "/bc", 4)) == 0);
    CHECK(strcmp(wire_string(&q, 0), "/a") == 0 && strcmp(wire_string(&q, 1), "/bc") == 0);
    CHECK(check_exactly(compose("", 0, "/bc", 4)) == 0);
    CHECK(wire_string(&q, 0) == NULL && strcmp(wire_string(&q, 1), "/bc") == 0);
    CHECK(check_exactly(compose("", 1, "", 1)) == 0);
}

static void test_longest_strings(void) {
    static char path[LIMIT_PATH_BYTES + 1];
    memset(path, 'x', LIMIT_PATH_BYTES - 1);
    CHECK(check_exactly(compose(path, LIMIT_PATH_BYTES, path, LIMIT_PATH_BYTES)) == 0);
    memset(path, 'x', LIMIT_PATH_BYTES);
    CHECK(check_exactly(compose(path, LIMIT_PATH_BYTES + 1, "", 0)) < 0);
}

static void test_wrong_sizes(void) {
    size_t size = compose("/a", 3, "/bc", 4);
    CHECK(check_exactly(0) < 0 && check_exactly(4) < 0 && check_exactly(HEAD - 1) < 0);
    CHECK(check_exactly(size - 1) < 0);
    CHECK(wire_check_request(&q, size + 1) < 0);
    CHECK(wire_check_request(&q, sizeof(q)) < 0);
    CHECK(wire_check_request(&q, sizeof(q) + 1) < 0);
    q.length[0] = UINT16_MAX;
    CHECK(check_exactly(size) < 0);
    q.length[0] = 3;
    q.length[1] = UINT16_MAX;
    CHECK(check_exactly(size) < 0);
}

static void test_wrong_strings(void) {
    CHECK(check_exactly(compose("/ab", 3, "/bc", 4)) < 0); /* no terminator */
    CHECK(check_exactly(compose("/\0b", 4, "/bc", 4)) < 0); /* one inside */
    CHECK(check_exactly(compose("/a", 3, "/bcd", 4)) < 0);
    CHECK(check_exactly(compose("\0", 2, "", 0)) < 0);
    size_t size = compose("/a", 3, "", 0);
    q.reserved = 1;
    CHECK(check_exactly(size) < 0);
}

static bool is_open(int fd) {
    return fcntl(fd, F_GETFD) >= 0;
}

static int lowest_free(void) {
    int fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
    CHECK(fd >= 0);
    close(fd);
    return fd;
}

static void send_many(int socket_fd, const int *fds, size_t count) {
    char space[CMSG_SPACE(sizeof(int) * 16)] __attribute__((aligned(8))) = {0};
    char byte = 'x';
    struct iovec io = {.iov_base = &byte, .iov_len = 1};
    struct msghdr message = {.msg_iov = &io, .msg_iovlen = 1, .msg_control = space,
                             .msg_controllen = CMSG_SPACE(sizeof(int) * count)};
    struct cmsghdr *head = CMSG_FIRSTHDR(&message);
    CHECK(head != NULL && count <= 16);
    head->cmsg_level = SOL_SOCKET;
    head->cmsg_type = SCM_RIGHTS;
    head->cmsg_len = CMSG_LEN(sizeof(int) * count);
    memcpy(CMSG_DATA(head), fds, sizeof(int) * count);
    CHECK(sendmsg(socket_fd, &message, 0) == 1);
}

static void test_one_descriptor(void) {
    int pair[2], passed = -1;
    char frame[8] = "";
    CHECK(wire_pair(pair) == 0);
    CHECK(wire_send(pair[1], "frame", 5, 0) == 0);
    CHECK(wire_receive(pair[0], frame, sizeof(frame), &passed) == 5);
    CHECK(memcmp(frame, "frame", 5) == 0);
    CHECK(passed >= 3 && (fcntl(passed, F_GETFD) & FD_CLOEXEC) != 0);
    close(passed);
    CHECK(wire_send(pair[1], "none", 4, -1) == 0);
    CHECK(wire_receive(pair[0], frame, sizeof(frame), &passed) == 4 && passed == -1);
    CHECK(wire_send(pair[1], "unwanted", 8, 0) == 0);
    int free_before = lowest_free();
    CHECK(wire_receive(pair[0], frame, sizeof(frame), NULL) == 8);
    CHECK(lowest_free() == free_before);
    close(pair[1]);
    CHECK(wire_receive(pair[0], frame, sizeof(frame), &passed) == 0 && passed == -1);
    CHECK(wire_send(pair[0], "x", 1, -1) < 0); /* no SIGPIPE either */
    close(pair[0]);
}

static void test_too_many_descriptors(void) {
    static const int streams[16] = {0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0};
    int pair[2], passed = -1;
    char frame[8];
    CHECK(wire_pair(pair) == 0);
    int free_before = lowest_free();
    send_many(pair[1], streams, 4);
    CHECK(wire_receive(pair[0], frame, sizeof(frame), &passed) == 1);
    CHECK(passed == free_before && !is_open(passed + 1));
    close(passed);
    send_many(pair[1], streams, 16);
    CHECK(wire_receive(pair[0], frame, sizeof(frame), &passed) < 0 && errno == EMSGSIZE);
    CHECK(lowest_free() == free_before && passed == -1);
    close(pair[0]);
    close(pair[1]);
}

static void test_too_long_a_frame(void) {
    int pair[2], passed = -1;
    char frame[4];
    CHECK(wire_pair(pair) == 0);
    int free_before = lowest_free();
    CHECK(wire_send(pair[1], "too long", 8, 0) == 0);
    CHECK(wire_receive(pair[0], frame, sizeof(frame), &passed) < 0 && errno == EMSGSIZE);
    CHECK(lowest_free() == free_before && passed == -1);
    close(pair[0]);
    close(pair[1]);
}

int main(void) {
    test_good_frames();
    test_longest_strings();
    test_wrong_sizes();
    test_wrong_strings();
    test_one_descriptor();
    test_too_many_descriptors();
    test_too_long_a_frame();
    return 0;
}
