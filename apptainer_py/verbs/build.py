"""`build`: a SIF image or a sandbox directory from a definition file, an image or a URI."""

from __future__ import annotations

import os

from apptainer_py.base import build as build_facts
from apptainer_py.base import epoch, held, log
from apptainer_py.base.errors import ApptainerError
from apptainer_py.base.files import temporary_directory
from apptainer_py.base.record import Record
from apptainer_py.builds import agents, arguments, definition, json_definition, pipeline, supervised
from apptainer_py.builds import identity as identities
from apptainer_py.host import config_file
from apptainer_py.image import arch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from apptainer_py.builds.definition import Stage
    from apptainer_py.crypto.sealing import Lock

_DEFINITION_BYTES = 16 << 20
_TEMPORARY = "build-temp-"
_EXISTS = "build target '{target}' already exists. Use --force if you want to overwrite it"
_ALL, _NONE = "all", "none"
# Agents that need more than a name.
_NO_URIS = ("arch", "busybox", "debootstrap", "dnf", "localimage", "scratch", "yum", "zypper")


class TargetRefused(ApptainerError):
    message = "While checking build target: {reason}"


class SectionsWrong(ApptainerError):
    message = "Could not check build sections: section specification error: {reason}"


class ArchitectureWrong(ApptainerError):
    message = "While processing the arch and arch variant: {reason}"


class CannotRead(ApptainerError):
    message = "Unable to build from {spec}: {reason}"


class Request(Record):
    """A command line of `build`, a field for each option, with the caller's environment.

    `lock` is what options of encryption came to: None for a plain image.
    """

    target: str
    spec: str
    environ: Mapping[str, str]
    build_arg: tuple[str, ...] = ()
    build_arg_file: str = ""
    warn_unused_build_args: bool = False
    section: tuple[str, ...] = (_ALL,)
    sandbox: bool = False
    force: bool = False
    update: bool = False
    notest: bool = False
    fakeroot: bool = False
    fix_perms: bool = False
    no_cleanup: bool = False
    reproducible: bool = False
    writable_tmpfs: bool = False
    ignore_fakeroot_command: bool = False
    ignore_subuid: bool = False
    ignore_userns: bool = False
    userns: bool = False
    json: bool = False
    arch: str = ""
    arch_variant: str = ""
    mksquashfs_args: str = ""
    tmpdir: str = ""
    container_options: tuple[str, ...] = ()
    announced: bool = True
    lock: Lock | None = None
    config_file: str = build_facts.CONFIG_FILE
    # Where what the build prints goes, if not to where the caller's does.
    output: int = -1
    is_unwanted: Callable[[], bool] | None = None


def build(request: Request, describe: Callable[[str], str]) -> None:
    """Make an image; `describe` returns what `inspect --all` says of a root directory.

    Raises:
        ApptainerError: it cannot be done; nothing is left of it.
    """
    job = _job(request, describe)
    supervised.run(
        lambda launches: pipeline.run(job, launches),
        job.identity,
        (job.folder, job.near),
        left=_left_beside(job),
        keep=request.no_cleanup,
        output=request.output,
        is_unwanted=request.is_unwanted,
    )
    if request.no_cleanup:
        log.info(f"The build's directories are kept: {job.folder}, {job.near}")


