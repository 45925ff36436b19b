# cython: language_level=3, binding=False, embedsignature=False
"""System calls that a container's making needs and `posix` has not.  No decision is made here."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.errno cimport EINTR, errno
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

import posix


cdef extern from *:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <dlfcn.h>
    #include <linux/bpf.h>
    #include <poll.h>
    #include <sched.h>
    #include <signal.h>
    #include <stdint.h>
    #include <stdio.h>
    #include <stdlib.h>
    #include <string.h>
    #include <sys/ioctl.h>
    #include <sys/mman.h>
    #include <sys/mount.h>
    #include <sys/prctl.h>
    #include <sys/resource.h>
    #include <sys/socket.h>
    #include <sys/stat.h>
    #include <sys/syscall.h>
    #include <sys/un.h>
    #include <sys/wait.h>
    #include <time.h>
    #include <unistd.h>

    #ifndef SYS_mount_setattr
    #define SYS_mount_setattr 442
    #endif
    #define APY_NS_GET_NSTYPE _IO(0xb7, 0x3)

    struct apy_mount_attr {
        uint64_t set, clear, propagation, userns_fd;
    };

    static int apy_prlimit(int pid, int which, uint64_t soft, uint64_t hard) {
        struct { uint64_t soft, hard; } both = {soft, hard};
        return (int)syscall(SYS_prlimit64, pid, which, &both, NULL);
    }

    static int apy_pidfd_open(int pid) {
        return (int)syscall(SYS_pidfd_open, pid, 0);
    }

    static int apy_pidfd_signal(int fd, int number) {
        return (int)syscall(SYS_pidfd_send_signal, fd, number, NULL, 0);
    }

    static int apy_pidfd_getfd(int fd, int number) {
        return (int)syscall(SYS_pidfd_getfd, fd, number, 0);
    }

    static int apy_wait(int fd, int timeout_ms) {
        struct pollfd one = {.fd = fd, .events = POLLIN};
        return poll(&one, 1, timeout_ms);
    }

    static int apy_ns_type(int fd) {
        return ioctl(fd, APY_NS_GET_NSTYPE);
    }

    static int apy_open_tree(int directory, const char *path, unsigned flags) {
        return (int)syscall(SYS_open_tree, directory, path, flags | O_CLOEXEC);
    }

    static int apy_move_mount(int from, const char *from_path, int to, const char *to_path,
                              unsigned flags) {
        return (int)syscall(SYS_move_mount, from, from_path, to, to_path, flags);
    }

    static int apy_mount_setattr(int fd, const char *path, unsigned flags,
                                 struct apy_mount_attr *a) {
        return (int)syscall(SYS_mount_setattr, fd, path, flags, a, sizeof(*a));
    }

    static int apy_bpf(int command, union bpf_attr *a) {
        return (int)syscall(SYS_bpf, command, a, sizeof(*a));
    }

    static int apy_bpf_load(int type, const void *code, unsigned count, const char *license,
                            char *log, unsigned log_size) {
        union bpf_attr a;
        memset(&a, 0, sizeof(a));
        a.prog_type = (uint32_t)type;
        a.insns = (uintptr_t)code;
        a.insn_cnt = count;
        a.license = (uintptr_t)license;
        a.log_buf = (uintptr_t)log;
        a.log_size = log_size;
        a.log_level = log ? 1 : 0;
        return apy_bpf(BPF_PROG_LOAD, &a);
    }

    static int apy_bpf_attach(int detach, int target, int program, int type, unsigned flags,
                              int replaced) {
        union bpf_attr a;
        memset(&a, 0, sizeof(a));
        a.target_fd = (uint32_t)target;
        a.attach_bpf_fd = (uint32_t)program;
        a.attach_type = (uint32_t)type;
        a.attach_flags = flags;
        if (replaced >= 0)
            a.replace_bpf_fd = (uint32_t)replaced;
        return apy_bpf(detach ? BPF_PROG_DETACH : BPF_PROG_ATTACH, &a);
    }

    static int apy_bpf_query(int target, int type, uint32_t *ids, uint32_t *count) {
        union bpf_attr a;
        memset(&a, 0, sizeof(a));
        a.query.target_fd = (uint32_t)target;
        a.query.attach_type = (uint32_t)type;
        a.query.prog_ids = (uintptr_t)ids;
        a.query.prog_cnt = *count;
        int result = apy_bpf(BPF_PROG_QUERY, &a);
        *count = a.query.prog_cnt;
        return result;
    }

    static int apy_bpf_by_id(uint32_t id) {
        union bpf_attr a;
        memset(&a, 0, sizeof(a));
        a.prog_id = id;
        return apy_bpf(BPF_PROG_GET_FD_BY_ID, &a);
    }

    /* A process that holds a new user namespace until it is killed.  clone(2) without a new stack
     * is fork, and the child makes nothing but system calls. */
    static int apy_userns_holder(void) {
        pid_t parent = getpid();
        long pid = syscall(SYS_clone, CLONE_NEWUSER | SIGCHLD, NULL, NULL, NULL, NULL);
        if (pid != 0)
            return (int)pid;
        syscall(SYS_prctl, PR_SET_PDEATHSIG, SIGKILL);
        /* In the new namespace getppid() still tells the truth: the pid namespace is ours. */
        while (syscall(SYS_getppid) == parent)
            syscall(SYS_ppoll, NULL, 0, NULL, NULL, 0);
        syscall(SYS_exit_group, 0);
        return -1;
    }

    /* `parent` 0: nobody looks whether it is there still. */
    static int apy_end_with(int parent) {
        if (prctl(PR_SET_PDEATHSIG, SIGKILL) < 0)
            return -1;
        if (parent > 0 && getppid() != parent)
            raise(SIGKILL);
        return 0;
    }

    /* SAFE: of a child that does nothing else: its ids are those of a namespace that its maker has
     * made, and none that the maker lacks. */
    static int apy_enter_userns(int fd) {
        if (setns(fd, CLONE_NEWUSER) < 0)
            return -1;
        return setresgid(0, 0, 0) < 0 || setresuid(0, 0, 0) < 0 ? -1 : 0;
    }

    static void apy_end_child(int pid) {
        int status;
        kill(pid, SIGKILL);
        while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
            ;
    }

    /* SAFE: a socket's path may be longer than sun_path; it is then reached below its directory. */
    static int apy_connect(const char *path, int timeout_ms) {
        struct sockaddr_un a;
        const struct timeval wait = {timeout_ms / 1000, timeout_ms % 1000 * 1000};
        memset(&a, 0, sizeof(a));
        a.sun_family = AF_UNIX;
        int directory = -1;
        if (strlen(path) < sizeof(a.sun_path)) {
            strcpy(a.sun_path, path);
        } else {
            const char *name = strrchr(path, '/');
            char above[4096];
            if (!name || (size_t)(name - path) >= sizeof(above)) {
                errno = ENAMETOOLONG;
                return -1;
            }
            memcpy(above, path, (size_t)(name - path));
            above[name - path] = 0;
            directory = open(name == path ? "/" : above, O_PATH | O_DIRECTORY | O_CLOEXEC);
            if (directory < 0)
                return -1;
            int size = snprintf(a.sun_path, sizeof(a.sun_path), "/proc/self/fd/%d/%s", directory,
                                name + 1);
            if (size < 0 || (size_t)size >= sizeof(a.sun_path)) {
                close(directory);
                errno = ENAMETOOLONG;
                return -1;
            }
        }
        int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (fd >= 0 && timeout_ms > 0)
            (void)setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &wait, sizeof(wait));
        int result = fd < 0 ? -1 : connect(fd, (struct sockaddr *)&a, sizeof(a));
        int failed = errno;
        if (directory >= 0)
            close(directory);
        if (result < 0 && fd >= 0)
            close(fd);
        errno = failed;
        return result < 0 ? -1 : fd;
    }

    static int apy_listen(const char *path, int backlog) {
        struct sockaddr_un a;
        memset(&a, 0, sizeof(a));
        a.sun_family = AF_UNIX;
        if (strlen(path) >= sizeof(a.sun_path)) {
            errno = ENAMETOOLONG;
            return -1;
        }
        strcpy(a.sun_path, path);
        int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        if (fd >= 0 &&
            (bind(fd, (struct sockaddr *)&a, sizeof(a)) < 0 || listen(fd, backlog) < 0)) {
            int failed = errno;
            close(fd);
            errno = failed;
            return -1;
        }
        return fd;
    }

    /* A socket of another network namespace.  The calling process, which has one thread, is in that
     * namespace for two system calls; if it could not come back it would be of no use any more. */
    static int apy_socket_in(int space, int family, int type, int protocol) {
        if (space < 0)
            return socket(family, type | SOCK_CLOEXEC, protocol);
        int own = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
        if (own < 0)
            return -1;
        int fd = -1;
        int failed = 0;
        if (setns(space, CLONE_NEWNET) == 0) {
            fd = socket(family, type | SOCK_CLOEXEC, protocol);
            failed = errno;
            if (setns(own, CLONE_NEWNET) < 0)
                abort();
        } else {
            failed = errno;
        }
        close(own);
        errno = failed;
        return fd;
    }

    /* A copy of a mount as a container's namespace has it, by the caller's own right to reach it.
     * Cloned there, its flags stay locked for the container; the process, which has one thread, is
     * away for one system call, and comes back to its own root and directory. */
    static int apy_tree_in(int space, const char *path, unsigned flags) {
        int own = open("/proc/self/ns/mnt", O_RDONLY | O_CLOEXEC);
        int here = open(".", O_PATH | O_DIRECTORY | O_CLOEXEC);
        int root = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
        int fd = -1;
        if (own >= 0 && here >= 0 && root >= 0 && setns(space, CLONE_NEWNS) == 0) {
            fd = apy_open_tree(AT_FDCWD, path, flags);
            int failed = errno;
            if (setns(own, CLONE_NEWNS) < 0 || fchdir(root) < 0 || chroot(".") < 0 ||
                fchdir(here) < 0)
                abort();
            errno = failed;
        }
        int failed = errno;
        if (own >= 0)
            close(own);
        if (here >= 0)
            close(here);
        if (root >= 0)
            close(root);
        errno = failed;
        return fd;
    }

    static ssize_t apy_send_fd(int fd, const void *data, size_t size, int passed) {
        union { struct cmsghdr header; char space[CMSG_SPACE(sizeof(int))]; } control;
        struct iovec part = {(void *)(uintptr_t)data, size};
        struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
        memset(&control, 0, sizeof(control));
        if (passed >= 0) {
            message.msg_control = control.space;
            message.msg_controllen = sizeof(control.space);
            control.header.cmsg_level = SOL_SOCKET;
            control.header.cmsg_type = SCM_RIGHTS;
            control.header.cmsg_len = CMSG_LEN(sizeof(int));
            memcpy(CMSG_DATA(&control.header), &passed, sizeof(int));
        }
        return sendmsg(fd, &message, MSG_NOSIGNAL);
    }

    /* libseccomp.so.2, whose interface is stable since 2.0; no header of it is needed to build. */
    struct apy_condition {
        unsigned argument;
        int op;
        uint64_t first, second;
    };

    struct apy_seccomp {
        void *(*init)(uint32_t action);
        void (*release)(void *filter);
        int (*arch_add)(void *filter, uint32_t arch);
        int (*attr_set)(void *filter, int attribute, uint32_t value);
        int (*resolve)(const char *name);
        int (*resolve_arch)(uint32_t arch, const char *name);
        int (*rule_add)(void *filter, uint32_t action, int number, unsigned count,
                        const struct apy_condition *conditions);
        int (*export_bpf)(void *filter, int fd);
        const unsigned *(*version)(void);
        unsigned (*api_get)(void);
    };
    static struct apy_seccomp apy_library;

    static const char *apy_seccomp_open(void) {
        static const char *const names[] = {
            "seccomp_init", "seccomp_release", "seccomp_arch_add", "seccomp_attr_set",
            "seccomp_syscall_resolve_name", "seccomp_syscall_resolve_name_arch",
            "seccomp_rule_add_array", "seccomp_export_bpf", "seccomp_version", "seccomp_api_get"};
        void *found[sizeof(names) / sizeof(*names)];
        if (apy_library.init)
            return NULL;
        void *object = dlopen("libseccomp.so.2", RTLD_NOW | RTLD_LOCAL);
        if (!object)
            return dlerror();
        for (size_t i = 0; i < sizeof(names) / sizeof(*names); i++) {
            found[i] = dlsym(object, names[i]);
            if (!found[i])
                return dlerror();
        }
        memcpy(&apy_library, found, sizeof(found));
        return NULL;
    }
    """
    enum:
        MFD_CLOEXEC
        MFD_ALLOW_SEALING
        F_ADD_SEALS
        F_SEAL_SEAL
        F_SEAL_SHRINK
        F_SEAL_GROW
        F_SEAL_WRITE
    struct apy_mount_attr:
        uint64_t set
        uint64_t clear
        uint64_t propagation
        uint64_t userns_fd
    struct apy_condition:
        unsigned argument
        int op
        uint64_t first
        uint64_t second
    struct apy_seccomp:
        void *(*init)(uint32_t action)
        void (*release)(void *filter)
        int (*arch_add)(void *filter, uint32_t arch)
        int (*attr_set)(void *filter, int attribute, uint32_t value)
        int (*resolve)(const char *name)
        int (*resolve_arch)(uint32_t arch, const char *name)
        int (*rule_add)(void *filter, uint32_t action, int number, unsigned count,
                        const apy_condition *conditions)
        int (*export_bpf)(void *filter, int fd)
        const unsigned *(*version)()
        unsigned (*api_get)()
    apy_seccomp apy_library
    int memfd_create(const char *name, unsigned flags)
    int fcntl(int fd, int command, ...)
    int close(int fd)
    ssize_t write(int fd, const void *data, size_t size)
    int sys_mount "mount"(const char *source, const char *target, const char *kind,
                          unsigned long flags, const void *data)
    int sys_umount "umount2"(const char *target, int flags)
    int sys_unshare "unshare"(int kinds)
    int sys_setns "setns"(int fd, int kinds)
    int apy_prlimit(int pid, int which, uint64_t soft, uint64_t hard)
    int apy_pidfd_open(int pid)
    int apy_pidfd_signal(int fd, int number)
    int apy_pidfd_getfd(int fd, int number)
    int apy_wait(int fd, int timeout_ms) nogil
    int apy_ns_type(int fd)
    int apy_open_tree(int directory, const char *path, unsigned flags)
    int apy_move_mount(int source, const char *source_path, int target, const char *target_path,
                       unsigned flags)
    int apy_mount_setattr(int fd, const char *path, unsigned flags, apy_mount_attr *a)
    int apy_bpf_load(int type, const void *code, unsigned count, const char *license, char *log,
                     unsigned log_size)
    int apy_bpf_attach(int detach, int target, int program, int type, unsigned flags,
                       int replaced)
    int apy_bpf_query(int target, int type, uint32_t *ids, uint32_t *count)
    int apy_bpf_by_id(uint32_t id)
    int apy_userns_holder()
    int apy_end_with(int parent)
    int apy_enter_userns(int fd)
    void apy_end_child(int pid)
    int apy_connect(const char *path, int timeout_ms)
    int apy_listen(const char *path, int backlog)
    int apy_socket_in(int space, int family, int type, int protocol)
    int apy_tree_in(int space, const char *path, unsigned flags)
    ssize_t apy_send_fd(int fd, const void *data, size_t size, int passed)
    const char *apy_seccomp_open()


