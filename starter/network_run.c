/* In the janitor: the plugins of a container's networks.  Each is the administrator's own program,
 * reads the administrator's own file, and is told where the container's network is. */
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "networks.h"
#include "steps.h"

enum { PLUGIN_LOST = 127, PLUGIN_MS = 60000, KILLED_MS = 5000, KILLED_STEP_MS = 5 };

struct call {
    const struct network *network;
    const struct network_plugin *plugin;
    size_t interface;
    bool add;
};

static bool put(int fd, const char *bytes, size_t length) {
    return write(fd, bytes, length) == (ssize_t)length;
}

static bool put_text(int fd, const char *text) {
    return put(fd, text, strlen(text));
}

static const char *protocol_name(uint16_t number) {
    return number == IPPROTO_TCP ? "tcp" : number == IPPROTO_UDP ? "udp" : "sctp";
}

static bool put_ports(int fd, const struct network *n) {
    bool good = put_text(fd, ",\"runtimeConfig\":{\"portMappings\":[");
    for (size_t i = 0; i < n->port_count; i++) {
        const struct network_port *p = &n->ports[i];
        good = good && dprintf(fd, "%s{\"hostPort\":%u,\"containerPort\":%u,\"protocol\":\"%s\"}",
                               i ? "," : "", (unsigned)p->host, (unsigned)p->inside,
                               protocol_name(p->protocol)) > 0;
    }
    return good && put_text(fd, "]}");
}

/* What the plugin before it has said, as it stands: it is root's program too. */
static bool put_result(int fd, size_t network) {
    static char text[NETWORK_RESULT_BYTES];
    ssize_t got = record_result(network, text, sizeof(text));
    return got == 0 || (got > 0 && put_text(fd, ",\"prevResult\":") && put(fd, text, (size_t)got));
}

/* The members of the file's object, and ours behind them: of two of one name the last counts. */
static int compose(const struct call *c) {
    const struct network *n = c->network;
    int fd = memfd_create("network", MFD_CLOEXEC);
    bool good = fd >= 0 && put_text(fd, "{") &&
                put(fd, n->file.text + c->plugin->from, c->plugin->length) &&
                put_text(fd, ",\"name\":\"") && put_text(fd, n->name) &&
                put_text(fd, "\",\"cniVersion\":\"") && put_text(fd, n->file.version) &&
                put_text(fd, "\"");
    if (good && c->plugin->maps_ports && n->port_count > 0)
        good = put_ports(fd, n);
    if (good && put_result(fd, c->interface) && put_text(fd, "}") && lseek(fd, 0, SEEK_SET) == 0)
        return fd;
    if (fd >= 0)
        close(fd);
    return -1;
}

/* By descriptor: what was looked at is what runs.  A script has no interpreter that was looked at,
 * and is not run. */
static int open_plugin(const struct launch *l, const char *type) {
    static struct config_error why;
    static char path[LIMIT_PATH_BYTES];
    path[0] = '\0';
    append_text(path, sizeof(path), config_string(&l->config, CONFIG_CNI_PLUGIN_PATH));
    append_text(path, sizeof(path), "/");
    append_text(path, sizeof(path), type);
    memset(&why, 0, sizeof(why));
    return config_open_trusted(path, INT32_MAX, &why);
}

NO_RETURN static void become_plugin(const struct launch *l, const struct call *c, int program,
                                    int space) {
    static char path[LIMIT_PATH_BYTES + 16] = "CNI_PATH=", args[NETWORK_ARGS_BYTES + 32];
    char id[64] = "CNI_CONTAINERID=", interface[32] = "CNI_IFNAME=eth";
    char place[64] = "CNI_NETNS=", name[] = "plugin";
    char command[32] = "CNI_COMMAND=", search[] = "PATH=/usr/sbin:/usr/bin:/sbin:/bin";
    append_text(command, sizeof(command), c->add ? "ADD" : "DEL");
    append_text(id, sizeof(id), network_record->container);
    append_number(interface, sizeof(interface), c->interface);
    if (space >= 0) {
        append_text(place, sizeof(place), "/proc/");
        append_number(place, sizeof(place), (uint64_t)getppid());
        append_text(place, sizeof(place), "/fd/");
        append_number(place, sizeof(place), (uint64_t)space);
    }
    append_text(path, sizeof(path), config_string(&l->config, CONFIG_CNI_PLUGIN_PATH));
    append_text(args, sizeof(args), "CNI_ARGS=IgnoreUnknown=1");
    append_text(args, sizeof(args), *c->network->args ? ";" : "");
    append_text(args, sizeof(args), c->network->args);
    char *const argv[] = {name, NULL};
    char *const envp[] = {command, id, place, interface, path, args, search, NULL};
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    umask(022);
    /* SAFE: the administrator's program, which nobody else can write or replace; the environment is
     * closed, stdin the administrator's text, no descriptor is the caller's. */
    (void)syscall(SYS_execveat, program, "", argv, envp, AT_EMPTY_PATH);
    _exit(PLUGIN_LOST);
}

static int plugin_limit_ms(void) {
#ifdef APY_TEST_STEPS
    return test_limit_ms(PLUGIN_MS);
#else
    return PLUGIN_MS;
#endif
}

static bool ends_within(int process, int limit_ms) {
    const uint64_t ms = 1000000, end = trace_now() + (uint64_t)limit_ms * ms;
    struct pollfd one = {.fd = process, .events = POLLIN};
    for (;;) {
        uint64_t now = trace_now();
        int got = poll(&one, 1, now < end ? (int)((end - now + ms - 1) / ms) : 0);
        if (got >= 0 || errno != EINTR)
            return got > 0;
    }
}

