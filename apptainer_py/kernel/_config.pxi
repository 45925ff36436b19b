# The administrator's file, read by the same C as in the starter.

from cpython.mem cimport PyMem_Free, PyMem_Malloc
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset
from libc.errno cimport ENOENT as _ENOENT
from posix.unistd cimport close as _close_fd

cdef extern from "config_open.c":
    pass
cdef extern from "config_value.c":
    pass
cdef extern from "config.c":
    pass

cdef extern from "config.h":
    enum:
        CONFIG_COUNT
        CONFIG_PROBLEMS
    ctypedef int config_id "enum config_id"
    struct config_c "config":
        pass
    struct config_problem:
        uint32_t line
        char *key
        char *text
        char *nearest
    struct config_error:
        uint32_t count
        config_problem problem[16]
    int config_open(const char *path, bint require_root_owned, config_error *why)
    int config_parse_fd(int fd, config_c *out, config_error *why)
    void config_defaults(config_c *out)
    bint config_bool(const config_c *c, config_id id)
    uint64_t config_uint(const config_c *c, config_id id)
    const char *config_string(const config_c *c, config_id id)
    size_t config_list_count(const config_c *c, config_id id)
    const char *config_list_item(const config_c *c, config_id id, size_t n)
    unsigned config_line(const config_c *c, config_id id)
    const char *config_key(config_id id)
    const char *config_type(config_id id)


cdef struct config_space:
    config_c config
    config_error why


cdef str _config_text(const char *text):
    return (<bytes>text).decode("utf-8", "surrogateescape")


cdef object _config_value(const config_c *c, config_id id):
    cdef size_t n
    cdef str kind = _config_text(config_type(id))
    if kind == "BOOL":
        return bool(config_bool(c, id))
    if kind == "UINT":
        return int(config_uint(c, id))
    if kind == "LIST":
        return tuple([_config_text(config_list_item(c, id, n))
                      for n in range(config_list_count(c, id))])
    return _config_text(config_string(c, id))


cdef list _config_problems(const config_error *why):
    cdef uint32_t n
    cdef list found = []
    for n in range(min(why.count, <uint32_t>CONFIG_PROBLEMS)):
        found.append((
            int(why.problem[n].line),
            *[(<bytes>text).decode("utf-8", "backslashreplace") for text in (
                why.problem[n].key, why.problem[n].text, why.problem[n].nearest)],
        ))
    if why.count > CONFIG_PROBLEMS:
        found.append((0, "", f"{why.count - CONFIG_PROBLEMS} more problems are not shown", ""))
    return found


cdef tuple _config_result(const config_space *space):
    cdef dict values = {}
    cdef dict lines = {}
    cdef int id
    for id in range(CONFIG_COUNT):
        key = _config_text(config_key(<config_id>id))
        values[key] = _config_value(&space.config, <config_id>id)
        lines[key] = int(config_line(&space.config, <config_id>id))
    return values, lines, _config_problems(&space.why)


cdef config_space *_config_new() except NULL:
    # Too large for a stack, and wanted once: a static copy would stay in every process.
    cdef config_space *space = <config_space *>PyMem_Malloc(sizeof(config_space))
    if space == NULL:
        raise MemoryError
    memset(&space.why, 0, sizeof(config_error))
    config_defaults(&space.config)
    return space


def parse_config(str path not None, *, bint require_root_owned):
    """Read the file at `path`: values by key, lines by key (0: a default), and all problems.

    A problem is (line, key, text, nearest key); line 0 is the file itself or a directory above it,
    whose path is then the key. A file that cannot be trusted or read gives the defaults.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: `path` holds a NUL character.
    """
    cdef int fd
    cdef bytes name = path.encode("utf-8", "surrogateescape")
    cdef config_space *space
    if b"\0" in name:
        raise ValueError("embedded null byte")
    space = _config_new()
    try:
        fd = config_open(name, require_root_owned, &space.why)
        if fd == -_ENOENT:
            raise FileNotFoundError(_ENOENT, "there is no file", path)
        if fd >= 0:
            try:
                config_parse_fd(fd, &space.config, &space.why)
            finally:
                _close_fd(fd)
        return _config_result(space)
    finally:
        PyMem_Free(space)


def parse_config_fd(int fd):
    """Read an open file from its beginning; the answer is that of parse_config()."""
    cdef config_space *space = _config_new()
    try:
        config_parse_fd(fd, &space.config, &space.why)
        return _config_result(space)
    finally:
        PyMem_Free(space)


def default_config():
    """Return what holds where there is no file at all, in the form of parse_config()."""
    cdef config_space *space = _config_new()
    try:
        return _config_result(space)
    finally:
        PyMem_Free(space)
