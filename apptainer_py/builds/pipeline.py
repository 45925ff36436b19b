"""A build, step by step: each stage's root directory, then one image of the last."""

from __future__ import annotations

import os
import stat

from apptainer_py.base import held, log
from apptainer_py.base.record import Record
from apptainer_py.builds import (
    agents,
    copying,
    metadata,
    programs,
    report,
    scif,
    skeleton,
    streaming,
)
from apptainer_py.builds.oci_scripts import write_scripts
from apptainer_py.builds.scripts import Container, Script, host_environment, on_host
from apptainer_py.image import arch, sif, sif_write, squashfs
from apptainer_py.image.oci_config import parse_config

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from apptainer_py.builds.agents import Base
    from apptainer_py.builds.definition import Section, Stage
    from apptainer_py.builds.identity import Identity
    from apptainer_py.builds.scripts import Launch
    from apptainer_py.crypto.sealing import Lock

_PACKED = "squashfs"
SECTIONS = ("setup", "post", "files", "environment", "test", "labels")
# Those that cannot be chosen come with all of them only.
ALL_SECTIONS = frozenset((*SECTIONS, "pre", "help", "runscript", "startscript"))


class Job(Record):
    """Everything that a build depends on.

    `folder` is for temporary files, `near` lies beside the target, so that the result can be
    renamed; `describe` returns the text of `inspect --all` for a root directory. With `epoch` (in
    seconds since 1970) the same input gives the same bytes. `update` names a sandbox to change.
    `lock` encrypts the image.
    """

    stages: tuple[Stage, ...]
    target: str
    folder: str
    near: str
    identity: Identity
    environ: Mapping[str, str]
    describe: Callable[[str], str]
    sandbox: bool = False
    force: bool = False
    update: bool = False
    with_test: bool = True
    fix_perms: bool = False
    writable_tmpfs: bool = False
    sections: frozenset[str] = ALL_SECTIONS
    container_options: tuple[str, ...] = ()
    umask: int = 0o022
    mksquashfs: tuple[str, ...] = ()
    processors: int = 0
    memory: str = ""
    epoch: int | None = None
    arch: str = ""
    arch_variant: str = ""
    announced: bool = True
    lock: Lock | None = None


def run(job: Job, launch: Launch) -> None:
    """Build the image and put it in its place.

    Raises:
        ApptainerError: a section failed, or something is not there.
        OSError: a file cannot be written.
    """
    job = job.replace(umask=os.umask(0o022))
    for folder in dict.fromkeys((job.folder, job.near)):
        os.mkdir(folder, 0o700)
        held.hold(folder)
    log.info("Starting build...")
    roots: dict[str, str] = {}
    base: Base | None = None
    root = ""
    for number, stage in enumerate(job.stages):
        last = number == len(job.stages) - 1
        root = _root_of(job, number, last=last)
        base = _Stage(job, stage, root, roots, launch).make(last=last)
        roots[str(number)] = root
        if stage.name:
            roots.setdefault(stage.name, root)
    assert base is not None
    if job.sandbox:
        _place_sandbox(job, root)
    else:
        _place_sif(job, root, base)
    if job.announced:
        log.info(f"Build complete: {job.target}")


def _root_of(job: Job, number: int, *, last: bool) -> str:
    if last and job.update:
        return os.path.abspath(job.target)
    folder = f"{job.near if last and job.sandbox else job.folder}/{number}"
    os.mkdir(folder, 0o700)
    os.mkdir(f"{folder}/rootfs", 0o755)
    return f"{folder}/rootfs"


