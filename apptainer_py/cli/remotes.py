"""From the command lines of `remote`, `keyserver`, `search` and `delete` to their verbs."""

from __future__ import annotations

import os
import sys

from apptainer_py.base import log
from apptainer_py.base.errors import ApptainerError, UsageError
from apptainer_py.cli import ask, environment

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from apptainer_py.model.request import Parsed
    from apptainer_py.verbs.remote import File

_PASSWORD_BYTES = 1 << 16


class TokenInvalid(ApptainerError):
    message = "the endpoint does not take the token that is kept for it"
    hint = "log in again: `{program} remote login`"


def _path(parsed: Parsed) -> str:
    from apptainer_py.registry import remotes as files

    return str(parsed.options.get("config") or "") or files.user_file(environment.of_caller())


def _file(parsed: Parsed) -> File:
    """Return the file that a command is about."""
    from apptainer_py.registry import remotes as files
    from apptainer_py.verbs import remote

    is_system = bool(parsed.options.get("global") or parsed.options.get("exclusive"))
    if not is_system:
        return remote.File(path=_path(parsed))
    if parsed.options.get("config"):
        raise UsageError(text="--config and --global exclude each other")
    _check_root("global endpoint configuration file")
    return remote.File(path=files.system_file(), is_system=True)


def _check_root(what: str) -> None:
    from apptainer_py.registry import remotes as files

    if os.geteuid() != 0:
        raise files.NotYourFile(what=what)


def _name(parsed: Parsed) -> str:
    return "".join(parsed.arguments)


def _add(parsed: Parsed) -> int:
    from apptainer_py.verbs import remote

    options = parsed.options
    name, address = parsed.arguments
    file = _file(parsed)
    remote.add(
        file,
        name,
        address,
        insecure=bool(options["insecure"]),
        chosen=not options["no-default"],
    )
    log.info(f'Remote "{name}" added.')
    if options["no-login"]:
        return 0
    if file.is_system:
        log.info("Global option detected. Will not automatically log into remote.")
        return 0
    return _log_in(file, name, str(options["tokenfile"]))


def _log_in(file: File, name: str, tokenfile: str, given: str = "") -> int:
    from apptainer_py.verbs import remote

    token = remote.token_in(tokenfile) if tokenfile else given or _asked_token(file, name)
    if not token:
        return 0
    remote.login(file, name, token, environment.of_caller())
    log.info("Access Token Verified!")
    log.info(f"Token stored in {file.path}")
    return 0


def _asked_token(file: File, name: str) -> str:
    from apptainer_py.verbs import remote

    if remote.token_of(file, name):
        question = "An access token is already set for this remote. Replace it? [y/N] "
        if ask.ask(question).strip().lower() not in ("y", "yes"):
            return ""
    place = remote.place_for_tokens(file, name)
    sys.stdout.write(f"Generate an access token at {place}, and paste it here.\n")
    sys.stdout.write("Token entered will be hidden for security.\n")
    return ask.ask_hidden("Access Token: ").strip()


def _login(parsed: Parsed) -> int:
    name = _name(parsed)
    if "://" in name:
        return _login_elsewhere(parsed, name)
    options = parsed.options
    if options["username"]:
        raise UsageError(text="--username: a remote takes a token, and no name")
    if options["insecure"]:
        raise UsageError(text="--insecure: a remote is added with it, or without")
    if options["tokenfile"] and (options["password"] or options["password-stdin"]):
        raise UsageError(text="--tokenfile and --password exclude each other")
    return _log_in(_file(parsed), name, str(options["tokenfile"]), _password(parsed))


def _login_elsewhere(parsed: Parsed, uri: str) -> int:
    """Do what `remote login` did before registries and key servers had commands of their own."""
    if parsed.options["tokenfile"]:
        raise UsageError(text="--tokenfile is for remotes, not for registries or key servers")
    command = "registry login" if uri.startswith(("docker:", "oras:")) else "keyserver login"
    log.warning(f"'remote login' is deprecated for registries or keyservers; use '{command}'")
    if command == "keyserver login":
        return _keyserver_login(parsed)
    from apptainer_py.cli import images

    more = {"authfile": "", "no-https": parsed.options["insecure"]}
    return images.registry_login(parsed.replace(options={**parsed.options, **more}))


def _password(parsed: Parsed) -> str:
    """Return the password of the options, "" where there is none."""
    password = str(parsed.options["password"])
    if parsed.options["password-stdin"]:
        if password:
            raise UsageError(text="--password and --password-stdin exclude each other")
        password = sys.stdin.read(_PASSWORD_BYTES).rstrip("\r\n")
    return password


def _logout(parsed: Parsed) -> int:
    from apptainer_py.verbs import remote

    name = _name(parsed)
    if "://" in name:
        command = "registry logout" if name.startswith(("docker:", "oras:")) else "keyserver logout"
        log.warning(f"'remote logout' is deprecated for registries or keyservers; use '{command}'")
        if command == "keyserver logout":
            return _keyserver_logout(parsed)
        from apptainer_py.cli import images

        return images.registry_logout(parsed.replace(options={**parsed.options, "authfile": ""}))
    remote.logout(_file(parsed), name)
    log.info("Logout succeeded")
    return 0


