/* The janitor leaves the control groups of its caller.  A user may own them (systemd delegates), a
 * batch system ends a job by them: whoever kills or freezes all that is there, or lets no process
 * be forked there, must not keep from being undone what has been made. */
#include <fcntl.h>
#include <linux/magic.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "starter.h"

#include "janitor_group.h"

#define TOP "/sys/fs/cgroup"

/* Where hierarchies are: of version 2, of both, of version 1. */
static const char *const tops[] = {
    TOP, TOP "/unified", TOP "/systemd", TOP "/freezer", TOP "/pids", TOP "/memory", TOP "/cpu",
    TOP "/cpuacct", TOP "/cpu,cpuacct", TOP "/cpuset", TOP "/blkio", TOP "/devices",
    TOP "/net_cls", TOP "/net_prio", TOP "/net_cls,net_prio", TOP "/perf_event", TOP "/hugetlb",
    TOP "/rdma", TOP "/misc",
};

static bool is_control_group(int fd) {
    struct statfs fs;
    return fstatfs(fd, &fs) == 0 &&
           (fs.f_type == CGROUP2_SUPER_MAGIC || fs.f_type == CGROUP_SUPER_MAGIC);
}

/* Where the top is not to be had, the janitor stays: it is no worse off than its caller. */
void leave_control_groups(void) {
    for (size_t i = 0; i < ARRAY_SIZE(tops); i++) {
        char path[128] = "";
        append_text(path, sizeof(path), tops[i]);
        append_text(path, sizeof(path), "/cgroup.procs");
        /* SAFE: a fixed name in a file system of the kernel's own; this process alone is moved. */
        int fd = open(path, O_WRONLY | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
        ssize_t ignored = fd >= 0 && is_control_group(fd) ? write(fd, "0", 1) : 0;
        (void)ignored;
        if (fd >= 0)
            close(fd);
    }
}
