"""`plugin install|uninstall|enable|disable|list|inspect`: commands that others have written."""

from __future__ import annotations

import os

from apptainer_py.base import log
from apptainer_py.host import plugin_content
from apptainer_py.host.plugin_content import PluginError
from apptainer_py.host.plugins import Row

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection

    from apptainer_py.host.plugin_content import Plugin
    from apptainer_py.host.plugins import Place

_NOT_FOUND = "plugin not found."


class NeedsRoot(PluginError):
    message = '"{program} plugin {verb}" command requires root privileges'


class PluginFailed(PluginError):
    message = 'Failed to {verb} plugin "{name}": {reason}'


def install(place: Place, path: str, reserved: Collection[str]) -> Plugin:
    """Install a wheel, or a directory like an unpacked one, in place of an earlier version.

    Raises:
        PluginFailed: it is no plug-in, or has a command that is there already.
    """
    try:
        content = plugin_content.read(path)
        plugin = plugin_content.judged(content)
        with place.changing():
            rows = [row for row in place.rows() if row.name != plugin.name]
            _check_free(place, rows, plugin, reserved)
            place.tidy(place.rows())
            folder = place.add(plugin, content)
            place.save([*rows, Row(name=plugin.name, folder=folder)])
    except OSError as error:
        raise PluginFailed(verb="install", name=_shown(path), reason=_reason(error)) from None
    except PluginError as error:
        raise PluginFailed(verb="install", name=_shown(path), reason=error) from None
    return plugin


def _check_free(
    place: Place, rows: Collection[Row], plugin: Plugin, reserved: Collection[str]
) -> None:
    """Refuse a command that we have, or another plug-in has, enabled or not."""
    taken = dict.fromkeys(reserved, "this program")
    for row in rows:
        try:
            taken |= dict.fromkeys(dict(place.plugin(row).commands), f"the plug-in {row.name}")
        except PluginError as error:
            log.warning(f"the plug-in {row.name} is left out: {error}")
    for command, _ in plugin.commands:
        if command in taken:
            raise PluginError(text=f"{taken[command]} has a command {command} already")


def uninstall(place: Place, name: str) -> None:
    """Remove a plug-in, one that is broken too.

    Raises:
        PluginFailed: there is none of that name.
    """
    _change(place, "uninstall", name)


def enable(place: Place, name: str) -> None:
    """Let the commands of a plug-in be there again.

    Raises:
        PluginFailed: there is none of that name.
    """
    _change(place, "enable", name)


def disable(place: Place, name: str) -> None:
    """Keep a plug-in without its commands.

    Raises:
        PluginFailed: there is none of that name.
    """
    _change(place, "disable", name)


def _change(place: Place, verb: str, name: str) -> None:
    try:
        with place.changing():
            rows = {row.name: row for row in place.rows()}
            row = rows.pop(_key(name), None)
            if row is None:
                raise PluginError(text=_NOT_FOUND)
            kept = [] if verb == "uninstall" else [row.replace(enabled=verb == "enable")]
            place.save([*rows.values(), *kept])
    except OSError as error:
        raise PluginFailed(verb=verb, name=_shown(name), reason=_reason(error)) from None
    except PluginError as error:
        raise PluginFailed(verb=verb, name=_shown(name), reason=error) from None


def _key(name: str) -> str:
    try:
        return plugin_content.check_name(name)
    except PluginError:
        return ""


def listing(place: Place, *, as_json: bool) -> str:
    """Return what is installed, as text or JSON.

    Raises:
        PluginError: the file that lists it cannot be used.
    """
    rows = place.rows()
    if as_json:
        import json

        return json.dumps({"plugins": [_facts(place, row) for row in rows]}, indent=4) + "\n"
    if not rows:
        return "There are no plugins installed.\n"
    lines = [f"{'yes' if row.enabled else 'no':>7}  {row.name}\n" for row in rows]
    return "ENABLED  NAME\n" + "".join(lines)


def _facts(place: Place, row: Row) -> dict[str, object]:
    facts: dict[str, object] = {"name": row.name, "enabled": row.enabled}
    try:
        plugin = place.plugin(row)
    except PluginError as error:
        return {**facts, "error": str(error)}
    return {**facts, **_of(plugin)}


def _of(plugin: Plugin) -> dict[str, object]:
    facts = plugin.asdict()
    return {**facts, "commands": [command for command, _ in plugin.commands]}


def inspect(place: Place, name: str, *, as_json: bool) -> str:
    """Return what a plug-in says of itself: an installed one, or one in a file or directory.

    Raises:
        PluginFailed: there is no such plug-in, or it is broken.
    """
    try:
        row = next((row for row in place.rows() if row.name == _key(name)), None)
        if row is not None:
            plugin, state = place.plugin(row), {"enabled": row.enabled}
        elif os.path.lexists(name):
            plugin, state = plugin_content.judged(plugin_content.read(name)), {}
        else:
            raise PluginError(text=_NOT_FOUND)
    except PluginError as error:
        raise PluginFailed(verb="inspect", name=_shown(name), reason=error) from None
    if as_json:
        import json

        return json.dumps({**_of(plugin), **state}, indent=4) + "\n"
    lines = {
        "Name": plugin.name,
        "Description": plugin.summary,
        "Author": plugin.author,
        "Version": plugin.version,
        "Commands": ", ".join(command for command, _ in plugin.commands),
    }
    return "".join(f"{title}: {text}\n" for title, text in lines.items())


def _shown(text: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _reason(error: OSError) -> str:
    where = f"{_shown(str(error.filename))}: " if error.filename else ""
    return f"{where}{(error.strerror or str(error)).lower()}"
