/* Every change of identity: set, try to go back, verify.  No other file changes an identity. */
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <linux/keyctl.h>
#include <linux/securebits.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/fsuid.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "starter.h"

#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008U
#endif

/* NOROOT, NO_SETUID_FIXUP, KEEP_CAPS, NO_CAP_AMBIENT_RAISE and their locks; later ones concern
 * scripts, and anybody may set them. */
#define SECUREBITS_OLD 0xffu

struct raised {
    uint64_t caps;
};

static int caps_get(uint64_t *effective, uint64_t *permitted, uint64_t *inheritable) {
    struct __user_cap_header_struct head = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2];
    if (syscall(SYS_capget, &head, data) < 0)
        return -1;
    *effective = (uint64_t)data[1].effective << 32 | data[0].effective;
    *permitted = (uint64_t)data[1].permitted << 32 | data[0].permitted;
    *inheritable = (uint64_t)data[1].inheritable << 32 | data[0].inheritable;
    return 0;
}

static int caps_set(uint64_t effective, uint64_t permitted, uint64_t inheritable) {
    struct __user_cap_header_struct head = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2] = {
        {(uint32_t)effective, (uint32_t)permitted, (uint32_t)inheritable},
        {(uint32_t)(effective >> 32), (uint32_t)(permitted >> 32), (uint32_t)(inheritable >> 32)},
    };
    return (int)syscall(SYS_capset, &head, data);
}

static uint64_t caps_bounding(void) {
    uint64_t set = 0;
    for (int cap = 0; cap < 64; cap++) {
        int has = prctl(PR_CAPBSET_READ, cap);
        if (has < 0)
            break;
        if (has)
            set |= CAP_BIT(cap);
    }
    return set;
}

/* The kernel keeps it within both others: where they have nothing in common, nobody need ask. */
static uint64_t caps_ambient(const uint64_t caps[CAP_SETS]) {
    uint64_t set = 0, most = caps[CAP_SET_PERMITTED] & caps[CAP_SET_INHERITABLE];
    for (int cap = 0; most != 0 && cap < 64; cap++) {
        int has = prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_IS_SET, cap, 0, 0);
        if (has < 0)
            break;
        if (has)
            set |= CAP_BIT(cap);
    }
    return set;
}

uint64_t privs_last_cap_mask(void) {
    uint64_t mask = 0;
    for (int cap = 0; cap < 64 && prctl(PR_CAPBSET_READ, cap) >= 0; cap++)
        mask |= CAP_BIT(cap);
    return mask;
}

/* What the link says, "mnt:[4026531841]", is the number that following it would show, at a fraction
 * of the cost: no file is opened or made for it.  0 where it says something else. */
static uint64_t space_number(const char *link, ssize_t length) {
    uint64_t number = 0;
    ssize_t at = 0;
    while (at < length && link[at] != '[')
        at++;
    for (at++; at < length && link[at] >= '0' && link[at] <= '9'; at++)
        number = number * 10 + (uint64_t)(link[at] - '0');
    return at < length && link[at] == ']' ? number : 0;
}

static void find_spaces(struct identity *who) {
    static const char *const names[8] = {"user", "mnt", "pid", "ipc", "uts", "net", "cgroup",
                                         "time"};
    static const char place[] = "/proc/self/ns/";
    int folder = open(place, O_PATH | O_DIRECTORY | O_CLOEXEC);
    for (size_t i = 0; i < 8; i++) {
        char path[32] = "", link[48] = "";
        append_text(path, sizeof(path), folder < 0 ? place : "");
        append_text(path, sizeof(path), names[i]);
        who->spaces[i] = space_number(
            link, readlinkat(folder < 0 ? AT_FDCWD : folder, path, link, sizeof(link)));
    }
    if (folder >= 0)
        close(folder);
}

int privs_identify(struct identity *who, bool with_spaces) {
    memset(who, 0, sizeof(*who));
    if (getresuid(&who->uid[0], &who->uid[1], &who->uid[2]) < 0 ||
        getresgid(&who->gid[0], &who->gid[1], &who->gid[2]) < 0)
        return -1;
    who->uid[3] = (uint32_t)setfsuid((uid_t)-1); /* an impossible id changes nothing, but tells */
    who->gid[3] = (uint32_t)setfsgid((gid_t)-1);
    if (caps_get(&who->caps[CAP_SET_EFFECTIVE], &who->caps[CAP_SET_PERMITTED],
                 &who->caps[CAP_SET_INHERITABLE]) < 0)
        return -1;
    who->caps[CAP_SET_BOUNDING] = caps_bounding();
    who->caps[CAP_SET_AMBIENT] = caps_ambient(who->caps);
    who->securebits = (uint32_t)prctl(PR_GET_SECUREBITS);
    who->no_new_privs = (uint16_t)prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0);
    who->dumpable = (uint16_t)prctl(PR_GET_DUMPABLE);
    if (with_spaces)
        find_spaces(who);
    return 0;
}