class _Stage:
    """One stage on its way to a root directory."""

    def __init__(
        self, job: Job, stage: Stage, root: str, roots: Mapping[str, str], launch: Launch
    ) -> None:
        self._job = job
        self._stage = stage
        self._root = root
        self._roots = dict(roots)
        self._container = Container(
            root=root,
            options=job.container_options,
            environ=dict(job.environ),
            umask=job.umask,
            launch=launch,
        )

    def make(self, *, last: bool) -> Base:
        """Run every section; `last` tells that the root becomes the image."""
        job, root = self._job, self._root
        self._host_script("pre")
        base = self._base(last=last)
        skeleton.make(root)
        if base.oci_config and self._stage.header.get("bootstrap", "") not in ("localimage",):
            log.info("Inserting Apptainer configuration...")
            write_scripts(root, parse_config(base.oci_config, image=job.target))
        if job.fix_perms:
            fix_permissions(root)
        scif.make(root, self._stage)
        self._files(from_stage=True)
        self._host_script("setup")
        self._files(from_stage=False)
        self._post()
        self._insert(base)
        self._test()
        return base

    def _wants(self, section: str) -> bool:
        return section in self._job.sections

    def _base(self, *, last: bool) -> Base:
        stage, job = self._stage, self._job
        if job.update and last:
            return agents.Base()
        order = agents.Order(
            header=stage.header,
            root=self._root,
            folder=os.path.dirname(self._root),
            owns_all=job.identity.owns_all,
            may_share=not job.sandbox and last and not self._needs_container(),
            environ=job.environ,
            plan=self._plan() if last else None,
            arch=job.arch,
            arch_variant=job.arch_variant,
            is_root=job.identity.is_root,
        )
        agent = stage.header["bootstrap"].lower()
        try:
            return agents.find(agent)(order)
        except agents.ConveyorFailed as error:
            if stage.line:
                error.facts["where"] = f"it is asked for in line {stage.line}: Bootstrap: {agent}"
            raise

    def _plan(self) -> streaming.Plan | None:
        """Return how layers are packed as they come, where nothing of the build is in between."""
        job = self._job
        if job.sandbox or job.update or job.fix_perms or job.mksquashfs:
            return None
        if not streaming.can([section.name for section in self._stage.sections]):
            return None
        # In the order of layers files of a kind are further apart, and pack less well.
        how = _packing(job).replace(level=9)
        return streaming.Plan(target=f"{job.near}/{_PACKED}", how=how, now_s=_now_s(job))

    def _needs_container(self) -> bool:
        names = ("post", "test", "appinstall")
        return any(self._stage.all(name) for name in names)

    def _host_script(self, name: str) -> None:
        section = self._stage.joined(name)
        if section is None or not metadata.says_something(section) or not self._wants(name):
            return
        log.info(f"Running {name} scriptlet")
        environ = host_environment(self._job.environ, self._root)
        on_host(_script(section), environ, folder=self._job.folder, umask=self._job.umask)

    def _files(self, *, from_stage: bool) -> None:
        if not self._wants("files"):
            return
        for section in self._stage.all("files"):
            if bool(section.words) == from_stage:
                self._copy(section, "")
        if not from_stage:
            for section in self._stage.all("appfiles"):
                self._copy(section, f"/scif/apps/{section.app}")

    def _copy(self, section: Section, below: str) -> None:
        environ = dict(self._job.environ)
        copying.copy(section, self._root, stages=self._roots, below=below, environ=environ)

    def _post(self) -> None:
        section = self._stage.joined("post")
        installs = scif.install_script(self._stage)
        said = section is not None and metadata.says_something(section)
        if not self._wants("post") or not (said or installs):
            return
        log.info("Running post scriptlet")
        lines = [] if section is None else [(line.number, line.text) for line in section.lines]
        how = Script(section="post", lines=()) if section is None else _script(section)
        lines += installs
        self._container.post(how.replace(lines=tuple(lines), of_apps=len(installs)))

    def _insert(self, base: Base) -> None:
        job, root, stage = self._job, self._root, self._stage
        if self._wants("help"):
            metadata.help_text(root, stage, force=job.force)
        metadata.deffile(root, stage.text if len(job.stages) == 1 else _whole(job))
        metadata.labels(
            root,
            stage,
            known=metadata.known_labels(stage, _now_s(job), job.arch or arch.host_arch()),
            force=job.force,
            more=base.labels,
            with_own=self._wants("labels"),
        )
        if self._wants("environment"):
            metadata.environment(root, stage)
        metadata.scripts(root, stage, job.sections)

    def _test(self) -> None:
        if not self._job.with_test or not self._wants("test"):
            return
        if not metadata.says_something(self._stage.joined("test")):
            return
        log.info("Running testscript")
        self._container.test(writable_tmpfs=self._job.writable_tmpfs)


