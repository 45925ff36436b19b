"""The image, mounted by its user on the host and handed to the container.

Where `allow userns-mount fuse = no` says that no FUSE file system is mounted in a user namespace,
fusermount3 does it, which is setuid. The process of `cleanup_host` mounts, so that it knows what
there is to undo; the starter serves the mount as any other. The container shows it again, and from
then on the host needs it no more: `post_start_host` detaches it.
"""

from __future__ import annotations

import os

from apptainer_py.base import held, log
from apptainer_py.base.errors import LaunchError
from apptainer_py.base.files import read_at_most, temporary_directory
from apptainer_py.kernel import _starter
from apptainer_py.model import protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from apptainer_py.engines.apptainer.prepare import Prepared
    from apptainer_py.runtime.contexts import PrepareContext, PrepareHostContext
    from apptainer_py.runtime.mounting import Mounting

_PROGRAMS = ("/usr/bin/fusermount3", "/bin/fusermount3", "/usr/local/bin/fusermount3")
_PREFIX = "apptainer-py-rootfs-"
_FUSE_CONFIG = "/etc/fuse.conf"
_OPTIONS = "ro,nosuid,nodev,fsname=squashfuse_ll,subtype=squashfuse"
# The descriptor of fusermount3 on which it hands back the device, and how it is told so.
_CHANNEL, _VARIABLE = 3, "_FUSE_COMMFD"
_OUTPUT_BYTES = 4096
_FILE_BYTES = 1 << 20


class CannotMount(LaunchError):
    message = "cannot mount the image outside of the user namespace: {reason}"
    hint = "the administrator may set `allow userns-mount fuse = yes`; or use `--unsquash`"


def plan(prepared: Prepared, context: PrepareContext) -> None:
    """Name the place of the mount, and have it made."""
    if _program() is None:
        raise CannotMount(reason="fusermount3 is not installed (package fuse3)")
    above = os.path.realpath(temporary_directory(context.environment))
    folder = f"{above}/{_PREFIX}{os.urandom(8).hex()}"
    prepared.fuse = False
    prepared.host_root = f"{folder}/root"
    options = _OPTIONS
    if prepared.fakeroot is not None and prepared.fakeroot.subids:
        if _others_may():
            options += ",allow_other"
        else:
            log.warning(
                f"only root can read this image; with user_allow_other in {_FUSE_CONFIG}, which is "
                "the administrator's, the container's other ids can"
            )
    context.tell_host(b"\0".join((os.fsencode(folder), os.fsencode(options))))


def _program() -> str | None:
    return next((path for path in _PROGRAMS if os.access(path, os.X_OK)), None)


def _others_may() -> bool:
    try:
        data = read_at_most(os.open(_FUSE_CONFIG, os.O_RDONLY | os.O_CLOEXEC), _FILE_BYTES)
    except OSError:
        return False
    return any(line.strip() == b"user_allow_other" for line in data.split(b"\n"))


def take(mounting: Mounting, prepared: Prepared) -> int:
    """Have it served, and shown in the container; returns a descriptor of its root."""
    mounting.serve_image(0, prepared.root_fd, prepared.offset, prepared.what)
    there = os.stat(prepared.host_root)
    flags = protocol.BINDFLAG_READ_ONLY
    return mounting.root_directory(
        prepared.host_root, there.st_dev, there.st_ino, flags, prepared.what
    )


def mount(context: PrepareHostContext) -> None:
    """Mount it with nobody to serve it yet; the device is the starter's.

    Raises:
        CannotMount: there is no place for it, or fusermount3 refuses.
    """
    folder, options = context.message.split(b"\0")
    root = folder + b"/root"
    _sweep(os.path.dirname(os.fsdecode(folder)))
    try:
        os.mkdir(folder, 0o700)
        held.hold(os.fsdecode(folder))  # until this process ends, which undoes it first
        os.mkdir(root, 0o700)
    except OSError as error:
        reason = f"{os.fsdecode(folder)}: {(error.strerror or '').lower()}"
        raise CannotMount(reason=reason) from None
    context.hand_over(_device(options, root))


def _sweep(above: str) -> None:
    """Take away what launches have left there of which nobody lived to undo it."""
    for folder in held.abandoned(above, _PREFIX):
        try:
            detach(os.fsencode(folder))
        except CannotMount as error:
            log.verbose(str(error))


def _device(options: bytes, root: bytes) -> int:
    import _socket

    ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
    environment = {_VARIABLE: str(_CHANNEL)}
    status, said = _run([b"-o", options, b"--", root], environment, theirs.fileno())
    theirs.close()
    try:
        _, fd = _starter.receive_bytes(ours.fileno(), 16)
    except OSError:
        fd = -1
    ours.close()
    if status or fd < 0:
        raise CannotMount(reason=said or "fusermount3 hands over no device")
    return fd


def _run(words: list[bytes], environment: dict[str, str], channel: int) -> tuple[int, str]:
    """Run fusermount3; return its status, and what it says."""
    program = _program()
    if program is None:
        return 127, "fusermount3 is not installed (package fuse3)"
    reading, writing = os.pipe2(os.O_CLOEXEC)
    # Out of the way of the numbers that they get.
    channel = os.dup(channel) if channel >= 0 else -1
    actions = [(os.POSIX_SPAWN_DUP2, writing, number) for number in (1, 2)]
    if channel >= 0:
        actions.append((os.POSIX_SPAWN_DUP2, channel, _CHANNEL))
    try:
        line = [os.fsencode(program), *words]
        child = os.posix_spawn(program, line, environment, file_actions=actions)
    except OSError as error:
        os.close(reading)
        return 127, f"{program}: {(error.strerror or '').lower()}"
    finally:
        os.close(writing)
        if channel >= 0:
            os.close(channel)
    said = read_at_most(reading, _OUTPUT_BYTES).decode("utf-8", "replace").strip()
    return os.waitpid(child, 0)[1], " ".join(said.split())


def detach(message: bytes) -> None:
    """Take the mount away, if it is there, and its place; both of the host pair may do so at once.

    Raises:
        CannotMount: it stays.
    """
    if not message:
        return
    folder = message.split(b"\0")[0]
    root = folder + b"/root"
    said = ""
    if _is_mounted(root):
        # Lazily: the container has it.
        _, said = _run([b"-u", b"-z", b"-q", b"--", root], {}, -1)
    for path in (root, folder):
        try:
            os.rmdir(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            reason = said or (error.strerror or "").lower()
            raise CannotMount(reason=f"{os.fsdecode(path)} cannot be removed: {reason}") from None


def _is_mounted(root: bytes) -> bool:
    table = read_at_most(
        os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC), _FILE_BYTES << 4
    )
    for mark, escaped in (
        (b"\\", b"\\134"),
        (b" ", b"\\040"),
        (b"\t", b"\\011"),
        (b"\n", b"\\012"),
    ):
        root = root.replace(mark, escaped)
    return any(line.split(b" ", 5)[4] == root for line in table.splitlines())
