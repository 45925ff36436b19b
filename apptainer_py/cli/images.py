"""From the command lines of `pull`, `push`, `cache` and `registry` to their verbs."""

from __future__ import annotations

import os
import sys

from apptainer_py.base import log
from apptainer_py.base.errors import UsageError
from apptainer_py.cli.table import PROGRAM

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from apptainer_py.builds.fetching import Fetching
    from apptainer_py.builds.uris import Convert
    from apptainer_py.cache.store import Cache
    from apptainer_py.model.request import Parsed

_FETCHING = (
    "arch", "arch_variant", "authfile", "disable_cache", "docker_password", "docker_username",
    "library", "no_https", "tmpdir",
)  # fmt: skip
_PASSWORD_BYTES = 1 << 16
_SIGNALLED = 128


def _environment() -> dict[str, str]:
    return dict(os.environ)  # noqa: TID251 cli is where it is read


def fetching(parsed: Parsed) -> Fetching:
    """Return how the command line wants images to be fetched."""
    from apptainer_py.builds.fetching import Fetching

    options: dict[str, Any] = {
        name.replace("-", "_"): value for name, value in parsed.options.items()
    }
    return Fetching(**{name: options[name] for name in _FETCHING if name in options})


def _converter(how: Fetching, config_file: str) -> Convert:
    """Return what makes a SIF file of an image of layers."""

    def convert(path: str, uri: str, cache: Cache) -> None:
        from apptainer_py.base import build as facts
        from apptainer_py.builds import layered
        from apptainer_py.cli.build import environment
        from apptainer_py.verbs import build, inspect

        layered.register(how, cache)
        request = build.Request(
            target=path,
            spec=uri,
            environ=environment(),
            config_file=config_file or facts.CONFIG_FILE,
            force=True,
            tmpdir=how.tmpdir,
            announced=False,
        )

        def describe(root: str) -> str:
            return inspect.inspect(root, inspect.Wanted(all=True)).text

        build.build(request, describe)

    return convert


def start(parsed: Parsed, typed: Sequence[str]) -> int:
    """Fetch the image of a command line, then let the launcher start it as the file that it is.

    Raises:
        ApptainerError: it cannot be had.
    """
    from apptainer_py.base import build as facts
    from apptainer_py.builds import uris

    how, environ = fetching(parsed), _environment()
    # Nothing behind the image is an option of ours.
    place = len(typed) - len(parsed.arguments)
    uri = typed[place]
    convert = _converter(how, parsed.config_file)
    with uris.cache_for(how, environ) as cache:
        found = uris.fetch(uri, how, environ, cache, convert)
        before = _without_password(typed[:place], how.docker_password)
        words = [f"{facts.BINDIR}/{PROGRAM}", *before, found, *typed[place + 1 :]]
        if cache.passing:
            # Whoever waits outlives the launch, and takes the image away then.
            return _wait_for(words, environ)
    sys.stdout.flush()
    return os.execve(words[0], words, environ)


def _without_password(words: Sequence[str], password: str) -> list[str]:
    """Return options without what nobody needs any more, and every user of the machine sees."""
    option, kept = "--docker-password", list(words)
    for place, word in enumerate(words):
        if word == f"{option}={password}":
            kept[place] = f"{option}=-"
        elif place and word == password and words[place - 1] == option:
            kept[place] = "-"
    return kept


def _wait_for(words: list[str], environ: dict[str, str]) -> int:
    """Start a program and take its place: its signals, its status."""
    import signal

    child = os.posix_spawn(words[0], words, environ)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, lambda number, _frame: os.kill(child, number))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status if status >= 0 else _SIGNALLED - status


