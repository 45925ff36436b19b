/* What a payload finds around it, as lines of JSON; it is linked statically, so any root has it. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/keyctl.h>
#include <linux/sched.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

extern char **environ;

struct scheduling {
    uint32_t size, policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime, deadline, period;
};

static void text(const char *value)
{
    putchar('"');
    for (const unsigned char *at = (const unsigned char *)value; *at; at++) {
        if (*at == '"' || *at == '\\')
            putchar('\\');
        if (*at < 32 || *at > 126)
            printf("\\u%04x", *at);
        else
            putchar(*at);
    }
    putchar('"');
}

static void name(const char *value)
{
    printf(",\n");
    text(value);
    printf(": ");
}

static void list(const char *title, char **words)
{
    name(title);
    putchar('[');
    for (int i = 0; words[i]; i++) {
        if (i)
            putchar(',');
        text(words[i]);
    }
    putchar(']');
}

static void ids(void)
{
    uid_t uid[3];
    gid_t gid[3], groups[256];

    getresuid(&uid[0], &uid[1], &uid[2]);
    getresgid(&gid[0], &gid[1], &gid[2]);
    printf("\"uid\": [%u,%u,%u], \"gid\": [%u,%u,%u], \"groups\": [", uid[0], uid[1], uid[2],
           gid[0], gid[1], gid[2]);
    int count = getgroups(256, groups);
    for (int i = 0; i < count; i++)
        printf("%s%u", i ? "," : "", groups[i]);
    mode_t mask = umask(0);
    umask(mask);
    printf("], \"umask\": %u, \"pid\": %d, \"ppid\": %d, \"sid\": %d", mask, getpid(), getppid(),
           getsid(0));
}

/* What /proc/self/status calls Cap..., NoNewPrivs and Seccomp, without needing /proc. */
static void rights(void)
{
    struct {
        uint32_t version;
        int pid;
    } head = {0x20080522, 0};
    struct {
        uint32_t effective, permitted, inheritable;
    } data[2];
    uint64_t bounding = 0, ambient = 0;

    syscall(SYS_capget, &head, data);
    for (unsigned cap = 0; cap < 64; cap++) {
        if (prctl(PR_CAPBSET_READ, cap, 0, 0, 0) == 1)
            bounding |= 1ULL << cap;
        if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_IS_SET, cap, 0, 0) == 1)
            ambient |= 1ULL << cap;
    }
    name("capabilities");
    printf("{\"effective\": %llu, \"permitted\": %llu, \"inheritable\": %llu, \"bounding\": %llu, "
           "\"ambient\": %llu}",
           (unsigned long long)data[1].effective << 32 | data[0].effective,
           (unsigned long long)data[1].permitted << 32 | data[0].permitted,
           (unsigned long long)data[1].inheritable << 32 | data[0].inheritable,
           (unsigned long long)bounding, (unsigned long long)ambient);
    name("no_new_privs");
    printf("%d", prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0));
    name("dumpable");
    printf("%d", prctl(PR_GET_DUMPABLE, 0, 0, 0, 0));
    name("pdeathsig");
    int pdeath = -1;
    prctl(PR_GET_PDEATHSIG, &pdeath, 0, 0, 0);
    printf("%d", pdeath);
}

static void limits(void)
{
    name("rlimits");
    putchar('[');
    for (int which = 0; which < 16; which++) {
        struct rlimit limit = {0, 0};
        getrlimit((__rlimit_resource_t)which, &limit);
        printf("%s[%lld,%lld]", which ? "," : "", (long long)limit.rlim_cur,
               (long long)limit.rlim_max);
    }
    putchar(']');
}

static void scheduling(void)
{
    struct scheduling found = {.size = sizeof(found)};
    int mode = -1;
    unsigned long nodes[16] = {0};
    cpu_set_t set;

    syscall(SYS_sched_getattr, 0, &found, sizeof(found), 0);
    name("scheduler");
    printf("{\"policy\": %u, \"flags\": %llu, \"nice\": %d, \"priority\": %u, \"runtime\": %llu, "
           "\"deadline\": %llu, \"period\": %llu}",
           found.policy, (unsigned long long)found.flags, found.nice, found.priority,
           (unsigned long long)found.runtime, (unsigned long long)found.deadline,
           (unsigned long long)found.period);
    name("io_priority");
    printf("%ld", syscall(SYS_ioprio_get, 1, 0));
    name("personality");
    printf("%d", personality(0xffffffff));
    name("memory_policy");
    if (syscall(SYS_get_mempolicy, &mode, nodes, 1024UL, NULL, 0UL) == 0)
        printf("[%d,%lu]", mode, nodes[0]);
    else
        printf("null");
    name("cpus");
    CPU_ZERO(&set);
    sched_getaffinity(0, sizeof(set), &set);
    putchar('[');
    for (int cpu = 0, any = 0; cpu < CPU_SETSIZE; cpu++) {
        if (CPU_ISSET(cpu, &set))
            printf("%s%d", any++ ? "," : "", cpu);
    }
    putchar(']');
}

