/* Decisions about a launch.  Nothing here changes anything; names are looked up in names.c. */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/capability.h>
#include <linux/magic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "starter.h"

static int own_groups(gid_t *groups, size_t size) {
    int count = getgroups((int)size, groups);
    return count < 0 ? 0 : count;
}

/* May this caller use the setuid flow at all?  0, or -1 with the reason for the message. */
int policy_caller(const struct launch *l, const char **why) {
    const struct config *c = &l->config;
    if (!config_bool(c, CONFIG_ALLOW_SETUID)) {
        *why = "allow setuid = no";
        return -1;
    }
    size_t users = config_list_count(c, CONFIG_ALLOW_SETUID_USERS);
    size_t groups = config_list_count(c, CONFIG_ALLOW_SETUID_GROUPS);
    if (users == 0 && groups == 0)
        return 0;
    gid_t uid_as_id = l->uid, held[1024];
    if (users > 0 && names_match(l, CONFIG_ALLOW_SETUID_USERS, false, &uid_as_id, 1) == 1)
        return 0;
    int count = own_groups(held, ARRAY_SIZE(held) - 1);
    held[count] = l->gid;
    size_t held_count = (size_t)count + 1;
    if (groups > 0 && names_match(l, CONFIG_ALLOW_SETUID_GROUPS, true, held, held_count) == 1)
        return 0;
    *why = "you are in neither `allow setuid users` nor `allow setuid groups`";
    return -1;
}

static bool wants_capabilities(const struct container_plan *plan) {
    uint64_t any = 0;
    for (int set = 0; set < CAP_SETS; set++)
        any |= plan->caps[set];
    return any != 0;
}

/* A user has what the administrator's own file grants, whatever master made of that file. */
static uint64_t most_capabilities(const struct launch *l, const struct container_plan *plan) {
    if (plan->flags & PLAN_FAKEROOT)
        return privs_last_cap_mask(); /* of a namespace that the caller owns */
    switch (l->flow) {
    case FLOW_ROOT:
        return l->permitted;
    case FLOW_USERNS:
        return privs_last_cap_mask();
    case FLOW_SETUID:
    case FLOW_CALLER:
    default:
        return wants_capabilities(plan) ? names_granted_caps(l) & l->permitted : 0;
    }
}

/* Bearer holds a grant in all five sets or in none: each set of its own would be a case to think
 * through. */
static bool whole_grant(const struct container_plan *plan) {
    for (int set = 1; set < CAP_SETS; set++)
        if (plan->caps[set] != plan->caps[0])
            return false;
    return true;
}

/* An instance lives as long as the first process of its own pid namespace.  Who joins one makes
 * nothing: what it enters is found out from that process alone (join.c). */
static bool fits_instance(const struct launch *l, const struct container_plan *plan) {
    const uint32_t joining = PLAN_JOIN | PLAN_NO_NEW_PRIVS | PLAN_FAKEROOT | PLAN_SHARED |
                             PLAN_BOOTED | PLAN_LABEL;
    /* Whose first process is none of ours is root's alone, to start and to join. */
    if (plan->flags & PLAN_BOOTED && (l->uid != 0 || !(plan->flags & PLAN_JOIN)))
        return false;
    if (plan->flags & PLAN_JOIN)
        return plan->spaces == 0 && plan->fuse_count == 0 && !(plan->flags & ~joining);
    /* Root's may be the image's own init. */
    bool fit = plan->spaces & SPACE_PID && (plan->flags & PLAN_SHIM || l->uid == 0);
    return !(plan->flags & PLAN_INSTANCE) || fit;
}

/* Mounts that other launches of the caller's may enter: where the caller owns them, and where they
 * are all that there is to enter. */
static bool fits_sharing(const struct launch *l, const struct container_plan *plan) {
    const uint32_t without = PLAN_FAKEROOT | PLAN_INSTANCE | PLAN_SHIM | PLAN_METHODS;
    return !(plan->flags & PLAN_SHARED) ||
           (l->flow == FLOW_USERNS && plan->spaces == 0 && !(plan->flags & without));
}

