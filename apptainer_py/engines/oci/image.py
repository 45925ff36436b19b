"""`run --oci` and its like: a container from an image, as `docker run` makes one.

The image is only read: squashfs is served by the image server as in the other engine, a layout is
unpacked for the time of the launch. What the container writes goes to memory. All else is a
config.json, which takes the way of every other.
"""

from __future__ import annotations

import os
import stat

from apptainer_py.base import build, log
from apptainer_py.base.errors import ApptainerError, ImageError, LaunchError
from apptainer_py.base.files import own_directory
from apptainer_py.engines.apptainer import binds, environ, policy
from apptainer_py.engines.oci import facts, image_spec, steps
from apptainer_py.engines.oci.create import Creation
from apptainer_py.engines.oci.id_maps import maps_for
from apptainer_py.engines.oci.spaces import outside
from apptainer_py.engines.oci.unpacking import Unpacking, folder_of
from apptainer_py.image.detect import open_image
from apptainer_py.image.oci_config import CONFIG_BYTES, ImageConfig, parse_config
from apptainer_py.image.oci_user import User, find_user
from apptainer_py.kernel import _container, _starter
from apptainer_py.model import protocol
from apptainer_py.model.json_out import dumps
from apptainer_py.model.oci_plan import Row
from apptainer_py.runtime.nest import RowFailed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from apptainer_py.image.oci_layout import Image, Layout
    from apptainer_py.model.oci_call import OciCall
    from apptainer_py.model.oci_plan import OciPlan, ProcessSpec
    from apptainer_py.model.request import ActionRequest
    from apptainer_py.runtime.contexts import Facts, PrepareContext
    from apptainer_py.runtime.nest import Nest

IMAGE_SERVER = f"{build.LIBEXECDIR}/bin/squashfuse_ll"
_ROOT = f"{build.SESSIONDIR}/root"
_IMAGE_FUSE = _USERXATTR = 1
_WHY_DEVICE, _WHY_SOURCE = 2, 4
_SERVER_END_MS = 5000
_FILE_BYTES = 1 << 20
_RESOLVE_IN_ROOT = 0x10
_OCI_CONFIG = b"oci-config.json"
_LAYOUTS = ("oci:", "oci-archive:")


class Source:
    """The image, judged: where its root comes from, and what it says about itself."""

    __slots__ = ("config", "directory", "fd", "image", "layout", "name", "offset", "realpath")

    def __init__(self, name: str) -> None:
        self.name = name
        self.config: ImageConfig | None = None
        self.directory = ""
        self.realpath = name
        self.fd = -1
        self.offset = 0
        self.layout: Layout | None = None
        self.image: Image | None = None


def open_source(name: str, caller: Facts) -> Source:
    """Open an image: a file, a directory, or an OCI layout.

    Raises:
        ApptainerError: it is none, or of a kind that cannot be started.
    """
    source = Source(name)
    if name.startswith(_LAYOUTS) and not os.path.exists(name):
        from apptainer_py.image.oci_layout import Layout

        source.layout = Layout(name)
        source.realpath = source.layout.path
        source.image = source.layout.image()
        source.config = parse_config(source.image.config, image=name)
        return source
    image = open_image(name)
    policy.check_signers(caller, image)
    source.realpath = image.realpath
    if image.kind == "ext3":
        raise ImageError(image=name, reason="ext3 images are not supported yet")
    if image.kind == "sandbox":
        os.close(image.fd)
        source.directory = image.realpath
        return source
    source.fd, source.offset = image.fd, image.offset
    if image.kind == "sif":
        _read_sif(source)
    if not os.path.exists(IMAGE_SERVER):
        raise LaunchError(text=f"{IMAGE_SERVER} is not installed; install squashfuse first")
    return source


def _read_sif(source: Source) -> None:
    from apptainer_py.image import sif

    partition = sif.primary_partition(source.fd)
    if partition.fs != "squashfs":
        reason = f"a root file system of type {partition.fs} is not supported yet"
        raise ImageError(image=source.name, reason=reason)
    source.offset = partition.offset
    for entry in sif.read_descriptors(source.fd):
        if entry.data_type == sif.GENERIC_JSON and entry.name == _OCI_CONFIG:
            data = sif.read_object(source.fd, entry, limit_bytes=CONFIG_BYTES)
            source.config = parse_config(data, image=source.name)


