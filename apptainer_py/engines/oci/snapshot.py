"""What checkpoint and restore have in common: flags, mounts that are not the container's, logs."""

from __future__ import annotations

import os
import posixpath

from apptainer_py.base import log
from apptainer_py.base.record import Record
from apptainer_py.engines.oci.devices import DEFAULT_NODES
from apptainer_py.engines.oci.mounts import BIND, clean, parse_options
from apptainer_py.host import criu
from apptainer_py.kernel import _starter
from apptainer_py.runtime.containers import ContainerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from apptainer_py.model.oci_call import OciCall

DESCRIPTORS = "descriptors.json"
_CLONE_NEWNET = 0x40000000
_RESOLVE_IN_ROOT = 0x10
_DEFAULT_SETTINGS = "/etc/criu/runc.conf"
_LOG_BYTES = 64 << 20
_LINES_BEFORE = 5
VERSION_LEAST = 30000
# What runc needs of CRIU: external namespaces, and the step `status-ready`.
VERSION_EXTERNAL = {"net": 31100, "pid": 31500}
VERSION_STATUS = 31500


class Snapshot(Record):
    """What the flags say: paths are absolute, but `parent` is relative to `images`."""

    images: str
    work: str = ""
    parent: str = ""
    cgroup_mode: int = criu.CGROUP_MODES[""]
    empty_spaces: int = _CLONE_NEWNET
    page_server: tuple[str, int] | None = None


def reason(verb: str, path: str, error: OSError) -> ContainerError:
    """Return the error for one path, in the form of Go's os.PathError."""
    return ContainerError(text=f"{verb} {path}: {(error.strerror or '').lower()}")


def snapshot_of(call: OciCall) -> Snapshot:
    """Return what the flags of `checkpoint` or `restore` say.

    Raises:
        ContainerError: one of them is wrong.
    """
    images = os.path.abspath(call.text("image-path") or "checkpoint")
    parent = call.text("parent-path")
    if parent.startswith("/"):
        raise ContainerError(text="--parent-path must be relative")
    if parent:
        _check_parent(posixpath.normpath(f"{images}/{parent}"))
    mode = call.text("manage-cgroups-mode")
    page_server = _page_server(call.text("page-server"))
    if mode not in criu.CGROUP_MODES:
        raise ContainerError(text="invalid manage-cgroups-mode value")
    for name in call.words("empty-ns"):
        # Network devices are nobody's here: that namespace is always restored empty.
        if name != "network":
            raise ContainerError(text=f'namespace "{name}" is not supported')
    return Snapshot(
        images=images,
        work=os.path.abspath(call.text("work-path")) if call.text("work-path") else "",
        parent=parent,
        cgroup_mode=criu.CGROUP_MODES[mode],
        page_server=page_server,
    )


def _check_parent(path: str) -> None:
    if not os.path.exists(path):
        text = f"invalid --parent-path: stat {path}: no such file or directory"
        raise ContainerError(text=text)
    if not os.path.isdir(path):
        raise ContainerError(text=f"invalid --parent-path: {path}: not a directory")


def _page_server(word: str) -> tuple[str, int] | None:
    if not word:
        return None
    address, _, port = word.rpartition(":")
    address = address.removeprefix("[").removesuffix("]")
    if not address or not port:
        raise ContainerError(text="Use --page-server ADDRESS:PORT to specify page server")
    if not port.isascii() or not port.isdecimal() or int(port) > 65535:
        raise ContainerError(text="Invalid port number")
    return address, int(port)


def open_directory(path: str) -> int:
    """Return a descriptor of a directory.

    Raises:
        ContainerError: there is none.
    """
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise reason("open", path, error) from None


def make_directory(path: str) -> None:
    """Make a directory for images; one that is there is fine.

    Raises:
        ContainerError: it cannot be made.
    """
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        return
    except OSError as error:
        raise reason("mkdir", path, error) from None


def settings_file(annotations: dict[str, str]) -> dict[str, str]:
    """Return the option for CRIU's own file of settings: a container may name one, or none."""
    path = annotations.get("org.criu.config", _DEFAULT_SETTINGS)
    return {"config_file": path} if path else {}


