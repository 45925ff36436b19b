"""`create_container`: carries the plan out; every mount is an operation of the mounting process.

The session directory, a memory file system of the user's own, is filled through a descriptor and
needs no privilege. It holds what the mounts need: directories for targets that the image lacks
(`lower`, which lies under the image in the overlay), generated files, and empty directories.
"""

from __future__ import annotations

import errno
import os
import stat

from apptainer_py.base import log
from apptainer_py.base.errors import LaunchError, is_gone
from apptainer_py.base.files import read_at_most, write_all
from apptainer_py.engines.apptainer import accounts, lean, places
from apptainer_py.kernel import _starter
from apptainer_py.model import protocol
from apptainer_py.model.plan import Mount
from apptainer_py.runtime.mounting import MOUNTS, StarterGone, StarterRefused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from apptainer_py.engines.apptainer.prepare import Prepared
    from apptainer_py.runtime.contexts import CreateContext
    from apptainer_py.runtime.janitor import Janitor
    from apptainer_py.runtime.mounting import Mounting

# linux/openat2.h
_IN_ROOT, _NO_MAGICLINKS = 0x10, 0x02
_RESOLVE = _IN_ROOT | _NO_MAGICLINKS


class TargetMissing(LaunchError):
    """A mount that was asked for cannot be made."""

    message = (
        "container creation failed: mount hook function failure: {what}: while mounting {source}: "
        "{reason}"
    )
    hint = "{way_out}"


def create(context: CreateContext, prepared: Prepared) -> None:
    """Put the container together; ends with the change of the root."""
    Creation(context, prepared).run()