cdef object _failed(object what=None):
    cdef int number = errno
    return OSError(number, posix.strerror(number), what)


cdef const char *_text(bytes value, str what) except *:
    if b"\0" in value:
        raise ValueError(f"{what} holds a NUL character")
    return PyBytes_AS_STRING(value)


cdef const char *_maybe(bytes value, str what) except *:
    return NULL if value is None else _text(value, what)


def prlimit(int pid, int which, uint64_t soft, uint64_t hard):
    """Set a resource limit of a process, as prlimit64(2) takes it."""
    if apy_prlimit(pid, which, soft, hard) < 0:
        raise _failed()


def pidfd_open(int pid):
    """Return a descriptor of a process; close-on-exec."""
    cdef int fd = apy_pidfd_open(pid)
    if fd < 0:
        raise _failed()
    return fd


def pidfd_signal(int fd, int number):
    """Send a signal to the process of a descriptor, and to no other that has its number now."""
    if apy_pidfd_signal(fd, number) < 0:
        raise _failed()


def pidfd_getfd(int fd, int number):
    """Return a duplicate of a descriptor of another process; close-on-exec."""
    cdef int got = apy_pidfd_getfd(fd, number)
    if got < 0:
        raise _failed()
    return got


def wait_pidfd(int fd, int timeout_ms=-1):
    """Return whether the process of a descriptor has ended, after at most that time.

    Raises:
        OSError: as poll(2) fails; EINTR is one of these, so that the caller may look at signals.
    """
    cdef int ready
    with nogil:
        ready = apy_wait(fd, timeout_ms)
    if ready < 0:
        raise _failed()
    return ready > 0