class ImageRun(Creation):
    """A container whose bundle is made up."""

    def __init__(self, context: PrepareContext, call: OciCall) -> None:
        assert call.action is not None
        self.action: ActionRequest = call.action
        self.caller = context.facts
        self.server_fd, self.server_pid = context.image_server()
        # Now: whoever waits for the payload reaps the server too, and its number is anybody's then.
        self.server = _container.pidfd_open(self.server_pid) if self.server_pid > 0 else -1
        self.source = Source("")
        self.unpacking: Unpacking | None = None
        super().__init__(context, call)

    # -- prepare_config

    def read_bundle(self) -> tuple[str, bytes]:
        """Return the directory of the container's state and its configuration."""
        action, call = self.action, self.call
        rootless = facts.is_rootless(call, os.geteuid())
        image_spec.check_action(action, rootless=rootless)
        own_directory(call.root)
        self.source = source = open_source(action.image, self.caller)
        if source.layout is not None:
            folder = folder_of(self.environment, os.geteuid())
            own_directory(folder)
            self.unpacking = Unpacking(folder, self.name)
            source.directory = self.unpacking.root
        uids, gids = maps_for(rootless=rootless)
        host = image_spec.Host(
            rootless=rootless,
            cgroup2=facts.has_cgroup2(),
            hostname=action.hostname or os.uname().nodename,
            terminal=os.isatty(0) and os.isatty(1),
            uid_maps=uids,
            gid_maps=gids,
        )
        self.files = self._network_files(host.hostname)
        state = f"{call.root}/{self.name}"
        mounts: list[dict[str, Any]] = [
            image_spec.bind_mount(binds.Bind(source=f"{state}/{file}", target=f"/etc/{file}"))
            for file in self.files
        ]
        cwd = os.getcwd()
        mounts += map(image_spec.scratch_mount, action.scratch)
        mounts += map(image_spec.bind_mount, binds.parse_all(action.bind, action.mount, cwd))
        config = image_spec.config_of(
            action,
            source.config,
            self._environment(terminal=host.terminal),
            mounts,
            host,
            _ROOT,
        )
        return state, dumps(config).encode("utf-8", "surrogateescape")

    def _environment(self, *, terminal: bool) -> list[str]:
        action = self.action.replace(cleanenv=True)
        given = environ.collect(action, self.environment)
        added = dict(given.forwarded)
        added.pop("LANG", None)
        if not terminal:
            added.pop("TERM", None)
        if self.source.config is None:
            own = environ.own_variables(action, self.source.realpath, "", "")
            del own["HOME"]
            added.update((name, value) for name, value in own.items() if value)
        added.update(given.injected)
        return image_spec.environment_of(self.source.config, added, given.path_edits)

    def _network_files(self, hostname: str) -> dict[str, bytes]:
        if self.action.dns:
            servers = [word.strip() for word in self.action.dns.split(",")]
            if not all(_is_address(word) for word in servers):
                raise LaunchError(text=f"--dns: {self.action.dns} is no list of addresses")
            resolv = "".join(f"nameserver {word}\n" for word in servers).encode()
        else:
            resolv = b"" if self.action.net else _host_file("/etc/resolv.conf")
        own = b"127.0.0.1\tlocalhost\n::1\tlocalhost\n"
        hosts = own if self.action.net else _host_file("/etc/hosts") or own
        if os.fsencode(hostname) not in hosts.split():
            hosts = hosts.rstrip(b"\n") + b"\n127.0.1.1\t" + os.fsencode(hostname) + b"\n"
        return {"hosts": hosts, "resolv.conf": resolv}

    def shape(self, plan: OciPlan) -> OciPlan:
        """Put the rows that make the root before the one that takes it."""
        *before, bundle = plan.setup
        place = os.fsencode(build.SESSIONDIR)
        directory = os.fsencode(self.source.directory) or None
        image = Row(
            op=protocol.OP_IMAGE,
            flags=0 if directory else _IMAGE_FUSE,
            first=place,
            second=directory,
        )
        overlay = Row(op=protocol.OP_OVERLAY, flags=_USERXATTR if plan.uid_maps else 0)
        return plan.replace(setup=(*before, image, overlay, bundle))

    # -- create_container

    def make_state(self) -> None:
        """Add to the state what the container finds in /etc."""
        super().make_state()
        assert self.state is not None
        for file, data in self.files.items():
            self.state.write(file, data)
            os.chmod(f"{self.state.path}/{file}", 0o644)

    def mapped(self) -> None:
        """Unpack a layout with the container's ids: its files then belong to whom they should."""
        if self.unpacking is None or self.source.layout is None or self.source.image is None:
            return
        # Opened now: soon nobody may look at that process any more.
        flags = os.O_RDONLY | os.O_CLOEXEC
        userns = os.open(f"/proc/{self.pid}/ns/user", flags) if self.plan.uid_maps else -1
        self.unpacking.unpack(self.source.layout, self.source.image, userns)
        self.source.layout.close()

    def assemble(self, nest: Nest) -> None:
        """Mount the image, then what every container has."""
        try:
            super().assemble(nest)
        except RowFailed as error:
            raise self._explained(error) from None

    def _explained(self, error: RowFailed) -> ApptainerError:
        if error.row.op not in (protocol.OP_IMAGE, protocol.OP_OVERLAY):
            return error
        reason = os.strerror(error.errno).lower()
        name = self.source.name
        if error.row.op == protocol.OP_IMAGE and error.value == _WHY_DEVICE:
            return LaunchError(text=f"cannot mount {name}: /dev/fuse cannot be opened: {reason}")
        what = (
            "root file system of the container: the overlay" if error.value != _WHY_SOURCE else name
        )
        return LaunchError(text=f"cannot mount {name}: {what}: {reason}")

    def send(self, nest: Nest, row: Row) -> None:
        """Send a row; the image server gets the device that comes back for it."""
        if row.op != protocol.OP_IMAGE or not row.flags & _IMAGE_FUSE:
            super().send(nest, row)
            return
        _, device = nest.ask(row)
        try:
            offset = self.source.offset.to_bytes(8, "little")
            _starter.send_bytes(self.server_fd, offset, self.source.fd)
            _starter.send_bytes(self.server_fd, b"f", device)
        except OSError:
            raise LaunchError(text="the image server has ended before it had its image") from None
        finally:
            os.close(device)

    def process(self, root: int) -> ProcessSpec:
        """Return the process with the image's user, and with a program that is there."""
        spec = self.plan.process
        user = self._user(root)
        uids, gids = self.plan.uid_maps, self.plan.gid_maps
        groups: tuple[int, ...] | None = user.groups
        if uids:
            if outside(uids, user.uid) is None or outside(gids, user.gid) is None:
                log.warning(
                    f"the image's user {user.uid}:{user.gid} becomes root of the container, which "
                    "is you: /etc/subuid and /etc/subgid give you no such ids"
                )
                user = User()
            may_set = len(gids) > 1 or os.geteuid() == 0
            kept = [gid for gid in user.groups if outside(gids, gid) is not None]
            groups = tuple(kept) if may_set else None
        # Its root goes with the launch: nothing is to be left that runs in there.
        spec = spec.replace(uid=user.uid, gid=user.gid, groups=groups, tied=True)
        if self.source.config is None and not _is_there(root, spec.arguments[0]):
            words = image_spec.plain_arguments(self.action)
            spec = spec.replace(arguments=tuple(map(os.fsencode, words)))
        # What is told of a failure is about what was really started.
        self.plan = self.plan.replace(process=spec)
        return steps.with_home(spec, root)

    def _user(self, root: int) -> User:
        config = self.source.config
        if config is None:
            return User()
        passwd, group = _file_in(root, b"etc/passwd"), _file_in(root, b"etc/group")
        return find_user(config.user, passwd, group, image=self.source.name)

    def let_go(self, nest: Nest) -> int:
        """Have the process become the payload; afterwards nothing of ours keeps its root."""
        pid = super().let_go(nest)
        if nest.root_fd >= 0:
            os.close(nest.root_fd)
            nest.root_fd = -1
        self.passed.close()
        return pid

    def successor_can_end(self) -> bool:
        """Return that none can: the image is undone here."""
        return False

    def clean_up(self, status: int | None) -> None:
        """Undo the container; then nobody wants the image any more."""
        try:
            super().clean_up(status)
        finally:
            self._end_server()
            if self.unpacking is not None:
                self.unpacking.remove()

    def _end_server(self) -> None:
        """The server ends with the last mount of its image: wait for that, so that none is left."""
        if self.server_fd >= 0:
            os.close(self.server_fd)
            self.server_fd = -1
        fd, self.server = self.server, -1
        if fd < 0:
            return
        if not _container.wait_pidfd(fd, _SERVER_END_MS):
            try:
                _container.pidfd_signal(fd, 9)
            except ProcessLookupError:
                pass
        os.close(fd)
        try:
            os.waitpid(self.server_pid, 0)
        except ChildProcessError:
            pass


def _is_address(word: str) -> bool:
    return bool(word) and all(c in "0123456789abcdefABCDEF.:%" for c in word)


def _host_file(path: str) -> bytes:
    try:
        return facts.read_file(path, _FILE_BYTES)
    except OSError:
        return b""


def _open_in(root: int, path: bytes, flags: int) -> int:
    return _starter.openat2(root, path, flags | os.O_CLOEXEC, _RESOLVE_IN_ROOT)


def _is_there(root: int, path: bytes) -> bool:
    try:
        os.close(_open_in(root, path.lstrip(b"/"), os.O_PATH))  # type: ignore[attr-defined,unused-ignore]
    except OSError:
        return False
    return True


def _file_in(root: int, path: bytes) -> bytes:
    """Return a file of the container, or nothing if it is none."""
    try:
        fd = _open_in(root, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return b""
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return b""
        return os.pread(fd, _FILE_BYTES, 0)
    except OSError:
        return b""
    finally:
        os.close(fd)