def _job(request: Request, describe: Callable[[str], str]) -> pipeline.Job:
    sections = _sections(request.section)
    _check_lock(request)
    _check_target(request)
    stages = _stages(request)
    for stage in stages:
        agents.find(stage.header["bootstrap"].lower())
    identity = identities.choose(
        fakeroot=request.fakeroot,
        ignore_subuid=request.ignore_subuid,
        ignore_userns=request.ignore_userns,
        userns=request.userns,
    )
    config = config_file.read(request.config_file, require_root_owned=False).config
    folder, near = _places(request)
    return pipeline.Job(
        stages=stages,
        target=request.target,
        folder=folder,
        near=near,
        identity=identity,
        environ=request.environ,
        describe=describe,
        sandbox=request.sandbox,
        force=request.force,
        update=request.update,
        with_test=not request.notest,
        fix_perms=request.fix_perms,
        writable_tmpfs=request.writable_tmpfs,
        sections=sections,
        container_options=(*_as_root(request, identity), *request.container_options),
        mksquashfs=tuple(request.mksquashfs_args.split()),
        processors=config.mksquashfs_procs,
        memory=config.mksquashfs_mem,
        epoch=_epoch(request),
        announced=request.announced,
        lock=request.lock,
        arch=request.arch,
        arch_variant=request.arch_variant,
    )


def _places(request: Request) -> tuple[str, str]:
    """Return the temporary directories: where TMPDIR says, and beside the target."""
    # What shall stay is no leftover of a build that was killed.
    kind = "build-kept-" if request.no_cleanup else _TEMPORARY
    name = f"{kind}{os.urandom(6).hex()}"
    above, target = os.path.split(os.path.abspath(request.target))
    return f"{_tmpdir(request)}/{name}", f"{above}/.{target[:200]}.{name}"


def _left_beside(job: pipeline.Job) -> tuple[str, ...]:
    """Return what builds that were killed have left beside the directories of this one."""
    name = os.path.basename(job.folder)
    prefixes = (f"{place.removesuffix(name)}{_TEMPORARY}" for place in (job.folder, job.near))
    return tuple(path for prefix in prefixes for path in held.abandoned(*os.path.split(prefix)))


def _as_root(request: Request, identity: identities.Identity) -> list[str]:
    """Return the options that make containers of a build root of the same ids as the build."""
    if identity.is_root:
        return []
    options = ["--fakeroot"] if identity.setuid else ["--fakeroot", "--userns"]
    options += [] if identity.owns_all else ["--ignore-subuid"]
    return options + (["--ignore-fakeroot-command"] if request.ignore_fakeroot_command else [])


def _tmpdir(request: Request) -> str:
    folder = os.path.abspath(temporary_directory(request.environ, request.tmpdir))
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        raise ApptainerError(text=f"{folder}, the directory for temporary files, cannot be written")
    return folder


def check_arch(name: str) -> None:
    """Check the name of an architecture that a command line asks for; "" is this machine's.

    Raises:
        ArchitectureWrong: nothing is built for it.
    """
    if name and name not in arch.BUILT_FOR:
        known = " ".join(arch.BUILT_FOR)
        raise ArchitectureWrong(reason=f"arch: {name} is not valid, supported archs are: [{known}]")


def _epoch(request: Request) -> int | None:
    found = epoch.of(request.environ)
    return 0 if found is None and request.reproducible else found


def _sections(chosen: Sequence[str]) -> frozenset[str]:
    words = [word.strip() for entry in chosen for word in entry.split(",") if word.strip()]
    for word in (_ALL, _NONE):
        if word in words and len(words) > 1:
            raise SectionsWrong(reason=f"cannot have {word} and any other option")
    if words == [_ALL] or not words:
        return pipeline.ALL_SECTIONS
    if words == [_NONE]:
        return frozenset()
    unknown = [word for word in words if word not in pipeline.SECTIONS]
    if unknown:
        known = ", ".join((_ALL, _NONE, *pipeline.SECTIONS))
        raise SectionsWrong(reason=f"{unknown[0]} is none of {known}")
    return frozenset(words)


# -- the target


def _check_lock(request: Request) -> None:
    if request.lock is None:
        return
    if request.sandbox:
        raise TargetRefused(reason="a sandbox cannot be encrypted: leave --sandbox out")
    if request.reproducible:
        raise TargetRefused(
            reason="--reproducible and encryption exclude each other: each key is random"
        )