def ns_type(int fd):
    """Return the CLONE_NEW* number of an open namespace file (ioctl_ns(2))."""
    cdef int kind = apy_ns_type(fd)
    if kind < 0:
        raise _failed()
    return kind


cdef int _write_all(int fd, bytes data) except -1:
    cdef const char *place = PyBytes_AS_STRING(data)
    cdef Py_ssize_t rest = PyBytes_GET_SIZE(data)
    cdef ssize_t done
    while rest > 0:
        done = write(fd, place, rest)
        if done < 0:
            if errno == EINTR:
                continue
            raise _failed()
        place += done
        rest -= done
    return 0


def memfd_seal(bytes data not None, str name not None):
    """Return a memfd with these bytes, which nobody can alter any more; its offset is 0."""
    cdef int fd = memfd_create(_text(name.encode(), "the name"), MFD_CLOEXEC | MFD_ALLOW_SEALING)
    if fd < 0:
        raise _failed()
    try:
        _write_all(fd, data)
        posix.lseek(fd, 0, 0)
        if fcntl(fd, F_ADD_SEALS, F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE) < 0:
            raise _failed()
    except BaseException:
        close(fd)
        raise
    return fd


cdef int _write_file(str path, bytes data) except -1:
    cdef int fd = posix.open(path, posix.O_WRONLY | posix.O_CLOEXEC)
    try:
        # A map is taken in one write or not at all.
        if posix.write(fd, data) != len(data):
            raise OSError(5, "was written in part", path)
    finally:
        close(fd)
    return 0


