/* The container's streams, between it, the log, our own streams and all who have attached.
 *
 * Our own streams are those of whoever made the container: what they do not take holds it up, as
 * it would without us.  An attached client holds up nobody: what it does not take is kept up to a
 * bound, and then it is let go. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "monitor.h"

#define CHUNK_BYTES 32768
#define CLIENTS_MAX 16
#define KEPT_BYTES_MAX (32u << 20)       /* for one client */
#define PROMPT_BYTES 4096
#define MUCH_BYTES (1u << 20)            /* worth to be given back */
/* poll(2) promises a pipe only so much: more could wait. */
#define OWN_WRITE_BYTES 4096
#define DRAIN_READS 4096u                /* no pipe holds more pieces */

/* Output of the container on its way to our own stream. */
struct output {
    int from, to;                        /* -1: over */
    size_t start, used;
    char bytes[CHUNK_BYTES];
};

struct client {
    int fd;                              /* -1: free */
    bool heard;                          /* nothing more comes from it */
    bool deaf;                           /* it takes nothing more */
    char *kept;
    size_t start, used;
};

static struct output outputs[2];
static struct client clients[CLIENTS_MAX];
static size_t first_client;              /* who is listened to first: each in turn */
/* Input on its way to the container, of whoever has sent it. */
static char input[CHUNK_BYTES];
static size_t input_start, input_used;
static int input_fd = -1, own_stdin = -1, pty_fd = -1, listener = -1;
/* What a terminal shows in its last line, for who comes later. */
static char prompt[PROMPT_BYTES];
static size_t prompt_used;

static void make_nonblocking(int fd) {
    if (fd >= 0)
        (void)fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
}

void streams_open(const struct settings *s) {
    bool own = (s->head.flags & MONITOR_OWN_STREAMS) != 0;
    pty_fd = s->head.pty_fd;
    input_fd = pty_fd >= 0 ? pty_fd : s->head.streams[0];
    listener = s->head.attach_fd;
    for (int i = 0; i < 2; i++) {
        outputs[i].from = pty_fd < 0 ? s->head.streams[i + 1] : i == 0 ? pty_fd : -1;
        outputs[i].to = own ? STDOUT_FILENO + i : -1;
        make_nonblocking(outputs[i].from);
    }
    make_nonblocking(input_fd);
    for (size_t i = 0; i < CLIENTS_MAX; i++)
        clients[i].fd = -1;
    own_stdin = (s->head.flags & MONITOR_READS) != 0 ? STDIN_FILENO : -1;
}

static void let_go(struct client *c) {
    if (c->fd >= 0)
        close(c->fd);
    if (c->kept != NULL)
        (void)munmap(c->kept, KEPT_BYTES_MAX);
    *c = (struct client){.fd = -1};
}

static void send_kept(struct client *c) {
    while (c->fd >= 0 && c->used > 0) {
        ssize_t sent = send(c->fd, c->kept + c->start, c->used, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent < 0 && (errno == EAGAIN || errno == EINTR))
            return;
        if (sent < 0) {
            c->deaf = true; /* what it has sent before it went is still the container's */
            c->used = 0;
            return;
        }
        c->start += (size_t)sent;
        c->used -= (size_t)sent;
    }
    if (c->start > MUCH_BYTES)
        (void)madvise(c->kept, KEPT_BYTES_MAX, MADV_DONTNEED);
    c->start = 0;
}

