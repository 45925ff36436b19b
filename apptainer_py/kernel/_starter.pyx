# cython: language_level=3, binding=False, embedsignature=False
"""The starter's structures and channels, as Python sees them.  No decision is made here."""

include "_config.pxi"

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.errno cimport ECONNRESET, errno
from libc.stdint cimport int32_t, uint16_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, strerror, strlen
from posix.types cimport mode_t


cdef extern from "Python.h":
    ctypedef struct PyStatus:
        pass
    int Py_IsInitialized()
    int PyStatus_Exception(PyStatus status)
    PyStatus _Py_InitializeMain()


cdef extern from "protocol.h":
    enum:
        LIMIT_FRAME_BYTES
        LIMIT_GROUPS
    struct op_request:
        uint32_t op
        uint32_t flags
        uint64_t num[6]
        uint16_t length[2]
        uint32_t reserved
        char tail[8384]
    struct op_reply:
        uint32_t op
        int32_t code
        int32_t error
        uint32_t value
    struct container_plan:
        uint32_t spaces
        uint32_t flags
        uint32_t fuse_count
        uint32_t group_count
        uint32_t uid
        uint32_t gid
        uint32_t groups[32]
        uint64_t caps[5]
    struct container_request:
        uint32_t op
        uint32_t image_length
        container_plan plan
        char image[1024]
    struct event_frame:
        uint32_t event
        int32_t pid
        int32_t status
    struct stage_info:
        uint32_t stage
        uint32_t flow
        uint32_t reason
        uint32_t uid
        uint32_t gid
        uint32_t umask
        int32_t caller_pid
        int32_t request_fd
        int32_t config_fd
        int32_t keeper_fd
        int32_t rpc_fd
        int32_t start_fd
        int32_t methods_fd
        int32_t trigger_fd
        int32_t helper_fds[2]
        int32_t init_fd
        int32_t init_pid
        int32_t server_fd
        int32_t server_pid
        int32_t ready_fd
        int32_t trace_fd
        const char *watcher
        uint64_t permitted
        void (*enter_hook)(uint32_t hook)
        void (*leave_hook)(uint32_t hook, int failed)
        void (*at_step)(uint32_t step, int end)
        int (*tell_sealed)() nogil
        int (*wait_for_go)() nogil
        int (*exec_payload)(const char *path, char **argv, char **envp)
        int (*set_filter)(const void *code, size_t size, uint32_t flags)
        int (*set_label)(uint32_t kind, const char *text, size_t size)


cdef extern from *:
    """
    #include <fcntl.h>
    #include <sys/mman.h>
    #include <unistd.h>
    """
    enum:
        F_ADD_SEALS
        MFD_ALLOW_SEALING
        MFD_CLOEXEC
    int close(int fd)
    int fcntl(int fd, int command, ...)
    int memfd_create(const char *name, unsigned flags)
    ssize_t write(int fd, const void *data, size_t size)


cdef extern from "request.h":
    enum:
        REQUEST_SEALS
        REQUEST_VERSION
    const char *REQUEST_MAGIC
    struct request_header:
        char magic[8]
        uint32_t version
        uint32_t header_size
        char build_id[64]
        uint32_t flow
        uint32_t reason
        int32_t trace_fd
        uint32_t argc
        uint32_t envc
        uint32_t argv_off
        uint32_t env_off
        uint32_t cwd_off
        uint32_t engine_off
        uint32_t engine_file_off
        uint32_t total


cdef extern from "wire_client.h" nogil:
    const stage_info *wire_stage()
    int wire_send(int fd, const void *frame, size_t size, int passed)
    ssize_t wire_receive(int fd, void *frame, size_t size, int *passed)
    int wire_openat2(int directory, const char *path, uint64_t flags, uint64_t resolve)
    int wire_is_proc(int fd)
    uint64_t wire_bounding()
    void wire_release_code(int fd)


cdef extern from "container_client.h" nogil:
    struct hook_result:
        uint32_t failed
        char text[8704]
    int hook_run_frame "hook_run"(const char *frame, size_t size, int pid, char **environment,
                                  hook_result *result)
    int relay_block_signals "relay_begin"()
    int relay_run(int pid, int pty_fd, int *status)


cdef const stage_info *_info() except NULL:
    cdef const stage_info *info = wire_stage()
    if info == NULL:
        raise RuntimeError("this is not a stage of the starter")
    return info


def is_complete():
    """Return whether this interpreter has more than its core: file imports, streams, `open`."""
    return bool(Py_IsInitialized())


def complete_interpreter():
    """Do the second part of the interpreter's start.

    Raises:
        ImportError: it failed.
    """
    if Py_IsInitialized():
        return
    cdef PyStatus status = _Py_InitializeMain()
    if PyStatus_Exception(status):
        raise ImportError("the interpreter could not be completed")