def flags_of(call: OciCall) -> dict[str, int]:
    """Return the options of CRIU that are flags of runc's under the same name."""
    words = {
        "tcp_established": "tcp-established",
        "ext_unix_sk": "ext-unix-sk",
        "shell_job": "shell-job",
        "file_locks": "file-locks",
        "auto_dedup": "auto-dedup",
        "lazy_pages": "lazy-pages",
    }
    return {name: int(call.flag(flag)) for name, flag in words.items()}


def namespace_paths(config: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (type, path) for each namespace that config.json names; path "" for a new one."""
    rows = (config.get("linux") or {}).get("namespaces") or ()
    return [(row.get("type", ""), row.get("path") or "") for row in rows]


class Inside:
    """Finds where a path of the container lies, below a root directory that it cannot leave."""

    def __init__(self, root: str) -> None:
        self._root = os.path.realpath(root)
        self._fd = os.open(self._root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def close(self) -> None:
        """Let the root go."""
        os.close(self._fd)

    def real(self, path: str) -> str:
        """Return a path with its links resolved, as far as the root has what it names."""
        cleaned = clean(path)
        try:
            fd = _starter.openat2(
                self._fd, os.fsencode(cleaned), os.O_PATH | os.O_CLOEXEC, _RESOLVE_IN_ROOT
            )
        except OSError:
            return cleaned
        try:
            found = os.readlink(f"/proc/self/fd/{fd}")
        finally:
            os.close(fd)
        inside = found.startswith(f"{self._root}/")
        return found[len(self._root) :] if inside else cleaned


def binds_of(config: dict[str, Any], bundle: str) -> list[tuple[str, str]]:
    """Return (target, source) of every bind mount of config.json, targets as they are written."""
    found = []
    for mount in config.get("mounts") or ():
        if parse_options(mount.get("options") or []).flags & BIND:
            source = posixpath.normpath(f"{bundle}/{mount.get('source', '')}")
            if mount.get("source", "").startswith("/"):
                source = mount["source"]
            found.append((mount.get("destination", ""), source))
    return found


def cgroup_binds(config: dict[str, Any], paths: dict[str, str]) -> list[tuple[str, str]]:
    """Return (target, source) of what a mount of type cgroup consists of."""
    if any(kind == "cgroup" for kind, _ in namespace_paths(config)):
        return []
    from apptainer_py.host.cgroups.mounting import bind_places

    found = []
    for mount in config.get("mounts") or ():
        flags = parse_options(mount.get("options") or []).flags
        if mount.get("type") == "cgroup" and not flags & BIND:
            found += bind_places(paths, clean(mount.get("destination", "")))
    return found


def device_nodes(config: dict[str, Any]) -> list[str]:
    """Return the paths of all device nodes: with a user namespace they are mounts of the host's."""
    own = [row.get("path", "") for row in (config.get("linux") or {}).get("devices") or ()]
    return [*DEFAULT_NODES, *(path for path in own if path not in DEFAULT_NODES)]


def external_mounts(found: Sequence[tuple[str, str]]) -> list[bytes]:
    """Return ext_mnt: a mount point and what it is called, or that name and what it stands for."""
    return [criu.pair(key, value) for key, value in dict(found).items()]


def quote_log(directory: str, name: str) -> None:
    """Warn with the lines of CRIU's log that tell of errors, and with those before each."""
    path = f"{directory}/{name}"
    try:
        with open(path, "rb") as stream:
            lines = stream.read(_LOG_BYTES).decode("utf-8", "replace").splitlines()
    except OSError as error:
        log.warning(f"open {path}: {(error.strerror or '').lower()}")
        return
    shown = 0
    for number, line in enumerate(lines, 1):
        if "Error" not in line:
            continue
        first = max(number - _LINES_BEFORE, shown + 1)
        if not shown:
            log.warning(f'--- Quoting "{path}"')
        elif first > shown + 1:
            log.warning("...")
        for place in range(first, number + 1):
            log.warning(f"{place}:{lines[place - 1]}")
        shown = number
    if shown:
        log.warning("---")
