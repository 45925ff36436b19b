"""`registry login|logout|list`: accounts of OCI registries, in the files of Docker's tools."""

from __future__ import annotations

from apptainer_py.base.errors import ApptainerError
from apptainer_py.registry import accounts, reference
from apptainer_py.registry.client import Registry

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

_TRANSPORTS = ("docker", "oras")


class CannotLogIn(ApptainerError):
    message = "while login to {uri}: {reason}"


class CannotLogOut(ApptainerError):
    message = "while logout from {uri}: {reason}"


def login(
    uri: str,
    account: accounts.Account,
    environ: Mapping[str, str],
    *,
    authfile: str,
    https: bool = True,
) -> str:
    """Keep an account which the registry accepts; return the file.

    Raises:
        ApptainerError: it is not accepted, or cannot be kept.
    """
    host = _host(uri, CannotLogIn)
    if not account.username or not account.password:
        raise CannotLogIn(uri=uri, reason="a user name and a password are needed")
    server = reference.Reference(host=host, repository="none").server
    with Registry(server, account=account, https=https, environ=environ) as asked:
        asked.check()
    file = accounts.files(environ, authfile)[-1]
    accounts.store(file, host, account)
    return file


def logout(uri: str, environ: Mapping[str, str], *, authfile: str) -> str:
    """Forget an account; return the file that it was in.

    Raises:
        ApptainerError: there is none.
    """
    host = _host(uri, CannotLogOut)
    gone = [file for file in accounts.files(environ, authfile) if accounts.forget(file, host)]
    if not gone:
        raise CannotLogOut(uri=uri, reason="there is no account for it")
    return gone[0]


def listing(environ: Mapping[str, str], *, as_json: bool) -> str:
    """Return the registries that accounts are kept for, never the accounts."""
    hosts: dict[str, str] = {}
    for file in accounts.files(environ):
        for key in accounts.entries(accounts.read(file)):
            name = reference.DOCKER_HUB if key == reference.DOCKER_ACCOUNT else key
            hosts.setdefault(name, file)
    if as_json:
        import json

        rows = [{"uri": f"docker://{name}", "file": file} for name, file in hosts.items()]
        return json.dumps(rows, indent=4) + "\n"
    width = max((len(name) for name in hosts), default=0) + len("docker://") + 2
    lines = [f"{'URI':<{width}}FILE"]
    lines += [f"{'docker://' + name:<{width}}{file}" for name, file in sorted(hosts.items())]
    return "\n".join(lines) + "\n"


def _host(uri: str, wrong: type[ApptainerError]) -> str:
    transport, colon, rest = uri.partition("://")
    if not colon or transport not in _TRANSPORTS:
        raise wrong(uri=uri, reason="transport is not supported")
    host = rest.partition("/")[0]
    parsed = reference.parse(f"{host}/x", docker=False)
    return parsed.host
