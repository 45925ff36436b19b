"""The commands that start no container: from a parsed command line to a verb, and its text out."""

from __future__ import annotations

import sys

from apptainer_py.base import log
from apptainer_py.base.errors import UsageError
from apptainer_py.cli.table import GROUPS, PROGRAM

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from apptainer_py.model.request import Parsed

_NEED_MORE = (
    "cache", "capability", "instance", "key", "keyserver", "overlay", "plugin",
    "registry", "remote",
)  # fmt: skip
_CONFIG_OPERATIONS = ("set", "unset", "get", "reset")


def run(parsed: Parsed) -> int:
    """Do what `parsed` asks for; return the exit status.

    Raises:
        ApptainerError: it cannot be done.
    """
    if parsed.command in _NEED_MORE and not parsed.help:
        raise UsageError(text="invalid command")
    if parsed.help or (parsed.command in GROUPS):
        from apptainer_py.cli import help as texts

        sys.stdout.write(texts.full(parsed.command))
        return 0
    known = _COMMANDS.get(parsed.command)
    if known is None:
        from apptainer_py.cli import plugins, signing

        known = {**signing.COMMANDS, **plugins.COMMANDS}[parsed.command]
    return known(parsed)


def _help(parsed: Parsed) -> int:
    from apptainer_py.cli import help as texts

    sys.stdout.write(texts.topic(parsed.arguments))
    return 0


def _version(parsed: Parsed) -> int:
    from apptainer_py.base import build

    start = f"{PROGRAM} version " if parsed.options.get("version") else ""
    sys.stdout.write(f"{start}{build.VERSION}\n")
    return 0


def _completion(parsed: Parsed) -> int:
    from apptainer_py.cli import complete

    shell = parsed.command.rpartition(" ")[2]
    bare = bool(parsed.options["no-descriptions"])
    sys.stdout.write(complete.script(shell, descriptions=not bare))
    return 0


def _confgen(parsed: Parsed) -> int:
    from apptainer_py.verbs import config

    *old, new = parsed.arguments
    config.confgen(new, "".join(old))
    return 0


def _buildcfg(parsed: Parsed) -> int:
    from apptainer_py.base import build

    values = {
        "PACKAGE_NAME": PROGRAM,
        "PACKAGE_VERSION": build.VERSION,
        "BUILD_ID": build.BUILD_ID,
        "PREFIX": build.PREFIX,
        "BINDIR": build.BINDIR,
        "LIBEXECDIR": build.LIBEXECDIR,
        "LIBDIR": build.LIBDIR,
        "SYSCONFDIR": build.SYSCONFDIR.rpartition("/")[0] or "/",
        "APPTAINER_CONFDIR": build.SYSCONFDIR,
        "SESSIONDIR": build.SESSIONDIR,
        "APPTAINER_CONF_FILE": build.CONFIG_FILE,
        "PLUGIN_ROOTDIR": f"{build.LIBEXECDIR}/plugins",
        "APPTAINER_SUID_INSTALL": int(build.SETUID),
        "PYTHON": build.PYTHON,
        "LIBPYTHON": build.LIBPYTHON,
    }
    if not parsed.arguments:
        sys.stdout.write("".join(f"{name}={value}\n" for name, value in values.items()))
    elif parsed.arguments[0] in values:
        sys.stdout.write(f"{values[parsed.arguments[0]]}\n")
    else:
        raise UsageError(text=f'no variable named "{parsed.arguments[0]}"')
    return 0


def _inspect(parsed: Parsed) -> int:
    from apptainer_py.api import inspecting

    found = inspecting.inspect(parsed.arguments[0], parsed.options)
    sys.stdout.write(found.text)
    for warning in found.warnings:
        log.warning(warning)
    return 0


def _instance_list(parsed: Parsed) -> int:
    from apptainer_py.api import instances
    from apptainer_py.verbs import instance_list

    options = parsed.options
    form = {"as_json": bool(options["json"]), "with_logs": bool(options["logs"])}
    instance_list.check_form(**form)
    found = instances.found(
        "".join(parsed.arguments), user=str(options["user"]), all=bool(options["all"])
    )
    sys.stdout.write(instance_list.shown(found, **form))
    return 0


def _instance_stats(parsed: Parsed) -> int:
    import os

    from apptainer_py.cli.environment import of_caller
    from apptainer_py.verbs import instance_stats

    options = parsed.options
    pages = instance_stats.instance_stats(
        parsed.arguments[0],
        of_caller(),
        user=str(options["user"]),
        uid=os.getuid(),
        as_json=bool(options["json"]),
        once=bool(options["no-stream"]),
        clear=sys.stdout.isatty(),
    )
    for page in pages:
        sys.stdout.write(page)
        sys.stdout.flush()
    return 0


def _instance_stop(parsed: Parsed) -> int:
    from apptainer_py.api import instances

    options: dict[str, Any] = dict(parsed.options)
    instances.stop("".join(parsed.arguments), **options)
    return 0


def _run_help(parsed: Parsed) -> int:
    from apptainer_py.verbs import inspect

    app = str(parsed.options["app"])
    text = inspect.help_text(parsed.arguments[0], app)
    sys.stdout.write(text or "No help sections were defined for this image\n")
    return 0


def _sif_list(parsed: Parsed) -> int:
    from apptainer_py.verbs import sif

    shown = sif.sif_list_json if parsed.options["json"] else sif.sif_list
    sys.stdout.write(shown(parsed.arguments[0]))
    return 0


def _sif_header(parsed: Parsed) -> int:
    from apptainer_py.verbs import sif

    sys.stdout.write(sif.sif_header(parsed.arguments[0]))
    return 0


