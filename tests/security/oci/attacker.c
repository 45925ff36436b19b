/* What a payload tries against the processes of its runtime: one line for each thing that worked.
 *
 *   attacker pry PID...      the processes of its pid namespace but these and itself, once
 *   attacker write PID...    their programs and what these have mapped, until SIGTERM
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static volatile sig_atomic_t over;

static void end(int number)
{
    (void)number;
    over = 1;
}

static void worked(int pid, const char *what)
{
    char path[64], program[256] = "";
    snprintf(path, sizeof(path), "/proc/%d/exe", pid);
    if (readlink(path, program, sizeof(program) - 1) < 0)
        strcpy(program, "?");
    printf("%d %s %s\n", pid, what, program);
    fflush(stdout);
}

static int opens(int pid, const char *name, int flags)
{
    char path[512];
    snprintf(path, sizeof(path), "/proc/%d/%s", pid, name);
    int fd = open(path, flags | O_CLOEXEC);
    if (fd < 0)
        return 0;
    /* What is sealed opens, and takes nothing. */
    int seals = flags & (O_RDWR | O_WRONLY) ? fcntl(fd, F_GET_SEALS) : -1;
    close(fd);
    return seals < 0 || !(seals & F_SEAL_WRITE);
}

static void pry(int pid)
{
    static const char *const links[] = {"exe", "root", "cwd", "ns/mnt"};
    char path[64], target[256], byte;
    for (size_t i = 0; i < sizeof(links) / sizeof(links[0]); i++) {
        snprintf(path, sizeof(path), "/proc/%d/%s", pid, links[i]);
        if (readlink(path, target, sizeof(target)) >= 0)
            worked(pid, links[i]);
    }
    if (opens(pid, "fd", O_RDONLY | O_DIRECTORY))
        worked(pid, "fd");
    if (opens(pid, "mem", O_RDWR))
        worked(pid, "mem");
    if (opens(pid, "environ", O_RDONLY))
        worked(pid, "environ");
    struct iovec here = {&byte, 1}, there = {(void *)0x400000, 1};
    if (process_vm_readv(pid, &here, 1, &there, 1, 0) >= 0 || (errno != EPERM && errno != ESRCH))
        worked(pid, "process_vm_readv");
    int pidfd = (int)syscall(SYS_pidfd_open, pid, 0);
    if (pidfd >= 0 && syscall(SYS_pidfd_getfd, pidfd, 0, 0) >= 0)
        worked(pid, "pidfd_getfd");
    if (ptrace(PTRACE_SEIZE, pid, 0, 0) == 0)
        worked(pid, "ptrace");
}

static void overwrite(int pid)
{
    char path[128], target[256];
    snprintf(path, sizeof(path), "/proc/%d/exe", pid);
    ssize_t length = readlink(path, target, sizeof(target) - 1);
    if (length > 0 && (opens(pid, "exe", O_RDWR) || opens(pid, "exe", O_WRONLY | O_TRUNC)))
        printf("%d wrote exe %.*s\n", pid, (int)length, target);
    snprintf(path, sizeof(path), "/proc/%d/map_files", pid);
    DIR *maps = opendir(path);
    for (struct dirent *entry; maps && (entry = readdir(maps));) {
        snprintf(path, sizeof(path), "/proc/%d/map_files/%.40s", pid, entry->d_name);
        length = readlink(path, target, sizeof(target) - 1);
        snprintf(path, sizeof(path), "map_files/%.40s", entry->d_name);
        if (length > 0 && opens(pid, path, O_RDWR))
            printf("%d wrote map %.*s\n", pid, (int)length, target);
    }
    if (maps)
        closedir(maps);
}

static int is_spared(int pid, int argc, char **argv)
{
    for (int i = 2; i < argc; i++)
        if (atoi(argv[i]) == pid)
            return 1;
    return pid == getpid();
}

static int visit_all(int argc, char **argv, void (*visit)(int pid))
{
    int count = 0;
    DIR *proc = opendir("/proc");
    for (struct dirent *entry; proc && (entry = readdir(proc));) {
        int pid = atoi(entry->d_name);
        if (pid > 0 && !is_spared(pid, argc, argv)) {
            visit(pid);
            count++;
        }
    }
    if (proc)
        closedir(proc);
    return count;
}

int main(int argc, char **argv)
{
    if (argc < 2)
        return 2;
    signal(SIGTERM, end);
    if (strcmp(argv[1], "pry") == 0) {
        printf("visited %d\n", visit_all(argc, argv, pry));
        return 0;
    }
    puts("ready");
    fflush(stdout);
    while (!over)
        visit_all(argc, argv, overwrite);
    puts("over");
    return 0;
}