/* The setuid flow needs exactly this; everything else is a refusal, never a guess. */
int privs_check_start(struct launch *l) {
    struct identity who;
    const uint64_t needed = CAP_BIT(CAP_SYS_ADMIN) | CAP_BIT(CAP_SETUID) | CAP_BIT(CAP_SETGID) |
                            CAP_BIT(CAP_SETPCAP) | CAP_BIT(CAP_DAC_OVERRIDE);
    if (privs_identify(&who, false) < 0)
        return -1;
    l->uid = who.uid[0];
    l->gid = who.gid[0];
    l->bounding = who.caps[CAP_SET_BOUNDING];
    l->permitted = who.caps[CAP_SET_PERMITTED];
    if (who.gid[0] != who.gid[1] || who.gid[0] != who.gid[2])
        return -1;
    if (who.uid[0] != 0 && who.uid[1] == 0) {
        l->flow = FLOW_SETUID;
        if (who.uid[2] != 0 || !getauxval(AT_SECURE) || (who.securebits & SECUREBITS_OLD) != 0 ||
            (who.caps[CAP_SET_PERMITTED] & needed) != needed)
            return -1;
        return 0;
    }
    if (who.uid[0] != who.uid[1] || who.uid[0] != who.uid[2] || getauxval(AT_SECURE))
        return -1;
    l->flow = who.uid[0] == 0 && (l->permitted & needed) == needed ? FLOW_ROOT : FLOW_USERNS;
    return 0;
}

/* keeper's (user, 0, 0, user): files are opened as the user, capabilities come one by one. */
int privs_enter_keeper(const struct launch *l) {
    if (l->flow == FLOW_SETUID) {
        (void)setfsgid(l->gid);
        (void)setfsuid(l->uid);
        if ((uid_t)setfsuid((uid_t)-1) != l->uid || (gid_t)setfsgid((gid_t)-1) != l->gid)
            return -1;
    }
    if (l->flow == FLOW_USERNS)
        return 0; /* nothing to hold yet */
    return caps_set(0, l->permitted, 0);
}

/* What this process was dropped to stays effective beside what is raised: root's rpc has more. */
static uint64_t standing;

const struct raised *privs_raise(uint64_t caps) {
    static struct raised token;
    uint64_t effective, permitted, inheritable;
    caps |= standing;
    if (caps_get(&effective, &permitted, &inheritable) < 0 || (caps & ~permitted) != 0 ||
        caps_set(caps, permitted, inheritable) < 0)
        return NULL;
    token.caps = caps;
    return &token;
}

void privs_lower(const struct raised *token) {
    uint64_t effective, permitted, inheritable;
    if (token == NULL)
        return;
    if (caps_get(&effective, &permitted, &inheritable) < 0 ||
        caps_set(0, permitted, inheritable) < 0)
        fail("cannot lower a capability", errno); /* still privileged: nothing may follow */
}

static int drop_bounding(uint64_t wanted) {
    for (int cap = 0; cap < 64; cap++) {
        int has = prctl(PR_CAPBSET_READ, cap);
        if (has < 0)
            break;
        if (has && !(wanted & CAP_BIT(cap)) && prctl(PR_CAPBSET_DROP, cap) < 0)
            return -1;
    }
    return 0;
}

static int raise_ambient(uint64_t wanted) {
    for (int cap = 0; cap < 64; cap++)
        if (wanted & CAP_BIT(cap) && prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, cap, 0, 0) < 0)
            return -1;
    return 0;
}

static bool same_groups(const struct target_identity *t) {
    gid_t held[LIMIT_GROUPS + 1];
    if (!t->set_groups)
        return true; /* the caller's own are kept */
    int count = getgroups((int)ARRAY_SIZE(held), held);
    for (int i = 0; i < count; i++) { /* the kernel sorts them */
        size_t k = 0;
        while (k < t->group_count && t->groups[k] != held[i])
            k++;
        if (k == t->group_count)
            return false;
    }
    return count >= 0 && (size_t)count == t->group_count;
}

