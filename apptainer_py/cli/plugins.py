"""The commands of plug-ins, and the `plugin` commands that bring them.

Nothing of a plug-in is loaded before one of its commands is to run, and then with the rights of
the caller: a launch does not come by here.
"""

from __future__ import annotations

import os
import sys

from apptainer_py.base import log
from apptainer_py.base.errors import ApptainerError
from apptainer_py.base.record import Record
from apptainer_py.cli import environment
from apptainer_py.cli.table import COMMANDS as OWN
from apptainer_py.cli.table import PROGRAM, SUPPORTED
from apptainer_py.cli.values import plain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from apptainer_py.cli.table import Command
    from apptainer_py.host.plugins import Place
    from apptainer_py.model.request import Parsed

_STATUS_MAX = 255


class PluginBroken(ApptainerError):
    message = "the plug-in {name} {version} failed: {reason}"
    hint = "`-d` before the command shows where; `plugin disable {name}` takes it away"


class Extra(Record):
    """A command of an enabled plug-in."""

    plugin: str
    version: str
    summary: str
    target: str
    folder: str


_found: dict[str, Extra] | None = None


def _place() -> Place:
    from apptainer_py.host.plugins import Place

    return Place()


def extras() -> dict[str, Extra]:
    """Return the commands of enabled plug-ins by name; warn of those that cannot be used."""
    global _found
    if _found is None:
        _found = _looked_up(_place())
    return _found


def _looked_up(place: Place) -> dict[str, Extra]:
    from apptainer_py.host.plugin_content import PluginError

    own = {row[0] for row in OWN}
    found: dict[str, Extra] = {}
    try:
        rows = [row for row in place.rows() if row.enabled]
    except PluginError as error:
        log.warning(f"plug-ins are left out: {error}")
        return found
    for row in rows:
        try:
            plugin = place.plugin(row)
        except PluginError as error:
            log.warning(f"the plug-in {row.name} is left out: {error}")
            continue
        for command, target in plugin.commands:
            if command not in own:
                found[command] = Extra(
                    plugin=plugin.name,
                    version=plugin.version,
                    summary=plugin.summary or f"Command of the plug-in {plugin.name}",
                    target=target,
                    folder=place.path(row),
                )
    return found


def rows() -> list[Command]:
    """Return the commands of plug-ins in the form of the table."""
    return [
        (name, "[arguments...]", 0, -1, SUPPORTED, extra.summary)
        for name, extra in sorted(extras().items())
    ]


def row(name: str) -> Command | None:
    """Return the row of a plug-in's command, or None."""
    return next((row for row in rows() if row[0] == name), None)


# ---- running one ----


def start(parsed: Parsed) -> int:
    """Run the command of a plug-in; return its exit status.

    Raises:
        PluginBroken: it cannot be loaded, or ended in a way of which it says nothing.
    """
    extra = extras()[parsed.command]
    sys.argv = [f"{PROGRAM} {parsed.command}", *parsed.arguments]
    try:
        return _status(_loaded(extra)(list(parsed.arguments)))
    except SystemExit as end:
        return _status(end.code)
    except (ApptainerError, BrokenPipeError):
        raise
    except Exception as error:  # noqa: BLE001 what others have written may raise anything
        if log.level >= log.DEBUG:
            import traceback

            traceback.print_exception(error, file=sys.stderr)
        reason = plain(f"{type(error).__name__}: {error}")
        raise PluginBroken(name=extra.plugin, version=extra.version, reason=reason) from None


def _loaded(extra: Extra) -> Callable[[list[str]], Any]:
    import importlib

    from apptainer_py.base import packages

    packages.allow()
    # Behind all else, and alone: no plug-in stands in the way of another, or of the library.
    sys.path.append(extra.folder)
    module, _, path = extra.target.partition(":")
    found: Any = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    function: Callable[[list[str]], Any] = found
    return function


def _status(given: object) -> int:
    """Return an exit status by the rules of sys.exit."""
    if given is None:
        return 0
    if isinstance(given, int):
        return given & _STATUS_MAX
    sys.stderr.write(f"{plain(str(given))}\n")
    return 1


# ---- the `plugin` commands ----


def _check_root(verb: str) -> None:
    from apptainer_py.verbs.plugin import NeedsRoot

    if os.geteuid() != 0:
        raise NeedsRoot(program=PROGRAM, verb=verb)


def _install(parsed: Parsed) -> int:
    from apptainer_py.verbs import plugin

    _check_root("install")
    reserved = {row[0].partition(" ")[0] for row in OWN}
    made = plugin.install(_place(), parsed.arguments[0], reserved)
    log.info(f"{made.name} {made.version} is installed and enabled")
    return 0


def _change(parsed: Parsed) -> int:
    from apptainer_py.verbs import plugin

    verb = parsed.command.rpartition(" ")[2]
    _check_root(verb)
    change = {"uninstall": plugin.uninstall, "enable": plugin.enable, "disable": plugin.disable}
    change[verb](_place(), parsed.arguments[0])
    return 0


def _list(parsed: Parsed) -> int:
    from apptainer_py.verbs import plugin

    sys.stdout.write(plugin.listing(_place(), as_json=bool(parsed.options["json"])))
    return 0


def _inspect(parsed: Parsed) -> int:
    from apptainer_py.verbs import plugin

    as_json = bool(parsed.options["json"])
    sys.stdout.write(plugin.inspect(_place(), parsed.arguments[0], as_json=as_json))
    return 0


def _create(parsed: Parsed) -> int:
    from apptainer_py.verbs import plugin_source

    folder, name = parsed.arguments
    plugin_source.create(folder, name)
    return 0


def _compile(parsed: Parsed) -> int:
    from apptainer_py.verbs import plugin_source

    environ = environment.of_caller()
    made = plugin_source.compile(parsed.arguments[0], str(parsed.options["out"]), environ)
    log.info(f"{made} can be installed")
    return 0


COMMANDS: dict[str, Callable[[Parsed], int]] = {
    "plugin compile": _compile,
    "plugin create": _create,
    "plugin disable": _change,
    "plugin enable": _change,
    "plugin inspect": _inspect,
    "plugin install": _install,
    "plugin list": _list,
    "plugin uninstall": _change,
}