def make_userns(bytes uid_lines not None, bytes gid_lines not None, bint deny_setgroups=False):
    """Return a descriptor of a new user namespace with these maps (user_namespaces(7)).

    Raises:
        OSError: the caller may not make it, or may not map these ids.
    """
    cdef int pid = apy_userns_holder()
    if pid < 0:
        raise _failed()
    try:
        if deny_setgroups:
            _write_file(f"/proc/{pid}/setgroups", b"deny")
        _write_file(f"/proc/{pid}/uid_map", uid_lines)
        _write_file(f"/proc/{pid}/gid_map", gid_lines)
        return posix.open(f"/proc/{pid}/ns/user", posix.O_RDONLY | posix.O_CLOEXEC)
    finally:
        apy_end_child(pid)


def end_with(int parent):
    """Have the kernel kill this process when its parent ends; `parent` is its number, or 0.

    Raises:
        OSError: the kernel refuses.
    """
    if apy_end_with(parent) < 0:
        raise _failed()


def enter_userns(int fd):
    """Become root of a user namespace for good; for a child that was forked for it.

    Raises:
        OSError: the caller may not enter it.
    """
    if apy_enter_userns(fd) < 0:
        raise _failed()


def mount(bytes source, bytes target not None, bytes kind, unsigned long flags, bytes data=None):
    """Mount as mount(2) does; an argument that is None is passed as a null pointer."""
    if sys_mount(_maybe(source, "the source"), _text(target, "the target"),
                 _maybe(kind, "the type"), flags, _maybe(data, "the data")) < 0:
        raise _failed(target)


