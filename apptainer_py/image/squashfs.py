"""Squashfs: the facts of a superblock, and packing a tree with mksquashfs."""

from __future__ import annotations

import os
import struct

from apptainer_py.base.errors import ApptainerError, ImageError
from apptainer_py.base.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Sequence

MAGIC = b"hsqs"
SUPERBLOCK_BYTES = 96
COMPRESSIONS = {1: "gzip", 2: "lzma", 3: "lzo", 4: "xz", 5: "lz4", 6: "zstd"}

_SUPERBLOCK = struct.Struct("<4sIIIIHHHHHHQQ")
_TOOL_FOLDERS = ("/usr/local/bin", "/usr/local/sbin", "/usr/bin", "/usr/sbin", "/bin", "/sbin")
_PIPE_BYTES = 1 << 20
_LIST_LIMIT_BYTES = 4 << 20
_NEWNS, _NEWUSER = 0x00020000, 0x10000000
_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 0x40000
_AT_FDCWD, _AT_RECURSIVE, _ATTR_RDONLY = -100, 0x8000, 1
_LEVELS = {"gzip": range(1, 10), "zstd": range(1, 23)}

# mksquashfs compares each file with all others of its size: what that takes grows with the square.
# For so many it is some seconds.
ALIKE_MOST = 20_000

# What a launch reads before its program runs; small, and apart from others it is read without them.
_AS_IT_IS = "pathname(etc/passwd)||pathname(etc/group)||subpathname(.singularity.d)"


class ToolMissing(ApptainerError):
    """squashfs-tools is not installed."""

    message = "{program} was not found in {folders}"
    hint = "install squashfs-tools"


class PackFailed(ApptainerError):
    """mksquashfs ended with an error."""

    message = "mksquashfs could not pack {tree}: {reason}"


class ReadFailed(ApptainerError):
    """unsquashfs ended with an error, or gave more than was allowed."""

    message = "unsquashfs could not read the image: {reason}"


class Superblock(Record):
    """What the first bytes of a squashfs say about it; none of it is verified further."""

    compression: str
    block_size_bytes: int
    used_bytes: int
    inodes: int
    made_s: int
    version: tuple[int, int]


class Packing(Record):
    """How to make a squashfs; `memory` is in the form of mksquashfs (`512M`).

    With `epoch`, in seconds since 1970, no time stamp in the file is younger. With `quick_start`,
    what a launch reads before its program runs is not compressed: inodes, folders, small files; the
    rest of it is `squashfs_start`'s. Without `compare`, files of the same content are packed twice.
    """

    compression: str = "zstd"
    level: int | None = 7
    block_size_bytes: int = 131072
    quick_start: bool = True
    all_root: bool = True
    compare: bool = True
    epoch: int | None = None
    processors: int | None = None
    memory: str | None = None
    program: str | None = None
    more_options: tuple[str, ...] = ()


def parse_superblock(data: bytes, *, image: str) -> Superblock:
    """Return the facts in the first 96 bytes of a squashfs file system.

    Raises:
        ImageError: no squashfs, or of a version or compression that nothing here can read.
    """
    if len(data) < SUPERBLOCK_BYTES or data[:4] != MAGIC:
        raise ImageError(
            image=image, reason="while parsing squashfs super block: not a valid squashfs image"
        )
    (_, inodes, made_s, block, _, compression, block_log, _, _, major, minor, _, used) = (
        _SUPERBLOCK.unpack_from(data)
    )
    if major != 4:
        raise ImageError(image=image, reason=f"squashfs version {major}.{minor} is not supported")
    if compression not in COMPRESSIONS:
        raise ImageError(
            image=image,
            reason=f"corrupted image: unknown compression algorithm value {compression}",
        )
    if not 12 <= block_log <= 20 or block != 1 << block_log:
        raise ImageError(image=image, reason="corrupted image: impossible squashfs block size")
    if used < SUPERBLOCK_BYTES:
        raise ImageError(image=image, reason="corrupted image: impossible squashfs size")
    return Superblock(
        compression=COMPRESSIONS[compression],
        block_size_bytes=block,
        used_bytes=used,
        inodes=inodes,
        made_s=made_s,
        version=(major, minor),
    )


def read_superblock(fd: int, offset: int, *, image: str) -> Superblock:
    """Return the facts of the squashfs that starts `offset` bytes into a file.

    Raises:
        ImageError: as `parse_superblock`, or the file ends first.
    """
    return parse_superblock(os.pread(fd, SUPERBLOCK_BYTES, offset), image=image)


def find_tool(program: str, *, folders: Sequence[str] = _TOOL_FOLDERS) -> str:
    """Return the absolute path of one of the squashfs tools.

    Raises:
        ToolMissing: no folder has it.
    """
    for folder in folders:
        path = f"{folder}/{program}"
        if os.access(path, os.X_OK):
            return path
    raise ToolMissing(program=program, folders=":".join(folders))


