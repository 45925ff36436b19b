/* What the administrator leaves to a launch, whatever stage 1 plans: 0, or abort with the line. */
#define _GNU_SOURCE
#include "../../starter/policy_mounts.c"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);                \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

static struct launch launch;
static const char *home = "/nonexistent";

int names_home(const struct launch *l, char *out, size_t size) {
    (void)l;
    out[0] = '\0';
    append_text(out, size, home);
    return 0;
}

static void reset(const char *text) {
    static struct config_error why;
    int fd = memfd_create("configuration", MFD_CLOEXEC);
    CHECK(fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text));
    memset(&launch, 0, sizeof(launch));
    launch.flow = FLOW_SETUID;
    CHECK(config_parse_fd(fd, &launch.config, &why) == 0);
    close(fd);
}

static bool binds(const char *source, const char *target) {
    int fd = open(source, O_PATH | O_CLOEXEC);
    bool allowed = policy_bind(&launch, source, target, fd);
    if (fd >= 0)
        close(fd);
    return allowed;
}

#define NO_BINDS "user bind control = no\n"

static void test_who_is_bound_by_it(void) {
    reset("");
    CHECK(binds("/etc", "/anywhere"));
    reset(NO_BINDS);
    CHECK(!binds("/etc", "/anywhere") && !binds("/etc", "/etc") && !binds("/", "/host"));
    launch.flow = FLOW_USERNS;
    CHECK(binds("/etc", "/anywhere"));
    launch.flow = FLOW_ROOT;
    CHECK(binds("/etc", "/anywhere"));
}

static void test_defaults(void) {
    reset(NO_BINDS);
    CHECK(binds("/tmp", "/tmp") && binds("/var/tmp", "/var/tmp") && binds("/proc", "/proc"));
    CHECK(binds("/etc/resolv.conf", "/etc/resolv.conf"));
    CHECK(!binds("/tmp", "/etc") && !binds("/tmp/", "/tmp") && !binds("/tmp/x", "/tmp/x"));
    CHECK(!binds("/tmp/../etc", "/tmp") && !binds("/tmp/../etc", "/tmp/../etc"));
    CHECK(!binds("/sys", "/sys")); /* this flow has a sysfs of its own */
    reset(NO_BINDS "mount tmp = no\nmount proc = no\nconfig resolv_conf = no\n");
    CHECK(!binds("/tmp", "/tmp") && !binds("/var/tmp", "/var/tmp") && !binds("/proc", "/proc"));
    CHECK(!binds("/etc/resolv.conf", "/etc/resolv.conf"));
}

static void test_devices(void) {
    reset(NO_BINDS);
    CHECK(binds("/dev", "/dev") && binds("/dev/null", "/dev/null"));
    CHECK(binds("/dev/pts/0", "/dev/console") && binds("/dev/pts/12", "/dev/console"));
    CHECK(!binds("/dev/shm", "/dev/shm") && !binds("/dev/fuse", "/dev/fuse"));
    CHECK(!binds("/dev/pts/", "/dev/console") && !binds("/dev/pts/1/../..", "/dev/console"));
    CHECK(!binds("/dev/null", "/dev/console") && !binds("/dev", "/etc"));
    CHECK(!binds("/dev/null", "/dev/zero") && !binds("/de", "/de"));
    reset(NO_BINDS "mount dev = minimal\n");
    CHECK(!binds("/dev", "/dev") && binds("/dev/null", "/dev/null"));
    reset(NO_BINDS "mount dev = no\n");
    CHECK(!binds("/dev", "/dev") && !binds("/dev/null", "/dev/null"));
    CHECK(!binds("/dev/pts/0", "/dev/console"));
}

static void test_paths_of_the_administrator(void) {
    reset(NO_BINDS "bind path = /etc/hosts, /opt:/data\nbind path = /srv:\n");
    CHECK(binds("/etc/hosts", "/etc/hosts") && binds("/opt", "/data") && binds("/srv", "/srv"));
    CHECK(!binds("/opt", "/opt") && !binds("/data", "/data") && !binds("/opt:/data", "/opt:/data"));
    CHECK(!binds("/opt/x", "/data") && !binds("/op", "/data") && !binds("/etc/hosts", "/etc"));
    CHECK(!binds("/etc/localtime", "/etc/localtime")); /* a default of files, not of no list */
}

