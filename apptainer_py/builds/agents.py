"""Bootstrap agents: from a header to a root directory.

An agent is a function that fills an Order's `root`; the table is open, so that what fetches from a
registry can register itself. `base` is what the rest of a build has to know of the image.
"""

from __future__ import annotations

import os
import threading

from apptainer_py.base import log
from apptainer_py.base.errors import ApptainerError, ImageError, NotSupported
from apptainer_py.base.record import Record
from apptainer_py.builds import report

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from apptainer_py.builds.streaming import Opened, Plan, Streamed
    from apptainer_py.image.detect import OpenImage
    from apptainer_py.image.oci_layout import Layout

TOOLS = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_MS_NOSUID, _MS_NODEV, _MS_BIND = 2, 4, 0x1000
_AT_FDCWD, _ATTR_RDONLY, _MNT_DETACH = -100, 1, 2
_INITIAL_USERNS = "user:[4026531837]"


class Order(Record):
    """What an agent is to do: `root` is an empty directory, `folder` one for temporary files.

    `owns_all` tells that files can be given to any id; `may_share` that the base is only read, so
    that a tree can be laid under `root` in place of a copy; `environ` is the caller's, `arch`
    and `arch_variant` the machine that was asked for; `is_root` tells that the
    build is the host's root. With `plan` layers may go into the packer at once.
    """

    header: Mapping[str, str]
    root: str
    folder: str
    owns_all: bool
    may_share: bool
    environ: Mapping[str, str]
    plan: Plan | None = None
    arch: str = ""
    arch_variant: str = ""
    is_root: bool = False

    @property
    def source(self) -> str:
        """The value of `From`."""
        return self.header.get("from", "")


class Base(Record):
    """What came with a root directory: an OCI image's configuration, labels, architecture.

    Where layers went into the packer, `streamed` is what takes the rest.
    """

    oci_config: bytes = b""
    labels: Mapping[str, str] = {}
    arch: str = ""
    streamed: Streamed | None = None


if TYPE_CHECKING:
    Agent = Callable[[Order], Base]


class ConveyorFailed(ApptainerError):
    """An agent could not do its work; `advice` is what can be done, `where` a place in the file."""

    message = "While performing build: conveyor failed to get: {reason}"

    def advice(self) -> str | None:
        """Return what to do next, and the lines of the definition file that asked for it."""
        found = (str(self.facts.get(name) or "") for name in ("advice", "where"))
        return "; ".join(filter(None, found)) or None


class UnknownAgent(ApptainerError):
    message = "Unable to create build: unable to get conveyorpacker: invalid build source {agent}"


class EndOfLife(ApptainerError):
    message = "Singularity Hub ended in 2021: images from shub are no longer to be had"
    hint = "the image may be at docker:// or library:// under another name"


# Those of one thread: how they fetch is a matter of the caller for whom it builds.
_OWN = threading.local()


# Fields of an OCI image's configuration, and the labels that show them; the signal's is OCI's own.
_TOLD = (
    ("StopSignal", "org.opencontainers.image.stopSignal"),
    ("User", "org.apptainer-py.oci.user"),
    ("WorkingDir", "org.apptainer-py.oci.working-dir"),
)
_TOLD_CHARACTERS = 4096


def find(agent: str) -> Agent:
    """Return the function for the value of `Bootstrap`.

    Raises:
        UnknownAgent: there is none of that name.
        EndOfLife: nobody has it any more.
    """
    own = getattr(_OWN, "agents", {}).get(agent)
    if own is not None:
        found: Agent = own
        return found
    if agent in AGENTS:
        return AGENTS[agent]
    if agent == "shub":
        raise EndOfLife
    raise UnknownAgent(agent=agent)


def register(name: str, agent: Agent) -> None:
    """Add an agent, or put one in place of another, for the builds of this thread."""
    if not hasattr(_OWN, "agents"):
        _OWN.agents = {}
    _OWN.agents[name] = agent


def _scratch(order: Order) -> Base:
    return Base()


# -- images of this machine


