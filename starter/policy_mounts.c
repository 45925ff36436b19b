/* Which mounts the administrator leaves to a launch of the setuid flow.  Stage 1 plans by the same
 * directives; here they hold even if it should plan otherwise.  Nothing here changes anything. */
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "starter.h"

static bool same(const char *a, const char *b) {
    return strcmp(a, b) == 0;
}

/* Paths that show themselves in the container, each by a directive of its own. */
static bool is_default(const struct config *c, const char *path) {
    static const struct {
        const char *path;
        enum config_id directive;
    } defaults[] = {
        {"/proc", CONFIG_MOUNT_PROC},
        {"/tmp", CONFIG_MOUNT_TMP},
        {"/var/tmp", CONFIG_MOUNT_TMP},
        {"/etc/resolv.conf", CONFIG_CONFIG_RESOLV_CONF},
    };
    for (size_t i = 0; i < ARRAY_SIZE(defaults); i++)
        if (same(path, defaults[i].path))
            return config_bool(c, defaults[i].directive);
    return false;
}

static bool is_terminal(const char *path) {
    static const char folder[] = "/dev/pts/";
    const char *number = path + strlen(folder);
    return strncmp(path, folder, strlen(folder)) == 0 && *number != '\0' &&
           number[strspn(number, "0123456789")] == '\0';
}

/* The host's /dev, or what a small one of the container's own has of it.  Anything else below /dev
 * could lead out of it again: a link in /dev/shm is its user's. */
static bool is_device(const struct config *c, const char *source, const char *target) {
    static const char *const small[] = {"tty", "null", "zero", "random", "urandom"};
    unsigned dev = config_enum(c, CONFIG_MOUNT_DEV);
    if (dev == MOUNT_DEV_NO)
        return false;
    if (same(target, "/dev/console"))
        return is_terminal(source);
    if (!same(source, target))
        return false;
    if (same(source, "/dev"))
        return dev == MOUNT_DEV_YES;
    for (size_t i = 0; i < ARRAY_SIZE(small); i++)
        if (strncmp(source, "/dev/", 5) == 0 && same(source + 5, small[i]))
            return true;
    return false;
}

/* `bind path`: a path, or two with a colon between, behind which options may follow. */
static bool is_bind_path(const struct config *c, const char *source, const char *target) {
    const char *item;
    for (size_t n = 0; (item = config_list_item(c, CONFIG_BIND_PATH, n)) != NULL; n++) {
        size_t length = strcspn(item, ":");
        const char *second = item[length] ? item + length + 1 : "";
        size_t most = strcspn(second, ":");
        if (strlen(source) == length && strncmp(source, item, length) == 0 &&
            (most == 0 ? same(target, source)
                       : strlen(target) == most && strncmp(target, second, most) == 0))
            return true;
    }
    return false;
}

static bool lies_in(const char *path, const char *folder) {
    size_t length = strlen(folder);
    return strncmp(path, folder, length) == 0 && (path[length] == '/' || path[length] == '\0');
}

/* `mount hostfs`: a file system of the host's as a whole, by its own path. */
static bool is_host_file_system(const struct config *c, const char *path, int fd) {
    static const char *const others[] = {"/proc", "/sys", "/dev", "/run", "/boot", "/var"};
    static char known[LIMIT_PATH_BYTES];
    char link[32] = "/proc/self/fd/";
    struct statx facts;
    if (!config_bool(c, CONFIG_MOUNT_HOSTFS) || same(path, "/"))
        return false;
    for (size_t i = 0; i < ARRAY_SIZE(others); i++)
        if (lies_in(path, others[i]))
            return false;
    append_number(link, sizeof(link), (uint64_t)fd);
    ssize_t length = readlink(link, known, sizeof(known) - 1);
    known[length > 0 ? length : 0] = '\0';
    return same(path, known) && statx(fd, "", AT_EMPTY_PATH, STATX_TYPE, &facts) == 0 &&
           (facts.stx_attributes & STATX_ATTR_MOUNT_ROOT) != 0;
}

/* `mount home`: the directory that the account has, not one that the caller names. */
static bool is_home(const struct launch *l, int fd) {
    static char home[LIMIT_PATH_BYTES];
    struct stat named, opened;
    return config_bool(&l->config, CONFIG_MOUNT_HOME) &&
           names_home(l, home, sizeof(home)) == 0 && stat(home, &named) == 0 &&
           fstat(fd, &opened) == 0 && named.st_dev == opened.st_dev &&
           named.st_ino == opened.st_ino;
}

/* A bind of something of the host's: with `user bind control = no` only what the administrator's
 * other directives bring. */
bool policy_bind(const struct launch *l, const char *source, const char *target, int source_fd) {
    const struct config *c = &l->config;
    if (l->flow != FLOW_SETUID || config_bool(c, CONFIG_USER_BIND_CONTROL))
        return true;
    if (is_device(c, source, target) || is_bind_path(c, source, target))
        return true;
    return same(source, target) &&
           (is_default(c, source) || is_host_file_system(c, source, source_fd) ||
            is_home(l, source_fd));
}

/* Out of an image that the user has named. */
bool policy_image_bind(const struct launch *l) {
    return l->flow != FLOW_SETUID || config_bool(&l->config, CONFIG_USER_BIND_CONTROL);
}

/* One that a program of the user's serves: by `enable fusemount`, and for who could open the device
 * without us (access(2) asks for the real ids, and grants them no capability). */
bool policy_user_fuse(const struct launch *l) {
    return l->flow != FLOW_SETUID || (config_bool(&l->config, CONFIG_ENABLE_FUSEMOUNT) &&
                                      access("/dev/fuse", R_OK | W_OK) == 0);
}

/* A file system of the kernel's own: each has its directive and its one place. */
bool policy_kernel_mount(const struct launch *l, enum kernel_fs kind, const char *target) {
    const struct config *c = &l->config;
    bool dev = config_enum(c, CONFIG_MOUNT_DEV) != MOUNT_DEV_NO;
    if (l->flow != FLOW_SETUID)
        return true;
    switch (kind) {
    case KERNELFS_PROC:
        return config_bool(c, CONFIG_MOUNT_PROC) && same(target, "/proc");
    case KERNELFS_SYSFS:
        return config_bool(c, CONFIG_MOUNT_SYS) && same(target, "/sys");
    case KERNELFS_DEVPTS:
        return dev && config_bool(c, CONFIG_MOUNT_DEVPTS) && same(target, "/dev/pts");
    case KERNELFS_MQUEUE: /* without a namespace of its own it would be the host's */
        return dev && l->plan.spaces & SPACE_IPC && same(target, "/dev/mqueue");
    case KERNELFS_TMPFS:
        return dev && same(target, "/dev/shm");
    default:
        return false;
    }
}

/* What may lie over the image. */
bool policy_layer(const struct launch *l, enum layer_kind kind) {
    const struct config *c = &l->config;
    if (l->flow != FLOW_SETUID)
        return true;
    switch (kind) {
    case LAYER_OVERLAY:
    case LAYER_OVERLAY_TMPFS:
    case LAYER_OVERLAY_USER:
    case LAYER_OVERLAY_SERVED:
        return config_enum(c, CONFIG_ENABLE_OVERLAY) != OVERLAY_NO;
    case LAYER_UNDERLAY:
        return config_enum(c, CONFIG_ENABLE_UNDERLAY) != UNDERLAY_NO;
    case LAYER_NONE:
    default:
        return true;
    }
}