static void test_home(void) {
    reset(NO_BINDS);
    CHECK(!binds("/usr", "/usr"));
    home = "/usr/";
    CHECK(binds("/usr", "/usr") && !binds("/usr", "/etc") && !binds("/usr/bin", "/usr/bin"));
    reset(NO_BINDS "mount home = no\n");
    CHECK(!binds("/usr", "/usr"));
    home = "/nonexistent";
}

static void test_file_systems_of_the_host(void) {
    reset(NO_BINDS "mount hostfs = yes\n");
    CHECK(!binds("/", "/") && !binds("/etc", "/etc") && !binds("/proc/sys", "/proc/sys"));
    CHECK(!binds("/dev/pts", "/dev/pts") && !binds("/dev/shm", "/dev/shm"));
    CHECK(!binds("/variable", "/variable"));
}

static void test_file_systems_of_the_kernel(void) {
    reset("");
    CHECK(policy_kernel_mount(&launch, KERNELFS_PROC, "/proc"));
    CHECK(policy_kernel_mount(&launch, KERNELFS_SYSFS, "/sys"));
    CHECK(policy_kernel_mount(&launch, KERNELFS_DEVPTS, "/dev/pts"));
    CHECK(policy_kernel_mount(&launch, KERNELFS_TMPFS, "/dev/shm"));
    CHECK(!policy_kernel_mount(&launch, KERNELFS_MQUEUE, "/dev/mqueue"));
    launch.plan.spaces = SPACE_IPC;
    CHECK(policy_kernel_mount(&launch, KERNELFS_MQUEUE, "/dev/mqueue"));
    CHECK(!policy_kernel_mount(&launch, KERNELFS_PROC, "/mnt"));
    CHECK(!policy_kernel_mount(&launch, KERNELFS_TMPFS, "/etc"));
    CHECK(!policy_kernel_mount(&launch, (enum kernel_fs)77, "/proc"));
    reset("mount proc = no\nmount sys = no\nmount devpts = no\n");
    CHECK(!policy_kernel_mount(&launch, KERNELFS_PROC, "/proc"));
    CHECK(!policy_kernel_mount(&launch, KERNELFS_SYSFS, "/sys"));
    CHECK(!policy_kernel_mount(&launch, KERNELFS_DEVPTS, "/dev/pts"));
    launch.flow = FLOW_ROOT;
    CHECK(policy_kernel_mount(&launch, KERNELFS_PROC, "/proc"));
    reset("mount dev = no\n");
    launch.plan.spaces = SPACE_IPC;
    CHECK(!policy_kernel_mount(&launch, KERNELFS_DEVPTS, "/dev/pts"));
    CHECK(!policy_kernel_mount(&launch, KERNELFS_MQUEUE, "/dev/mqueue"));
    CHECK(!policy_kernel_mount(&launch, KERNELFS_TMPFS, "/dev/shm"));
}

static void test_layers(void) {
    reset("enable overlay = no\nenable underlay = yes\n");
    CHECK(!policy_layer(&launch, LAYER_OVERLAY) && !policy_layer(&launch, LAYER_OVERLAY_TMPFS));
    CHECK(policy_layer(&launch, LAYER_UNDERLAY) && policy_layer(&launch, LAYER_NONE));
    reset("enable overlay = try\nenable underlay = no\n");
    CHECK(policy_layer(&launch, LAYER_OVERLAY) && !policy_layer(&launch, LAYER_UNDERLAY));
    launch.flow = FLOW_USERNS;
    CHECK(policy_layer(&launch, LAYER_UNDERLAY));
}

int main(void) {
    test_who_is_bound_by_it();
    test_defaults();
    test_devices();
    test_paths_of_the_administrator();
    test_home();
    test_file_systems_of_the_host();
    test_file_systems_of_the_kernel();
    test_layers();
    return 0;
}
