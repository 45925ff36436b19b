/* A second launch of an image that is in use shows the mount that is there, instead of having the
 * image unpacked by a server of its own.
 *
 * rpc copies the new mount before it is attached; keeper has the copy for as long as the container
 * runs, and hands it out.  Nobody stays for that, and the server ends with the last mount.
 *
 * A descriptor of such a mount is worth something: in a namespace of one's own its nodev can be
 * taken off.  So in the setuid flow only who has connected as root gets one, which no process of
 * the user's can.  Who gets one believes nobody: a sealed memory file that is root's says which
 * mount, by the number that the kernel never gives twice, shows which file. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include "loan.h"

#ifndef SO_PEERPIDFD
#define SO_PEERPIDFD 77
#endif
#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008U
#endif
#ifndef F_SEAL_EXEC
#define F_SEAL_EXEC 0x0020
#endif
#ifndef STATX_MNT_ID_UNIQUE
#define STATX_MNT_ID_UNIQUE 0x00004000U
#endif
enum { PATIENCE_MS = 50, BACKLOG = 16, PARTS = 3, USER = 0, PIDS = 2 };
enum { SEALS = F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_EXEC };
enum { UID_OF_OTHERS = 65534 }; /* which every other user has in a user namespace */

/* linux/pidfd.h, from 6.15 on: how a process has ended that is nobody's child here. */
struct process_info {
    uint64_t mask, group;
    uint32_t ids[11];
    int32_t status;
};
#define INFO_EXIT ((uint64_t)1 << 3)
#define GET_INFO _IOWR(0xFF, 11, struct process_info)

static void close_fd(int *fd) {
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

void loan_init(struct launch *l, struct loan *s) {
    l->loan_mount = l->loan_socket[0] = l->loan_socket[1] = -1;
    l->loan_kept[0] = l->loan_kept[1] = l->loan_asked = -1;
    s->token_fd = s->server_fd = s->listener = s->holder = -1;
    s->taken = false;
}

static void offer_no_more(struct launch *l, struct loan *s) {
    close_fd(&l->loan_mount);
    close_fd(&s->token_fd);
    close_fd(&s->listener);
    close_fd(&s->holder);
}

void loan_close(struct launch *l, struct loan *s) {
    offer_no_more(l, s);
    close_fd(&l->loan_kept[0]);
    close_fd(&l->loan_kept[1]);
    close_fd(&s->server_fd);
    s->taken = false;
}

/* Where rules bind images, or signatures are asked for, each launch has a server of its own. */
bool loan_allowed(const struct launch *l) {
    bool flow = l->flow == FLOW_SETUID || l->flow == FLOW_USERNS;
    return flow && l->uid != 0 && l->uid != UID_OF_OTHERS && !fakeroot_wanted(l) &&
           !policy_limits_images(l) &&
           faccessat(AT_FDCWD, APY_SYSCONFDIR "/ecl.toml", F_OK, AT_SYMLINK_NOFOLLOW) < 0 &&
           errno == ENOENT;
}

/* ---- what must be the same ---- */

static uint64_t digest(uint64_t sum, const void *bytes, size_t size) {
    const unsigned char *at = bytes;
    for (size_t i = 0; i < size; i++)
        sum = (sum ^ at[i]) * 0x100000001b3;
    return sum;
}

/* The server lives and is counted where the first launch is: it dies with a batch job's group. */
static uint64_t control_group(void) {
    char text[4096];
    int fd = open("/proc/self/cgroup", O_RDONLY | O_CLOEXEC);
    ssize_t got = fd < 0 ? -1 : read(fd, text, sizeof(text));
    close_fd(&fd);
    return got < 0 ? 0 : digest(0xcbf29ce484222325, text, (size_t)got);
}

static void describe_file(struct loan_key *k, const struct stat *st) {
    k->dev = st->st_dev;
    k->ino = st->st_ino;
    k->size = (uint64_t)st->st_size;
    k->modified[0] = (uint64_t)st->st_mtim.tv_sec;
    k->modified[1] = (uint64_t)st->st_mtim.tv_nsec;
    k->changed[0] = (uint64_t)st->st_ctim.tv_sec;
    k->changed[1] = (uint64_t)st->st_ctim.tv_nsec;
}

static void make_key(const struct launch *l, const struct stat *st, struct loan_key *k) {
    memset(k, 0, sizeof(*k));
    memcpy(k->build_id, APY_BUILD_ID, sizeof(APY_BUILD_ID) - 1);
    k->flow = (uint64_t)l->flow;
    k->uid = l->uid;
    k->gid = l->gid;
    k->userns = l->host_spaces[USER];
    k->pidns = l->host_spaces[PIDS];
    k->group = control_group();
    describe_file(k, st);
}

/* An abstract name: nothing lies anywhere, whoever dies. */
static socklen_t address_of(const struct loan_key *k, struct sockaddr_un *address) {
    memset(address, 0, sizeof(*address));
    address->sun_family = AF_UNIX;
    char *name = address->sun_path + 1;
    append_text(name, sizeof(address->sun_path) - 1, "apptainer-py image ");
    append_number(name, sizeof(address->sun_path) - 1,
                  digest(0xcbf29ce484222325, k, sizeof(*k)));
    return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + strlen(name));
}