/* Master judges for a payload that is what master is itself; bearer waits for stage 2. */
static bool fits_lean(const struct launch *l, const struct container_plan *plan) {
    const uint32_t without = PLAN_FAKEROOT | PLAN_INSTANCE | PLAN_GROUPS | PLAN_METHODS;
    bool same = plan->uid == l->uid && plan->gid == l->gid && plan->group_count == 0;
    bool as_able = l->flow == FLOW_ROOT ? plan->caps[CAP_SET_PERMITTED] == l->permitted
                                        : !wants_capabilities(plan);
    return !(plan->flags & PLAN_LEAN) || (!(plan->flags & without) && same && as_able);
}

/* Root of a namespace of the caller's own: nothing in it reaches beyond what the caller has, and
 * what the caller was given in /etc/subuid and /etc/subgid, which fakeroot.c looks up. */
static int fakeroot_plan(const struct launch *l, const struct container_plan *plan) {
    const struct config *c = &l->config;
    if (plan->uid != 0 || plan->gid != 0 || plan->group_count != 0 ||
        plan->flags & (PLAN_SETUID | PLAN_KERNEL_IMAGE | PLAN_KERNEL_EXTFS | PLAN_METHODS |
                       PLAN_GROUPS))
        return ERR_MALFORMED;
    if (l->flow == FLOW_USERNS)
        return ERR_OK;
    /* Ids that are there already; an owner needs no right of ours to enter, as root would. */
    if (plan->flags & PLAN_JOIN)
        return l->flow == FLOW_ROOT ? ERR_OK : ERR_MALFORMED;
    /* One id needs no right of ours: then the user-namespace flow serves. */
    if (!(plan->flags & PLAN_SUBIDS) || !(plan->flags & PLAN_NO_NEW_PRIVS))
        return ERR_MALFORMED;
    return l->flow == FLOW_SETUID && !config_bool(c, CONFIG_ALLOW_USER_NS) ? ERR_REFUSED : ERR_OK;
}

/* What the administrator's file leaves of a plan in the setuid flow. */
static int setuid_plan(const struct launch *l, const struct container_plan *plan) {
    const struct config *c = &l->config;
    if ((plan->spaces & SPACE_PID && !config_bool(c, CONFIG_ALLOW_PID_NS)) ||
        (plan->spaces & SPACE_IPC && !config_bool(c, CONFIG_ALLOW_IPC_NS)) ||
        (plan->spaces & SPACE_UTS && !config_bool(c, CONFIG_ALLOW_UTS_NS)) ||
        plan->spaces & SPACE_CGROUP || plan->flags & PLAN_METHODS ||
        (plan->flags & PLAN_SLAVE && !config_bool(c, CONFIG_MOUNT_SLAVE)))
        return ERR_REFUSED;
    if (plan->flags & (PLAN_WRITABLE_LAYER | PLAN_USER_LAYER | PLAN_SERVED_LAYER) &&
        config_enum(c, CONFIG_ENABLE_OVERLAY) == OVERLAY_NO)
        return ERR_REFUSED;
    if (plan->flags & PLAN_KERNEL_EXTFS && !config_bool(c, CONFIG_ALLOW_SETUID_MOUNT_EXTFS))
        return ERR_REFUSED;
    unsigned squashfs = config_enum(c, CONFIG_ALLOW_SETUID_MOUNT_SQUASHFS);
    if (plan->flags & PLAN_KERNEL_IMAGE &&
        (squashfs == SETUID_SQUASHFS_NO ||
         (squashfs == SETUID_SQUASHFS_IFLIMITED && !policy_limits_images(l))))
        return ERR_REFUSED;
    return ERR_OK;
}

/* Is the payload to have other ids than its caller? */
bool policy_gives_names(const struct launch *l, const struct container_plan *plan) {
    return plan->uid != l->uid || plan->gid != l->gid;
}

/* In a user namespace ids are names, and whoever has them is the caller.  They hold in one more
 * namespace, which no other launch enters, and in which a capability would be worth nothing. */
static bool may_have_names(const struct launch *l, const struct container_plan *plan) {
    const uint32_t without = PLAN_INSTANCE | PLAN_JOIN | PLAN_SHARED | PLAN_METHODS;
    return l->flow == FLOW_USERNS && !(plan->flags & without) && !wants_capabilities(plan) &&
           plan->uid != UINT32_MAX && plan->gid != UINT32_MAX;
}

