"""`build`, `pull` and `push` by their options: what commands and functions have in common."""

from __future__ import annotations

from apptainer_py.api import signatures
from apptainer_py.base import log
from apptainer_py.base.errors import ApptainerError, UsageError
from apptainer_py.base.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from apptainer_py.builds.fetching import Fetching
    from apptainer_py.builds.uris import Convert
    from apptainer_py.cache.store import Cache
    from apptainer_py.crypto.sealing import Lock

# Passed on to the containers in which %post and %test run.
_REPEATED = ("bind", "mount")
_SWITCHES = ("nv", "nvccli", "rocm")
_OWN = (
    "build_arg", "build_arg_file", "fakeroot", "fix_perms", "force", "ignore_fakeroot_command",
    "arch", "arch_variant", "ignore_subuid", "ignore_userns", "json", "mksquashfs_args",
    "no_cleanup", "notest", "reproducible", "sandbox", "section", "tmpdir", "update", "userns",
    "warn_unused_build_args", "writable_tmpfs",
)  # fmt: skip


_FETCHING = (
    "arch", "arch_variant", "authfile", "disable_cache", "docker_host", "docker_password",
    "docker_username", "library", "no_https", "tmpdir",
)  # fmt: skip
_UNWANTED = ("APPTAINER_BIND", "SINGULARITY_BIND", "APPTAINERENV_", "SINGULARITYENV_")


class Surroundings(Record):
    """What a command has around it: environment, configuration file, where its output goes."""

    environ: Mapping[str, str]
    config_file: str = ""
    output: int = -1
    # Asked while a build goes on, whether it may end.
    is_unwanted: Callable[[], bool] | None = None
    # Returns the passphrase that an image is to be encrypted with.
    ask: Callable[[], str] | None = None

    def of_build(self) -> dict[str, str]:
        """Return the environment without what would change the containers of a build."""
        return {
            name: value for name, value in self.environ.items() if not name.startswith(_UNWANTED)
        }


def fetching(options: Mapping[str, Any]) -> Fetching:
    """Return how options, by their long names, want images to be fetched."""
    from apptainer_py.builds.fetching import Fetching

    known = _by_keyword(options)
    return Fetching(**{name: known[name] for name in _FETCHING if name in known})


def build_image(target: str, spec: str, options: Mapping[str, Any], around: Surroundings) -> None:
    """Build an image.

    Raises:
        ApptainerError: it cannot be done.
    """
    from apptainer_py.base import build as facts
    from apptainer_py.builds import layered
    from apptainer_py.crypto import sealing
    from apptainer_py.verbs import build

    known = _by_keyword(options)
    build.check_arch(known["arch"])
    layered.register(fetching(options))
    passed: list[str] = []
    for name in _REPEATED:
        for value in known[name]:
            passed += [f"--{name}", value]
    passed += [f"--{name}" for name in _SWITCHES if known[name]]
    secret = known["encrypt"] or known["passphrase"] or known["pem_path"]
    with sealing.Closed(wanted=bool(secret)):
        request = build.Request(
            target=target,
            spec=spec,
            environ=sealing.without_secrets(around.of_build()),
            lock=_lock(known, around),
            config_file=around.config_file or facts.CONFIG_FILE,
            container_options=tuple(passed),
            output=around.output,
            is_unwanted=around.is_unwanted,
            **{name: known[name] for name in _OWN},
        )
        build.build(request, _describe)


def _lock(known: Mapping[str, Any], around: Surroundings) -> Lock | None:
    from apptainer_py.crypto import sealing

    if known["passphrase"] and around.ask is None:
        raise UsageError(
            text="nobody can be asked for a passphrase here: "
            "APPTAINER_ENCRYPTION_PASSPHRASE of the environment names one"
        )
    return sealing.find_lock(
        around.environ,
        encrypt=known["encrypt"],
        pem_path=known["pem_path"],
        ask=around.ask if known["passphrase"] else None,
    )


def converter(how: Fetching, around: Surroundings) -> Convert:
    """Return what makes a SIF file of an image of layers."""

    def convert(path: str, uri: str, cache: Cache) -> None:
        from apptainer_py.base import build as facts
        from apptainer_py.builds import layered
        from apptainer_py.verbs import build

        layered.register(how, cache)
        request = build.Request(
            target=path,
            spec=uri,
            environ=around.of_build(),
            config_file=around.config_file or facts.CONFIG_FILE,
            force=True,
            tmpdir=how.tmpdir,
            arch=how.arch,
            arch_variant=how.arch_variant,
            announced=False,
            output=around.output,
        )
        build.build(request, _describe)

    return convert


def pull_image(uri: str, name: str, options: Mapping[str, Any], around: Surroundings) -> str:
    """Fetch an image; return the path of its file.

    Raises:
        ApptainerError: it cannot be had, or the file is there.
    """
    from apptainer_py.verbs import build, pull

    how = fetching(options)
    build.check_arch(how.arch)
    request = pull.Request(
        uri=uri,
        how=how,
        environ=around.environ,
        name=name,
        folder=str(options["dir"]),
        force=bool(options["force"]),
    )
    made = pull.pull(request, converter(how, around))
    if uri.startswith("library:"):
        try:
            signatures.check_signed(made, around.environ)
        except ApptainerError as error:
            log.warning(str(error))
            log.warning("Skipping container verification")
    return made


def push_image(path: str, uri: str, options: Mapping[str, Any], environ: Mapping[str, str]) -> str:
    """Upload a SIF file; return the digest of what the registry now has, "" for a library.

    Raises:
        ApptainerError: the registry does not take it, or it is no SIF file.
    """
    from apptainer_py.verbs import push

    if uri.startswith("library:"):
        return _push_to_library(path, uri, options, environ)
    if options["description"]:
        raise UsageError(text="--description is for library:// only")
    digest = push.push(path, uri, fetching(options), environ, options["annotation"])
    log.verbose(f"{uri} is {digest}")
    log.info("Upload complete")
    return digest


def tag_image(image: str, name: str, options: Mapping[str, Any], environ: Mapping[str, str]) -> str:
    """Give an image of a registry one more tag; return the digest of its manifest.

    Raises:
        ApptainerError: there is no such image, or the registry does not take the tag.
    """
    from apptainer_py.verbs import push

    digest = push.tag(image, name, fetching(options), environ)
    log.info(f'Image {image.partition(":")[2]} tagged "{name}".')
    return digest


def _push_to_library(
    path: str, uri: str, options: Mapping[str, Any], environ: Mapping[str, str]
) -> str:
    from apptainer_py.verbs import push

    def check() -> None:
        if not options["allow-unsigned"]:
            signatures.check_signed(path, environ)

    if options["annotation"]:
        raise UsageError(text="--annotation is for oras:// only")
    if options["allow-unsigned"]:
        log.warning("Skipping container verification")
    sent = push.push_to_library(
        path,
        uri,
        fetching(options),
        environ,
        description=str(options["description"]),
        check=check,
    )
    log.info("Upload complete" if sent else "The library has this image already")
    return ""


def _describe(root: str) -> str:
    from apptainer_py.verbs import inspect

    return inspect.inspect(root, inspect.Wanted(all=True)).text


def _by_keyword(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name.replace("-", "_"): value for name, value in options.items()}