def _sif_info(parsed: Parsed) -> int:
    from apptainer_py.verbs import sif

    number, path = parsed.arguments
    sys.stdout.write(sif.sif_info(path, number))
    return 0


def _sif_dump(parsed: Parsed) -> int:
    from apptainer_py.verbs import sif

    number, path = parsed.arguments
    sif.sif_dump(path, number, sys.stdout.buffer.write)
    return 0


def _capability_change(parsed: Parsed) -> int:
    from apptainer_py.verbs import capability

    change = capability.add if parsed.command == "capability add" else capability.drop
    user, group = str(parsed.options["user"]), str(parsed.options["group"])
    for warning in change(parsed.arguments[0], user=user, group=group):
        log.warning(warning)
    return 0


def _capability_list(parsed: Parsed) -> int:
    from apptainer_py.verbs import capability

    name = parsed.arguments[0] if parsed.arguments else None
    sys.stdout.write(capability.listing(name, as_json=bool(parsed.options["json"])))
    return 0


def _capability_avail(parsed: Parsed) -> int:
    from apptainer_py.verbs import capability

    names = "".join(parsed.arguments)
    sys.stdout.write(capability.avail(names, as_json=bool(parsed.options["json"])))
    return 0


def _config_fakeroot(parsed: Parsed) -> int:
    from apptainer_py.verbs import config_fakeroot

    chosen = [name for name in config_fakeroot.OPERATIONS if parsed.options[name]]
    if not chosen:
        raise UsageError(text="you must specify an option (eg: --add/--remove)")
    if len(chosen) > 1:
        raise UsageError(text=f"--{chosen[0]} and --{chosen[1]} exclude each other")
    config_fakeroot.config_fakeroot(chosen[0], parsed.arguments[0])
    return 0


def _config_global(parsed: Parsed) -> int:
    from apptainer_py.verbs import config

    chosen = [name for name in _CONFIG_OPERATIONS if parsed.options[name]]
    if not chosen:
        raise UsageError(text="you must specify an option (eg: --set/--unset)")
    if len(chosen) > 1:
        raise UsageError(text=f"--{chosen[0]} and --{chosen[1]} exclude each other")
    directive, *value = parsed.arguments
    file = {"file": parsed.config_file} if parsed.config_file else {}
    text = config.config_global(
        operation=chosen[0],
        directive=directive,
        value="".join(value),
        dry_run=bool(parsed.options["dry-run"]),
        **file,
    )
    sys.stdout.write(text)
    return 0


def _config_check(parsed: Parsed) -> int:
    from apptainer_py.verbs import config_report

    file = "".join(parsed.arguments) or parsed.config_file or None
    outcome = config_report.config_check(file=file, as_json=bool(parsed.options["json"]))
    sys.stdout.write(outcome.text)
    return outcome.exit_code


def _config_show(parsed: Parsed) -> int:
    from apptainer_py.verbs import config_report

    user = parsed.options["user"]
    if user and not parsed.options["effective"]:
        raise UsageError(text="--user: what holds for a user is what --effective shows: add it")
    outcome = config_report.config_show(
        file="".join(parsed.arguments) or parsed.config_file or None,
        effective=bool(parsed.options["effective"]),
        user=str(user) if user else None,
        as_json=bool(parsed.options["json"]),
    )
    sys.stdout.write(outcome.text)
    return outcome.exit_code


def _images(parsed: Parsed) -> int:
    from apptainer_py.cli import images

    command: Callable[[Parsed], int] = getattr(images, parsed.command.replace(" ", "_"))
    return command(parsed)


def _remotes(parsed: Parsed) -> int:
    from apptainer_py.cli import remotes

    return remotes.COMMANDS[parsed.command](parsed)


def _overlay_create(parsed: Parsed) -> int:
    from apptainer_py.verbs import overlay

    options: dict[str, Any] = dict(parsed.options)
    wanted = overlay.Wanted(
        size_mib=options["size"],
        folders=tuple(options["create-dir"]),
        sparse=options["sparse"],
        for_root=options["fakeroot"],
    )
    overlay.overlay_create(parsed.arguments[0], wanted)
    return 0


_COMMANDS: dict[str, Callable[[Parsed], int]] = {
    "build": _images,
    "buildcfg": _buildcfg,
    "cache clean": _images,
    "cache list": _images,
    "capability add": _capability_change,
    "capability avail": _capability_avail,
    "capability drop": _capability_change,
    "capability list": _capability_list,
    "completion bash": _completion,
    "completion fish": _completion,
    "completion powershell": _completion,
    "completion zsh": _completion,
    "confgen": _confgen,
    "config check": _config_check,
    "config fakeroot": _config_fakeroot,
    "config global": _config_global,
    "config show": _config_show,
    "delete": _remotes,
    "help": _help,
    "inspect": _inspect,
    "instance list": _instance_list,
    "instance stats": _instance_stats,
    "instance stop": _instance_stop,
    "keyserver add": _remotes,
    "keyserver list": _remotes,
    "keyserver login": _remotes,
    "keyserver logout": _remotes,
    "keyserver remove": _remotes,
    "overlay create": _overlay_create,
    "pull": _images,
    "push": _images,
    "registry list": _images,
    "registry login": _images,
    "registry logout": _images,
    "remote add": _remotes,
    "remote add-keyserver": _remotes,
    "remote get-login-password": _remotes,
    "remote list": _remotes,
    "remote login": _remotes,
    "remote logout": _remotes,
    "remote remove": _remotes,
    "remote remove-keyserver": _remotes,
    "remote status": _remotes,
    "remote use": _remotes,
    "run-help": _run_help,
    "search": _remotes,
    "sif dump": _sif_dump,
    "sif header": _sif_header,
    "sif info": _sif_info,
    "sif list": _sif_list,
    "tag": _images,
    "version": _version,
}
