"""The payload's environment, and the script with which the image's own shell builds it."""

from __future__ import annotations

import os

from apptainer_py.base import log
from apptainer_py.base.errors import ApptainerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from apptainer_py.model.request import ActionRequest

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PROXIES = ("http_proxy", "https_proxy", "ftp_proxy", "all_proxy", "no_proxy")
_KEPT_CLEAN = ("TERM", *_PROXIES, *(name.upper() for name in _PROXIES))
_NEVER_FORWARDED = ("HOME", "PATH", "LD_LIBRARY_PATH")
_OWN_PREFIXES = ("APPTAINER_", "SINGULARITY_", "APPTAINERENV_", "SINGULARITYENV_")
_NOT_OVERRIDABLE = (
    "HOME",
    "APPTAINER_SHELL",
    "SINGULARITY_SHELL",
    "APPTAINER_APPNAME",
    "SINGULARITY_APPNAME",
)
_PATH_EDITS = (
    "PREPEND_PATH", "APPEND_PATH", "PATH", "PREPEND_LD_LIBRARY_PATH", "APPEND_LD_LIBRARY_PATH",
)  # fmt: skip
_LIBRARY_PATHS = (
    ("PREPEND_LD_LIBRARY_PATH", '"$__path${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"'),
    ("APPEND_LD_LIBRARY_PATH", '"${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$__path"'),
)
# Bash has these for itself, and ends where one is assigned; other shells only pass them on.
OF_BASH = ("UID", "GID")
_OF_THE_SHELL = frozenset(
    (*OF_BASH, "EUID", "PPID", "OPTIND", "SHELLOPTS", "BASHOPTS", "BASH_VERSINFO", "BASHPID")
)
# What the image's own environment files find set; everything else comes after them.
EARLY = (
    "HOME",
    "APPTAINER_NAME",
    "SINGULARITY_NAME",
    "APPTAINER_CONTAINER",
    "SINGULARITY_CONTAINER",
    "APPTAINER_SHELL",
    "SINGULARITY_SHELL",
    "SINGULARITY_APPNAME",
)
_ENV_FILE_BYTES = 1 << 20


class EnvFileUnreadable(ApptainerError):
    """An --env-file that cannot be used."""

    message = (
        "while setting environment: while processing {path}: could not read environment file "
        '"{path}": {reason}'
    )


class Environment:
    """What reaches the payload: forwarded as it is, and injected after the image's own files."""

    __slots__ = ("fixed", "forwarded", "injected", "last", "path_edits")

    def __init__(self) -> None:
        self.forwarded: dict[str, str] = {}
        self.injected: dict[str, str] = {}
        # Injected before those, and never evaluated.
        self.fixed: dict[str, str] = {}
        self.last: list[str] = []
        self.path_edits: dict[str, str] = {}


def is_name(name: str) -> bool:
    """Return whether a shell can hold a variable of that name, and leaves it to others."""
    fit = name.isascii() and name.replace("_", "a").isalnum() and not name[0].isdigit()
    return fit and name not in _OF_THE_SHELL


def is_of_the_shell(name: str) -> bool:
    """Return whether shells have a variable of that name for themselves."""
    return name in _OF_THE_SHELL


def collect(action: ActionRequest, environment: Mapping[str, str]) -> Environment:
    """Sort the caller's environment and the options into what is forwarded and what is injected."""
    result = Environment()
    overrides = _prefixed(environment)
    for name, value in environment.items():
        if name.startswith(_OWN_PREFIXES) or name in _NEVER_FORWARDED or name in action.no_env:
            continue
        if not action.cleanenv or name in _KEPT_CLEAN:
            result.forwarded[name] = value
    if action.cleanenv:
        result.forwarded["LANG"] = "C"
    elif "PATH" in environment:
        result.forwarded["USER_PATH"] = environment["PATH"]
    for path in action.env_file:
        overrides.update(_read_env_file(path, environment))
    for name, value in action.env:
        if name in overrides and overrides[name] != value and action.env_file:
            log.warning(f"Ignored environment file variable {name}: override from --env")
        overrides[name] = value
    for name, value in overrides.items():
        _place(result, name, value)
    return result