/* A caller other than root gets its own ids, and in the setuid flow no capability but granted
 * ones. */
int policy_plan(const struct launch *l, const struct container_plan *plan) {
    const uint32_t spaces = SPACE_PID | SPACE_IPC | SPACE_UTS | SPACE_NET | SPACE_CGROUP;
    const uint32_t flags = PLAN_SHIM | PLAN_WRITABLE_LAYER | PLAN_KERNEL_IMAGE | PLAN_SLAVE |
                           PLAN_NO_NEW_PRIVS | PLAN_METHODS | PLAN_SETUID | PLAN_USER_LAYER |
                           PLAN_SERVED_LAYER | PLAN_KERNEL_EXTFS | PLAN_GROUPS | PLAN_FAKEROOT |
                           PLAN_SUBIDS | PLAN_INSTANCE | PLAN_JOIN | PLAN_JOIN_NET |
                           PLAN_SHARED | PLAN_BOOTED | PLAN_LABEL | PLAN_LEAN;
    if ((plan->spaces & ~spaces) || (plan->flags & ~flags) ||
        plan->fuse_count > LIMIT_FUSE_DEVICES ||
        (plan->flags & PLAN_SERVED_LAYER && plan->fuse_count == 0) || !fits_lean(l, plan) ||
        plan->group_count > LIMIT_GROUPS || !fits_instance(l, plan) || !fits_sharing(l, plan))
        return ERR_MALFORMED;
    if (plan->flags & PLAN_JOIN_NET &&
        (l->netns_fd < 0 || !(plan->spaces & SPACE_NET) || plan->flags & PLAN_FAKEROOT))
        return ERR_MALFORMED;
    uint64_t most = most_capabilities(l, plan);
    for (int set = 0; set < CAP_SETS; set++)
        if (plan->caps[set] & ~most)
            return ERR_CAPABILITY;
    bool fakeroot = (plan->flags & PLAN_FAKEROOT) != 0;
    if ((l->flow == FLOW_SETUID && !fakeroot && !whole_grant(plan)) ||
        (!fakeroot && plan->flags & PLAN_SUBIDS))
        return ERR_MALFORMED;
    uint64_t most_ambient = plan->caps[CAP_SET_PERMITTED] & plan->caps[CAP_SET_INHERITABLE];
    if (plan->caps[CAP_SET_EFFECTIVE] & ~plan->caps[CAP_SET_PERMITTED] ||
        plan->caps[CAP_SET_AMBIENT] & ~most_ambient)
        return ERR_MALFORMED;
    int code = fakeroot ? fakeroot_plan(l, plan) : ERR_OK;
    if (code != ERR_OK || l->flow == FLOW_ROOT)
        return code;
    /* Root's payload in a namespace of its own may gain what that namespace has. */
    bool root_inside = l->flow == FLOW_USERNS && (l->uid == 0 || fakeroot);
    bool named = !fakeroot && policy_gives_names(l, plan);
    if ((named && !may_have_names(l, plan)) || plan->group_count != 0 ||
        plan->flags & (PLAN_SETUID | PLAN_GROUPS) ||
        (!(plan->flags & PLAN_NO_NEW_PRIVS) && (named || !root_inside)))
        return ERR_REFUSED;
    return l->flow == FLOW_USERNS ? ERR_OK : setuid_plan(l, plan);
}

bool policy_limits_images(const struct launch *l) {
    return config_list_count(&l->config, CONFIG_LIMIT_CONTAINER_OWNERS) > 0 ||
           config_list_count(&l->config, CONFIG_LIMIT_CONTAINER_GROUPS) > 0 ||
           config_list_count(&l->config, CONFIG_LIMIT_CONTAINER_PATHS) > 0;
}

/* The options of the file system are the last field; the fields before it hold texts that whoever
 * mounted it has chosen, and that may look like options. */
static bool line_says_root(const char *line, size_t length) {
    static const char wanted[] = ",user_id=0";
    const char *options = memrchr(line, ' ', length);
    if (!options)
        return false;
    size_t left = length - (size_t)(options - line);
    const char *id = memmem(options, left, wanted, sizeof(wanted) - 1);
    size_t after = id ? (size_t)(id - options) + sizeof(wanted) - 1 : left;
    return after < left && (options[after] == ',' || options[after] == '\n');
}

