"""`--unsquash`: the image becomes a directory for the time of one launch.

front ── sweeper: the sweeper removes the directory when the front and what it has started are gone,
whichever of them was killed; an instance's, when its keeper has ended. What a killed sweeper leaves
is not locked any more, and goes with the next such launch, unless it is a running instance's.

The launch judges the directory; the image is judged here, by its owner, group, path and signers.
As anybody may unpack it with other tools, `allow container dir = no` is what forbids directories.
"""

from __future__ import annotations

import os

from apptainer_py.base import log
from apptainer_py.base.errors import ApptainerError, LaunchError
from apptainer_py.base.files import own_directory, temporary_directory
from apptainer_py.cli import child as children
from apptainer_py.cli.table import PROGRAM

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import NoReturn

    from apptainer_py.image.detect import OpenImage
    from apptainer_py.model.request import ActionRequest
    from apptainer_py.runtime.instances import Instance

_SWITCHES = ("APPTAINER_UNSQUASH", "SINGULARITY_UNSQUASH")
_TOOLS = {"PATH": "/usr/bin:/bin", "LC_ALL": "C"}
_STOPPED = 127
_IN_ORDER = b"E"
_TRIES, _PAUSE_S = 100, 0.05


def start(action: ActionRequest, typed: Sequence[str], environ: Mapping[str, str]) -> int:
    """Unpack the image of a command line, start that directory, and return the status.

    Raises:
        ApptainerError: it cannot be unpacked.
    """
    from apptainer_py.base import build as facts

    # Behind the image come an instance's name and the arguments.
    place = len(typed) - len(action.arguments) - (2 if action.instance else 1)
    kept = {name: value for name, value in environ.items() if name not in _SWITCHES}
    launcher = f"{facts.BINDIR}/{PROGRAM}"

    def line(image: str) -> list[str]:
        # What was asked for is done: the launcher must not ask for it again.  Behind "--" there
        # are no options.
        end = place - 1 if place and typed[place - 1] == "--" else place
        words = [*typed[:end], "--unsquash=false", *typed[end:place]]
        return [launcher, *words, image, *typed[place + 1 :]]

    image = _image(action.image)
    if image is None:
        return os.execve(launcher, line(action.image), kept)
    folder = _Folder(environ, action.instance)
    stays = False
    try:
        image = _judged(image, folder.above, action)
        log.info("Converting SIF file to temporary sandbox...")
        _unpack(image, folder.root)
        status = folder.run(line(folder.root), kept)
        stays = bool(action.instance) and status == 0
        if not stays:
            log.info("Cleaning up image...")
        return status
    finally:
        folder.close(wait=not stays)


def _image(path: str) -> OpenImage | None:
    """Return a file with a squashfs; of everything else the launch itself says what it is."""
    from apptainer_py.image import detect

    try:
        image = detect.open_image(path)
    except ApptainerError:
        return None
    if image.kind in ("sif", "squashfs"):
        _tell_of_overlays(image)
        return image
    if image.kind == "ext3":
        log.warning(f"--unsquash does nothing for {path}, which is an ext3 image")
    os.close(image.fd)
    return None


def _tell_of_overlays(image: OpenImage) -> None:
    from apptainer_py.image import sif

    try:
        has_one = image.kind == "sif" and bool(sif.partitions(image.fd, sif.OVERLAY))
    except ApptainerError:
        return  # a damaged file, which is refused with its reason
    if has_one:
        log.warning(f"--unsquash leaves out the overlay partition of {image.path}")


class _Caller:
    """Whoever asks, in the flow that the launch will most likely have."""

    def __init__(self, *, userns: bool) -> None:
        from apptainer_py.base import build as facts
        from apptainer_py.kernel._starter import default_config, parse_config
        from apptainer_py.model import protocol

        self.flow = protocol.FLOW_ROOT
        if os.geteuid():
            setuid = not userns and os.access(facts.STARTER_SUID, os.X_OK)
            self.flow = protocol.FLOW_SETUID if setuid else protocol.FLOW_USERNS
        try:
            found = parse_config(facts.CONFIG_FILE, require_root_owned=False)
        except FileNotFoundError:
            found = default_config()
        self.configuration: Mapping[str, object] = found[0]