def local_image(order: Order) -> Base:
    """Unpack a file or directory of this machine.

    Raises:
        ConveyorFailed: it cannot be used.
    """
    from apptainer_py.image import detect

    if not order.source:
        raise ConveyorFailed(reason="the header has no From")
    try:
        image = detect.open_image(order.source)
    except ImageError as error:
        raise ConveyorFailed(reason=error.facts["reason"]) from None
    try:
        if image.kind != "sandbox":
            log.info(f"Verifying bootstrap image {order.source}")
        if order.header.get("fingerprints"):
            raise NotSupported(what="the header key `Fingerprints`")
        log.info("Extracting local image...")
        return _unpack(image, order)
    finally:
        os.close(image.fd)


def _unpack(image: OpenImage, order: Order) -> Base:
    from apptainer_py.image import sif

    if image.kind == "sandbox":
        _from_sandbox(image, order)
        return Base()
    if image.kind == "squashfs":
        _unsquash(image.fd, image.offset, order)
        return Base()
    if image.kind != "sif":
        raise NotSupported(what=f"building from an {image.kind} image")
    try:
        part = sif.primary_partition(image.fd)
        if part.fs != "squashfs":
            raise NotSupported(what=f"building from a partition of the kind {part.fs}")
        _unsquash(image.fd, part.offset, order)
        return Base(oci_config=_oci_config(image.fd))
    except sif.SifError as error:
        raise ConveyorFailed(reason=error.facts["reason"]) from None


def _oci_config(fd: int) -> bytes:
    from apptainer_py.image import sif
    from apptainer_py.image.oci_config import CONFIG_BYTES

    for entry in sif.read_descriptors(fd):
        if entry.data_type == sif.GENERIC_JSON and entry.name == b"oci-config.json":
            return sif.read_object(fd, entry, limit_bytes=CONFIG_BYTES)
    return b""