static bool number_of(int mount_fd, uint64_t *number) {
    struct statx sx;
    if (statx(mount_fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_MNT_ID_UNIQUE, &sx) < 0 ||
        !(sx.stx_mask & STATX_MNT_ID_UNIQUE))
        return false;
    *number = sx.stx_mnt_id;
    return true;
}

/* ---- the other end ---- */

static bool has_one_number(int process) {
    char text[1024], path[48] = "/proc/self/fdinfo/";
    append_number(path, sizeof(path), (uint64_t)process);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t got = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);
    close_fd(&fd);
    if (got <= 0)
        return false;
    text[got] = '\0';
    const char *numbers = strstr(text, "\nNSpid:\t");
    return numbers && numbers[8] >= '1' && numbers[8] <= '9' &&
           strcspn(numbers + 8, "\t") > strcspn(numbers + 8, "\n");
}

/* A process that is first in a pid namespace below ours, or lives there, is a payload's.  Asked of
 * the process that has connected or listens, not of its number: that may be anybody's by now. */
static bool is_beside_us(int socket) {
    int process = -1;
    socklen_t size = sizeof(process);
    if (getsockopt(socket, SOL_SOCKET, SO_PEERPIDFD, &process, &size) < 0)
        return false;
    struct pollfd alive = {.fd = process, .events = POLLIN};
    bool beside = has_one_number(process) && poll(&alive, 1, 0) == 0;
    close_fd(&process);
    return beside;
}

static bool is_peer(const struct launch *l, int fd, uid_t wanted) {
    struct ucred peer;
    socklen_t size = sizeof(peer);
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) < 0 || peer.uid != wanted)
        return false;
    return l->flow == FLOW_SETUID || is_beside_us(fd);
}

/* ---- who takes ---- */