/* After a drop every way back must be shut: a success here means that privilege survived. */
static int verify_drop(const struct target_identity *t) {
    struct identity who;
    if (t->uid != 0 && !(t->caps[CAP_SET_PERMITTED] & CAP_BIT(CAP_SETUID)) &&
        (setresuid((uid_t)-1, 0, (uid_t)-1) == 0 || setuid(0) == 0 || seteuid(0) == 0))
        return -1;
    if (t->gid != 0 && !(t->caps[CAP_SET_PERMITTED] & CAP_BIT(CAP_SETGID)) &&
        (setresgid((gid_t)-1, 0, (gid_t)-1) == 0 || setgid(0) == 0))
        return -1;
    if (privs_identify(&who, false) < 0)
        return -1;
    for (int i = 0; i < 4; i++)
        if (who.uid[i] != t->uid || who.gid[i] != t->gid)
            return -1;
    for (int set = 0; set < CAP_SETS; set++)
        if (who.caps[set] != t->caps[set] && !(set == CAP_SET_BOUNDING && t->keep_bounding))
            return -1;
    if (!same_groups(t) || (who.securebits & SECUREBITS_OLD) != 0)
        return -1;
    if (who.dumpable != 0 || (t->no_new_privs && !who.no_new_privs))
        return -1;
    if (t->caps[CAP_SET_PERMITTED] == privs_last_cap_mask())
        return 0; /* root's own stage: there is nothing above it to regain */
    return caps_set(~(uint64_t)0, ~(uint64_t)0, 0) == 0 ? -1 : 0;
}

int privs_drop(const struct target_identity *t) {
    uint64_t effective, permitted, inheritable;
    if (caps_get(&effective, &permitted, &inheritable) < 0 ||
        caps_set(permitted, permitted, inheritable) < 0)
        return -1;
    if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) < 0)
        return -1;
    if (!t->keep_bounding && drop_bounding(t->caps[CAP_SET_BOUNDING]) < 0)
        return -1;
    if (t->caps[CAP_SET_PERMITTED] != 0 && prctl(PR_SET_KEEPCAPS, 1) < 0)
        return -1;
    if (t->set_groups && setgroups(t->group_count, t->groups) < 0)
        return -1;
    if (setresgid(t->gid, t->gid, t->gid) < 0 || setresuid(t->uid, t->uid, t->uid) < 0)
        return -1;
    /* Ambient needs permitted and inheritable; effective comes last. */
    if (caps_set(t->caps[CAP_SET_EFFECTIVE], t->caps[CAP_SET_PERMITTED],
                 t->caps[CAP_SET_INHERITABLE]) < 0)
        return -1;
    if (prctl(PR_SET_KEEPCAPS, 0) < 0 || raise_ambient(t->caps[CAP_SET_AMBIENT]) < 0)
        return -1;
    if (t->no_new_privs && prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
        return -1;
    if (prctl(PR_SET_DUMPABLE, 0) < 0)
        return -1;
    standing = t->caps[CAP_SET_EFFECTIVE];
    return verify_drop(t);
}

static int write_map(const char *path, const char *text) {
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    ssize_t wrote = write(fd, text, strlen(text));
    int error = errno;
    close(fd);
    errno = error;
    return wrote == (ssize_t)strlen(text) ? 0 : -1;
}

/* The namespaces of a child that makes one mount.  It stays closed to its user all the time, so its
 * parent writes the maps. */
int privs_enter_layer_userns(void) {
    if (unshare(CLONE_NEWUSER | CLONE_NEWNS) < 0)
        return -1;
    return prctl(PR_SET_DUMPABLE, 0);
}

/* The caller's own namespace, for a server that has dropped: root there in every id, which is the
 * caller in every id, closed to its user as before. */
int privs_enter_inner_userns(int space) {
    struct identity who;
    if (setns(space, CLONE_NEWUSER) < 0 || prctl(PR_SET_DUMPABLE, 0) < 0 ||
        privs_identify(&who, false) < 0)
        return -1;
    for (int i = 0; i < 4; i++)
        if (who.uid[i] != 0 || who.gid[i] != 0)
            return -1;
    return who.no_new_privs && who.dumpable == 0 ? 0 : -1;
}

