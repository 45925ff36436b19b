/* Network devices, by rtnetlink. */
#include <errno.h>
#include <linux/if.h>
#include <linux/rtnetlink.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "init_root.h"

struct link_request {
    struct nlmsghdr head;
    struct ifinfomsg info;
    struct rtattr attribute;
    char name[IFNAMSIZ];
};

static int talk(int socket, const struct link_request *request) {
    union {
        struct nlmsghdr head;
        struct {
            struct nlmsghdr head;
            struct nlmsgerr error;
        } answer;
        char space[1024];
    } reply;
    if (send(socket, request, sizeof(*request), 0) != (ssize_t)sizeof(*request))
        return -1;
    ssize_t got;
    do
        got = recv(socket, &reply, sizeof(reply), 0);
    while (got < 0 && errno == EINTR);
    if (got < 0)
        return -1;
    if ((size_t)got < sizeof(reply.answer) || reply.head.nlmsg_type != NLMSG_ERROR) {
        errno = EPROTO;
        return -1;
    }
    errno = -reply.answer.error.error;
    return errno == 0 ? 0 : -1;
}

int init_link_up(const char *name) {
    struct link_request request = {
        .head = {.nlmsg_len = sizeof(request),
                 .nlmsg_type = RTM_NEWLINK,
                 .nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK,
                 .nlmsg_seq = 1},
        .info = {.ifi_family = AF_UNSPEC, .ifi_flags = IFF_UP, .ifi_change = IFF_UP},
        .attribute = {.rta_len = RTA_LENGTH(IFNAMSIZ), .rta_type = IFLA_IFNAME}};
    if (*name == '\0' || strlen(name) >= sizeof(request.name)) {
        errno = ENODEV;
        return -1;
    }
    memcpy(request.name, name, strlen(name) + 1);
    int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
    int result = fd < 0 ? -1 : talk(fd, &request), error = errno;
    init_close(&fd);
    errno = error;
    return result;
}

/* NETDEV(name): up. */
int init_netdev(struct init *s, const struct op_request *q, struct op_reply *a) {
    if (!row_is_plain(q, 0, 0, true, false) || s->passed >= 0)
        return ERR_MALFORMED;
    return init_link_up(wire_string(q, 0)) < 0 ? init_failed(a) : ERR_OK;
}