def umount2(bytes target not None, int flags):
    """Unmount as umount2(2) does."""
    if sys_umount(_text(target, "the target"), flags) < 0:
        raise _failed(target)


def unshare(int kinds):
    """Give this process namespaces of its own, as unshare(2) does."""
    if sys_unshare(kinds) < 0:
        raise _failed()


def setns(int fd, int kinds):
    """Enter namespaces as setns(2) does; of a mount namespace, its root directory."""
    if sys_setns(fd, kinds) < 0:
        raise _failed()


def open_tree(int directory, bytes path not None, unsigned flags):
    """Return a descriptor of a mount, or with OPEN_TREE_CLONE of a copy; close-on-exec."""
    cdef int fd = apy_open_tree(directory, _text(path, "the path"), flags)
    if fd < 0:
        raise _failed(path)
    return fd


def tree_in(int space, bytes path not None, unsigned flags):
    """Return what open_tree() does, in the mount namespace of a descriptor."""
    cdef int fd = apy_tree_in(space, _text(path, "the path"), flags)
    if fd < 0:
        raise _failed(path)
    return fd


def move_mount(int source, bytes source_path not None, int target, bytes target_path not None,
               unsigned flags):
    """Attach a mount as move_mount(2) does."""
    if apy_move_mount(source, _text(source_path, "the source"), target,
                      _text(target_path, "the target"), flags) < 0:
        raise _failed(target_path)


