"""The mounting process's operations, as calls: one function a row of starter/protocol.def.

Requests are sent without waiting, and the replies fetched in order, because each round trip costs
two process switches. `LaunchError` names the operation, what it was about and what to do.
"""

from __future__ import annotations

import errno
import os

from apptainer_py.base.errors import ImageGone, LaunchError
from apptainer_py.kernel import _starter
from apptainer_py.model import protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from apptainer_py.model.plan import Mount
    from apptainer_py.runtime.janitor import Janitor

_KERNEL_FS = {
    "proc": protocol.KERNELFS_PROC,
    "sysfs": protocol.KERNELFS_SYSFS,
    "devpts": protocol.KERNELFS_DEVPTS,
    "mqueue": protocol.KERNELFS_MQUEUE,
    "tmpfs": protocol.KERNELFS_TMPFS,
}
_IN_FLIGHT = 24
_DENIED = (errno.EPERM, errno.EACCES)
# Of `Mounting.space`.
NETWORK, USER, MOUNTS = range(3)


class StarterRefused(LaunchError):
    """The starter said no: `code` is an ERR_* of the protocol, `errno` of the call that failed."""

    message = "container creation failed: {what}: {reason}"


class FuseRefused(StarterRefused):
    """FUSE is kept from the caller, or from user namespaces."""

    hint = (
        "users must be able to open /dev/fuse (mode 0666); where a security module keeps FUSE "
        "from user namespaces, the administrator sets `allow userns-mount fuse = no`, and "
        "fusermount3 mounts images on the host"
    )


class StarterGone(LaunchError):
    """A process of the launch ended in the middle."""

    message = "container creation failed: {what}: a process of the launch has ended"


def refused(what: str, code: int, error: int) -> StarterRefused:
    """Return the exception for a reply that is not ERR_OK."""
    reason = protocol.ERR_TEXTS.get(code, "unknown reason")
    if error:
        reason = f"{reason}: {os.strerror(error).lower()}"
    of_fuse = code == protocol.ERR_FUSE and error in _DENIED
    kind = FuseRefused if of_fuse else StarterRefused
    return kind(what=what, reason=reason, code=code, errno=error)