static bool receive(int fd, int parts[PARTS]) {
    union {
        char space[CMSG_SPACE(sizeof(int) * PARTS)];
        struct cmsghdr align;
    } control;
    char byte;
    struct iovec io = {.iov_base = &byte, .iov_len = 1};
    struct msghdr message = {.msg_iov = &io, .msg_iovlen = 1, .msg_control = control.space,
                             .msg_controllen = CMSG_LEN(sizeof(int) * PARTS)}; /* and no more */
    struct pollfd ready = {.fd = fd, .events = POLLIN};
    ssize_t got = poll(&ready, 1, PATIENCE_MS) != 1
                      ? -1 : recvmsg(fd, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
    if (got < 0)
        return false;
    /* An empty message has descriptors too, which the caller closes. */
    size_t count = 0;
    for (struct cmsghdr *head = CMSG_FIRSTHDR(&message); head; head = CMSG_NXTHDR(&message, head)) {
        if (head->cmsg_level != SOL_SOCKET || head->cmsg_type != SCM_RIGHTS)
            continue;
        size_t here = (head->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < here && count < PARTS; i++)
            memcpy(&parts[count++], CMSG_DATA(head) + i * sizeof(int), sizeof(int));
    }
    return got == 1 && count == PARTS && !(message.msg_flags & (MSG_TRUNC | MSG_CTRUNC));
}

/* Of the three, the memory file is looked at first: until it is root's, all may be a forger's. */
static bool judge(const struct launch *l, const struct loan_key *key, const int parts[PARTS],
                  struct loan_token *token) {
    struct stat st;
    struct pollfd server = {.fd = parts[2], .events = POLLIN};
    uint64_t number;
    uid_t owner = l->flow == FLOW_SETUID ? 0 : l->uid;
    return fcntl(parts[1], F_GET_SEALS) == SEALS && fstat(parts[1], &st) == 0 &&
           st.st_uid == owner && st.st_size == (off_t)sizeof(*token) &&
           pread(parts[1], token, sizeof(*token), 0) == (ssize_t)sizeof(*token) &&
           memcmp(&token->key, key, sizeof(*key)) == 0 && number_of(parts[0], &number) &&
           number == token->mount && poll(&server, 1, 0) == 0;
}

/* The file that the launcher has foreseen; that stage 1 judges the same one is seen to later. */
static bool foreseen_file(const struct launch *l, struct stat *st) {
    char word[LIMIT_PATH_BYTES];
    if (!early_word(l, l->request.image_arg, word, sizeof(word)))
        return false;
    int fd = open(word, O_PATH | O_CLOEXEC); /* SAFE: with the caller's fsuid; opens no contents */
    bool found = fd >= 0 && fstat(fd, st) == 0 && S_ISREG(st->st_mode);
    close_fd(&fd);
    return found;
}

void loan_ask(struct launch *l, struct loan *s) {
    const uint32_t foreseen = FORECAST_CONTAINER | FORECAST_FUSE;
    struct stat st;
    struct sockaddr_un address;
    if ((l->request.forecast & foreseen) != foreseen || !loan_allowed(l) || !foreseen_file(l, &st))
        return;
    make_key(l, &st, &s->wanted);
    socklen_t size = address_of(&s->wanted, &address);
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    /* SAFE: nothing is sent or taken; what may come stays in the socket, which keeper alone has,
     * until the launch is on record: loan_take(). */
    if (fd >= 0 &&
        (connect(fd, (struct sockaddr *)&address, size) < 0 || !is_peer(l, fd, l->uid)))
        close_fd(&fd);
    l->loan_asked = fd;
}

bool loan_take(struct launch *l, struct loan *s) {
    int parts[PARTS] = {-1, -1, -1};
    /* SAFE: in the setuid flow what comes is a mount of rpc's own making, or nothing: judge().  In
     * a user namespace it is at most one that the same user could make there. */
    s->taken = l->loan_asked >= 0 && receive(l->loan_asked, parts) &&
               judge(l, &s->wanted, parts, &s->token);
    close_fd(&l->loan_asked);
    if (s->taken) {
        l->loan_mount = parts[0];
        l->loan_kept[0] = fcntl(parts[0], F_DUPFD_CLOEXEC, 3);
        l->loan_kept[1] = parts[1];
        s->server_fd = parts[2];
    } else {
        for (int i = 0; i < PARTS; i++)
            close_fd(&parts[i]);
    }
    return s->taken;
}

bool loan_is(const struct loan *s, const struct stat *st, uint64_t offset) {
    struct loan_key judged = s->token.key;
    describe_file(&judged, st);
    return offset == s->token.offset && memcmp(&judged, &s->token.key, sizeof(judged)) == 0;
}

/* ---- who hands out ---- */

/* The kernel knows once its parent has reaped it.  A server whose mount is still here has not ended
 * by itself. */
int loan_server_status(const struct launch *l, const struct loan *s) {
    struct process_info info = {.mask = INFO_EXIT};
    if (ioctl(s->server_fd, GET_INFO, &info) == 0 && info.mask & INFO_EXIT)
        return info.status;
    return l->loan_mount >= 0 || l->loan_kept[0] >= 0 ? SIGKILL : 0;
}

/* In rpc: a copy for keeper.  Before Linux 6.15 a mount that is not attached has no copy. */
void loan_spare(struct launch *l, int mount_fd) {
    if (l->loan_socket[1] >= 0 && loan_allowed(l)) {
        /* SAFE: the image's own mount, already nosuid and nodev; the copy stays with keeper. */
        int spare = (int)syscall(SYS_open_tree, mount_fd, "",
                                 OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_EMPTY_PATH);
        if (spare >= 0 && wire_send(l->loan_socket[1], "M", 1, spare) < 0)
            report("VERBOSE: ", "the mount of the image is not shared");
        close_fd(&spare);
    }
    close_fd(&l->loan_socket[1]);
}

void loan_forget(struct launch *l) {
    char byte;
    int spare;
    struct pollfd ready = {.fd = l->loan_socket[0], .events = POLLIN};
    while (ready.fd >= 0 && poll(&ready, 1, 0) == 1 && ready.revents & POLLIN &&
           wire_receive(ready.fd, &byte, 1, &spare) > 0)
        close_fd(&spare);
}

static int write_token(const struct launch *l, const struct loan_token *token) {
    int fd = l->flow == FLOW_SETUID ? privs_memory_as_root("apptainer-py image")
                                    : memfd_create("apptainer-py image",
                                                   MFD_CLOEXEC | MFD_NOEXEC_SEAL);
    if (fd >= 0 && (write(fd, token, sizeof(*token)) != (ssize_t)sizeof(*token) ||
                    fcntl(fd, F_ADD_SEALS, SEALS) < 0))
        close_fd(&fd);
    return fd;
}

void loan_seal(struct launch *l, struct loan *s, pid_t server, const struct stat *st,
                uint64_t offset) {
    char byte;
    struct loan_token token = {.offset = offset};
    struct pollfd ready = {.fd = l->loan_socket[0], .events = POLLIN};
    if (!loan_allowed(l) || s->taken || l->loan_mount >= 0 || ready.fd < 0 ||
        poll(&ready, 1, 0) != 1 || wire_receive(ready.fd, &byte, 1, &l->loan_mount) != 1)
        return;
    make_key(l, st, &token.key);
    s->server_fd = (int)syscall(SYS_pidfd_open, server, 0);
    if (number_of(l->loan_mount, &token.mount) && s->server_fd >= 0)
        s->token_fd = write_token(l, &token);
    s->token = token;
    if (s->token_fd < 0)
        loan_close(l, s);
}

/* Who listens there, by the process; -1 if that has ended, whose name is still taken. */
static int find_holder(const struct sockaddr_un *address, socklen_t length) {
    int holder = -1, fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    socklen_t size = sizeof(holder);
    /* SAFE: nothing is believed and nothing read: its end alone is waited for. */
    if (fd < 0 || connect(fd, (const struct sockaddr *)address, length) < 0 ||
        getsockopt(fd, SOL_SOCKET, SO_PEERPIDFD, &holder, &size) < 0)
        holder = -1;
    struct pollfd ended = {.fd = holder, .events = POLLIN};
    if (holder >= 0 && poll(&ended, 1, 0) != 0)
        close_fd(&holder);
    close_fd(&fd);
    return holder;
}

/* Nothing privileged is left by now, but the mount: ours, or the one that was taken, with the word
 * that came with it.  Where another container offers this image, we do so when that has ended. */
void loan_listen(struct launch *l, struct loan *s) {
    struct sockaddr_un address;
    close_fd(&l->loan_socket[0]);
    close_fd(&s->holder);
    if (l->loan_kept[0] >= 0) {
        l->loan_mount = l->loan_kept[0];
        s->token_fd = l->loan_kept[1];
        l->loan_kept[0] = l->loan_kept[1] = -1;
    }
    if (s->token_fd < 0)
        return;
    socklen_t size = address_of(&s->token.key, &address);
    s->listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (s->listener >= 0 && bind(s->listener, (struct sockaddr *)&address, size) == 0 &&
        listen(s->listener, BACKLOG) == 0)
        return;
    close_fd(&s->listener);
    s->holder = find_holder(&address, size);
    if (s->holder < 0)
        offer_no_more(l, s);
}

static void hand_out(const struct launch *l, const struct loan *s, int to) {
    union {
        char space[CMSG_SPACE(sizeof(int) * PARTS)];
        struct cmsghdr align;
    } control = {0};
    const int parts[PARTS] = {l->loan_mount, s->token_fd, s->server_fd};
    char byte = 'M';
    struct iovec io = {.iov_base = &byte, .iov_len = 1};
    struct msghdr message = {.msg_iov = &io, .msg_iovlen = 1, .msg_control = control.space,
                             .msg_controllen = sizeof(control.space)};
    struct cmsghdr *head = CMSG_FIRSTHDR(&message);
    head->cmsg_level = SOL_SOCKET;
    head->cmsg_type = SCM_RIGHTS;
    head->cmsg_len = CMSG_LEN(sizeof(parts));
    memcpy(CMSG_DATA(head), parts, sizeof(parts));
    (void)sendmsg(to, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
}

void loan_serve(const struct launch *l, const struct loan *s) {
    uid_t wanted = l->flow == FLOW_SETUID ? 0 : l->uid;
    for (int i = 0; i < BACKLOG; i++) {
        int to = accept4(s->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
        if (to < 0)
            return;
        step_begin(STEP_OFFER_MOUNT);
        /* SAFE: to who was root when it connected: keeper, before it drops; in the user-namespace
         * flow to the same user, beside us.  Nothing is read. */
        if (is_peer(l, to, wanted))
            hand_out(l, s, to);
        step_end(STEP_OFFER_MOUNT);
        close_fd(&to);
    }
}