def pull(parsed: Parsed) -> int:
    """Fetch an image."""
    from apptainer_py.verbs import pull as verb

    *name, uri = parsed.arguments
    how = fetching(parsed)
    if name and parsed.options["name"]:
        raise UsageError(text="the name of the file is given twice")
    request = verb.Request(
        uri=uri,
        how=how,
        environ=_environment(),
        name="".join(name) or str(parsed.options["name"]),
        folder=str(parsed.options["dir"]),
        force=bool(parsed.options["force"]),
    )
    made = verb.pull(request, _converter(how, parsed.config_file))
    if uri.startswith("library:"):
        from apptainer_py.base.errors import ApptainerError
        from apptainer_py.cli import signing

        try:
            signing.check_signed(parsed, made)
        except ApptainerError as error:
            log.warning(str(error))
            log.warning("Skipping container verification")
    return 0


def push(parsed: Parsed) -> int:
    """Upload an image."""
    from apptainer_py.verbs import push as verb

    path, uri = parsed.arguments
    notes: Any = parsed.options["annotation"]
    if uri.startswith("library:"):
        return _push_to_library(parsed, path, uri)
    if parsed.options["description"]:
        raise UsageError(text="--description is for library:// only")
    digest = verb.push(path, uri, fetching(parsed), _environment(), notes)
    log.verbose(f"{uri} is {digest}")
    log.info("Upload complete")
    return 0


def _push_to_library(parsed: Parsed, path: str, uri: str) -> int:
    from apptainer_py.cli import signing
    from apptainer_py.verbs import push as verb

    if parsed.options["annotation"]:
        raise UsageError(text="--annotation is for oras:// only")
    check = None if parsed.options["allow-unsigned"] else signing.check_signed
    if check is None:
        log.warning("Skipping container verification")
    sent = verb.push_to_library(
        path,
        uri,
        fetching(parsed),
        _environment(),
        description=str(parsed.options["description"]),
        check=lambda: None if check is None else check(parsed, path),
    )
    log.info("Upload complete" if sent else "The library has this image already")
    return 0


def cache_list(parsed: Parsed) -> int:
    """List what is in the cache."""
    from apptainer_py.verbs import cache

    options: dict[str, Any] = dict(parsed.options)
    text = cache.cache_list(
        _environment(), options["type"], verbose=options["verbose"], as_json=options["json"]
    )
    sys.stdout.write(text)
    return 0


def cache_clean(parsed: Parsed) -> int:
    """Remove what is in the cache."""
    from apptainer_py.verbs import cache

    options: dict[str, Any] = dict(parsed.options)

    def sure(question: str) -> bool:
        if options["force"]:
            return True
        sys.stdout.write(f"{question}\nDo you want to continue? [y/N] ")
        sys.stdout.flush()
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    lines = cache.cache_clean(
        _environment(), options["type"], days=options["days"], dry_run=options["dry-run"], sure=sure
    )
    for line in lines:
        log.info(line)
    return 0


def registry_login(parsed: Parsed) -> int:
    """Keep an account."""
    from apptainer_py.registry.accounts import Account
    from apptainer_py.verbs import registry

    options = parsed.options
    name, password = str(options["username"]), str(options["password"])
    if options["password-stdin"]:
        if password:
            raise UsageError(text="--password and --password-stdin exclude each other")
        password = sys.stdin.read(_PASSWORD_BYTES).rstrip("\r\n")
    elif not password and sys.stdin.isatty():
        import getpass

        name = name or input("Username: ")
        password = getpass.getpass("Password / Token: ")
    file = registry.login(
        parsed.arguments[0],
        Account(username=name, password=password),
        _environment(),
        authfile=str(options["authfile"]),
        https=not options["no-https"],
    )
    log.info(f"Token stored in {file}")
    return 0


def registry_logout(parsed: Parsed) -> int:
    """Forget an account."""
    from apptainer_py.verbs import registry

    file = registry.logout(
        parsed.arguments[0], _environment(), authfile=str(parsed.options["authfile"])
    )
    log.info(f"Token removed from {file}")
    log.info("Logout succeeded")
    return 0


def registry_list(parsed: Parsed) -> int:
    """List registries with accounts."""
    from apptainer_py.verbs import registry

    sys.stdout.write(registry.listing(_environment(), as_json=bool(parsed.options["json"])))
    return 0