class Mounting:
    """The two channels to the starter, as `create_container` may use them."""

    __slots__ = ("_flight", "_keeper_fd", "_rpc_fd", "container_pid")

    def __init__(self, keeper_fd: int, rpc_fd: int, container_pid: int = 0) -> None:
        self.container_pid = container_pid
        self._keeper_fd = keeper_fd
        self._rpc_fd = rpc_fd
        self._flight: list[tuple[str, Callable[[int, int], None] | None]] = []

    def _send(
        self,
        what: str,
        op: int,
        *,
        flags: int = 0,
        numbers: tuple[int, ...] = (),
        paths: tuple[bytes, ...] = (),
        on_failure: Callable[[int, int], None] | None = None,
    ) -> None:
        if len(self._flight) >= _IN_FLIGHT:
            self._fetch()
        first, second = (*paths, None, None)[:2]
        try:
            _starter.send_operation(self._rpc_fd, op, flags, numbers, first, second)
        except ValueError as error:
            raise LaunchError(text=f"{what}: {error}") from None
        except OSError:
            raise StarterGone(what=what) from None
        self._flight.append((what, on_failure))

    def _fetch(self) -> int:
        what, on_failure = self._flight.pop(0)
        try:
            _, code, error, fd = _starter.receive_reply(self._rpc_fd)
        except (EOFError, OSError):
            raise StarterGone(what=what) from None
        if code != protocol.ERR_OK:
            if on_failure is None:
                raise refused(what, code, error)
            on_failure(code, error)
        return fd

    def settle(self) -> None:
        """Fetch every reply that is still out."""
        while self._flight:
            self._fetch()

    def _ask(
        self,
        what: str,
        op: int,
        *,
        flags: int = 0,
        numbers: tuple[int, ...] = (),
        paths: tuple[bytes, ...] = (),
    ) -> int:
        self._send(what, op, flags=flags, numbers=numbers, paths=paths)
        return self.take()

    def take(self) -> int:
        """Wait for all that was begun; returns the descriptor of the last, or -1."""
        fd = -1
        while self._flight:
            fd = self._fetch()
        return fd

    def _ask_fuse(self, what: str, op: int, **how: Any) -> int:
        try:
            return self._ask(what, op, **how)
        except StarterRefused as error:
            facts = error.facts
            if facts["code"] == protocol.ERR_MOUNT and facts["errno"] in _DENIED:
                raise FuseRefused(**facts) from None
            raise

    def session(self, size_mib: int) -> int:
        """Make the memory file system; returns a descriptor of its directory (size 0: no limit)."""
        return self._ask(
            "cannot make the session directory", protocol.OP_SESSION, numbers=(size_mib,)
        )

    def serve_image(self, device: int, image_fd: int, offset: int, what: str) -> None:
        """Start the image server on an open image whose file system begins at `offset` bytes."""
        self._serve(protocol.OP_SERVE_IMAGE, 0, (device, offset), image_fd, what)

    def serve_extfs(
        self, device: int, image_fd: int, offset: int, what: str, *, writable: bool
    ) -> None:
        """Start the server of an ext3 image; to write it, it must be open for writing."""
        flags = protocol.BINDFLAG_WRITABLE if writable else 0
        self._serve(protocol.OP_SERVE_EXTFS, flags, (device, offset), image_fd, what)

    def _serve(
        self, wanted: int, flags: int, numbers: tuple[int, ...], image_fd: int, what: str
    ) -> None:
        try:
            _starter.send_operation(self._keeper_fd, wanted, flags, numbers, None, None, image_fd)
            op, code, error, _ = _starter.receive_reply(self._keeper_fd)
        except (EOFError, OSError):
            raise StarterGone(what=what) from None
        if op == protocol.EVENT_SERVER_ENDED:
            raise ImageGone
        if op != wanted:
            raise StarterGone(what=what)
        if code != protocol.ERR_OK:
            raise refused(what, code, error)

    def network(self, name: str, arguments: str) -> tuple[int, int]:
        """Ask for one of the administrator's networks; returns an ERR_* and an errno."""
        first, second = name.encode(), arguments.encode()
        return self._judge(protocol.OP_NETWORK, (), first, second)

    def port(self, numbers: tuple[int, int, int, int]) -> tuple[int, int]:
        """Ask for a port of the host; returns an ERR_* and an errno.

        `numbers` are the network, the host's port, the container's and the protocol's number.
        """
        return self._judge(protocol.OP_PORT, numbers, None, None)

    def _judge(
        self, wanted: int, numbers: tuple[int, ...], first: bytes | None, second: bytes | None
    ) -> tuple[int, int]:
        what = "cannot connect the container to a network"
        try:
            _starter.send_operation(self._keeper_fd, wanted, 0, numbers, first, second, -1)
            op, code, error, _ = _starter.receive_reply(self._keeper_fd)
        except (EOFError, OSError):
            raise StarterGone(what=what) from None
        if op == protocol.EVENT_SERVER_ENDED:
            raise ImageGone
        if op != wanted:
            raise StarterGone(what=what)
        return code, error

    def janitor(self) -> Janitor:
        """Start the process that undoes what outlives this launch."""
        from apptainer_py.runtime.janitor import Janitor

        return Janitor(self._keeper_fd, self.container_pid)

    def space(self, which: int) -> int:
        """Return a descriptor of the container's network (0), user (1) or mount namespace (2)."""
        what = "cannot have the container's namespace"
        return self._ask(what, protocol.OP_SPACE, numbers=(which,))

    def root_fuse(self, device: int, what: str, flags: int = 0) -> int:
        """Mount the served image; returns a descriptor of its root."""
        return self._ask_fuse(what, protocol.OP_ROOT_FUSE, flags=flags, numbers=(device,))

    def root_squashfs(
        self, path: str, facts: tuple[int, int, int, int], what: str, flags: int = 0
    ) -> int:
        """Mount with the kernel's driver; `facts` are device, inode, offset and size in bytes."""
        paths = (os.fsencode(path),)
        return self._ask(what, protocol.OP_ROOT_SQUASHFS, flags=flags, numbers=facts, paths=paths)

    def root_directory(self, path: str, dev: int, ino: int, flags: int, what: str) -> int:
        """Use a directory as the image."""
        return self._ask(
            what,
            protocol.OP_ROOT_DIRECTORY,
            flags=flags,
            numbers=(dev, ino),
            paths=(os.fsencode(path),),
        )

    def image_fuse(self, number: int, device: int, flags: int, what: str) -> int:
        """Mount a served image beside the root; returns a descriptor of its root."""
        return self._ask_fuse(what, protocol.OP_IMAGE_FUSE, flags=flags, numbers=(number, device))

    def image_kernel(self, path: str, facts: tuple[int, ...], flags: int, what: str) -> int:
        """Mount an image beside the root; `facts` are those of `root_squashfs`, and its number."""
        paths = (os.fsencode(path),)
        return self._ask(what, protocol.OP_IMAGE_KERNEL, flags=flags, numbers=facts, paths=paths)

    def image_directory(self, path: str, facts: tuple[int, ...], flags: int, what: str) -> int:
        """Show a directory beside the root; `facts` are device, inode and its number."""
        paths = (os.fsencode(path),)
        return self._ask(what, protocol.OP_IMAGE_DIRECTORY, flags=flags, numbers=facts, paths=paths)

    def image_layer(self, number: int, flags: int, what: str) -> None:
        """Make an image that is shown the next layer of the overlay."""
        self._ask(what, protocol.OP_IMAGE_LAYER, flags=flags, numbers=(number,))

    def underlay_bind(self, source: bytes, target: bytes) -> None:
        """Show an entry of the image again, at a place of the underlay."""
        self._send(
            f"cannot show {os.fsdecode(source)} in the underlay",
            protocol.OP_UNDERLAY_BIND,
            paths=(source, target),
        )

    def layer(self, kind: int, what: str) -> int:
        """Put the layer over the image; returns a descriptor of the container's root."""
        return self._ask(what, protocol.OP_LAYER, numbers=(kind,))

    def begin_layer(self, kind: int) -> None:
        """Have the same done, and go on; `take` has the descriptor."""
        self._send("cannot put a layer over the image", protocol.OP_LAYER, numbers=(kind,))

    def mount(self, mount: Mount, on_failure: Callable[[int, int], None] | None) -> None:
        """Do one entry of the mount plan; `on_failure` gets code and errno instead of a raise."""
        flags = mount.flags | (protocol.BINDFLAG_MAY_FAIL if on_failure else 0)
        target = os.fsencode(mount.target)
        if mount.kind == "bind":
            self._send(
                f"mount {mount.source}->{mount.target} error",
                protocol.OP_BIND,
                flags=flags,
                numbers=(mount.area, mount.options),
                paths=(os.fsencode(mount.source), target),
                on_failure=on_failure,
            )
            return
        group = mount.options if mount.kind == "devpts" else 0
        size = mount.options if mount.kind == "tmpfs" else 0
        self._send(
            f"mount {mount.kind}->{mount.target} error",
            protocol.OP_MOUNT,
            flags=flags,
            numbers=(_KERNEL_FS[mount.kind], group, size),
            paths=(target,),
            on_failure=on_failure,
        )

    def user_fuse(self, device: int, target: bytes, what: str) -> int:
        """Mount what a program of the user's will serve; returns the device for it."""
        return self._ask_fuse(what, protocol.OP_USER_FUSE, numbers=(device,), paths=(target,))

    def hostname(self, name: str) -> None:
        """Set the host name of the container's UTS namespace."""
        self._send("cannot set the host name", protocol.OP_HOSTNAME, paths=(os.fsencode(name),))

    def begin_pivot(self) -> None:
        """Have the container's tree made its root once stage 2 is sealed; the last one."""
        self._send("cannot change the root", protocol.OP_PIVOT)

    def close(self) -> None:
        """Give up: the process that mounts ends."""
        os.close(self._rpc_fd)

    def pivot(self) -> None:
        """Wait until that is done."""
        self.begin_pivot()
        self.settle()