def _judged(image: OpenImage, folder: str, action: ActionRequest) -> OpenImage:
    """Return what may be unpacked.

    Where signatures count it is a copy, which nobody changes between the look and the use.
    """
    from apptainer_py.engines.apptainer import policy

    if policy.has_ecl() and image.kind == "sif":
        copy = _copy(image.fd, folder)
        os.close(image.fd)
        image = image.replace(fd=copy)
    policy.check_limits(_Caller(userns=action.userns), image)
    return image


def _copy(fd: int, folder: str) -> int:
    """Return a descriptor of a file without a name."""
    import tempfile

    try:
        with tempfile.TemporaryFile(dir=folder) as target:
            at = 0
            while count := os.sendfile(target.fileno(), fd, at, 1 << 30):
                at += count
            return os.dup(target.fileno())
    except OSError as error:
        reason = (error.strerror or "").lower()
        text = f"--unsquash: cannot copy the image, whose signature counts, to {folder}: {reason}"
        raise LaunchError(text=text) from None


def _unpack(image: OpenImage, root: str) -> None:
    import subprocess

    from apptainer_py.image import sif, squashfs

    offset = image.offset
    if image.kind == "sif":
        part = sif.primary_partition(image.fd)
        if part.fs != "squashfs":
            text = f"--unsquash: a root file system of the kind {part.fs} cannot be unpacked"
            raise LaunchError(text=text)
        offset = part.offset
    argv = [squashfs.find_tool("unsquashfs"), "-no-progress", "-quiet", "-o", str(offset)]
    argv += ["-no-xattrs"] if os.geteuid() else []
    try:
        done = subprocess.run(
            [*argv, "-d", root, f"/proc/self/fd/{image.fd}"],
            env=_TOOLS,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=(image.fd,),
            preexec_fn=lambda: squashfs.write_only_below(os.path.dirname(root)),
            check=False,
        )
    except subprocess.SubprocessError:
        raise LaunchError(text=f"--unsquash: {squashfs.UNFENCED}") from None
    os.close(image.fd)
    # 2: everything is there, but for owners or devices that this caller cannot make.
    if done.returncode not in (0, 2) or (done.returncode == 2 and os.geteuid() == 0):
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        reason = lines[-1] if lines else f"unsquashfs ended with status {done.returncode}"
        raise LaunchError(text=f"--unsquash: {reason}")


def _close_all_but(*kept: int) -> None:
    """Keep nothing of the caller's: who reads from a pipe waits for its end."""
    ends = sorted(kept)
    for low, high in zip(ends, [*ends[1:], os.sysconf("SC_OPEN_MAX")], strict=True):
        os.closerange(low + 1, high)