static char table[1 << 20];

/* /proc/self/mountinfo, whole if that is less than the table's size. */
static size_t read_table(void) {
    size_t used = 0;
    ssize_t got = 0;
    int fd = open("/proc/self/mountinfo", O_RDONLY | O_CLOEXEC);
    while (fd >= 0 && used < sizeof(table) &&
           (got = read(fd, table + used, sizeof(table) - used)) > 0)
        used += (size_t)got;
    if (fd >= 0)
        close(fd);
    return used;
}

static const char *mount_line(uint64_t mount_id, size_t *length) {
    size_t used = read_table();
    for (size_t at = 0; at < used;) {
        const char *end = memchr(table + at, '\n', used - at);
        if (!end)
            break;
        *length = (size_t)(end - (table + at)) + 1;
        if (strtoull(table + at, NULL, 10) == mount_id)
            return table + at;
        at += *length;
    }
    return NULL;
}

/* "ID PARENT ...": is something mounted on this very mount?  Yes, where nothing is known. */
bool policy_holds_mounts(int fd) {
    struct statx facts;
    size_t used = read_table();
    if (used == 0 || used == sizeof(table) ||
        statx(fd, "", AT_EMPTY_PATH, STATX_MNT_ID, &facts) < 0 ||
        !(facts.stx_mask & STATX_MNT_ID))
        return true;
    for (size_t at = 0; at < used;) {
        const char *end = memchr(table + at, '\n', used - at);
        char *parent;
        if (!end)
            break;
        (void)strtoull(table + at, &parent, 10);
        if (strtoull(parent, NULL, 10) == facts.stx_mnt_id)
            return true;
        at = (size_t)(end - table) + 1;
    }
    return false;
}

/* "ID PARENT ...": what lies on nothing is its own parent; so is what nothing is known of. */
bool policy_root_lies_on_nothing(void) {
    struct statx facts;
    size_t length = 0;
    char *parent;
    if (statx(AT_FDCWD, "/", 0, STATX_MNT_ID, &facts) < 0 || !(facts.stx_mask & STATX_MNT_ID))
        return true;
    const char *line = mount_line(facts.stx_mnt_id, &length);
    if (!line)
        return true;
    (void)strtoull(line, &parent, 10);
    return strtoull(parent, NULL, 10) == facts.stx_mnt_id;
}

/* A file whose owner, group and bytes are whatever some user says: one that a user serves, or one
 * on a mount of another namespace, where a user can have laid a file system of the kernel's over
 * that.  What root has mounted (CVMFS, for one) is as good as any other file system. */
bool policy_is_served(int fd) {
    struct statfs fs;
    struct statx facts;
    size_t length = 0;
    if (fstatfs(fd, &fs) < 0 || statx(fd, "", AT_EMPTY_PATH, STATX_MNT_ID, &facts) < 0 ||
        !(facts.stx_mask & STATX_MNT_ID))
        return true;
    const char *line = mount_line(facts.stx_mnt_id, &length);
    if (!line)
        return true;
    return (unsigned long)fs.f_type == FUSE_SUPER_MAGIC && !line_says_root(line, length);
}

/* Component-wise: /data/safe does not permit /data/safe-but-unsafe. */
static bool lies_below(const char *path, const char *directory) {
    size_t length = strlen(directory);
    if (length == 1)
        return true; /* "/" */
    return strncmp(path, directory, length) == 0 && (path[length] == '/' || path[length] == '\0');
}

