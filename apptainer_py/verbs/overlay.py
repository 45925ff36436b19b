"""`overlay create`: an ext3 image for what a container writes, as a file or inside a SIF file."""

from __future__ import annotations

import os
import time

from apptainer_py.base import held
from apptainer_py.base.errors import ApptainerError
from apptainer_py.base.files import give_name, open_nameless
from apptainer_py.base.record import Record
from apptainer_py.image import detect, sif, sif_edit, squashfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

SMALLEST_MIB = 64
_LARGEST_MIB = 16 << 20  # what ext3 can have with its blocks of 4 KiB
_MIB = 1 << 20
_MODE = 0o600
_PREFIX = "apptainer-py-overlay-"
_NAME_CHARACTERS = 50  # of a directory's name, four bytes each at most
_TOOLS = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}


class CannotCreate(ApptainerError):
    message = "{reason}"


class Wanted(Record):
    """The options: a size in MiB, directories below `upper`; `for_root` makes all of it root's."""

    size_mib: int = SMALLEST_MIB
    folders: tuple[str, ...] = ()
    sparse: bool = False
    for_root: bool = False


class _Base(Record):
    architecture: str
    group: int


def overlay_create(path: str, wanted: Wanted) -> None:
    """Make an overlay image, or add one to a SIF file; whoever is killed midway changes nothing.

    Raises:
        CannotCreate: there is one already, or it cannot be made.
    """
    if wanted.size_mib < SMALLEST_MIB:
        raise _failed(f"image size must be equal or greater than {SMALLEST_MIB} MiB")
    if wanted.size_mib > _LARGEST_MIB:
        raise _failed(f"image size must be equal or less than {_LARGEST_MIB} MiB")
    folders = _folders(wanted.folders)
    base = _check_target(path)
    above, name = os.path.split(os.path.abspath(path))
    import tempfile

    try:
        with (
            held.Directory(tempfile.gettempdir(), _PREFIX) as tree,
            _Nameless(above, name) as image,
        ):
            _make(image.fd, tree, folders, wanted)
            if base is None:
                # Not by rename: what has come to be there meanwhile is not lost.
                give_name(image.fd, image.folder, name)
            else:
                _append(image.fd, path)
    except FileExistsError:
        raise _failed(f"EXT3 overlay image {path} already exists") from None
    except OSError as error:
        raise _failed(f"{path}: {(error.strerror or '').lower()}") from None