def mount_setattr(int fd, bytes path not None, unsigned flags, uint64_t attr_set,
                  uint64_t attr_clear, uint64_t propagation=0, uint64_t userns_fd=0):
    """Change a mount as mount_setattr(2) does."""
    cdef apy_mount_attr a
    a.set = attr_set
    a.clear = attr_clear
    a.propagation = propagation
    a.userns_fd = userns_fd
    if apy_mount_setattr(fd, _text(path, "the path"), flags, &a) < 0:
        raise _failed(path)


def connect_unix(bytes path not None, int timeout_ms=0):
    """Return a stream socket that is connected to the one at a path of any length.

    With a timeout neither this nor what is sent waits any longer for the other side.
    """
    cdef int fd = apy_connect(_text(path, "the path"), timeout_ms)
    if fd < 0:
        raise _failed(path)
    return fd


def listen_unix(bytes path not None, int backlog):
    """Return a new stream socket that listens at a path, and never waits."""
    cdef int fd = apy_listen(_text(path, "the path"), backlog)
    if fd < 0:
        raise _failed(path)
    return fd


def socket_in(int space, int family, int kind, int protocol):
    """Return a socket of the network namespace of a descriptor, of our own for -1; close-on-exec."""
    cdef int fd = apy_socket_in(space, family, kind, protocol)
    if fd < 0:
        raise _failed()
    return fd


def send_fd(int fd, bytes data not None, int passed=-1):
    """Send bytes over a connected socket, with a descriptor if one is given."""
    cdef const char *place = PyBytes_AS_STRING(data)
    cdef Py_ssize_t rest = PyBytes_GET_SIZE(data)
    cdef ssize_t done
    while rest > 0:
        done = apy_send_fd(fd, place, rest, passed)
        if done < 0:
            if errno == EINTR:
                continue
            raise _failed()
        passed = -1
        place += done
        rest -= done