def _remove(parsed: Parsed) -> int:
    from apptainer_py.verbs import remote

    remote.remove(_file(parsed), _name(parsed))
    log.info(f'Remote "{_name(parsed)}" removed.')
    return 0


def _use(parsed: Parsed) -> int:
    from apptainer_py.verbs import remote

    remote.use(_file(parsed), _name(parsed), exclusive=bool(parsed.options["exclusive"]))
    log.info(f'Remote "{_name(parsed)}" now in use.')
    return 0


def _list(parsed: Parsed) -> int:
    from apptainer_py.verbs import remote

    sys.stdout.write(remote.listing(_file(parsed), as_json=bool(parsed.options["json"])))
    return 0


def _status(parsed: Parsed) -> int:
    from apptainer_py.verbs import remote

    name = _name(parsed)
    log.info(f"Checking status of {f'remote: {name}' if name else 'default remote.'}")
    text, is_valid = remote.status(
        _file(parsed), name, environment.of_caller(), as_json=bool(parsed.options["json"])
    )
    sys.stdout.write(text)
    if not is_valid:
        raise TokenInvalid(program="apptainer-py")
    return 0


def _get_login_password(parsed: Parsed) -> int:
    from apptainer_py.verbs import remote

    sys.stdout.write(f"{remote.login_password(environment.of_caller())}\n")
    return 0


# -- key servers


def _keyserver_add(parsed: Parsed) -> int:
    from apptainer_py.verbs import keyserver

    _check_root("keyserver configuration")
    _tell_of_command(parsed)
    *name, uri = parsed.arguments
    order = parsed.options["order"]
    keyserver.add(
        "".join(name),
        uri,
        environment.of_caller(),
        order=order if isinstance(order, int) and order != -1 else None,
        insecure=bool(parsed.options["insecure"]),
    )
    return 0


def _keyserver_remove(parsed: Parsed) -> int:
    from apptainer_py.verbs import keyserver

    _check_root("keyserver configuration")
    _tell_of_command(parsed)
    *name, uri = parsed.arguments
    keyserver.remove("".join(name), uri, environment.of_caller())
    return 0


def _tell_of_command(parsed: Parsed) -> None:
    command = parsed.command.removeprefix("remote ").removesuffix("-keyserver")
    if command != parsed.command:
        log.warning(f"'{parsed.command}' is deprecated; use 'keyserver {command}'")


def _keyserver_login(parsed: Parsed) -> int:
    from apptainer_py.registry.accounts import Account
    from apptainer_py.verbs import keyserver

    name, password = str(parsed.options["username"]), _password(parsed)
    if not password and not parsed.options["password-stdin"]:
        password = ask.ask_hidden("Password / Token: ")
    account = Account(username=name, password=password)
    keyserver.login(_path(parsed), _name(parsed), account, environment.of_caller())
    log.info(f"Token stored in {_path(parsed)}")
    return 0


def _keyserver_logout(parsed: Parsed) -> int:
    from apptainer_py.verbs import keyserver

    keyserver.logout(_path(parsed), _name(parsed))
    log.info("Logout succeeded")
    return 0


def _keyserver_list(parsed: Parsed) -> int:
    from apptainer_py.verbs import keyserver

    as_json = bool(parsed.options["json"])
    text = keyserver.listing(_path(parsed), _name(parsed), environment.of_caller(), as_json=as_json)
    sys.stdout.write(text)
    return 0


# -- libraries


def _arch(parsed: Parsed) -> str:
    from apptainer_py.image import arch

    return str(parsed.options["arch"]) or arch.host_arch()


def _search(parsed: Parsed) -> int:
    from apptainer_py.verbs import library

    options = parsed.options
    text = library.search(
        _name(parsed),
        environment.of_caller(),
        arch=_arch(parsed),
        given=str(options["library"]),
        signed=bool(options["signed"]),
        as_json=bool(options["json"]),
    )
    sys.stdout.write(text)
    return 0


def _delete(parsed: Parsed) -> int:
    from apptainer_py.verbs import library

    options, machine = parsed.options, _arch(parsed)
    name = library.parsed(_name(parsed))
    if not options["force"]:
        question = f"Are you sure you want to delete {name} ({machine}) [y/N] "
        if ask.ask(question).strip().lower() not in ("y", "yes"):
            return 0
    library.delete(
        name,
        environment.of_caller(),
        arch=machine,
        given=str(options["library"]),
        https=not options["no-https"],
    )
    log.info(f"Image {name} ({machine}) deleted.")
    return 0


COMMANDS: dict[str, Callable[[Parsed], int]] = {
    "delete": _delete,
    "keyserver add": _keyserver_add,
    "keyserver list": _keyserver_list,
    "keyserver login": _keyserver_login,
    "keyserver logout": _keyserver_logout,
    "keyserver remove": _keyserver_remove,
    "remote add": _add,
    "remote add-keyserver": _keyserver_add,
    "remote get-login-password": _get_login_password,
    "remote list": _list,
    "remote login": _login,
    "remote logout": _logout,
    "remote remove": _remove,
    "remote remove-keyserver": _keyserver_remove,
    "remote status": _status,
    "remote use": _use,
    "search": _search,
}