/* Address space for all that may ever be kept; memory comes when it is written to. */
static bool make_space(struct client *c, size_t size) {
    if (c->used + size > KEPT_BYTES_MAX)
        return false;
    if (c->kept == NULL) {
        void *all = mmap(NULL, KEPT_BYTES_MAX, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (all == MAP_FAILED)
            return false;
        c->kept = all;
    }
    if (c->start + c->used + size > KEPT_BYTES_MAX) {
        memmove(c->kept, c->kept + c->start, c->used);
        c->start = 0;
    }
    return true;
}

static void give_client(struct client *c, const char *bytes, size_t size) {
    if (c->fd < 0 || c->deaf || size == 0)
        return;
    if (!make_space(c, size)) {
        let_go(c);
        return;
    }
    memcpy(c->kept + c->start + c->used, bytes, size);
    c->used += size;
    send_kept(c);
}

static void remember_prompt(const char *bytes, size_t size) {
    const char *end = memrchr(bytes, '\n', size);
    if (end != NULL) {
        prompt_used = 0;
        size -= (size_t)(end + 1 - bytes);
        bytes = end + 1;
    }
    if (prompt_used + size > sizeof(prompt)) {
        prompt_used = 0; /* no prompt is so long */
        return;
    }
    memcpy(prompt + prompt_used, bytes, size);
    prompt_used += size;
}

static void take_output(struct output *o, bool is_error) {
    ssize_t got = read(o->from, o->bytes, sizeof(o->bytes));
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (got <= 0) {
        /* EIO of a terminal: the last of its other ends is closed.  Ours stays, or the processes
         * that it controls would be hung up. */
        if (o->from != pty_fd)
            close(o->from);
        o->from = -1;
        return;
    }
    size_t size = (size_t)got;
    log_bytes(o->bytes, size, is_error);
    for (size_t i = 0; i < CLIENTS_MAX; i++)
        give_client(&clients[i], o->bytes, size);
    if (pty_fd >= 0)
        remember_prompt(o->bytes, size);
    o->start = 0;
    o->used = o->to >= 0 ? size : 0;
}

/* Not more than fits, where the kernel can tell (pipes, sockets); a terminal takes it all. */
static void give_own(struct output *o) {
    size_t size = o->used < OWN_WRITE_BYTES ? o->used : OWN_WRITE_BYTES;
    struct iovec piece = {.iov_base = o->bytes + o->start, .iov_len = size};
    ssize_t put = pwritev2(o->to, &piece, 1, -1, RWF_NOWAIT);
    if (put < 0 && (errno == EOPNOTSUPP || errno == ENOSYS || errno == EINVAL))
        put = write(o->to, o->bytes + o->start, size);
    if (put < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (put < 0) {
        o->to = -1; /* nobody reads: what comes is logged, and the container goes on */
        o->used = 0;
        return;
    }
    o->start += (size_t)put;
    o->used -= (size_t)put;
}

static void close_input(void) {
    if (input_fd >= 0 && input_fd != pty_fd) {
        close(input_fd);
        input_fd = -1;
    }
    input_used = 0;
}

static void give_input(void) {
    ssize_t put = write(input_fd, input + input_start, input_used);
    if (put < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (put < 0) {
        close_input();
        return;
    }
    input_start += (size_t)put;
    input_used -= (size_t)put;
}

static void keep_input(ssize_t got) {
    input_start = 0;
    input_used = input_fd >= 0 ? (size_t)got : 0; /* nobody reads: it is lost */
}

static void take_own_input(void) {
    ssize_t got = read(STDIN_FILENO, input, sizeof(input));
    if (got > 0) {
        keep_input(got);
    } else if (got == 0 || (errno != EAGAIN && errno != EINTR)) {
        own_stdin = -1;
        close_input();
    }
}

static void take_client_input(struct client *c) {
    ssize_t got = recv(c->fd, input, sizeof(input), MSG_DONTWAIT);
    if (got > 0)
        keep_input(got);
    else if (got == 0)
        c->heard = true; /* it may still read */
    else if (errno != EAGAIN && errno != EINTR)
        let_go(c);
}

static void accept_client(void) {
    int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0)
        return;
    for (size_t i = 0; i < CLIENTS_MAX; i++) {
        if (clients[i].fd >= 0)
            continue;
        clients[i] = (struct client){.fd = fd};
        give_client(&clients[i], prompt, prompt_used);
        return;
    }
    close(fd);
}

/* In the order in which streams_work() looks at them: the listener, input, own stdin, outputs,
 * clients. */
enum { AT_LISTENER, AT_INPUT, AT_OWN_STDIN, AT_OUTPUT, AT_CLIENT = AT_OUTPUT + 2 };
_Static_assert(AT_CLIENT + CLIENTS_MAX <= STREAMS_POLLED, "all of them are polled");

static struct pollfd wish_client(const struct client *c) {
    struct pollfd wish = {.fd = c->fd};
    if (c->used > 0)
        wish.events |= POLLOUT;
    if (!c->heard && input_used == 0)
        wish.events |= POLLIN;
    /* One that has gone, and whose words we cannot take now, would be told of for ever. */
    if (wish.events == 0 && !c->heard)
        wish.fd = -1;
    return wish;
}

size_t streams_wish(struct pollfd *fds) {
    fds[AT_LISTENER] = (struct pollfd){.fd = listener, .events = POLLIN};
    fds[AT_INPUT] = (struct pollfd){.fd = input_used > 0 ? input_fd : -1, .events = POLLOUT};
    bool reads = own_stdin >= 0 && input_used == 0 && state_started();
    fds[AT_OWN_STDIN] = (struct pollfd){.fd = reads ? own_stdin : -1, .events = POLLIN};
    for (size_t i = 0; i < 2; i++) {
        const struct output *o = &outputs[i];
        fds[AT_OUTPUT + i] = o->used > 0
                                 ? (struct pollfd){.fd = o->to, .events = POLLOUT}
                                 : (struct pollfd){.fd = o->from, .events = POLLIN};
    }
    for (size_t i = 0; i < CLIENTS_MAX; i++)
        fds[AT_CLIENT + i] = wish_client(&clients[i]);
    return AT_CLIENT + CLIENTS_MAX;
}

static void work_output(size_t i, short ready) {
    struct output *o = &outputs[i];
    if (!ready)
        return;
    if (o->used > 0)
        give_own(o);
    else if (o->from >= 0)
        take_output(o, i == 1);
}

static void work_client(struct client *c, const struct pollfd *fd) {
    if (c->fd < 0 || c->fd != fd->fd || fd->revents == 0)
        return;
    if (c->used > 0)
        send_kept(c);
    if (!c->heard && input_used == 0 && fd->revents & (POLLIN | POLLHUP | POLLERR))
        take_client_input(c);
    if (c->fd >= 0 && c->heard && (c->deaf || fd->revents & (POLLHUP | POLLERR)))
        let_go(c);
}

void streams_work(const struct pollfd *fds, size_t count) {
    (void)count;
    /* First, so that who came before an output has all of it. */
    if (fds[AT_LISTENER].revents)
        accept_client();
    for (size_t i = 0; i < 2; i++)
        work_output(i, fds[AT_OUTPUT + i].revents);
    if (fds[AT_INPUT].revents && input_used > 0)
        give_input();
    if (fds[AT_OWN_STDIN].revents && input_used == 0)
        take_own_input();
    for (size_t k = 0; k < CLIENTS_MAX; k++) {
        size_t i = (first_client + k) % CLIENTS_MAX;
        work_client(&clients[i], &fds[AT_CLIENT + i]);
    }
    first_client = (first_client + 1) % CLIENTS_MAX;
}

void streams_resize(uint16_t rows, uint16_t columns) {
    const struct winsize size = {.ws_row = rows, .ws_col = columns};
    if (pty_fd >= 0)
        (void)ioctl(pty_fd, TIOCSWINSZ, &size);
}

/* A process that it left behind may hold the other end for ever, and write: what a pipe can have
 * held at the payload's end counts. */
void streams_drain(void) {
    for (size_t i = 0; i < 2; i++) {
        struct output *o = &outputs[i];
        struct pollfd ready = {.events = POLLIN};
        for (size_t reads = 0; reads < DRAIN_READS; reads++) {
            while (o->used > 0 && o->to >= 0) {
                struct pollfd room = {.fd = o->to, .events = POLLOUT};
                if (poll(&room, 1, -1) > 0)
                    give_own(o);
            }
            ready.fd = o->from;
            if (o->from < 0 || poll(&ready, 1, 0) <= 0)
                break;
            take_output(o, i == 1);
        }
    }
    close_input();
    if (listener >= 0)
        close(listener);
    listener = -1;
}

size_t streams_pending(void) {
    size_t sum = 0;
    for (size_t i = 0; i < CLIENTS_MAX; i++)
        if (clients[i].fd >= 0)
            sum += clients[i].used;
    return sum;
}

/* Whoever has all that was for him learns that nothing more comes. */
void streams_close(void) {
    for (size_t i = 0; i < CLIENTS_MAX; i++)
        if (clients[i].fd >= 0 && clients[i].used == 0)
            let_go(&clients[i]);
}