def bpf_load(int kind, bytes code not None):
    """Return a descriptor of a loaded eBPF program; what the verifier says is in the error.

    Raises:
        OSError: the kernel does not take it.
    """
    cdef char log[4096]
    cdef unsigned count = <unsigned>(len(code) // 8)
    cdef int fd = apy_bpf_load(kind, PyBytes_AS_STRING(code), count, b"GPL", NULL, 0)
    if fd >= 0:
        return fd
    failure = _failed()
    log[0] = 0
    fd = apy_bpf_load(kind, PyBytes_AS_STRING(code), count, b"GPL", log, sizeof(log))
    if fd >= 0:
        return fd
    log[sizeof(log) - 1] = 0
    said = (<bytes>log).decode("utf-8", "replace").strip()
    if said:
        failure = OSError(failure.errno, f"{failure.strerror}: {said.splitlines()[-1]}")
    raise failure


def bpf_attach(int target, int program, int kind, unsigned flags, int replaced=-1):
    """Attach an eBPF program to a control group (BPF_PROG_ATTACH)."""
    if apy_bpf_attach(False, target, program, kind, flags, replaced) < 0:
        raise _failed()


def bpf_detach(int target, int program, int kind):
    """Detach an eBPF program from a control group."""
    if apy_bpf_attach(True, target, program, kind, 0, -1) < 0:
        raise _failed()


def bpf_query(int target, int kind):
    """Return the numbers of the eBPF programs that are attached to a control group itself."""
    cdef uint32_t ids[64]
    cdef uint32_t count = 64
    cdef uint32_t i
    if apy_bpf_query(target, kind, ids, &count) < 0:
        raise _failed()
    return [ids[i] for i in range(count)]


def bpf_by_id(uint32_t number):
    """Return a descriptor of the eBPF program with that number."""
    cdef int fd = apy_bpf_by_id(number)
    if fd < 0:
        raise _failed()
    return fd


cdef int _open_seccomp() except -1:
    cdef const char *why = apy_seccomp_open()
    if why != NULL:
        raise OSError(2, (<bytes>why).decode("utf-8", "replace"))
    return 0


def seccomp_version():
    """Return (major, minor, micro, API level) of the libseccomp that is there.

    Raises:
        OSError: there is none.
    """
    _open_seccomp()
    cdef const unsigned *v = apy_library.version()
    return v[0], v[1], v[2], apy_library.api_get()


def seccomp_numbers(uint32_t arch, list names not None):
    """Return the system call numbers that an architecture has for names; -1 for one unknown."""
    _open_seccomp()
    return [apy_library.resolve_arch(arch, _text(name, "a name")) for name in names]


def seccomp_compile(uint32_t action, list architectures not None, list rules not None,
                    bint optimize):
    """Return the classic BPF program for a default action and rules.

    A rule is (name, action, conditions), a condition (argument, operator, value, second value), all
    in libseccomp's numbers. Names that this libseccomp does not know are left out.

    Raises:
        OSError: libseccomp is not there or refuses; `filename` is then the rule's name.
    """
    cdef apy_condition conditions[6]
    cdef unsigned count
    cdef int number
    cdef int result
    cdef int fd = -1
    _open_seccomp()
    cdef void *filter = apy_library.init(action)
    if filter == NULL:
        raise OSError(22, "the default action is not valid")
    try:
        for arch in architectures:
            result = apy_library.arch_add(filter, arch)
            if result < 0 and result != -17:
                raise OSError(-result, posix.strerror(-result))
        if optimize:
            # Older ones do not know SCMP_FLTATR_CTL_OPTIMIZE; the filter is then merely slower.
            apy_library.attr_set(filter, 8, 2)
        for name, rule_action, tests in rules:
            number = apy_library.resolve(_text(name, "a name"))
            if number == -1:
                continue
            count = 0
            for argument, op, first, second in tests[:6]:
                conditions[count].argument = argument
                conditions[count].op = op
                conditions[count].first = first
                conditions[count].second = second
                count += 1
            result = apy_library.rule_add(filter, rule_action, number, count, conditions)
            if result < 0:
                raise OSError(-result, posix.strerror(-result), name)
        fd = memfd_create("seccomp", MFD_CLOEXEC)
        if fd < 0:
            raise _failed()
        result = apy_library.export_bpf(filter, fd)
        if result < 0:
            raise OSError(-result, posix.strerror(-result))
        posix.lseek(fd, 0, 0)
        return posix.read(fd, 8 * 65536)
    finally:
        if fd >= 0:
            close(fd)
        apy_library.release(filter)
