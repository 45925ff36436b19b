"""Device nodes and the links of /dev."""

from __future__ import annotations

from apptainer_py.engines.oci.keys import ConfigWrong
from apptainer_py.engines.oci.mounts import clean
from apptainer_py.engines.oci.texts import IN_INIT, path_bytes, quoted
from apptainer_py.model import protocol
from apptainer_py.model.oci_plan import Row

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_S_IFIFO, _S_IFCHR, _S_IFBLK, _S_IFMT = 0o010000, 0o020000, 0o060000, 0o170000
_TYPES = {"p": _S_IFIFO, "c": _S_IFCHR, "u": _S_IFCHR, "b": _S_IFBLK}

_DEFAULTS = (
    ("/dev/null", 1, 3),
    ("/dev/random", 1, 8),
    ("/dev/full", 1, 7),
    ("/dev/tty", 5, 0),
    ("/dev/zero", 1, 5),
    ("/dev/urandom", 1, 9),
)
_LINKS = (
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
)

DEFAULT_NODES = tuple(path for path, _, _ in _DEFAULTS)
_SAYS = "configuring container /dev: error creating device nodes: {error}"
_SAYS_PTMX = "configuring container /dev: error setting up ptmx: {error}"
_SAYS_LINK = "configuring container /dev: error setting up /dev symlinks: {error}"
_MKNOD_BINDS = 1
_LINK_REPLACES = 1
_MAJOR_MAX, _MINOR_MAX = (1 << 12) - 1, (1 << 20) - 1


def compile_devices(linux: dict[str, Any], *, bind: bool, kcore: bool) -> tuple[Row, ...]:
    """Compile the nodes and links of /dev; with `bind` the host's nodes stand in for new ones.

    Raises:
        ConfigWrong: a device that cannot be.
    """
    own = linux.get("devices", ())
    taken = {device.get("path", "") for device in own}
    rows = [
        _node(path, _S_IFCHR | 0o666, major, minor, bind=bind)
        for path, major, minor in _DEFAULTS
        if path not in taken
    ]
    rows += [_own_node(device, bind=bind) for device in own]
    rows.append(
        Row(
            op=protocol.OP_LINK,
            flags=_LINK_REPLACES,
            first=b"pts/ptmx",
            second=b"/dev/ptmx",
            says=_SAYS_PTMX,
        )
    )
    links = (*_LINKS, ("/proc/kcore", "/dev/core")) if kcore else _LINKS
    for text, path in links:
        rows.append(
            Row(op=protocol.OP_LINK, first=text.encode(), second=path.encode(), says=_SAYS_LINK)
        )
    return tuple(rows)


def _own_node(device: dict[str, Any], *, bind: bool) -> Row:
    kind, path = device.get("type", ""), device.get("path", "")
    bits = _TYPES.get(kind)
    if bits is None:
        raise ConfigWrong(key="linux.devices", text=f"invalid device type {quoted(kind)}")
    major, minor = device.get("major", 0), device.get("minor", 0)
    why = ""
    if not path:
        why = "a device has no path"
    elif major == -1 or minor == -1:
        why = "cannot mkdev() device with wildcards"
    elif not 0 <= major <= _MAJOR_MAX or not 0 <= minor <= _MINOR_MAX:
        why = f"device {path} has no possible number: {major}:{minor}"
    elif bits == _S_IFIFO and (major or minor):
        why = (
            f"new p device inode {path} has incorrect major:minor: 0:0 doesn't match expected"
            f" {major}:{minor}"
        )
    if why:
        raise ConfigWrong(key="linux.devices", text=IN_INIT + _SAYS.replace("{error}", why))
    if path == "/dev/null" and (bits, major, minor) != (_S_IFCHR, 1, 3):
        why = "can't reopen /dev/null: container's /dev/null is invalid"
        text = f"{IN_INIT}error reopening /dev/null inside container: {why}"
        raise ConfigWrong(key="linux.devices", text=text)
    mode = bits | device.get("fileMode", 0o666) & ~_S_IFMT & 0o7777
    owner = device.get("uid", 0), device.get("gid", 0)
    return _node(path, mode, major, minor, owner=owner, bind=bind)


def _node(
    path: str,
    mode: int,
    major: int,
    minor: int,
    *,
    owner: tuple[int, int] = (0, 0),
    bind: bool,
) -> Row:
    data = path_bytes(clean(path), "linux.devices", _SAYS)
    # A fifo has no node of the host to stand in for it, and can be made by anyone.
    from_host = bind and mode & _S_IFMT != _S_IFIFO
    return Row(
        op=protocol.OP_MKNOD,
        flags=_MKNOD_BINDS if from_host else 0,
        numbers=(mode, major << 32 | minor, *owner),
        first=data,
        second=data if from_host else None,
        says=_SAYS,
    )