class Creation:
    """One container on its way."""

    def __init__(self, context: CreateContext, prepared: Prepared) -> None:
        self.context = context
        self.mounting: Mounting = context.mounting
        self.prepared = prepared
        self.session = -1
        self.root = -1
        self.root_path = b""
        self.final = -1
        self.underlay: set[bytes] = set()
        # Targets that could not be made in what another mount shows, and why.
        self.unmade: dict[str, OSError] = {}

    def run(self) -> None:
        """Do the steps in their order (facts §6.3)."""
        self.session = self.mounting.session(self.prepared.session_mib)
        self.mount_root()
        if self.prepared.service is not None:
            self.prepared.service.read_labels(self.read_image_file)
        if self.prepared.shown:
            from apptainer_py.engines.apptainer import layering

            layering.show(self)
        self.stage_files()
        self.stage_targets()
        self.put_layer()
        try:
            self.do_mounts()
        except StarterRefused as error:
            raise self.mount_failed(error) from None
        if self.prepared.hostname:
            self.mounting.hostname(self.prepared.hostname)
        if self.prepared.networks is not None:
            self.join_networks()
        if self.prepared.rank is not None:
            from apptainer_py.engines.apptainer import mpi_fit

            self.mounting.settle()
            mpi_fit.warn(self.final, self.prepared.rank, self.prepared.program)
        if self.prepared.limits is not None:
            self.limit()
        if self.prepared.meeting is not None:
            self.prepared.meeting.mounts = self.mounting.space(MOUNTS)
        self.change_root()
        for fd in (self.session, self.root, self.final):
            os.close(fd)
        os.close(self.prepared.image.fd)

    def change_root(self) -> None:
        """Change it; a lean stage 2 then becomes the payload, which is judged meanwhile."""
        message = self.prepared.payload
        if message is None:
            self.mounting.pivot()
            return
        view = lean.view_of(self.final, self.context.bearer, message)
        self.mounting.begin_pivot()
        try:
            wanted = lean.judge(view, message)
            self.mounting.settle()
            lean.start(view, wanted, message)
        except BaseException as error:
            bearer = self.context.bearer
            ended = bearer.has_ended()
            # Whoever mounts ends with its channel, and stage 2 waits for that.
            self.mounting.close()
            bearer.dismiss()
            # Without it the container's mounts are gone, and nothing is found any more.
            if ended and isinstance(error, LaunchError):
                raise StarterGone(what="cannot start the payload") from None
            raise

    def janitor(self) -> Janitor:
        """Return the process that undoes things in the end, started where it is first needed."""
        if self.prepared.janitor is None:
            self.prepared.janitor = self.mounting.janitor()
        return self.prepared.janitor

    def join_networks(self) -> None:
        """Connect the container as the administrator's networks say."""
        from apptainer_py.engines.apptainer import network

        assert self.prepared.networks is not None
        self.mounting.settle()
        if isinstance(self.prepared.networks, network.Networks):
            network.join(self.prepared.networks, self.mounting, self.janitor)
            if self.prepared.service is not None:
                self.prepared.service.address = self.prepared.networks.address
        else:
            self.prepared.networks.connect(self.mounting)

    def limit(self) -> None:
        """Put the container into control groups, which the janitor removes in the end."""
        from apptainer_py.engines.apptainer import limits

        prepared = self.prepared
        assert prepared.limits is not None
        self.mounting.settle()
        if prepared.limits.rootless:
            limits.apply(prepared.limits, self.mounting.container_pid, None, shim=prepared.shim)
            return
        janitor = self.janitor()
        limits.apply(prepared.limits, janitor.container_pid, janitor, shim=prepared.shim)

    # ---- the image ----

    def mount_root(self) -> None:
        """Mount the image: served, by the kernel, or as the directory that it is."""
        prepared, image = self.prepared, self.prepared.image
        if image.kind == "sandbox":
            flags = protocol.BINDFLAG_READ_ONLY if prepared.read_only_root else 0
            self.root = self.mounting.root_directory(
                image.realpath, image.dev, image.ino, flags, prepared.what
            )
        elif prepared.root_fs == "ext3":
            from apptainer_py.engines.apptainer import layering

            self.root = layering.root_extfs(self)
        elif prepared.host_root:
            from apptainer_py.engines.apptainer import host_image

            self.root = host_image.take(self.mounting, prepared)
        elif prepared.fuse:
            self.root = self.mounting.root_fuse(0, prepared.what)
            self.mounting.serve_image(0, prepared.root_fd, prepared.offset, prepared.what)
        else:
            facts = (image.dev, image.ino, prepared.offset, prepared.size_bytes)
            self.root = self.mounting.root_squashfs(image.realpath, facts, prepared.what)
        self.root_path = os.readlink(b"/proc/self/fd/%d" % self.root)

    @staticmethod
    def check_served(error: OSError) -> None:
        """Raise an error that says nothing about the image but that nobody serves it any more."""
        if is_gone(error.errno):
            raise error

    # ---- the session directory ----

    def stage_files(self) -> None:
        """Make what the plan wants to find in the session directory."""
        for kind, name, content, mode in self.prepared.staged:
            if kind == "directory":
                os.mkdir(name, mode, dir_fd=self.session)
                os.chmod(name, mode, dir_fd=self.session)
            elif kind == "link":
                os.symlink(content, name, dir_fd=self.session)
            else:
                assert isinstance(content, bytes)
                self.write_file(name, content, mode)

    def write_file(self, name: str, content: bytes, mode: int) -> None:
        """Write a new file of the session directory."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(name, flags, 0o600, dir_fd=self.session)
            write_all(fd, content)
            os.chmod(name, mode, dir_fd=self.session)
        except OSError as error:
            raise self.session_full(error) from None

    def session_full(self, error: OSError) -> LaunchError:
        """Return the exception for a session directory that takes no more."""
        text = f"the session directory cannot hold the container's own files: {error.strerror}"
        if error.errno == errno.ENOSPC:
            text += "; the administrator sets its size with `sessiondir max size`"
        return LaunchError(text=text)

    def read_image_file(self, path: str) -> bytes | None:
        """Read a small regular file of the image; None where there is no such file."""
        try:
            fd = _starter.openat2(
                self.root, os.fsencode(path), os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY, _RESOLVE
            )
        except OSError as error:
            self.check_served(error)
            return None
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            return None
        content = read_at_most(fd, accounts.FILE_BYTES + 1)
        return content if len(content) <= accounts.FILE_BYTES else None

    def stage_accounts(self) -> None:
        """Write /etc/passwd and /etc/group with the user in them, and plan their mounts."""
        configuration = self.context.facts.configuration
        # Root changes these files itself, which a mount of one would not let it replace.
        layer_of_ours = self.prepared.layer == protocol.LAYERKIND_OVERLAY_TMPFS
        writable = self.prepared.writable_root or layer_of_ours
        if writable and self.prepared.user.uid == 0:
            return
        for name, make in (("passwd", accounts.passwd), ("group", accounts.group)):
            if not configuration[f"config {name}"]:
                continue
            before = self.read_image_file(f"/etc/{name}")
            if before is None:
                log.warning(f"{name} file doesn't exist in container, not updating")
                continue
            self.write_file(f"files/{name}", make(before, self.prepared.user), 0o644)
            self.add_file_mount(f"/files/{name}", f"/etc/{name}")

    def add_file_mount(self, source: str, target: str) -> None:
        """Plan a mount of a generated file, behind the other generated files."""
        mount = Mount(
            kind="bind", source=source, target=target, tag="files", create="file",
            area=protocol.AREA_SESSION, flags=0,
        )  # fmt: skip
        mounts = self.prepared.mounts
        after = [n for n, other in enumerate(mounts) if other.tag in ("userbinds", "cwd")]
        mounts.insert(after[0] if after else len(mounts), mount)

    # ---- targets that the image lacks ----

    def stage_targets(self) -> None:
        """Make every missing target in the layer, where the image has no entry of that name."""
        if self.prepared.layer == protocol.LAYERKIND_NONE:
            self.stage_above_home()
            return
        for mount in self.prepared.mounts:
            place = self.missing_place(os.fsencode(mount.target))
            if place is not None and mount.create:
                self.make_target(place, mount.create)
        for text, path in self.prepared.links:
            place = self.missing_place(os.fsencode(path))
            if place is not None:
                self.make_target(place, "link", os.fsencode(text))

    def stage_above_home(self) -> None:
        """Without a layer: cover the directory above a home that the image lacks."""
        mounts = self.prepared.mounts
        at = next((n for n, mount in enumerate(mounts) if mount.tag == "home"), None)
        place = None if at is None else self.missing_place(os.fsencode(mounts[at].target))
        if at is None or place is None:
            return
        parts = place.strip(b"/").split(b"/")
        there = 0
        while there < len(parts) and self.is_directory(b"/".join(parts[: there + 1])):
            there += 1
        if there == 0:
            return
        path = b"above-home"
        os.mkdir(path, 0o755, dir_fd=self.session)
        for part in parts[there:]:
            path += b"/" + part
            os.mkdir(path, 0o755, dir_fd=self.session)
        above = Mount(
            kind="bind", source="/above-home", target=os.fsdecode(b"/" + b"/".join(parts[:there])),
            tag="home", area=protocol.AREA_SESSION,
        )  # fmt: skip
        mounts.insert(at, above)

    def is_directory(self, path: bytes) -> bool:
        """Return whether the image has a directory, not a link, at a path without links."""
        try:
            return stat.S_ISDIR(os.lstat(path, dir_fd=self.root).st_mode)
        except OSError:
            return False

    def missing_place(self, target: bytes) -> bytes | None:
        """Return where a target belongs, with the image's links resolved; None if it is there."""
        rest: list[bytes] = []
        here = target
        while True:
            try:
                fd = _starter.openat2(self.root, here, os.O_PATH, _RESOLVE)
            except OSError as error:
                self.check_served(error)
                here, _, name = here.rpartition(b"/")
                rest.insert(0, name)
                if not here:
                    return b"/" + b"/".join(rest)
                continue
            try:
                if not rest:
                    return None
                if not stat.S_ISDIR(os.fstat(fd).st_mode):
                    return None
                resolved = os.readlink(b"/proc/self/fd/%d" % fd)
            finally:
                os.close(fd)
            if not resolved.startswith(self.root_path):
                return None
            return resolved[len(self.root_path) :].rstrip(b"/") + b"/" + b"/".join(rest)

    def make_target(self, place: bytes, kind: str, text: bytes = b"") -> None:
        """Make a directory, an empty file or a link in the layer, and the directories above it."""
        top = b"underlay" if self.prepared.layer == protocol.LAYERKIND_UNDERLAY else b"lower"
        parts = place.strip(b"/").split(b"/")
        try:
            for depth in range(1, len(parts)):
                self.make_directory(top, b"/".join(parts[:depth]))
            name = top + b"/" + b"/".join(parts)
            if kind == "directory":
                os.mkdir(name, 0o755, dir_fd=self.session)
            elif kind == "link":
                os.symlink(text, name, dir_fd=self.session)
            else:
                flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
                os.close(os.open(name, flags, 0o644, dir_fd=self.session))
        except FileExistsError:
            pass
        except OSError as error:
            raise self.session_full(error) from None
        self.underlay.update(b"/".join(parts[:depth]) for depth in range(len(parts)))

    def make_directory(self, top: bytes, path: bytes) -> None:
        """Make one directory of the layer; it shows the mode of the image's own, if it has one."""
        mode = 0o755
        try:
            mode = stat.S_IMODE(os.stat(path, dir_fd=self.root, follow_symlinks=False).st_mode)
        except OSError:
            pass
        try:
            os.mkdir(top + b"/" + path, 0o700, dir_fd=self.session)
        except FileExistsError:
            return
        os.chmod(top + b"/" + path, mode | 0o500, dir_fd=self.session)

    # ---- the layer ----

    def put_layer(self) -> None:
        """Put the layer over the image; where the kernel has no overlay for it, an underlay."""
        kind = self.prepared.layer
        if kind == protocol.LAYERKIND_UNDERLAY:
            self.build_underlay()
        try:
            self.mounting.begin_layer(kind)
            self.stage_accounts()  # meanwhile: they need no target, being mounted over files
            self.final = self.mounting.take()
            return
        except StarterRefused as error:
            if self.prepared.shown:
                from apptainer_py.engines.apptainer import layering

                raise layering.failed(self, error) from None
            if kind != protocol.LAYERKIND_OVERLAY or not self.prepared.underlay_allowed:
                raise
            log.verbose(f"no overlay here ({error}); using an underlay")
        self.prepared.layer = protocol.LAYERKIND_UNDERLAY
        self.stage_targets()
        self.build_underlay()
        self.mounting.begin_layer(protocol.LAYERKIND_UNDERLAY)
        self.final = self.mounting.take()

    def build_underlay(self) -> None:
        """Show each entry of the image again beside the targets made for mounts."""
        for directory in sorted(self.underlay | {b""}):
            try:
                fd = _starter.openat2(
                    self.root, directory or b".", os.O_RDONLY | os.O_DIRECTORY, _RESOLVE
                )
            except OSError:
                continue
            try:
                for entry in os.scandir(fd):
                    self.show_entry(directory, os.fsencode(entry.name), entry)
            except OSError as error:
                raise LaunchError(
                    text=f"container creation failed: /{os.fsdecode(directory)} of the image "
                    f"cannot be read: {(error.strerror or '').lower()}"
                ) from None
            finally:
                os.close(fd)
        self.mounting.settle()

    def show_entry(self, directory: bytes, name: bytes, entry: os.DirEntry[str]) -> None:
        """Show one entry: a link is made again, anything else is bound."""
        path = directory + b"/" + name if directory else name
        if path in self.underlay:
            return
        target = b"underlay/" + path
        try:
            if entry.is_symlink():
                link = os.readlink(os.fsencode(entry.name), dir_fd=self.opened(directory))
                os.symlink(link, target, dir_fd=self.session)
                return
            if entry.is_dir(follow_symlinks=False):
                os.mkdir(target, 0o755, dir_fd=self.session)
            else:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                os.close(os.open(target, flags, 0o644, dir_fd=self.session))
        except FileExistsError:
            return
        self.mounting.underlay_bind(b"/" + path, b"/" + path)

    def opened(self, directory: bytes) -> int:
        """Return a descriptor of a directory of the image, closed by the interpreter's end."""
        return _starter.openat2(self.root, directory or b".", os.O_PATH, _RESOLVE)

    # ---- the mounts ----

    def do_mounts(self) -> None:
        """Carry out the mount plan; what is not required is left out with a warning."""
        mounts = self.prepared.mounts
        for at, mount in enumerate(mounts):
            if mount.tag == "cwd":
                self.mounting.settle()
                if self.is_there(mount.target):
                    continue
            elif mount.tag == "tmp" and mount.target == "/var/tmp" and self.is_tmp(mount.target):
                continue
            elif mount.required and places.above(mounts, at):
                problem = places.make(mounts, at, self.session)
                if problem is not None:
                    self.unmade[mount.target] = problem
            if self.prepared.fuses and mount.kind == "fuse":
                what = f"mount {mount.source}->{mount.target} error"
                self.prepared.fuses.serve(self, mount.options, what)
                continue
            self.mounting.mount(mount, None if mount.required else self.skip(mount))
        self.mounting.settle()

    def mount_failed(self, error: StarterRefused) -> LaunchError:
        """Return what to tell the user about a required mount that failed."""
        what, code, number = (error.facts[name] for name in ("what", "code", "errno"))
        for at, mount in enumerate(self.prepared.mounts):
            if what != f"mount {mount.source}->{mount.target} error":
                continue
            way_out = ""
            reason = f"could not mount {mount.source}: {os.strerror(int(str(number))).lower()}"
            if code == protocol.ERR_TARGET and number in (errno.ENOTDIR, errno.EISDIR):
                reason = f"could not mount {mount.source}: not a directory"
            elif code == protocol.ERR_TARGET:
                reason = f"destination {mount.target} doesn't exist in container"
                why = self.unmade.get(mount.target)
                way_out = places.advice(self.prepared.mounts, at, why)
                if self.prepared.writable_root:
                    log.warning(
                        f"By using --writable, Apptainer can't create {mount.target} destination "
                        "automatically without overlay or underlay"
                    )
            return TargetMissing(what=what, source=mount.source, reason=reason, way_out=way_out)
        return error

    def is_tmp(self, path: str) -> bool:
        """Return whether a path of the image leads to its /tmp, which the host's /tmp covers."""
        found = []
        for name in (b"tmp", os.fsencode(path)):
            try:
                fd = _starter.openat2(self.root, name, os.O_PATH, _RESOLVE)
            except OSError:
                return False
            found.append(os.fstat(fd))
            os.close(fd)
        return os.path.samestat(*found)

    def is_there(self, path: str) -> bool:
        """Return whether the container shows the host's own directory at that path already."""
        try:
            fd = _starter.openat2(self.final, os.fsencode(path), os.O_PATH, _RESOLVE)
        except OSError:
            return False
        try:
            return os.path.samestat(os.fstat(fd), os.stat(path))
        except OSError:
            return True
        finally:
            os.close(fd)

    def skip(self, mount: Mount) -> Callable[[int, int], None]:
        """Return what to do when an optional mount fails."""

        def warn(code: int, error: int) -> None:
            reason = os.strerror(error).lower() if error else protocol.ERR_TEXTS[code]
            self.check_served(OSError(error, reason))
            if code == protocol.ERR_TARGET:
                text = (
                    f"Skipping mount {mount.source} [{mount.tag}]: {mount.target} doesn't exist in "
                    "container"
                )
            else:
                text = f"Skipping mount {mount.source} [{mount.tag}]: {reason}"
            (log.verbose if mount.quiet or mount.tag == "cwd" else log.warning)(text)

        return warn