def pack(
    tree: str,
    target: str,
    how: Packing | None = None,
    *,
    meanwhile: Callable[[], None] | None = None,
) -> Superblock:
    """Make a squashfs file of a directory tree and return its facts; an old target is replaced.

    What only reads the tree can be done `meanwhile`.

    Raises:
        ToolMissing: no mksquashfs.
        PackFailed: mksquashfs said no, or died.
    """
    how = how or Packing()
    child = _start(tree, target, how)
    try:
        # It is still scanning the tree by then.
        if how.compare and too_many_alike(tree):
            _end(child)
            child = _start(tree, target, how.replace(compare=False))
        if meanwhile is not None:
            meanwhile()
        _, said = child.communicate()
    finally:
        _end(child)
    if child.returncode != 0:
        raise PackFailed(tree=tree, reason=_last_line(said, child.returncode))
    fd = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return read_superblock(fd, 0, image=target)
    finally:
        os.close(fd)


def _start(tree: str, target: str, how: Packing) -> subprocess.Popen[bytes]:
    import subprocess

    argv = [how.program or find_tool("mksquashfs"), tree, target, *_options(how), *_actions(how)]
    return subprocess.Popen(
        argv,
        env=_environment(how),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def _end(child: subprocess.Popen[bytes]) -> None:
    """End it, if it has not ended."""
    child.kill()
    child.wait()
    if child.stderr:
        child.stderr.close()


def too_many_alike(tree: str, most: int = ALIKE_MOST) -> bool:
    """Return whether more files of a tree than `most` are of one size, and not empty."""
    folders, files, left = [], 0, [tree]
    while left:
        folder = left.pop()
        try:
            with os.scandir(folder) as entries:
                kinds = [(entry.is_dir(follow_symlinks=False), entry.name) for entry in entries]
        except OSError:
            continue  # what cannot be read is mksquashfs's to tell
        folders.append(folder)
        below = [f"{folder}/{name}" for is_folder, name in kinds if is_folder]
        files += len(kinds) - len(below)
        left += below
    # Only to look at each of them takes long.
    return files > most and _most_of_one_size(folders) > most


def _most_of_one_size(folders: Sequence[str]) -> int:
    seen: dict[int, int] = {}
    for folder in folders:
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_file(follow_symlinks=False):
                        size = entry.stat(follow_symlinks=False).st_size
                        seen[size] = seen.get(size, 0) + 1
        except OSError:
            continue
    return max((count for size, count in seen.items() if size), default=0)


def _options(how: Packing) -> list[str]:
    options = ["-noappend", "-no-progress", "-quiet", "-comp", how.compression]
    options += ["-b", str(how.block_size_bytes)]
    if how.level is not None and how.level in _LEVELS.get(how.compression, ()):
        options += ["-Xcompression-level", str(how.level)]
    if how.quick_start:
        options.append("-noI")
    if how.all_root:
        options.append("-all-root")
    if not how.compare:
        options.append("-no-duplicates")
    if how.processors:
        options += ["-processors", str(how.processors)]
    if how.memory:
        options += ["-mem", how.memory]
    return [*options, *how.more_options]


def _actions(how: Packing) -> list[str]:
    words = ("uncompressed", "no-fragments") if how.quick_start else ()
    return [part for what in words for part in ("-action", f"{what}@{_AS_IT_IS}")]


def _environment(how: Packing) -> dict[str, str]:
    environment = {"PATH": ":".join(_TOOL_FOLDERS), "LC_ALL": "C"}
    if how.epoch is not None:
        environment["SOURCE_DATE_EPOCH"] = str(how.epoch)
    return environment


class StreamPacker:
    """mksquashfs on a tar stream; its root directory is root's, with the mode 0755."""

    def __init__(self, target: str, how: Packing) -> None:
        import subprocess
        import tempfile

        self._target = target
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 closed in the end
        argv = [how.program or find_tool("mksquashfs"), "-", target, *_options(how)]
        argv += ["-tar", "-exports", "-root-mode", "755", "-root-uid", "0", "-root-gid", "0"]
        self._child = subprocess.Popen(
            argv,
            env=_environment(how),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            bufsize=0,
        )
        assert self._child.stdin is not None
        self._end = self._child.stdin.fileno()
        _widen(self._end)

    def write(self, data: bytes) -> None:
        """Give it the next part of the stream.

        Raises:
            PackFailed: it has ended.
        """
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._end, rest) :]
        except BrokenPipeError:
            raise self._failed() from None

    def finish(self) -> None:
        """Wait until the file is there.

        Raises:
            PackFailed: mksquashfs said no, or died.
        """
        assert self._child.stdin is not None
        self._child.stdin.close()
        if self._child.wait() != 0:
            raise self._failed()
        self._errors.close()

    def abandon(self) -> None:
        """End it, and take away what it has made."""
        assert self._child.stdin is not None
        self._child.kill()
        self._child.wait()
        self._child.stdin.close()
        self._errors.close()
        try:
            os.unlink(self._target)
        except FileNotFoundError:
            pass

    def _failed(self) -> PackFailed:
        status = self._child.wait()
        self._errors.seek(0)
        return PackFailed(tree="the layers", reason=_last_line(self._errors.read(65536), status))