int networks_be_child(pid_t parent) {
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) < 0 || getppid() != parent || setpgid(0, 0) < 0)
        return -1;
    network_record->running = getpid();
    return 0;
}

/* A plugin's own children end here, or they would do something after it has been undone.  While
 * one was not reaped that is ours, the group's number is nobody else's. */
void networks_end_group(pid_t group) {
    siginfo_t info;
    for (int ms = 0; group > 0 && ms < KILLED_MS; ms += KILLED_STEP_MS) {
        int status;
        if (waitid(P_PGID, (id_t)group, &info, WEXITED | WNOHANG | WNOWAIT) < 0)
            return;
        /* SAFE: as above; nobody else's process joins the group, which is of a session of ours. */
        (void)kill(-group, SIGKILL);
        if (waitpid(-group, &status, WNOHANG) == 0)
            (void)poll(NULL, 0, KILLED_STEP_MS); /* one in the kernel's hands may stay there */
    }
}

/* One that hangs would keep from being undone what others have made: it is killed, and with it what
 * it waits for. */
int networks_wait_for(pid_t pid) {
    int status = 0, process = (int)syscall(SYS_pidfd_open, pid, 0);
    int error = process < 0 ? errno : ends_within(process, plugin_limit_ms()) ? 0 : ETIME;
    if (process >= 0)
        close(process);
    while (error == 0 && waitpid(pid, &status, 0) < 0)
        if (errno != EINTR)
            return -1;
    if (error != 0 || status != 0)
        networks_end_group(pid);
    return error != 0 ? -error : WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

/* Where its plugin says what has failed, a user gets this: a file of root's in memory whose seals
 * the user could set would be believed to be the starter's own word (loan.c). */
static int make_result(void) {
    int fd = memfd_create("result", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd >= 0 && fcntl(fd, F_ADD_SEALS, F_SEAL_SEAL) < 0) {
        close(fd);
        fd = -1;
    }
    return fd;
}

/* 0, or what went wrong: an errno, or -1 where the plugin says why, in *said. */
static int run(const struct launch *l, const struct call *c, int space, int *said) {
    *said = -1;
    int program = open_plugin(l, c->plugin->type);
    if (program < 0)
        return -program;
    int in = compose(c), out = make_result(), status = -1;
    pid_t self = getpid(), pid = in < 0 || out < 0 ? -1 : fork();
    if (pid == 0) {
        /* What it has begun is undone by the twin, when the janitor is killed. */
        if (networks_be_child(self) < 0 || dup2(0, 2) < 0 || /* 0 is /dev/null */
            dup2(in, 0) < 0 || dup2(out, 1) < 0)
            _exit(PLUGIN_LOST);
        become_plugin(l, c, program, space);
    }
    if (pid > 0) {
        (void)setpgid(pid, pid); /* whoever comes first */
        status = networks_wait_for(pid);
    }
    close(program);
    if (in >= 0)
        close(in);
    if (status < -1) {
        close(out);
        return -status;
    }
    *said = out;
    return status == 0 ? 0 : -1;
}

/* One that says nothing leaves the result of the one before it.  0 or an errno. */
static int keep_result(size_t network, int said) {
    static char text[NETWORK_RESULT_BYTES];
    ssize_t got = pread(said, text, sizeof(text), 0);
    if (got == 0)
        return 0;
    if (got < 0 || (size_t)got == sizeof(text))
        return EFBIG;
    return record_keep(network, text, (size_t)got);
}

/* What has been said of the first network: where the container is to be found. */
static int tell_first(void) {
    static char text[NETWORK_RESULT_BYTES];
    ssize_t got = record_result(0, text, sizeof(text));
    int fd = got > 0 ? make_result() : -1;
    if (fd >= 0 && !put(fd, text, (size_t)got)) {
        close(fd);
        fd = -1;
    }
    return fd;
}

/* ADD_NETWORKS: all of them, in order.  A plugin counts as begun before it runs. */
int networks_connect(const struct launch *l, int space, uint32_t *which, int *said) {
    for (size_t i = 0; i < networks.count; i++) {
        const struct network *n = &networks.at[i];
        for (uint32_t k = 0; k < n->file.plugin_count; k++) {
            struct call c = {n, &n->file.plugins[k], i, true};
            network_record->begun[i] = k + 1;
            *which = (uint32_t)i * PLUGINS_MAX + k;
            int error = run(l, &c, space, said);
            if (error != 0)
                return error;
            error = keep_result(i, *said);
            close(*said);
            *said = -1;
            if (error != 0)
                return error;
        }
    }
    *said = tell_first();
    return 0;
}

static void warn(const char *type, int error) {
    char text[256] = "the CNI plugin ";
    append_text(text, sizeof(text), type);
    append_text(text, sizeof(text), " could not undo its part of the container's network");
    append_text(text, sizeof(text), error == ETIME ? ": it did not end within a minute" : "");
    report("WARNING: ", text);
}

/* In reverse order; what one cannot undo does not keep the others from it.  Who is root in the
 * container's network can have taken away what a plugin looks there for. */
void networks_disconnect(const struct launch *l, int space) {
    uint32_t *begun = network_record ? network_record->begun : NULL;
    bool any = false;
    if (!begun)
        return;
    for (size_t i = networks.count; i-- > 0;)
        for (; begun[i] > 0; begun[i]--) {
            const struct network *n = &networks.at[i];
            struct call c = {n, &n->file.plugins[begun[i] - 1], i, false};
            int said;
            any = true;
            int error = run(l, &c, space, &said);
            if (error != 0 && error != ENOENT)
                warn(c.plugin->type, error);
            if (said >= 0)
                close(said);
        }
    if (any)
        rules_clear(network_record->container);
    record_close();
}