def in_stage():
    """Return whether this interpreter runs in a child of the starter."""
    return wire_stage() != NULL


def stage():
    """Return the facts of this stage by name: numbers of protocol.def, ids, descriptors or -1."""
    cdef const stage_info *info = _info()
    return {
        "stage": info.stage, "flow": info.flow, "reason": info.reason, "uid": info.uid,
        "gid": info.gid, "umask": info.umask,
        "caller_pid": info.caller_pid, "request_fd": info.request_fd,
        "config_fd": info.config_fd, "keeper_fd": info.keeper_fd, "rpc_fd": info.rpc_fd,
        "start_fd": info.start_fd, "methods_fd": info.methods_fd, "trigger_fd": info.trigger_fd,
        "helper_fds": (info.helper_fds[0], info.helper_fds[1]), "permitted": info.permitted,
        "init_fd": info.init_fd, "init_pid": info.init_pid,
        "server_fd": info.server_fd, "server_pid": info.server_pid,
        "ready_fd": info.ready_fd,
        "watcher": info.watcher if info.watcher != NULL else b"",
    }


def run_hook(unsigned int hook, function, *arguments):
    """Call a hook after the C side has compared this process's identity with the stage's.

    Raises whatever the hook raises; a difference of identity ends the process instead.
    """
    cdef const stage_info *info = _info()
    info.enter_hook(hook)
    try:
        result = function(*arguments)
    except BaseException:
        info.leave_hook(hook, 1)
        raise
    info.leave_hook(hook, 0)
    return result


def run_step(unsigned int step, function, *arguments):
    """Call what does a numbered step of the launch (STEP_* of the protocol)."""
    cdef const stage_info *info = _info()
    info.at_step(step, 0)
    result = function(*arguments)
    info.at_step(step, 1)
    return result


def tell_sealed():
    """Stage 2: say that nothing more will be loaded. Returns False when nobody hears it."""
    return _info().tell_sealed() == 0


def wait_for_go():
    """Stage 2, sealed: wait until no privilege is left.

    Returns False when the launch was abandoned meanwhile.
    """
    cdef const stage_info *info = _info()
    cdef int result
    with nogil:
        result = (<stage_info *>info).wait_for_go()
    return result == 0


cdef char **_vector(list items) except NULL:
    cdef Py_ssize_t count = len(items), i
    cdef char **vector = <char **>malloc((count + 1) * sizeof(char *))
    if vector == NULL:
        raise MemoryError
    for i in range(count):
        vector[i] = PyBytes_AS_STRING(items[i])
    vector[count] = NULL
    return vector


def exec_payload(bytes path, list argv, list env):
    """Become the payload; on failure return errno.  All elements are bytes without NUL."""
    cdef const stage_info *info = _info()
    cdef char **argument_vector = _vector(argv)
    cdef char **env_vector = _vector(env)
    cdef int error = info.exec_payload(PyBytes_AS_STRING(path), argument_vector, env_vector)
    free(argument_vector)
    free(env_vector)
    return error


def set_filter(bytes code not None, unsigned int flags):
    """Have the payload start under this seccomp filter; ValueError: it is none."""
    if _info().set_filter(<const void *>PyBytes_AS_STRING(code), len(code), flags) < 0:
        raise ValueError("this is no seccomp filter")


def set_label(unsigned int kind, bytes text not None):
    """Have the payload start with this security label; returns 0 or errno."""
    return _info().set_label(kind, PyBytes_AS_STRING(text), len(text))


def _check_request_part(bytes data, uint32_t start, uint32_t end, Py_ssize_t count):
    parts = data[start:end].split(b"\0")
    if parts.pop() != b"" or (count >= 0 and len(parts) != count):
        raise ValueError("the launch request is malformed")
    return parts


def read_request(bytes data):
    """Take a request apart: (arguments, environment, cwd, engine, engine file), all bytes.

    Raises:
        ValueError: the counts or offsets do not fit the data (starter/request.h).
    """
    cdef request_header head
    if len(data) < <Py_ssize_t>sizeof(head):
        raise ValueError("the launch request is malformed")
    memcpy(&head, PyBytes_AS_STRING(data), sizeof(head))
    if head.total != <uint32_t>len(data):
        raise ValueError("the launch request is malformed")
    return (
        _check_request_part(data, head.argv_off, head.env_off, head.argc),
        _check_request_part(data, head.env_off, head.cwd_off, head.envc),
        _check_request_part(data, head.cwd_off, head.engine_off, 1)[0],
        _check_request_part(data, head.engine_off, head.engine_file_off, 1)[0],
        _check_request_part(data, head.engine_file_off, head.total, 1)[0],
    )