def _check_target(request: Request) -> None:
    target = request.target
    if request.update and not request.sandbox:
        raise TargetRefused(reason="only sandbox update is supported: --sandbox flag is missing")
    if os.path.isdir(target) and not os.path.islink(target.rstrip("/")):
        _check_directory(request)
    elif os.path.lexists(target):
        if request.update:
            raise TargetRefused(reason=f"{target} is no sandbox, and cannot be updated")
        if not request.force:
            raise TargetRefused(reason=_EXISTS.format(target=target))
        if not os.path.isfile(target):
            raise TargetRefused(reason=f"{target} is no regular file")
    elif request.update:
        raise TargetRefused(reason=f"{target} does not exist, and cannot be updated")
    _check_above(os.path.dirname(os.path.abspath(target)))


def _check_above(above: str) -> None:
    if not os.path.isdir(above):
        raise TargetRefused(reason=f"the directory {above} does not exist")
    if not os.access(above, os.W_OK | os.X_OK):
        reason = f"no permission to write in {above}"
        if os.statvfs(above).f_flag & os.ST_RDONLY:
            reason = f"{above} is on a read-only file system"
        raise TargetRefused(reason=reason)


def _check_directory(request: Request) -> None:
    target = request.target
    absolute = os.path.abspath(target)
    if os.path.samefile(target, "/"):
        raise TargetRefused(reason="the host's root directory is no build target")
    is_image = os.path.isdir(f"{target}/.singularity.d")
    if request.update and not is_image:
        raise TargetRefused(reason=f"{absolute} is not an Apptainer sandbox")
    if request.update or (request.force and request.sandbox):
        return
    if not request.sandbox or is_image:
        reason = f"build target '{target}' is a directory; --sandbox builds one"
        if request.sandbox:
            reason = _EXISTS.format(target=target)
        raise TargetRefused(reason=reason)
    if os.listdir(target):
        raise TargetRefused(
            reason=f"{absolute} is not empty and is not an Apptainer sandbox, check its content "
            "first and use --force if you want to overwrite it"
        )


# -- the specification


def _stages(request: Request) -> tuple[Stage, ...]:
    spec = request.spec
    name, colon, rest = spec.partition(":")
    if request.json:
        text = json_definition.as_text(_read(spec), file=spec)
    elif colon and not os.path.exists(spec) and _is_agent(name):
        source = rest.removeprefix("//")
        return (definition.implicit(name, source),)
    elif os.path.isdir(spec) or _is_image(spec):
        return (definition.implicit("localimage", spec),)
    else:
        text = _read(spec)
    given = _arguments(request)
    text, unused = arguments.fill(text, given, file=spec)
    if unused:
        names = ", ".join(unused)
        if not request.warn_unused_build_args:
            raise arguments.NotUsed(names=names)
        log.warning(f"unused build args: {names}")
    return definition.parse(text, file=spec)


def _is_agent(name: str) -> bool:
    try:
        agents.find(name)
    except agents.UnknownAgent:
        return False
    except ApptainerError:
        return True
    return name not in _NO_URIS


def _arguments(request: Request) -> dict[str, str]:
    given = arguments.from_file(request.build_arg_file) if request.build_arg_file else {}
    return {**given, **arguments.pairs(request.build_arg, "--build-arg")}


def _is_image(path: str) -> bool:
    from apptainer_py.image import detect

    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return detect.kind_of(os.pread(fd, detect.HEAD_BYTES, 0)) is not None
    except (OSError, ApptainerError):
        return True
    finally:
        os.close(fd)


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            text = file.read(_DEFINITION_BYTES + 1)
    except OSError as error:
        words = (error.strerror or "").lower()
        reason = f"unable to open file {path}: open {path}: {words}"
        raise CannotRead(spec=path, reason=reason) from None
    if len(text) > _DEFINITION_BYTES or "\0" in text:
        raise CannotRead(spec=path, reason="it is neither an image nor a definition file")
    return text