def _whole(job: Job) -> str:
    return "".join(stage.text for stage in job.stages)


def _script(section: Section) -> Script:
    lines = tuple((line.number, line.text) for line in section.lines)
    words = section.words
    at = words.index("-c") if "-c" in words else len(words)
    return Script(
        section=section.name, lines=lines, interpreter=words[at + 1 :], options=words[:at]
    )


def _now_s(job: Job) -> int:
    import time

    return int(time.time()) if job.epoch is None else job.epoch


def fix_permissions(root: str) -> None:
    """Let the owner read everything, and enter and change every directory."""
    for folder, folders, files in os.walk(root):
        for name in folders:
            _add_mode(f"{folder}/{name}", 0o700)
        for name in files:
            _add_mode(f"{folder}/{name}", 0o600)


def _add_mode(path: str, more: int) -> None:
    mode = os.lstat(path).st_mode
    if not stat.S_ISLNK(mode) and mode & more != more:
        os.chmod(path, mode & 0o7777 | more)


def _place_sandbox(job: Job, root: str) -> None:
    from apptainer_py.image.oci_layers import remove_tree

    if job.update:
        return
    log.info("Creating sandbox directory...")
    target = os.path.abspath(job.target)
    if os.path.lexists(target):
        parent = os.open(os.path.dirname(target), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        remove_tree(parent, os.fsencode(os.path.basename(target)))
        os.close(parent)
    os.rename(root, target)


def _place_sif(job: Job, root: str, base: Base) -> None:
    log.info("Creating SIF file...")
    packed, made = f"{job.near}/{_PACKED}", f"{job.near}/sif"
    told = _Told(job, root, base)
    with report.working("Packing"):
        if base.streamed is not None:
            base.streamed.finish(root)
            told.read()
        else:
            squashfs.pack(root, packed, _packing(job), meanwhile=told.read)
    fs, message = sif.SQUASHFS, b""
    if job.lock is not None:
        packed, fs, message = _sealed(job, job.lock, packed), sif.GOCRYPTFS, job.lock.message
    sif_write.write_sif(
        made,
        packed,
        arch=told.machine,
        deffile=_whole(job).encode("utf-8", "surrogateescape"),
        metadata=told.metadata,
        oci_config=base.oci_config or None,
        epoch=job.epoch,
        fs=fs,
        message=message,
        quick_start=True,
    )
    os.rename(made, job.target)


class _Told:
    """What a SIF file says of the root directory in it."""

    def __init__(self, job: Job, root: str, base: Base) -> None:
        self._job = job
        self._root = root
        self._base = base
        self.machine = ""
        self.metadata = b""

    def read(self) -> None:
        """Look at the directory, which is not changed."""
        self.machine = _machine_of(self._job, self._root, self._base)
        self.metadata = self._job.describe(self._root).encode("utf-8", "surrogateescape")


def _machine_of(job: Job, root: str, base: Base) -> str:
    """Return the architecture of what is in the image, whatever was asked for."""
    found = base.arch or programs.machine_of(root) or arch.host_arch()
    if job.arch and found != job.arch:
        log.warning(f"Architecture {found} does not match build arch {job.arch}")
    return found


def _packing(job: Job) -> squashfs.Packing:
    return squashfs.Packing(
        all_root=not job.identity.is_root,
        epoch=job.epoch,
        processors=job.processors or None,
        memory=job.memory or None,
        more_options=job.mksquashfs,
    )


def _sealed(job: Job, lock: Lock, plain: str) -> str:
    """Return the squashfs with the encrypted file system of a plain one, which is removed."""
    folder, packed = f"{job.near}/encrypted", f"{job.near}/outer"
    # What is encrypted gets no smaller.
    how = squashfs.Packing(
        compression="gzip",
        level=None,
        quick_start=False,
        epoch=job.epoch,
        processors=job.processors or None,
        memory=job.memory or None,
        more_options=("-noD", "-noF", "-no-fragments"),
    )
    with report.working("Encrypting"):
        lock.seal(plain, folder)
        os.unlink(plain)
        squashfs.pack(folder, packed, how)
    return packed