def pack_request(list arguments, list environment, bytes cwd, bytes engine, bytes build_id,
                 unsigned int flow, unsigned int reason):
    """Return the request for an engine of the package's own, and the seals that its file needs."""
    cdef request_header head
    if len(build_id) >= <Py_ssize_t>sizeof(head.build_id):
        raise ValueError("the build id is too long")
    memset(&head, 0, sizeof(head))
    memcpy(head.magic, REQUEST_MAGIC, sizeof(head.magic))
    memcpy(head.build_id, PyBytes_AS_STRING(build_id), len(build_id))
    head.version = REQUEST_VERSION
    head.header_size = sizeof(head)
    head.flow = flow
    head.reason = reason
    head.trace_fd = -1
    head.argc = len(arguments)
    head.envc = len(environment)
    parts = [b"".join([text + b"\0" for text in texts])
             for texts in (arguments, environment, [cwd], [engine], [b""])]
    head.argv_off = sizeof(head)
    head.env_off = head.argv_off + len(parts[0])
    head.cwd_off = head.env_off + len(parts[1])
    head.engine_off = head.cwd_off + len(parts[2])
    head.engine_file_off = head.engine_off + len(parts[3])
    head.total = head.engine_file_off + len(parts[4])
    return PyBytes_FromStringAndSize(<char *>&head, sizeof(head)) + b"".join(parts), REQUEST_SEALS


cdef Py_ssize_t _fill(op_request *q, unsigned int op, unsigned int flags, tuple numbers,
                      bytes first, bytes second) except -1:
    """Lay out one operation; returns its size."""
    cdef Py_ssize_t used = 0, i
    memset(q, 0, sizeof(op_request) - sizeof(q.tail))
    q.op = op
    q.flags = flags
    for i in range(len(numbers)):
        q.num[i] = numbers[i]
    for i in range(2):
        text = first if i == 0 else second
        if text is None:
            continue
        size = len(text) + 1
        if size > 4096 or b"\0" in text:
            raise ValueError("a path is too long, or has a NUL in it")
        memcpy(q.tail + used, PyBytes_AS_STRING(text), size)
        q.length[i] = size
        used += size
    return sizeof(op_request) - sizeof(q.tail) + used


def send_operation(int fd, unsigned int op, unsigned int flags, tuple numbers, bytes first,
                   bytes second, int passed=-1):
    """Send one operation; its reply is fetched by receive_reply, in order.

    Raises:
        OSError: the other side is gone.
        ValueError: a string is longer than a path may be, or has a NUL.
    """
    cdef op_request q
    cdef Py_ssize_t size = _fill(&q, op, flags, numbers, first, second)
    if wire_send(fd, &q, size, passed) < 0:
        raise OSError(errno, "the starter is gone")


def pack_operation(unsigned int op, unsigned int flags, tuple numbers, bytes first, bytes second):
    """Return one operation as it goes into a message, of which several may be one.

    Raises:
        ValueError: a string is longer than a path may be, or has a NUL.
    """
    cdef op_request q
    cdef Py_ssize_t size = _fill(&q, op, flags, numbers, first, second)
    return PyBytes_FromStringAndSize(<char *>&q, size)


def receive_reply(int fd):
    """Return (operation, code, errno, descriptor or -1).

    Raises:
        EOFError: the other side ended.
        OSError: the channel failed.
    """
    cdef op_reply a
    cdef int passed = -1
    cdef ssize_t got
    with nogil:
        got = wire_receive(fd, &a, sizeof(a), &passed)
    if got == 0:
        raise EOFError("the starter ended")
    if got < 0:
        raise OSError(errno, "the starter is gone")
    if got != <ssize_t>sizeof(a):
        raise EOFError("the starter ended")
    return a.op, a.code, a.error, passed


def receive_answer(int fd):
    """Return (code, errno, value, descriptor or -1): a reply of a server that says a value.

    Raises:
        EOFError: the other side ended.
        OSError: the channel failed.
    """
    return receive_rows_answer(fd)[:4]


def receive_rows_answer(int fd):
    """Return the same, and which operation of its message it is about, from 0.

    That is the last one, or the first that failed.

    Raises:
        EOFError: the other side ended.
        OSError: the channel failed.
    """
    cdef op_reply a
    cdef int passed = -1
    cdef ssize_t got
    with nogil:
        got = wire_receive(fd, &a, sizeof(a), &passed)
    if got < 0 and errno != ECONNRESET:
        raise OSError(errno, "the container's first process is gone")
    if got != <ssize_t>sizeof(a):
        raise EOFError("the container's first process ended")
    return a.code, a.error, a.value, passed, a.op >> 16