class _Nameless:
    """A file beside its target that nobody sees, and that goes with a command that is killed.

    Where the file system has none without a name, it is in a directory that the next one removes.
    """

    def __init__(self, above: str, name: str) -> None:
        self._place: held.Directory | None = None
        self.fd = -1
        self.folder = os.open(above, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._open(above, name)
        except BaseException:
            self.__exit__()
            raise

    def _open(self, above: str, name: str) -> None:
        try:
            self.fd = open_nameless(self.folder, os.O_RDWR, _MODE)
        except OSError:
            self._place = held.Directory(above, f".{name[:_NAME_CHARACTERS]}.{_PREFIX}")
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self.fd = os.open(f"{self._place.path}/image", flags, _MODE)

    def __enter__(self) -> _Nameless:
        return self

    def __exit__(self, *_: object) -> None:
        # First: what is open when it is removed stays on such file systems, under another name.
        if self.fd >= 0:
            os.close(self.fd)
        if self._place is not None:
            self._place.__exit__()
        os.close(self.folder)


def _failed(reason: str) -> CannotCreate:
    return CannotCreate(reason=reason)


def _folders(words: Sequence[str]) -> list[str]:
    found = []
    for word in words:
        parts = [part for part in word.split("/") if part not in ("", ".")]
        if ".." in parts or not parts or not all(len(os.fsencode(p)) < 256 for p in parts):
            raise _failed(f"overlay directory {word!r} created outside of overlay layout")
        found.append("/".join(parts))
    return found


def _check_target(path: str) -> _Base | None:
    """Return what a SIF file that can be given an overlay has; None: it will be a new file."""
    if not os.path.lexists(path):
        return None
    try:
        image = detect.open_image(path)
    except ApptainerError as error:
        reason = str(error.facts.get("reason", error))
        raise _failed(f"while opening image file {path}: {reason}") from None
    try:
        if image.kind == "ext3":
            raise _failed(f"EXT3 overlay image {path} already exists")
        if image.kind != "sif":
            raise _failed("destination image must be SIF image")
        return _check_sif(image.fd, path)
    except ApptainerError as error:
        if isinstance(error, CannotCreate):
            raise
        raise _failed(f"{path}: {error.facts.get('reason', error)}") from None
    finally:
        os.close(image.fd)


def _check_sif(fd: int, path: str) -> _Base:
    entries = sif.read_descriptors(fd)
    if any(entry.data_type == sif.SIGNATURE for entry in entries):
        raise _failed(f"SIF image {path} is signed: could not add writable overlay")
    for entry in entries:
        if entry.data_type == sif.PARTITION and sif.partition_facts(entry)[1] == sif.OVERLAY:
            raise _failed(
                f"a writable overlay partition already exists in {path} (ID: {entry.id}), delete "
                f'it first with "apptainer-py sif del {entry.id} {path}"'
            )
    for entry in entries:
        if entry.data_type != sif.PARTITION:
            continue
        fs, part_type, architecture = sif.partition_facts(entry)
        if part_type == sif.PRIMARY_SYSTEM:
            if fs not in (sif.SQUASHFS, sif.EXT3):
                raise _failed(f"SIF image {path} is encrypted: could not add writable overlay")
            return _Base(architecture=architecture, group=entry.group)
    raise _failed(f"SIF image {path} has no root file system")


def _make(fd: int, tree: str, folders: Sequence[str], wanted: Wanted) -> None:
    for name in ("upper", "work", *(f"upper/{folder}" for folder in folders)):
        os.makedirs(os.path.join(tree, name), mode=0o755, exist_ok=True)
    for folder, _, _ in os.walk(tree):
        os.chmod(folder, 0o755)
    os.ftruncate(fd, wanted.size_mib * _MIB)
    _run(["mke2fs", "-q", "-F", "-t", "ext3", "-d", tree], fd)
    if wanted.for_root:
        _run(["debugfs", "-w", "-f", _ownership(tree)], fd)
    if not wanted.sparse:
        os.posix_fallocate(fd, 0, wanted.size_mib * _MIB)
    os.fsync(fd)


def _ownership(tree: str) -> str:
    """Return a file of debugfs(8)'s commands that make everything root's."""
    lines = []
    for folder, _, _ in os.walk(tree):
        inside = folder.removeprefix(tree) or "/"
        name = inside.replace("\\", "\\\\").replace('"', '\\"')
        lines += [f'set_inode_field "{name}" {field} 0\n' for field in ("uid", "gid")]
    path = f"{tree}/commands"
    with open(path, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.writelines(lines)
    return path


def _run(argv: list[str], fd: int) -> None:
    """Run a tool whose last word is the open image."""
    import subprocess

    program = squashfs.find_tool(argv[0], folders=_TOOLS["PATH"].split(":"))
    done = subprocess.run(
        [program, *argv[1:], f"/proc/self/fd/{fd}"],
        env=_TOOLS,
        pass_fds=(fd,),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise _failed(f"while creating ext3 filesystem: {lines[-1] if lines else argv[0]}")


def _append(source: int, path: str) -> None:
    fd = sif_edit.open_to_change(path)
    try:
        # Somebody may have added one, or a signature, since it was looked at.
        base = _check_sif(fd, path)
        new = sif_edit.NewObject(
            data_type=sif.PARTITION,
            source=source,
            group=base.group,
            extra=sif_edit.partition_extra(sif.EXT3, sif.OVERLAY, base.architecture),
            alignment=sif_edit.PARTITION_ALIGNMENT,
        )
        sif_edit.add(fd, (new,), now_s=int(time.time()))
    finally:
        os.close(fd)