class _Folder:
    """A directory for one unpacked image, with the process that removes it."""

    def __init__(self, environ: Mapping[str, str], instance: str) -> None:
        import fcntl
        import tempfile

        self._instance, self._environ = instance, environ
        named = os.path.abspath(temporary_directory(environ))
        self.above = above = f"{named}/apptainer-py-unsquash-{os.geteuid()}"
        own_directory(above)
        self._above = os.open(above, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        # Nobody sees it before it is locked.
        fcntl.flock(self._above, fcntl.LOCK_EX)
        self._name = os.path.basename(tempfile.mkdtemp(prefix="rootfs-", dir=above))
        lock = os.open(self._name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._above)
        fcntl.flock(lock, fcntl.LOCK_EX)
        fcntl.flock(self._above, fcntl.LOCK_UN)
        self.root = f"{above}/{self._name}/root"
        reading, self._told = os.pipe()
        self._sweeper = os.fork()
        if self._sweeper == 0:
            os.close(self._told)
            self._sweep(reading, lock)
        os.close(reading)
        os.close(lock)

    def run(self, line: list[str], environ: Mapping[str, str]) -> int:
        """Start a program and take its place: its signals, its status."""
        child = os.fork()
        if child == 0:
            try:
                # Told by itself: whoever is killed, no container is without its directory.
                os.write(self._told, os.getpid().to_bytes(4, "little"))
                os.execve(line[0], line, dict(environ))
            finally:
                os._exit(_STOPPED)
        status = children.wait_for(child)
        if status >= 0:
            os.write(self._told, _IN_ORDER)
        return children.as_of_a_shell(status)

    def close(self, *, wait: bool) -> None:
        """Have the directory removed when it is used no more, and wait for that if asked."""
        os.close(self._told)
        if wait:
            os.waitpid(self._sweeper, 0)

    # -- the sweeper

    def _sweep(self, told: int, lock: int) -> NoReturn:
        import signal

        try:
            os.setsid()
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
                signal.signal(number, signal.SIG_IGN)
            null = os.open(os.devnull, os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(null, fd)
            os.chdir("/")
            _close_all_but(2, told, lock, self._above)
            self._sweep_others()
            self._wait(told)
            self._remove()
        finally:
            os._exit(0)

    def _wait(self, told: int) -> None:
        """Wait until nobody is left who could use the directory."""
        import select
        import signal

        number = os.read(told, 4)
        if len(number) == 4:
            try:
                handle = os.pidfd_open(int.from_bytes(number, "little"))
            except ProcessLookupError:
                return
            # Whoever was killed between the two, the container ends first.
            ready, _, _ = select.select([handle, told], [], [])
            if handle not in ready and not self._instance:
                # Its front was killed, which would have passed that on.
                signal.pidfd_send_signal(handle, signal.SIGKILL)
            select.select([handle], [], [])
            in_order = os.read(told, 1) == _IN_ORDER
            if self._instance:
                self._outlive(in_order=in_order)

    def _outlive(self, *, in_order: bool) -> None:
        """Wait for the instance's end: its keeper goes on when what has started it is gone."""
        import select
        import time

        from apptainer_py.runtime import instances

        owner = instances.owner_asked("", os.getuid(), self._environ)
        # Where the start was cut off, the keeper may be about to write its record.
        for _ in range(1 if in_order else _TRIES):
            found = instances.find(owner, self._instance)
            if found is not None and self._is_root_of(found):
                try:
                    handle = os.pidfd_open(found.ppid)
                except OSError:
                    return
                if instances.runs(found, owner):
                    select.select([handle], [], [])
                return
            time.sleep(0 if in_order else _PAUSE_S)

    def _is_root_of(self, instance: Instance) -> bool:
        return instance.image == os.path.realpath(self.root)

    def _remove(self) -> None:
        import time

        from apptainer_py.image.oci_layers import remove_tree

        for _ in range(_TRIES):
            try:
                remove_tree(self._above, os.fsencode(self._name))
                return
            except FileNotFoundError:
                return
            except OSError:
                # An unsquashfs whose front was killed is still writing: soon it has no directory.
                time.sleep(_PAUSE_S)

    def _sweep_others(self) -> None:
        from apptainer_py.image.oci_layers import remove_tree
        from apptainer_py.runtime import instances

        above = os.path.dirname(os.path.dirname(os.path.realpath(self.root)))
        used = {
            one.image
            for one in instances.every(instances.owner_asked("", os.getuid(), self._environ))
        }
        for name in os.listdir(self._above):
            if name == self._name or not name.startswith("rootfs-"):
                continue
            if f"{above}/{name}/root" in used:
                continue
            fd = self._lock_of_nobody(name)
            if fd >= 0:
                try:
                    remove_tree(self._above, os.fsencode(name))
                except OSError:
                    pass
                os.close(fd)

    def _lock_of_nobody(self, name: str) -> int:
        """Return a descriptor of a directory that nobody holds, -1 where somebody does."""
        import fcntl

        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        fcntl.flock(self._above, fcntl.LOCK_EX)
        fd = -1
        try:
            fd = os.open(name, flags, dir_fd=self._above)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if fd >= 0:
                os.close(fd)
            fd = -1
        finally:
            fcntl.flock(self._above, fcntl.LOCK_UN)
        return fd
