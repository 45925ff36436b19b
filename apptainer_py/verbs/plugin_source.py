"""`plugin create|compile`: the beginning of a plug-in, and the wheel of a finished one."""

from __future__ import annotations

import os

from apptainer_py.base import epoch
from apptainer_py.host import plugin_content
from apptainer_py.host.plugin_content import ENTRIES, GROUP, METADATA, PluginError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from apptainer_py.host.plugin_content import Content

PROJECT = "pyproject.toml"
_PROJECT = """\
[build-system]
requires = ["setuptools>=61"]
build-backend = "setuptools.build_meta"

[project]
name = "{name}"
version = "0.1.0"
description = "Says hello"

[project.entry-points."{group}"]
{name} = "{module}:main"
"""
_MODULE = '''\
"""What `apptainer-py {name}` does."""


def main(arguments: list[str]) -> int:
    """Greet those who are named; return the exit status."""
    print("hello", *arguments)
    return 0
'''
_WHEEL = "Wheel-Version: 1.0\nGenerator: apptainer-py\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
# The first second that a zip file can express.
_EARLIEST = 315532800


class SourceWrong(PluginError):
    message = "{file}: {reason}"


def create(folder: str, name: str) -> None:
    """Write a plug-in of one command into a new directory.

    Raises:
        PluginError: the name fits no command, or there is something already.
    """
    name = plugin_content.check_name(name)
    module = name.replace("-", "_")
    if not module.isidentifier() or not name[0].islower():
        raise PluginError(text=f"{name} is no name of a command: it begins with a letter")
    try:
        os.makedirs(f"{folder}/{module}")
        _new_file(f"{folder}/{PROJECT}", _PROJECT.format(name=name, module=module, group=GROUP))
        _new_file(f"{folder}/{module}/__init__.py", _MODULE.format(name=name))
    except OSError as error:
        raise SourceWrong(file=error.filename, reason=_reason(error)) from None


def _new_file(path: str, text: str) -> None:
    with open(path, "x", encoding="utf-8") as stream:
        stream.write(text)


def compile(folder: str, out: str, environ: Mapping[str, str]) -> str:  # noqa: A001 it is its name
    """Pack what the entry points of pyproject.toml lead to; return the wheel's path.

    Raises:
        PluginError: what is packed could not be installed.
    """
    project = _project(f"{folder}/{PROJECT}")
    content = _packed(folder, project)
    plugin = plugin_content.judged(content)
    start = f"{plugin.name.replace('-', '_')}-{plugin.version}"
    path = out or f"{folder}/{start}-py3-none-any.whl"
    second = max(epoch.of(environ) or 0, _EARLIEST)
    try:
        _write(path, content, second)
    except OSError as error:
        raise SourceWrong(file=path, reason=_reason(error)) from None
    return path


def _project(path: str) -> dict[str, Any]:
    import tomllib

    try:
        with open(path, "rb") as stream:
            project = tomllib.load(stream)["project"]
    except OSError as error:
        raise SourceWrong(file=path, reason=_reason(error)) from None
    except (ValueError, KeyError) as error:
        raise SourceWrong(file=path, reason=f"it cannot be read: {error}") from None
    texts = {key: project.get(key, "") for key in ("name", "version", "description")}
    if not all(isinstance(text, str) and "\n" not in text for text in texts.values()):
        raise SourceWrong(file=path, reason="name, version and description are one line each")
    if not texts["name"] or not texts["version"]:
        raise SourceWrong(file=path, reason="[project] needs a name and a version")
    entries = project.get("entry-points", {})
    commands = entries.get(GROUP) if isinstance(entries, dict) else None
    if not isinstance(commands, dict) or not commands:
        raise SourceWrong(file=path, reason=f'[project.entry-points."{GROUP}"] is missing')
    return {**texts, "commands": commands, "needs": project.get("dependencies", [])}


def _packed(folder: str, project: Mapping[str, Any]) -> Content:
    import base64
    import hashlib

    commands: dict[str, str] = {name: str(to) for name, to in project["commands"].items()}
    tops = {target.partition(":")[0].partition(".")[0] for target in commands.values()}
    content = {
        name: data
        for name, data in plugin_content.read(folder).items()
        if name.partition("/")[0].removesuffix(".py") in tops
    }
    name = plugin_content.check_name(project["name"])
    info = f"{name.replace('-', '_')}-{project['version'].replace('-', '_')}.dist-info"
    head = {"Metadata-Version": "2.1", "Name": project["name"], "Version": project["version"]}
    if project["description"]:
        head["Summary"] = project["description"]
    lines = [f"{key}: {text}\n" for key, text in head.items()]
    lines += [f"Requires-Dist: {need}\n" for need in project["needs"]]
    entries = "".join(f"{command} = {target}\n" for command, target in sorted(commands.items()))
    content[f"{info}/{METADATA}"] = "".join(lines).encode()
    content[f"{info}/{ENTRIES}"] = f"[{GROUP}]\n{entries}".encode()
    content[f"{info}/WHEEL"] = _WHEEL.encode()
    record = ""
    for path, data in sorted(content.items()):
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
        record += f'"{path}",sha256={digest},{len(data)}\n'
    content[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    return content


def _write(path: str, content: Content, second: int) -> None:
    import time
    import zipfile

    fresh = f"{path}.{os.urandom(6).hex()}"
    try:
        with zipfile.ZipFile(fresh, "x", zipfile.ZIP_DEFLATED) as archive:
            for name, data in sorted(content.items()):
                member = zipfile.ZipInfo(name, time.gmtime(second)[:6])
                member.external_attr = 0o100644 << 16
                member.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(member, data)
        os.rename(fresh, path)
    except BaseException:
        if os.path.lexists(fresh):
            os.unlink(fresh)
        raise


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