static int write_map_of(int process, const char *name, const char *text);

static void one_id(char *out, size_t size, uint32_t inside, uint32_t outside) {
    out[0] = '\0';
    append_number(out, size, inside);
    append_text(out, size, " ");
    append_number(out, size, outside);
    append_text(out, size, " 1\n");
}

/* The user onto itself, and nobody else.  `process` is the child's directory of /proc, which it has
 * opened itself: its number here is that of the container's pid namespace, /proc is the host's. */
int privs_map_layer_userns(int process) {
    char uid_line[64], gid_line[64];
    const struct raised *raised = privs_raise(CAP_BIT(CAP_SYS_ADMIN) | CAP_BIT(CAP_DAC_OVERRIDE));
    int result = -1, error = EPERM;
    one_id(uid_line, sizeof(uid_line), geteuid(), geteuid());
    one_id(gid_line, sizeof(gid_line), getegid(), getegid());
    if (raised) {
        /* SAFE: a child of this process, which waits; its files are root's, as it is closed to its
         * user, and the kernel allows one line with the writer's own id. */
        result = write_map_of(process, "setgroups", "deny");
        if (result == 0)
            result = write_map_of(process, "gid_map", gid_line);
        if (result == 0)
            result = write_map_of(process, "uid_map", uid_line);
        error = errno;
    }
    privs_lower(raised);
    if (!privs_raise(CAP_BIT(CAP_SYS_ADMIN)))
        result = -1;
    errno = error;
    return result;
}

/* The maps of this process's own new namespace: one id each, which takes no privilege. */
static int map_one(uint32_t inside[2], uint32_t outside[2]) {
    char uid_line[64], gid_line[64];
    one_id(uid_line, sizeof(uid_line), inside[0], outside[0]);
    one_id(gid_line, sizeof(gid_line), inside[1], outside[1]);
    /* A non-dumpable process's map files belong to root; a tracer finds nothing to take here. */
    (void)prctl(PR_SET_DUMPABLE, 1);
    int result = write_map("/proc/self/setgroups", "deny");
    if (result == 0)
        result = write_map("/proc/self/gid_map", gid_line);
    if (result == 0)
        result = write_map("/proc/self/uid_map", uid_line);
    int error = errno;
    (void)prctl(PR_SET_DUMPABLE, 0);
    errno = error;
    return result;
}

/* A namespace of one id, the caller's; no privilege of the host is involved. */
static int make_userns(const struct launch *l, uint32_t inside[2]) {
    uint32_t own[2] = {l->uid, l->gid};
    /* The kernel maps root for nobody who could not have set file capabilities. */
    if (l->permitted & CAP_BIT(CAP_SETFCAP) && !privs_raise(CAP_BIT(CAP_SETFCAP)))
        return -1;
    if (unshare(CLONE_NEWUSER) < 0)
        return -1;
    return map_one(inside, own);
}

/* The caller is called there as it is outside. */
int privs_make_userns(const struct launch *l) {
    uint32_t own[2] = {l->uid, l->gid};
    return make_userns(l, own);
}

/* In the user-namespace flow other ids are other names: stage 2 is called so in a namespace below
 * that of the launch, and stays whom it was. */
int privs_take_names(const struct launch *l) {
    uint32_t inside[2] = {l->plan.uid, l->plan.gid};
    return make_userns(l, inside);
}

/* The same with the caller as root, for --fakeroot of those who have no ranges of ids. */
int privs_map_self(uid_t uid, gid_t gid) {
    uint32_t inside[2] = {0, 0}, outside[2] = {uid, gid};
    return map_one(inside, outside);
}

/* In the user-namespace flow newuidmap must see whose process it is; nothing here is worth a
 * tracer's while. */
void privs_show_maps(bool shown) {
    (void)prctl(PR_SET_DUMPABLE, shown ? 1 : 0);
}

/* A namespace belongs to the effective id of who makes it, and its owner has every right in it from
 * outside: that must be the caller, who shall be able to end what runs there, and never root. */
int privs_own_as_caller(const struct launch *l) {
    if (l->flow != FLOW_SETUID)
        return 0;
    if (setresuid((uid_t)-1, l->uid, (uid_t)-1) < 0)
        return -1;
    (void)prctl(PR_SET_DUMPABLE, 0);
    return geteuid() == l->uid && prctl(PR_GET_DUMPABLE) == 0 ? 0 : -1;
}