def _prefixed(environment: Mapping[str, str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in environment.items():
        if name.startswith("APPTAINERENV_"):
            found[name[13:]] = value
    for name, value in environment.items():
        if not name.startswith("SINGULARITYENV_"):
            continue
        key = name[15:]
        if key not in found:
            log.info(
                f"Environment variable SINGULARITYENV_{key} is set, but APPTAINERENV_{key} is"
                " preferred"
            )
            found[key] = value
        elif found[key] != value:
            log.warning(f"{name} and APPTAINERENV_{key} have different values, using the latter")
            log.warning(
                f"Skipping environment variable [{name}={value}], {key} is already overridden "
                f"with different value [{found[key]}]"
            )
    return found


def _place(result: Environment, name: str, value: str) -> None:
    if name in _NOT_OVERRIDABLE:
        log.warning(
            f"Overriding {name} environment variable with APPTAINERENV_{name} is not permitted"
        )
    elif name in _PATH_EDITS:
        result.path_edits[name] = value
    elif name == "LD_LIBRARY_PATH":
        if value:
            result.injected[name] = f"{value}:/.singularity.d/libs"
    elif is_name(name):
        result.injected[name] = value
        # An empty one would count for the image's own, which removes the host's.
        result.forwarded.pop(name, None)
    elif name:
        log.verbose(f"Environment variable {name} is not forwarded: no shell can hold that name")
    else:
        log.warning(f"Ignore environment variable ={value}: variable name missing")


def _read_env_file(path: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Evaluate an --env-file, which sees the caller's environment, and return what it sets."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as source:
            text = source.read(_ENV_FILE_BYTES + 1)
    except OSError as error:
        reason = f"open {path}: {(error.strerror or '').lower()}"
        raise EnvFileUnreadable(path=path, reason=reason) from None
    if len(text) > _ENV_FILE_BYTES or b"\0" in text:
        raise EnvFileUnreadable(path=path, reason="it is larger than 1 MiB, or has a NUL in it")
    from apptainer_py.engines.apptainer import envfile

    try:
        return envfile.evaluate(text, environment)
    except envfile.Failed as error:
        raise EnvFileUnreadable(path=path, reason=str(error)) from None


def own_variables(action: ActionRequest, image: str, home: str, binds: str) -> dict[str, str]:
    """Return what the runtime itself says about the container."""
    name = os.path.basename(image.rstrip("/"))
    found = {
        "APPTAINER_APPNAME": action.app,
        "APPTAINER_BIND": binds,
        "APPTAINER_COMMAND": action.command,
        "APPTAINER_CONTAINER": image,
        "APPTAINER_ENVIRONMENT": "/.singularity.d/env/91-environment.sh",
        "APPTAINER_NAME": name,
        "SINGULARITY_BIND": binds,
        "SINGULARITY_CONTAINER": image,
        "SINGULARITY_ENVIRONMENT": "/.singularity.d/env/91-environment.sh",
        "SINGULARITY_NAME": name,
    }
    if action.no_eval:
        found["APPTAINER_NO_EVAL"] = found["SINGULARITY_NO_EVAL"] = "1"
    if action.instance:
        found["APPTAINER_INSTANCE"] = found["SINGULARITY_INSTANCE"] = action.instance
    if action.shell:
        found["APPTAINER_SHELL"] = found["SINGULARITY_SHELL"] = action.shell
    if action.app:
        found["SINGULARITY_APPNAME"] = action.app
    found["HOME"] = home
    return found


def quoted(value: str) -> str:
    """Return a value as one word of the shell's language."""
    return "'" + value.replace("'", "'\\''") + "'"


def _evaluated(value: str) -> str:
    """Return the value between double quotes, which none of its own characters ends."""
    done = ['"']
    escaped = False
    for character in value:
        done.append('\\"' if character == '"' and not escaped else character)
        escaped = character == "\\" and not escaped
    return "".join((*done, '\\"' if escaped else '"'))


def _assignment(name: str, value: str, *, evaluate: bool) -> str:
    # Quoted twice: a value that is no shell language must not take the whole script with it.
    return f"__set {name} {quoted(_evaluated(value) if evaluate else quoted(value))}"


def injection(environment: Environment, *, evaluate: bool) -> str:
    """Return shell lines that set the injected variables, evaluated inside the container or not."""
    fixed = [_assignment(name, text, evaluate=False) for name, text in environment.fixed.items()]
    return "\n".join(
        fixed
        + [
            _assignment(name, value, evaluate=evaluate)
            for name, value in environment.injected.items()
        ]
    )


def path_lines(environment: Environment, *, evaluate: bool) -> str:
    """Return shell lines for PATH: they come last, so that the image cannot undo them."""
    edits = environment.path_edits
    lines = []
    for edit, form in (("PREPEND_PATH", '"$__path:$PATH"'), ("APPEND_PATH", '"$PATH:$__path"'),
                       ("PATH", '"$__path"')):  # fmt: skip
        if edits.get(edit):
            lines.append(_assignment("__path", edits[edit], evaluate=evaluate))
            lines.append(f"PATH={form}")
    for edit, form in _LIBRARY_PATHS:
        if edits.get(edit):
            lines.append(_assignment("__path", edits[edit], evaluate=evaluate))
            lines.append(f"export LD_LIBRARY_PATH={form}")
    if lines:
        lines.append("unset __path")
    return "\n".join([*lines, "export PATH", *environment.last])
