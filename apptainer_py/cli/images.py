"""From the command lines of `pull`, `push`, `tag`, `cache` and `registry` to their verbs."""

from __future__ import annotations

import os
import sys

from apptainer_py.base import log
from apptainer_py.base.errors import UsageError
from apptainer_py.cli import child as children
from apptainer_py.cli import environment
from apptainer_py.cli.table import PROGRAM

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from apptainer_py.api.building import Surroundings
    from apptainer_py.model.request import Parsed

_PASSWORD_BYTES = 1 << 16


def _around(parsed: Parsed) -> Surroundings:
    from apptainer_py.api.building import Surroundings

    return Surroundings(environ=environment.of_caller(), config_file=parsed.config_file)


def _with_account(parsed: Parsed) -> dict[str, Any]:
    """Return the options, with the account that `--docker-login` asks for."""
    options: dict[str, Any] = dict(parsed.options)
    if options["docker-login"]:
        from apptainer_py.cli import ask

        options["docker-username"] = ask.ask("Enter Docker Username: ")
        options["docker-password"] = ask.ask_hidden("Enter Docker Password: ")
        if not options["docker-username"] or not options["docker-password"]:
            raise UsageError(text="--docker-login: no user name, or no password, was given")
    return options


def build(parsed: Parsed) -> int:
    """Build an image."""
    from apptainer_py.api import building

    target, spec = parsed.arguments
    around = _around(parsed).replace(ask=_new_passphrase)
    building.build_image(target, spec, _with_account(parsed), around)
    return 0


def _new_passphrase() -> str:
    """Return a passphrase that is typed, at a terminal twice.

    Raises:
        CannotEncrypt: it was not typed the same way again.
    """
    from apptainer_py.cli import ask
    from apptainer_py.crypto.sealing import CannotEncrypt

    typed = ask.ask_hidden("Enter encryption passphrase: ")
    if sys.stdin.isatty() and typed != ask.ask_hidden("Retype encryption passphrase: "):
        raise CannotEncrypt(reason="Invalid encryption passphrase: passphrases do not match")
    return typed


def start(parsed: Parsed, typed: Sequence[str]) -> int:
    """Fetch the image of a command line, then let the launcher start it as the file that it is.

    Raises:
        ApptainerError: it cannot be had.
    """
    from apptainer_py.api import building
    from apptainer_py.base import build as facts
    from apptainer_py.builds import uris

    how, around = building.fetching(_with_account(parsed)), _around(parsed)
    environ = dict(around.environ)
    # Nothing behind the image is an option of ours.
    place = len(typed) - len(parsed.arguments)
    uri = typed[place]
    convert = building.converter(how, around)
    with uris.cache_for(how, environ) as cache:
        found = uris.fetch(uri, how, environ, cache, convert)
        before = _without_password(typed[:place], how.docker_password)
        words = [f"{facts.BINDIR}/{PROGRAM}", *before, found, *typed[place + 1 :]]
        if cache.passing:
            # Whoever waits outlives the launch, and takes the image away then.
            child = os.posix_spawn(words[0], words, environ)
            return children.as_of_a_shell(children.wait_for(child))
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


def pull(parsed: Parsed) -> int:
    """Fetch an image."""
    from apptainer_py.api import building

    *name, uri = parsed.arguments
    if name and parsed.options["name"]:
        raise UsageError(text="the name of the file is given twice")
    file = "".join(name) or str(parsed.options["name"])
    building.pull_image(uri, file, _with_account(parsed), _around(parsed))
    return 0


def push(parsed: Parsed) -> int:
    """Upload an image."""
    from apptainer_py.api import building

    path, uri = parsed.arguments
    building.push_image(path, uri, _with_account(parsed), environment.of_caller())
    return 0


def tag(parsed: Parsed) -> int:
    """Give an image of a registry one more tag."""
    from apptainer_py.api import building

    image, name = parsed.arguments
    building.tag_image(image, name, _with_account(parsed), environment.of_caller())
    return 0


def cache_list(parsed: Parsed) -> int:
    """List what is in the cache."""
    from apptainer_py.verbs import cache

    options: dict[str, Any] = dict(parsed.options)
    text = cache.cache_list(
        environment.of_caller(),
        options["type"],
        verbose=options["verbose"],
        as_json=options["json"],
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
        environment.of_caller(),
        options["type"],
        days=options["days"],
        dry_run=options["dry-run"],
        sure=sure,
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
        environment.of_caller(),
        authfile=str(options["authfile"]),
        https=not options["no-https"],
    )
    log.info(f"Token stored in {file}")
    return 0


def registry_logout(parsed: Parsed) -> int:
    """Forget an account."""
    from apptainer_py.verbs import registry

    file = registry.logout(
        parsed.arguments[0], environment.of_caller(), authfile=str(parsed.options["authfile"])
    )
    log.info(f"Token removed from {file}")
    log.info("Logout succeeded")
    return 0


def registry_list(parsed: Parsed) -> int:
    """List registries with accounts."""
    from apptainer_py.verbs import registry

    sys.stdout.write(
        registry.listing(environment.of_caller(), as_json=bool(parsed.options["json"]))
    )
    return 0