/* Back to (user, 0, 0, user), with nothing effective. */
void privs_own_as_before(const struct launch *l) {
    uid_t uid[3];
    if (l->flow != FLOW_SETUID)
        return;
    if (setresuid((uid_t)-1, 0, (uid_t)-1) < 0 || caps_set(0, l->permitted, 0) < 0)
        fail("cannot take the identity for the start", errno);
    (void)setfsuid(l->uid);
    (void)prctl(PR_SET_DUMPABLE, 0);
    if (getresuid(&uid[0], &uid[1], &uid[2]) < 0 || uid[0] != l->uid || uid[1] != 0 ||
        uid[2] != 0 || (uid_t)setfsuid((uid_t)-1) != l->uid || prctl(PR_GET_DUMPABLE) != 0)
        fail("cannot take the identity for the start", 0);
}

static int write_map_of(int process, const char *name, const char *text) {
    int fd = openat(process, name, O_WRONLY | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0)
        return -1;
    ssize_t wrote = write(fd, text, strlen(text));
    int error = errno;
    close(fd);
    errno = error;
    return wrote == (ssize_t)strlen(text) ? 0 : -1;
}

/* Both maps of a child of ours that has not been reaped, so its number is nobody else's. */
int privs_map_ids(pid_t pid, const char *uid_map, const char *gid_map, bool with_root) {
    char path[32] = "/proc/";
    uint64_t caps = CAP_BIT(CAP_DAC_OVERRIDE) | CAP_BIT(CAP_SYS_ADMIN) | CAP_BIT(CAP_SETUID) |
                    CAP_BIT(CAP_SETGID) | (with_root ? CAP_BIT(CAP_SETFCAP) : 0);
    append_number(path, sizeof(path), (uint64_t)pid);
    const struct raised *raised = privs_raise(caps);
    if (!raised) {
        errno = EPERM;
        return -1;
    }
    int process = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int result = process < 0 ? -1 : write_map_of(process, "gid_map", gid_map);
    if (result == 0)
        result = write_map_of(process, "uid_map", uid_map);
    int error = errno;
    privs_lower(raised);
    if (process >= 0)
        close(process);
    errno = error;
    return result;
}

/* In the new namespace, once it is mapped: its root in every id, and nothing effective. */
int privs_become_inner_root(void) {
    struct identity who;
    (void)prctl(PR_SET_DUMPABLE, 0);
    if (setresgid(0, 0, 0) < 0 || setresuid(0, 0, 0) < 0)
        return -1;
    (void)prctl(PR_SET_DUMPABLE, 0);
    if (caps_set(0, privs_last_cap_mask(), 0) < 0 || privs_identify(&who, false) < 0)
        return -1;
    for (int i = 0; i < 4; i++)
        if (who.uid[i] != 0 || who.gid[i] != 0)
            return -1;
    return who.dumpable == 0 && (who.securebits & SECUREBITS_OLD) == 0 ? 0 : -1;
}

/* Files are created for root, never for the caller: the administrator's own, or one in memory whose
 * owner says that we have made it. */
static int create_as_root(const char *name, int flags, mode_t mode, bool in_memory) {
    const struct raised *raised = privs_raise(CAP_BIT(CAP_SETUID) | CAP_BIT(CAP_SETGID));
    if (!raised)
        return -1;
    int uid = setfsuid(0), gid = setfsgid(0);
    int fd = in_memory ? memfd_create(name, (unsigned)flags) : open(name, flags, mode);
    int error = errno;
    (void)setfsgid((gid_t)gid);
    (void)setfsuid((uid_t)uid);
    if (setfsuid((uid_t)-1) != uid || setfsgid((gid_t)-1) != gid)
        fail("cannot give up an identity", 0);
    /* A change of fsuid sets it to what fs.suid_dumpable says. */
    (void)prctl(PR_SET_DUMPABLE, 0);
    privs_lower(raised);
    errno = error;
    return fd;
}

int privs_open_as_root(const char *path, int flags, mode_t mode) {
    return create_as_root(path, flags, mode, false);
}

int privs_memory_as_root(const char *name) {
    return create_as_root(name, MFD_CLOEXEC | MFD_NOEXEC_SEAL, 0, true);
}

/* Privileged processes only: the payload keeps the caller's keyring (Kerberos). */
void privs_new_keyring(void) {
    (void)syscall(SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, NULL, 0, 0, 0);
}
