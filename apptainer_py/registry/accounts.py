"""Who one is to a registry: files of Docker's form, and helpers that keep the secrets elsewhere."""

from __future__ import annotations

import base64
import binascii
import json
import os
import stat

from apptainer_py.base.errors import ApptainerError
from apptainer_py.base.record import Record
from apptainer_py.registry.reference import DOCKER_ACCOUNT, DOCKER_HUB

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

_FILE_BYTES = 1 << 20
_HELPER_S = 60
# What a helper gives as the user's name where the secret is an identity token.
_TOKEN_USER = "<token>"


class AccountError(ApptainerError):
    """A file or helper with accounts cannot be used."""

    message = "{file}: {reason}"


class Account(Record):
    """A name and a password, or an identity token."""

    username: str = ""
    password: str = ""
    token: str = ""

    def __repr__(self) -> str:
        return f"Account({self.username!r})"


def key_of(host: str) -> str:
    """Return the name under which files keep the account of a registry."""
    return DOCKER_ACCOUNT if host == DOCKER_HUB else host


def files(environ: Mapping[str, str], authfile: str = "") -> list[str]:
    """Return where accounts are looked for, the first first."""
    if authfile:
        return [authfile]
    home = environ.get("HOME", "") or os.path.expanduser("~").removeprefix("~")
    own = environ.get("APPTAINER_CONFIGDIR", "") or f"{home}/.apptainer"
    docker = environ.get("DOCKER_CONFIG", "") or f"{home}/.docker"
    return [f"{own}/docker-config.json", f"{docker}/config.json"]


def find(host: str, environ: Mapping[str, str], authfile: str = "") -> Account | None:
    """Return the account of a registry that the files know.

    Raises:
        AccountError: a file cannot be read, or its helper failed.
    """
    for file in files(environ, authfile):
        content = read(file, needed=bool(authfile))
        found = _of_helper(content, host, file, environ) or _of_file(content, host, file)
        if found is not None:
            return found
    return None


def read(file: str, *, needed: bool = False) -> dict[str, Any]:
    """Return what a file holds; nothing where there is none and none is needed.

    Raises:
        AccountError: it is no such file.
    """
    try:
        with open(file, encoding="utf-8") as stream:
            text = stream.read(_FILE_BYTES + 1)
    except FileNotFoundError:
        if needed:
            raise AccountError(file=file, reason="there is no such file") from None
        return {}
    except (OSError, UnicodeDecodeError) as error:
        reason = (getattr(error, "strerror", "") or "it is no text").lower()
        raise AccountError(file=file, reason=reason) from None
    try:
        content = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        raise AccountError(file=file, reason="it is no JSON") from None
    if not isinstance(content, dict):
        raise AccountError(file=file, reason="it is no JSON object")
    return content


def entries(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the accounts of a file by their keys."""
    auths = content.get("auths")
    return auths if isinstance(auths, dict) else {}


def _of_file(content: Mapping[str, Any], host: str, file: str) -> Account | None:
    auths = entries(content)
    wanted = key_of(host)
    for key in (wanted, f"https://{wanted}", f"http://{wanted}", f"https://{wanted}/v2/"):
        if isinstance(auths.get(key), dict):
            return _decoded(auths[key], file)
    return None


def _decoded(entry: Mapping[str, Any], file: str) -> Account | None:
    token = entry.get("identitytoken")
    if isinstance(token, str) and token:
        return Account(token=token)
    auth = entry.get("auth")
    if not isinstance(auth, str) or not auth:
        return None
    try:
        text = base64.b64decode(auth, validate=True).decode("utf-8")
    except (binascii.Error, ValueError):
        raise AccountError(file=file, reason="an entry's `auth` is not what it should be") from None
    name, colon, password = text.partition(":")
    if not colon:
        raise AccountError(file=file, reason="an entry's `auth` is not what it should be")
    return Account(username=name, password=password.rstrip("\0"))


def _of_helper(
    content: Mapping[str, Any], host: str, file: str, environ: Mapping[str, str]
) -> Account | None:
    helpers = content.get("credHelpers")
    helper = helpers.get(key_of(host)) if isinstance(helpers, dict) else None
    helper = helper or content.get("credsStore")
    if not isinstance(helper, str) or not helper:
        return None
    if "/" in helper or "\0" in helper:
        raise AccountError(file=file, reason=f"{helper!r} is no name of a credential helper")
    import subprocess

    program = f"docker-credential-{helper}"
    try:
        done = subprocess.run(
            [program, "get"],
            input=f"{key_of(host)}\n".encode(),
            capture_output=True,
            env=dict(environ),
            timeout=_HELPER_S,
            check=False,
        )
    except FileNotFoundError:
        raise AccountError(file=file, reason=f"{program} is not installed") from None
    except (OSError, subprocess.TimeoutExpired):
        raise AccountError(file=file, reason=f"{program} cannot be run, or does not end") from None
    if done.returncode:
        # It has none: what else it could mean is not standardised.
        return None
    try:
        said = json.loads(done.stdout)
        name, secret = said["Username"], said["Secret"]
    except (ValueError, KeyError, TypeError):
        raise AccountError(file=file, reason=f"the answer of {program} is none") from None
    if name == _TOKEN_USER:
        return Account(token=str(secret))
    return Account(username=str(name), password=str(secret))


# -- changes


def store(file: str, host: str, account: Account) -> None:
    """Keep an account in a file, which only its owner may read.

    Raises:
        AccountError: it cannot be written.
    """
    content = read(file)
    auths = dict(entries(content))
    pair = f"{account.username}:{account.password}".encode()
    auths[key_of(host)] = {"auth": base64.b64encode(pair).decode()}
    _write(file, {**content, "auths": auths})


def forget(file: str, host: str) -> bool:
    """Take an account out of a file; return whether it was there.

    Raises:
        AccountError: it cannot be written.
    """
    content = read(file)
    auths = dict(entries(content))
    if auths.pop(key_of(host), None) is None:
        return False
    _write(file, {**content, "auths": auths})
    return True


def _write(file: str, content: Mapping[str, Any]) -> None:
    write_private(file, (json.dumps(content, indent="\t") + "\n").encode())


def write_private(file: str, data: bytes, *, for_all: bool = False) -> None:
    """Replace a file as a whole; a link is followed to its file, whose mode is kept or made less.

    Raises:
        AccountError: it cannot be written.
    """
    target = os.path.realpath(file)
    made = f"{target}.{os.getpid()}.new"
    most = 0o644 if for_all else 0o600
    try:
        os.makedirs(os.path.dirname(target), mode=0o755 if for_all else 0o700, exist_ok=True)
        try:
            mode = stat.S_IMODE(os.stat(target).st_mode) & most
        except FileNotFoundError:
            mode = most
        fd = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as stream:
            # Whatever the umask: what is for all is read by all.
            os.fchmod(fd, mode)
            stream.write(data)
            stream.flush()
            os.fsync(fd)
        os.rename(made, target)
    except OSError as error:
        try:
            os.unlink(made)
        except OSError:
            pass
        raise AccountError(file=file, reason=(error.strerror or "").lower()) from None
