/* In keeper: which CNI networks a container gets, and with what, is judged before the janitor is
 * forked, which has them made and undone.  Nothing of the caller's but a name, an address and port
 * numbers comes that far. */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "networks.h"

struct networks networks;

/* CNI_ARGS has no quoting, so no byte may be there that could begin one more argument. */
static bool has_plain_bytes(const char *args) {
    static const char plain[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
                                "0123456789_-=;.:/";
    return args[strspn(args, plain)] == '\0';
}

/* A user may wish for an address of the network's own range, and for nothing else: static addresses
 * and those of network cards are anybody's. */
static bool is_address_wish(const struct network_file *file, const char *args) {
    unsigned char address[sizeof(struct in6_addr)];
    if (strncmp(args, "IP=", 3) != 0 || !file->host_local)
        return false;
    return inet_pton(AF_INET, args + 3, address) == 1 ||
           inet_pton(AF_INET6, args + 3, address) == 1;
}

/* A plugin that a limit ends leaves half of its work, and cannot be had undo it. */
static bool has_no_limits(const struct launch *l) {
    static const int of_plugins[] = {RLIMIT_CPU, RLIMIT_FSIZE, RLIMIT_DATA, RLIMIT_AS,
                                     RLIMIT_RTTIME};
    if (l->permitted & CAP_BIT(CAP_SYS_RESOURCE))
        return true; /* the janitor lifts them */
    for (size_t i = 0; i < ARRAY_SIZE(of_plugins); i++)
        if (l->inherited.limits[of_plugins[i]].rlim_max != RLIM_INFINITY)
            return false;
    return true;
}

/* NETWORK(name, arguments): the container is to be connected to it, as its next interface. */
int networks_add(const struct launch *l, const char *name, const char *args) {
    char decision[NETWORK_NAME_BYTES + 16] = "network ";
    if (!name || !network_is_name(name) || !args || strlen(args) >= NETWORK_ARGS_BYTES ||
        !has_plain_bytes(args) || networks.count == NETWORKS_MAX)
        return ERR_MALFORMED;
    int code = policy_network(l, name);
    if (code != ERR_OK)
        return code;
    if (l->flow != FLOW_ROOT && !has_no_limits(l))
        return ERR_LIMITS;
    struct network *n = &networks.at[networks.count];
    memset(n, 0, sizeof(*n));
    if (network_find(l, name, &n->file) < 0)
        return ERR_NETWORK;
    if (l->flow != FLOW_ROOT && *args && !is_address_wish(&n->file, args))
        return ERR_REFUSED;
    append_text(decision, sizeof(decision), name);
    if (audit_launch(l, &l->plan, "", decision) < 0)
        return ERR_REFUSED;
    append_text(n->name, sizeof(n->name), name);
    append_text(n->args, sizeof(n->args), args);
    networks.count++;
    return ERR_OK;
}

static int bind_port(int family, int type, uint16_t port) {
    struct sockaddr_in6 six = {.sin6_family = AF_INET6, .sin6_port = htons(port)};
    struct sockaddr_in four = {.sin_family = AF_INET, .sin_port = htons(port)};
    const struct sockaddr *address = family == AF_INET6 ? (const struct sockaddr *)&six
                                                        : (const struct sockaddr *)&four;
    int on = 1, off = 0, fd = socket(family, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return -1;
    /* For what is left of connections that have ended; who listens is found all the same.  Of
     * datagrams it would allow what shall not be. */
    if ((type == SOCK_STREAM && setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)) < 0) ||
        (family == AF_INET6 && setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof(off)) < 0) ||
        bind(fd, address, family == AF_INET6 ? sizeof(six) : sizeof(four)) < 0 ||
        (type == SOCK_STREAM && listen(fd, 0) < 0)) {
        int error = errno;
        close(fd);
        errno = error;
        return -1;
    }
    return fd;
}

/* Bound for as long as the container is connected: whoever binds it later would not know that what
 * is sent there goes elsewhere. */
static int hold_port(const struct launch *l, uint16_t port, int type) {
    const struct raised *raised =
        l->flow == FLOW_ROOT ? privs_raise(CAP_BIT(CAP_NET_BIND_SERVICE)) : NULL;
    /* SAFE: without any effective capability but root's own: a port that the caller may not bind,
     * or that is somebody's, is refused by the kernel. */
    int fd = bind_port(AF_INET6, type, port);
    if (fd < 0 && (errno == EAFNOSUPPORT || errno == EADDRNOTAVAIL))
        fd = bind_port(AF_INET, type, port);
    int error = errno;
    privs_lower(raised);
    errno = error;
    return fd;
}

/* PORT(network, host's, container's, protocol): of a network that was added. */
int networks_port(const struct launch *l, const uint64_t num[6], int *error) {
    if (num[0] >= networks.count || num[1] == 0 || num[1] > UINT16_MAX || num[2] == 0 ||
        num[2] > UINT16_MAX || networks.port_count == PORTS_MAX ||
        (num[3] != IPPROTO_TCP && num[3] != IPPROTO_UDP && num[3] != IPPROTO_SCTP))
        return ERR_MALFORMED;
    /* Nobody can tell here whose port it is. */
    if (num[3] == IPPROTO_SCTP && l->flow != FLOW_ROOT)
        return ERR_REFUSED;
    struct network *n = &networks.at[num[0]];
    struct network_port port = {(uint16_t)num[1], (uint16_t)num[2], (uint16_t)num[3], -1};
    if (num[3] != IPPROTO_SCTP) {
        port.fd = hold_port(l, port.host, num[3] == IPPROTO_TCP ? SOCK_STREAM : SOCK_DGRAM);
        *error = errno;
        if (port.fd < 0)
            return ERR_PORT;
    }
    *error = 0;
    n->ports[n->port_count++] = port;
    networks.port_count++;
    return ERR_OK;
}

/* Keeper's own copies, once the janitor has them. */
void networks_close(void) {
    for (size_t i = 0; i < networks.count; i++)
        for (size_t k = 0; k < networks.at[i].port_count; k++)
            if (networks.at[i].ports[k].fd >= 0) {
                close(networks.at[i].ports[k].fd);
                networks.at[i].ports[k].fd = -1;
            }
}