def send_container(int fd, unsigned int op, bytes image, unsigned int spaces, unsigned int flags,
                   unsigned int fuse_count, unsigned int uid, unsigned int gid, tuple groups,
                   tuple caps, int passed=-1):
    """Send the plan of a container; its reply is fetched by receive_reply."""
    cdef container_request q
    cdef Py_ssize_t i
    memset(&q, 0, sizeof(q))
    q.op = op
    q.plan.spaces = spaces
    q.plan.flags = flags
    q.plan.fuse_count = fuse_count
    q.plan.uid = uid
    q.plan.gid = gid
    q.plan.group_count = len(groups)
    for i in range(min(len(groups), <Py_ssize_t>LIMIT_GROUPS)):
        q.plan.groups[i] = groups[i]
    for i in range(5):
        q.plan.caps[i] = caps[i]
    image = image[:sizeof(q.image)]
    q.image_length = len(image)
    memcpy(q.image, PyBytes_AS_STRING(image), len(image))
    if wire_send(fd, &q, sizeof(q), passed) < 0:
        raise OSError(errno, "the starter is gone")


def receive_event(int fd):
    """Return (event, pid, wait status), or None at the end of the channel.

    Raises:
        OSError: the channel failed.
    """
    cdef event_frame frame
    cdef ssize_t got
    with nogil:
        got = wire_receive(fd, &frame, sizeof(frame), NULL)
    if got == 0:
        return None
    if got < 0:
        raise OSError(errno, "the starter is gone")
    return frame.event, frame.pid, frame.status


def sealed_file(bytes data):
    """Return a file in memory that nobody can change any more; close-on-exec."""
    cdef int fd = memfd_create(b"apptainer-py program", MFD_CLOEXEC | MFD_ALLOW_SEALING)
    if fd < 0:
        raise OSError(errno, "no file in memory could be made")
    if (write(fd, PyBytes_AS_STRING(data), len(data)) != len(data) or
            fcntl(fd, F_ADD_SEALS, REQUEST_SEALS) < 0):
        close(fd)
        raise OSError(errno, "a file in memory could not be filled")
    return fd


def send_bytes(int fd, bytes data, int passed=-1):
    """Send one frame of plain bytes between two stages."""
    if wire_send(fd, PyBytes_AS_STRING(data), len(data), passed) < 0:
        raise OSError(errno, "the other stage is gone")


def receive_bytes(int fd, Py_ssize_t size):
    """Return (bytes, descriptor or -1); empty bytes at the end."""
    cdef int passed = -1
    cdef char *space = <char *>malloc(size)
    cdef ssize_t got
    if space == NULL:
        raise MemoryError
    with nogil:
        got = wire_receive(fd, space, size, &passed)
    try:
        if got < 0:
            raise OSError(errno, "the other stage is gone")
        return PyBytes_FromStringAndSize(space, got), passed
    finally:
        free(space)


def openat2(int directory, bytes path, uint64_t flags, uint64_t resolve):
    """Open a path as openat2(2) does; close-on-exec.

    Raises:
        OSError: as the system call fails.
    """
    cdef int fd = wire_openat2(directory, PyBytes_AS_STRING(path), flags, resolve)
    if fd < 0:
        name = path.decode("utf-8", "surrogateescape")
        raise OSError(errno, strerror(errno).decode("utf-8", "replace"), name)
    return fd


def is_proc(int fd):
    """Return whether an open file belongs to proc(5)."""
    return wire_is_proc(fd) != 0


def bounding_set():
    """Return this process's capability bounding set as a bit mask."""
    return wire_bounding()


def release_code(int fd):
    """Give the pages of program code back to the page cache, unless `fd` can be read soon.

    For who sleeps until then (-1: has waited already); those who need a page again read it from the cache.
    """
    with nogil:
        wire_release_code(fd)


def hook_run(bytes frame, int pid, list environment):
    """Run the hooks of a frame (model/hook_frame.py) in order, until one fails.

    `environment` is what a hook gets that names none. Returns (0, "") or the number of the hook
    that failed, from 1, and how it did so in runc's words.
    """
    cdef hook_result result
    cdef char **variables = _vector(environment)
    cdef const char *bytes_of = PyBytes_AS_STRING(frame)
    cdef size_t size = len(frame)
    with nogil:
        hook_run_frame(bytes_of, size, pid, variables, &result)
    free(variables)
    return result.failed, (<bytes>result.text).decode("utf-8", "backslashreplace")


def relay_begin():
    """Hold back every signal until `relay`: a launch in the foreground loses none.

    Raises:
        OSError: as sigprocmask(2) fails.
    """
    if relay_block_signals() < 0:
        raise OSError(errno, "cannot hold back signals")


def relay(int pid, int pty_fd):
    """Pass signals on to a child, and the terminal `pty_fd` (-1: none), until it ends.

    Returns its wait status.

    Raises:
        OSError: it is no child, or there is no descriptor left.
    """
    cdef int status = 0, result
    with nogil:
        result = relay_run(pid, pty_fd, &status)
    if result < 0:
        raise OSError(errno, "cannot watch the container's process")
    return status
