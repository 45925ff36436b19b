/* Which network namespace a container may join, judged on the open descriptor, and which CNI
 * network.  Changes nothing. */
#include <linux/magic.h>
#include <linux/nsfs.h>
#include <sched.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "starter.h"

static bool is_network(int fd) {
    struct statfs fs;
    return fstatfs(fd, &fs) == 0 && (unsigned long)fs.f_type == NSFS_MAGIC &&
           ioctl(fd, NS_GET_NSTYPE) == CLONE_NEWNET;
}

/* A network of a user namespace that the caller has made is the caller's own. */
static bool is_own(const struct launch *l, int fd) {
    uid_t owner = 0;
    int space = ioctl(fd, NS_GET_USERNS);
    bool found = space >= 0 && ioctl(space, NS_GET_OWNER_UID, &owner) == 0;
    if (space >= 0)
        close(space);
    return found && owner == l->uid && owner != 0;
}

static bool is_net_user(const struct launch *l) {
    gid_t uid_as_id = l->uid, held[1024];
    int count = getgroups((int)ARRAY_SIZE(held) - 1, held);
    size_t held_count = count > 0 ? (size_t)count : 0;
    held[held_count++] = l->gid;
    return (config_list_count(&l->config, CONFIG_ALLOW_NET_USERS) > 0 &&
            names_match(l, CONFIG_ALLOW_NET_USERS, false, &uid_as_id, 1) == 1) ||
           (config_list_count(&l->config, CONFIG_ALLOW_NET_GROUPS) > 0 &&
            names_match(l, CONFIG_ALLOW_NET_GROUPS, true, held, held_count) == 1);
}

/* The very namespace that a listed path leads to now; a path of the caller's is never read. */
static bool is_listed(const struct launch *l, int fd) {
    struct stat opened, named;
    if (fstat(fd, &opened) < 0)
        return false;
    for (size_t i = 0; i < config_list_count(&l->config, CONFIG_ALLOW_NETNS_PATHS); i++)
        if (stat(config_list_item(&l->config, CONFIG_ALLOW_NETNS_PATHS, i), &named) == 0 &&
            named.st_dev == opened.st_dev && named.st_ino == opened.st_ino)
            return true;
    return false;
}

int policy_netns(const struct launch *l, int fd) {
    if (!is_network(fd))
        return ERR_KIND;
    switch (l->flow) {
    case FLOW_ROOT:
        return ERR_OK;
    case FLOW_SETUID:
        return is_own(l, fd) || (is_listed(l, fd) && is_net_user(l)) ? ERR_OK : ERR_REFUSED;
    case FLOW_USERNS:
    case FLOW_CALLER:
    default:
        return ERR_REFUSED;
    }
}

static bool is_listed_network(const struct launch *l, const char *name) {
    for (size_t i = 0; i < config_list_count(&l->config, CONFIG_ALLOW_NET_NETWORKS); i++)
        if (strcmp(config_list_item(&l->config, CONFIG_ALLOW_NET_NETWORKS, i), name) == 0)
            return true;
    return false;
}

/* Plugins run as root, and touch the host: whose launch may have them do so, for which network.
 * Only a namespace that the starter has made for this very container is ever connected. */
int policy_network(const struct launch *l, const char *name) {
    const struct container_plan *plan = &l->plan;
    if (!(plan->spaces & SPACE_NET) || plan->flags & (PLAN_JOIN | PLAN_JOIN_NET))
        return ERR_MALFORMED;
    bool fakeroot = (plan->flags & PLAN_FAKEROOT) != 0;
    switch (l->flow) {
    case FLOW_ROOT:
        return ERR_OK;
    case FLOW_SETUID:
        /* Root inside may change its own address: one network is made for that. */
        if (fakeroot)
            return strcmp(name, "fakeroot") == 0 ? ERR_OK : ERR_REFUSED;
        return is_listed_network(l, name) && is_net_user(l) ? ERR_OK : ERR_REFUSED;
    case FLOW_USERNS:
    case FLOW_CALLER:
    default:
        return ERR_REFUSED;
    }
}

static bool is_same(int fd, const char *path) {
    struct stat one, other;
    return fstat(fd, &one) == 0 && stat(path, &other) == 0 && one.st_dev == other.st_dev &&
           one.st_ino == other.st_ino;
}

/* The network of a container of ours, never the host's.  A process that has dropped could have made
 * itself another, with every right in it; but that belongs to another user namespace than ours,
 * and with --fakeroot the network that we make is the caller's own, too. */
bool policy_made_for_it(const struct launch *l, int fd) {
    if (l->netns_fd >= 0 || !is_network(fd) || is_same(fd, "/proc/self/ns/net"))
        return false;
    if (l->flow == FLOW_ROOT)
        return true;
    if (l->plan.flags & PLAN_FAKEROOT)
        return is_own(l, fd);
    int space = ioctl(fd, NS_GET_USERNS);
    bool ours = space >= 0 && is_same(space, "/proc/self/ns/user");
    if (space >= 0)
        close(space);
    return ours;
}