/* The path that the kernel knows an open file by: without links, dots and doubled slashes. */
static int path_of(int fd, char path[PATH_MAX]) {
    char link[32] = "/proc/self/fd/";
    append_number(link, sizeof(link), (uint64_t)fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    if (length <= 0 || path[0] != '/')
        return -1;
    path[length] = '\0';
    struct stat opened, named;
    /* A deleted file, or another one under that name, has no path that could be permitted. */
    return fstat(fd, &opened) == 0 && lstat(path, &named) == 0 && opened.st_dev == named.st_dev &&
                   opened.st_ino == named.st_ino
               ? 0
               : -1;
}

static bool lies_in_permitted(const char *path, const char *permitted) {
    static char directory[PATH_MAX];
    /* SAFE: the administrator's path, opened as the caller, for its name alone. */
    int fd = open(permitted, O_PATH | O_CLOEXEC);
    bool found = fd >= 0 && path_of(fd, directory) == 0 && lies_below(path, directory);
    if (fd >= 0)
        close(fd);
    return found;
}

static int path_permitted(const struct launch *l, int image_fd) {
    char path[PATH_MAX];
    if (path_of(image_fd, path) < 0)
        return -1;
    for (size_t i = 0; i < config_list_count(&l->config, CONFIG_LIMIT_CONTAINER_PATHS); i++)
        if (lies_in_permitted(path, config_list_item(&l->config, CONFIG_LIMIT_CONTAINER_PATHS, i)))
            return 0;
    return -1;
}

/* The rule of image/detect.py: the magic of SIF may stand behind any launcher line. */
static bool is_sif(int image_fd) {
    char head[2048];
    ssize_t got = pread(image_fd, head, sizeof(head), 0);
    return got > 0 && memmem(head, (size_t)got, "SIF_MAGIC", 9) != NULL;
}

/* The magic numbers alone: what the kind allows is not the image's to say. */
static bool is_extfs(int image_fd) {
    unsigned char head[4], magic[2];
    return pread(image_fd, head, sizeof(head), 0) == (ssize_t)sizeof(head) &&
           memcmp(head, "hsqs", sizeof(head)) != 0 &&
           pread(image_fd, magic, sizeof(magic), 1024 + 56) == (ssize_t)sizeof(magic) &&
           magic[0] == 0x53 && magic[1] == 0xef;
}

/* What master has decrypted: a sealed memory file, which no name leads to. */
static bool is_decrypted(int image_fd, const struct stat *st) {
    int sealed = S_ISREG(st->st_mode) && st->st_nlink == 0 ? fcntl(image_fd, F_GET_SEALS) : -1;
    return sealed >= 0 && sealed & F_SEAL_WRITE;
}

static bool kind_permitted(const struct config *c, int image_fd, const struct stat *st) {
    if (S_ISDIR(st->st_mode))
        return config_bool(c, CONFIG_ALLOW_CONTAINER_DIR);
    if (is_decrypted(image_fd, st))
        return config_bool(c, CONFIG_ALLOW_CONTAINER_ENCRYPTED);
    if (is_sif(image_fd))
        return config_bool(c, CONFIG_ALLOW_CONTAINER_SIF);
    return config_bool(c, is_extfs(image_fd) ? CONFIG_ALLOW_CONTAINER_EXTFS
                                             : CONFIG_ALLOW_CONTAINER_SQUASHFS);
}

/* The image as it is open, not as it is named.  Other flows ask the same, for honesty's sake. */
int policy_image(const struct launch *l, int image_fd) {
    const struct config *c = &l->config;
    struct stat st;
    if (fstat(image_fd, &st) < 0 || (!S_ISREG(st.st_mode) && !S_ISDIR(st.st_mode)))
        return ERR_KIND;
    if (!kind_permitted(c, image_fd, &st))
        return ERR_REFUSED;
    /* The bytes of neither are those of the file that has an owner, a group and a path. */
    if (policy_limits_images(l) && (policy_is_served(image_fd) || is_decrypted(image_fd, &st)))
        return ERR_OWNER;
    gid_t owner = st.st_uid;
    if (config_list_count(c, CONFIG_LIMIT_CONTAINER_OWNERS) > 0 &&
        names_match(l, CONFIG_LIMIT_CONTAINER_OWNERS, false, &owner, 1) != 1)
        return ERR_OWNER;
    if (config_list_count(c, CONFIG_LIMIT_CONTAINER_GROUPS) > 0 &&
        names_match(l, CONFIG_LIMIT_CONTAINER_GROUPS, true, &st.st_gid, 1) != 1)
        return ERR_OWNER;
    if (config_list_count(c, CONFIG_LIMIT_CONTAINER_PATHS) > 0 && path_permitted(l, image_fd) < 0)
        return ERR_PATH;
    return ERR_OK;
}