def _unsquash(fd: int, offset: int, order: Order) -> None:
    import subprocess

    from apptainer_py.image import squashfs

    argv = [squashfs.find_tool("unsquashfs"), "-no-progress", "-quiet", "-f", "-o", str(offset)]
    argv += ["-d", order.root, f"/proc/self/fd/{fd}"]
    with report.working("Unpacking"):
        try:
            done = subprocess.run(
                argv,
                env={"PATH": TOOLS, "LC_ALL": "C"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=(fd,),
                preexec_fn=lambda: squashfs.write_only_below(order.root),
                check=False,
            )
        except subprocess.SubprocessError:
            raise ConveyorFailed(reason=squashfs.UNFENCED) from None
    # 2: everything is there, but for owners or attributes that this caller cannot give.
    if done.returncode not in (0, 2) or (done.returncode == 2 and order.owns_all):
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        reason = lines[-1] if lines else f"unsquashfs ended with status {done.returncode}"
        raise ConveyorFailed(reason=f"{order.source}: {reason}")


def _from_sandbox(image: OpenImage, order: Order) -> None:
    own = _is_own(image)
    if own and order.may_share and _has_known_owners(image) and _lay_over(image, order):
        return
    import subprocess

    # What belongs to somebody else cannot be given to him again.
    how = ["-a"] if own and order.owns_all else ["-dR", "--preserve=mode,timestamps,links"]
    argv = ["/bin/cp", *how, "--reflink=auto", "-T", "--", f"/proc/self/fd/{image.fd}/."]
    argv.append(order.root)
    with report.working("Copying"):
        done = subprocess.run(
            argv,
            env={"PATH": TOOLS, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=(image.fd,),
            check=False,
        )
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        reason = lines[0] if lines else f"cp: status {done.returncode}"
        raise ConveyorFailed(
            reason=reason.replace(f"/proc/self/fd/{image.fd}/.", image.path).removeprefix("/bin/")
        )


def _is_own(image: OpenImage) -> bool:
    """Return whether a sandbox, and what a build changes in it, is of the build's own root."""
    if os.readlink("/proc/self/ns/user") == _INITIAL_USERNS:
        return True
    for name in ("", "/etc", "/.singularity.d", "/.singularity.d/env", "/.singularity.d/actions"):
        try:
            facts = os.lstat(f"/proc/self/fd/{image.fd}{name}/.")
        except OSError:
            continue
        if facts.st_uid != 0:
            return False
    return True


def _has_known_owners(image: OpenImage) -> bool:
    """Return whether folders that a build may change have owners here: else no layer takes them."""
    from apptainer_py.builds.skeleton import FOLDERS

    nobody = []
    for kind in ("uid", "gid"):
        with open(f"/proc/sys/kernel/overflow{kind}", encoding="ascii") as file:
            nobody.append(int(file.read()))
    for folder in FOLDERS:
        parts = ["", *folder.split("/")]
        for depth in range(1, len(parts) + 1):
            try:
                facts = os.lstat(f"/proc/self/fd/{image.fd}{'/'.join(parts[:depth])}/.")
            except OSError:
                break
            if facts.st_uid == nobody[0] or facts.st_gid == nobody[1]:
                return False
    return True


def _lay_over(image: OpenImage, order: Order) -> bool:
    """Lay an empty layer over a directory in place of copying it; False where that is refused."""
    from apptainer_py.kernel import _container

    if any(letter in f"{image.realpath}{order.folder}" for letter in ",:\\"):
        return False
    upper, work = f"{order.folder}/upper", f"{order.folder}/work"
    for folder in (upper, work):
        os.makedirs(folder, mode=0o700, exist_ok=True)
    os.chmod(upper, image.mode & 0o7777)
    options = f"lowerdir={image.realpath},upperdir={upper},workdir={work}"
    for more in ("", ",userxattr"):
        try:
            _container.mount(
                b"overlay",
                os.fsencode(order.root),
                b"overlay",
                _MS_NOSUID | _MS_NODEV,
                os.fsencode(options + more),
            )
        except OSError:
            continue
        # What was checked is what is there: the path may lead elsewhere by now.
        if os.stat(image.realpath).st_ino == image.ino:
            if order.plan is not None:
                _show_as_it_is(image, order.root)
            return True
        _container.umount2(os.fsencode(order.root), 2)
    return False


def _show_as_it_is(image: OpenImage, root: str) -> None:
    """Show folders that such a build leaves alone without the layer, which costs time per file."""
    from apptainer_py.builds.skeleton import FOLDERS, LINKS

    changed = {*LINKS, *(folder.partition("/")[0] for folder in FOLDERS)}
    source = f"/proc/self/fd/{image.fd}"
    shown = []
    with os.scandir(source) as entries:
        for entry in entries:
            is_folder = entry.is_dir(follow_symlinks=False)
            if is_folder and os.path.ismount(entry.path):
                continue  # the layer shows what is below it
            if is_folder and entry.name not in changed:
                shown.append(entry.name)
            elif _has_links(entry.path) if is_folder else _links_of(entry.path) > 1:
                return  # two names of one file, one here and one there, would become two files
    for name in shown:
        _show(f"{source}/{name}", f"{root}/{name}")


def _has_links(folder: str) -> bool:
    """Return whether a file below a folder has more names than one."""
    for above, _, files in os.walk(folder):
        if any(_links_of(f"{above}/{name}") > 1 for name in files):
            return True
    return False


def _links_of(path: str) -> int:
    try:
        return os.lstat(path).st_nlink
    except OSError:
        return 1


def _show(source: str, target: str) -> None:
    """Bind a folder, only to be read; where that is refused, what is there is the same."""
    from apptainer_py.kernel import _container

    place = os.fsencode(target)
    try:
        _container.mount(os.fsencode(source), place, b"", _MS_BIND)
    except OSError:
        return
    try:
        _container.mount_setattr(_AT_FDCWD, place, 0, _ATTR_RDONLY, 0)
    except OSError:
        _container.umount2(place, _MNT_DETACH)


# -- OCI images of this machine


def _oci(order: Order) -> Base:
    transport = order.header["bootstrap"].lower()
    log.info("Fetching OCI image...")
    try:
        layout = open_layout(transport, order.source, order.folder)
    except ImageError as error:
        raise ConveyorFailed(reason=str(error)) from None
    # docker's archives name layers as they are when they are not compressed: those are unpacked.
    plan = None if transport == "docker-archive" else order.plan
    return unpack_layout(layout, order.replace(plan=plan))


def open_layout(transport: str, source: str, folder: str) -> Layout:
    """Open an image of layers on this machine; `folder` is for temporary files.

    Raises:
        ImageError: it is none.
    """
    if transport == "docker-archive":
        from apptainer_py.image.docker_archive import Archive

        return Archive(source, folder)
    from apptainer_py.image.oci_layout import Layout

    return Layout(f"{transport}:{source}", folder=folder)


def unpack_layout(layout: Layout, order: Order) -> Base:
    """Unpack the image of a layout, which is closed then.

    Raises:
        ConveyorFailed: it cannot be used.
    """
    from apptainer_py.image.oci_layers import Unpacker

    layout.take_machine(order.arch, order.arch_variant)
    try:
        image = layout.image()
        log.info("Extracting OCI image...")
        with report.working("Packing layers"):
            base = stream_layout(layout, order, layout.open)
        if base is not None:
            return base
        unpacker = Unpacker(order.root, owns_all=order.owns_all)
        total = sum(layer.size_bytes for layer in image.layers)
        with report.counting("Unpacking layers", total) as told:
            layout.unpack(image, _Told(unpacker, told, [one.size_bytes for one in image.layers]))
        unpacker.close()
    except ImageError as error:
        raise ConveyorFailed(reason=str(error)) from None
    finally:
        layout.close()
    return from_oci_config(image.config)


def stream_layout(layout: Layout, order: Order, opened: Opened) -> Base | None:
    """Pass the layers of an image to the packer as they are read; nothing where that cannot be.

    Raises:
        ImageError: it cannot be used.
        ApptainerError: the packer failed, or a layer cannot be had.
    """
    if order.plan is None:
        return None
    from apptainer_py.builds import streaming

    image = layout.image()
    found = streaming.stream(order.plan, image.layers, opened, order.root)
    if found is None:
        return None
    return from_oci_config(image.config).replace(streamed=found)


class _Told:
    """An Unpacker that says after each layer how much of the image is there."""

    def __init__(self, unpacker: object, told: Callable[[int], None], sizes: list[int]) -> None:
        self._unpacker = unpacker
        self._told = told
        self._sizes = iter(sizes)

    def apply(self, read: Callable[[int], bytes]) -> None:
        self._unpacker.apply(read)  # type: ignore[attr-defined]
        self._told(next(self._sizes, 0))


def from_oci_config(document: bytes) -> Base:
    """Return what an OCI image's configuration says: what SIF files keep of it, and its labels."""
    import json

    from apptainer_py.image import arch
    from apptainer_py.model.json_text import JsonWrong, loads

    try:
        whole = loads(document)
    except JsonWrong as error:
        raise ConveyorFailed(reason=f"the image's configuration: {error}") from None
    config = whole.get("config") if isinstance(whole, dict) else None
    config = config if isinstance(config, dict) else {}
    machine = whole.get("architecture") if isinstance(whole, dict) else ""
    labels = config.get("Labels")
    labels = labels if isinstance(labels, dict) else {}
    return Base(
        oci_config=json.dumps(config, separators=(",", ":"), ensure_ascii=False).encode(),
        labels={
            **_told_of(config),
            **{key: value for key, value in labels.items() if isinstance(value, str)},
        },
        arch=str(machine) if machine in arch.SIF_CODES.values() else "",
    )


def _told_of(config: Mapping[str, object]) -> dict[str, str]:
    """Return as labels what a launch does not follow by itself, and `instance stop` follows."""
    found = {label: config.get(key) for key, label in _TOLD}
    return {
        label: value
        for label, value in found.items()
        if isinstance(value, str) and value.isprintable() and 0 < len(value) <= _TOLD_CHARACTERS
    }


# -- distributions


def _installed(name: str) -> Agent:
    """Return an agent of those that install a distribution, which few builds need."""

    def fill(order: Order) -> Base:
        from apptainer_py.builds import distributions

        agent: Agent = getattr(distributions, name)
        return agent(order)

    return fill


AGENTS: dict[str, Agent] = {
    "arch": _installed("arch_linux"),
    "busybox": _installed("busybox"),
    "debootstrap": _installed("debootstrap"),
    "dnf": _installed("yum"),
    "docker-archive": _oci,
    "localimage": local_image,
    "oci": _oci,
    "oci-archive": _oci,
    "scratch": _scratch,
    "yum": _installed("yum"),
    "zypper": _installed("zypper"),
}