def _widen(pipe: int) -> None:
    import fcntl

    try:
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    except OSError:
        pass  # a user may have so much in pipes, and no more


def _last_line(text: bytes, status: int) -> str:
    # What is wrong with an option stands before a long list of those that there are.
    said = text.decode("utf-8", "replace").partition("\nSYNTAX:")[0]
    lines = [line for line in said.splitlines() if line.strip()]
    # A last line that says only what failed has another one before it that says why.
    lines += [line for line in lines[-2:] if " because " in line]
    return lines[-1].strip() if lines else f"status {status}"


def list_paths(fd: int, offset: int, folders: Sequence[str], *, depth: int) -> frozenset[str]:
    """Return the paths of files below some folders of a squashfs, with unsquashfs.

    Paths are absolute in the image; folders without files are listed as well.

    Raises:
        ToolMissing: no unsquashfs.
        ReadFailed: it failed, took too long or listed more than can be of use.
    """
    argv = ["-no-wildcards", "-max-depth", str(depth), "-lc"]
    text = _unsquashfs(fd, offset, argv, folders, limit_bytes=_LIST_LIMIT_BYTES)
    root = b"squashfs-root"
    return frozenset(
        line[len(root) :].decode("utf-8", "surrogateescape")
        for line in text.split(b"\n")
        if line.startswith(root + b"/")
    )


def read_file(fd: int, offset: int, path: str, *, limit_bytes: int) -> bytes:
    """Return the content of one regular file of a squashfs, with unsquashfs.

    Raises:
        ToolMissing: no unsquashfs.
        ReadFailed: no such file, too large, too slow, or a damaged image.
    """
    return _unsquashfs(fd, offset, ["-no-wildcards", "-cat"], [path], limit_bytes=limit_bytes)


def _unsquashfs(
    fd: int, offset: int, options: Sequence[str], paths: Sequence[str], *, limit_bytes: int
) -> bytes:
    import subprocess
    import tempfile

    argv = [find_tool("unsquashfs"), "-o", str(offset), "-processors", "1"]
    argv += ["-data-queue", "16", "-frag-queue", "16", "-no-progress", *options]
    argv += [f"/proc/self/fd/{fd}", *(path.lstrip("/") for path in paths)]
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            argv,
            env={"PATH": ":".join(_TOOL_FOLDERS), "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            pass_fds=(fd,),
        )
        try:
            limit(child.pid)
            content = _bounded_output(child, limit_bytes)
            status = child.wait()
        finally:
            child.kill()
            child.wait()
            if child.stdout:
                child.stdout.close()
        if status != 0:
            errors.seek(0)
            raise ReadFailed(reason=_last_line(errors.read(65536), status))
    return content


# For whoever starts a program with that and finds that it has not begun.
UNFENCED = (
    "unsquashfs is not started where it could write to more than one directory, "
    "and a mount namespace to prevent that could not be made"
)


def write_only_below(folder: str) -> None:
    """Leave a new process one directory to write to.

    unsquashfs works with all rights of its caller, on what anybody may have made.

    Raises:
        OSError: that cannot be done; the process must not go on.
    """
    from apptainer_py.kernel import _container

    place = os.fsencode(folder)
    try:
        _container.unshare(_NEWNS)
    except PermissionError:
        # An ordinary user may mount in a user namespace, where he stays who he is.
        uid, gid = os.geteuid(), os.getegid()
        _container.unshare(_NEWUSER | _NEWNS)
        for name, text in (
            ("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1"),
        ):  # fmt: skip
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(text)
    _container.mount(b"none", b"/", b"", _MS_REC | _MS_PRIVATE)
    _container.mount(place, place, b"", _MS_BIND)
    _container.mount_setattr(_AT_FDCWD, b"/", _AT_RECURSIVE, _ATTR_RDONLY, 0)
    _container.mount_setattr(_AT_FDCWD, place, 0, 0, _ATTR_RDONLY)


def limit(pid: int) -> None:
    """Bound what an image can make a program that reads it ask for: memory, time, its messages."""
    import resource

    for kind, value in (
        (resource.RLIMIT_AS, 1 << 30),
        (resource.RLIMIT_CPU, 60),
        (resource.RLIMIT_FSIZE, 16 << 20),
    ):
        try:
            _, hard = resource.prlimit(pid, kind)
            inside = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.prlimit(pid, kind, (inside, inside))
        except ProcessLookupError:
            return


def _bounded_output(child: subprocess.Popen[bytes], limit_bytes: int) -> bytes:
    assert child.stdout is not None
    content = child.stdout.read(limit_bytes + 1)
    if len(content) > limit_bytes:
        raise ReadFailed(reason=f"more than {limit_bytes} bytes")
    return content