static void descriptors(void)
{
    name("fds");
    putchar('{');
    int any = 0;
    for (int fd = 0; fd < 4096; fd++) {
        char path[64], target[4096];
        struct stat facts;
        if (fstat(fd, &facts) != 0)
            continue;
        snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
        ssize_t length = readlink(path, target, sizeof(target) - 1);
        target[length < 0 ? 0 : length] = 0;
        printf("%s\"%d\": ", any++ ? "," : "", fd);
        text(target);
    }
    putchar('}');
}

static void around(void)
{
    struct utsname names;
    char where[4096];
    struct winsize size = {0};
    char described[512] = "";

    uname(&names);
    name("hostname");
    text(names.nodename);
    name("domainname");
    text(names.domainname);
    name("machine");
    text(names.machine);
    name("cwd");
    text(syscall(SYS_getcwd, where, sizeof(where)) > 0 ? where : "");
    name("terminal");
    if (isatty(0) && ioctl(0, TIOCGWINSZ, &size) == 0)
        printf("[%d,%d]", size.ws_row, size.ws_col);
    else
        printf("null");
    name("keyring");
    syscall(SYS_keyctl, KEYCTL_DESCRIBE, KEY_SPEC_SESSION_KEYRING, described, sizeof(described) - 1);
    text(described);
    struct timespec now;
    name("monotonic");
    clock_gettime(CLOCK_MONOTONIC, &now);
    printf("%lld", (long long)now.tv_sec);
    name("boottime");
    clock_gettime(CLOCK_BOOTTIME, &now);
    printf("%lld", (long long)now.tv_sec);
    sigset_t blocked;
    sigprocmask(SIG_SETMASK, NULL, &blocked);
    name("signals");
    printf("{\"blocked\": [");
    int any = 0;
    for (int number = 1; number < 32; number++) {
        if (sigismember(&blocked, number))
            printf("%s%d", any++ ? "," : "", number);
    }
    printf("], \"ignored\": [");
    any = 0;
    for (int number = 1; number < 32; number++) {
        struct sigaction how;
        if (sigaction(number, NULL, &how) == 0 && how.sa_handler == SIG_IGN)
            printf("%s%d", any++ ? "," : "", number);
    }
    printf("]}");
}

static int facts(char **argv)
{
    putchar('{');
    ids();
    rights();
    limits();
    scheduling();
    descriptors();
    around();
    list("argv", argv);
    list("env", environ);
    printf("}\n");
    return fflush(stdout) != 0;
}

/* One system call by name: the number of its error, 0 for none. */
static int call(const char *what, const char *argument)
{
    int done = -1;

    errno = ENOSYS;
    if (!strcmp(what, "mkdir"))
        done = mkdir(argument, 0755);
    else if (!strcmp(what, "getppid"))
        done = (int)syscall(SYS_getppid);
    else if (!strcmp(what, "chmod"))
        done = chmod(argument, 0600);
    else if (!strcmp(what, "sethostname"))
        done = sethostname(argument, strlen(argument));
    else if (!strcmp(what, "personality"))
        done = personality((unsigned long)strtoul(argument, NULL, 0));
    else if (!strcmp(what, "unshare"))
        done = unshare((int)strtol(argument, NULL, 0));
    else if (!strcmp(what, "number"))
        done = (int)syscall(strtol(argument, NULL, 0), 0, 0, 0, 0, 0, 0);
    else if (!strcmp(what, "setgroups"))
        done = setgroups(0, NULL);
    else if (!strcmp(what, "open"))
        done = open(argument, O_RDWR);
    else if (!strcmp(what, "write"))
        done = open(argument, O_WRONLY);
    else if (!strcmp(what, "umount"))
        done = umount2(argument, MNT_DETACH);
    else if (!strcmp(what, "setrlimit"))
        done = setrlimit(RLIMIT_NOFILE, &(struct rlimit){64, 64});
    printf("%d\n", done < 0 ? errno : 0);
    return 0;
}

int main(int argc, char **argv)
{
    if (argc > 2 && !strcmp(argv[1], "call"))
        return call(argv[2], argc > 3 ? argv[3] : "0");
    if (argc > 1 && !strcmp(argv[1], "status"))
        return argc > 2 ? (int)strtol(argv[2], NULL, 10) : 0;
    if (argc > 1 && !strcmp(argv[1], "fill")) {
        size_t bytes = (size_t)strtoul(argv[2], NULL, 10) << 20;
        char *memory = malloc(bytes);
        for (size_t at = 0; memory && at < bytes; at += 4096)
            *(volatile char *)(memory + at) = 1;
        printf("filled\n");
        return 0;
    }
    int failed = facts(argv);
    if (argc > 1 && !strcmp(argv[1], "stay"))
        for (;;)
            pause();
    return failed;
}
