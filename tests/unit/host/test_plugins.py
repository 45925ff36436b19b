"""Plug-ins: what may be installed, where it is kept, and who else could have written it."""

from __future__ import annotations

import io
import json
import os
import stat
import zipfile
from pathlib import Path

import pytest

from apptainer_py.host import plugin_content, plugins
from apptainer_py.host.plugin_content import PluginError
from apptainer_py.host.plugins import Place, Row
from apptainer_py.verbs import plugin, plugin_source

INFO = "greet-1.0.dist-info"
CONTENT = {
    "greet/__init__.py": b"def main(arguments):\n    print('hello', *arguments)\n",
    f"{INFO}/METADATA": b"Metadata-Version: 2.1\nName: Greet\nVersion: 1.0\nSummary: Says hello\n",
    f"{INFO}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\n",
    f"{INFO}/entry_points.txt": b"[apptainer_py.plugins]\ngreet = greet:main\n",
}


def wheel(tmp_path: Path, content: dict[str, bytes], name: str = "greet.whl") -> str:
    path = tmp_path / name
    with zipfile.ZipFile(path, "w") as archive:
        for entry, data in content.items():
            archive.writestr(entry, data)
    return str(path)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(str(tmp_path / "plugins"), owner=os.geteuid())


def installed(place: Place, tmp_path: Path, content: dict[str, bytes] = CONTENT) -> Row:
    plugin.install(place, wheel(tmp_path, content), ())
    return place.rows()[0]


def test_what_is_installed_is_listed_and_everybody_can_read_it(place, tmp_path):
    before = os.umask(0o077)
    try:
        row = installed(place, tmp_path)
    finally:
        os.umask(before)
    assert (row.name, row.enabled) == ("greet", True)
    found = place.plugin(row)
    assert (found.version, found.summary) == ("1.0", "Says hello")
    assert found.commands == (("greet", "greet:main"),)
    written = {
        str(path.relative_to(place.path(row))): path.read_bytes()
        for path in Path(place.path(row)).rglob("*")
        if path.is_file()
    }
    assert written == CONTENT
    for path in Path(place.folder).rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        wanted = 0o755 if path.is_dir() else 0o600 if path.name == ".lock" else 0o644
        assert mode == wanted, path


def test_a_newer_version_replaces_an_older_one_and_what_was_killed_is_tidied(place, tmp_path):
    old = installed(place, tmp_path)
    Path(place.folder, "greet-left").mkdir()
    newer = {
        name: data.replace(b"Version: 1.0\nS", b"Version: 2.0\nS") for name, data in CONTENT.items()
    }
    row = installed(place, tmp_path, newer)
    assert place.plugin(row).version == "2.0"
    assert row.folder != old.folder
    assert set(os.listdir(place.folder)) == {".lock", "state.json", row.folder}


def test_enable_disable_uninstall(place, tmp_path):
    installed(place, tmp_path)
    plugin.disable(place, "GREET")
    assert not place.rows()[0].enabled
    assert plugin.listing(place, as_json=False) == "ENABLED  NAME\n     no  greet\n"
    plugin.enable(place, "greet")
    (listed,) = json.loads(plugin.listing(place, as_json=True))["plugins"]
    assert listed["commands"] == ["greet"]
    assert listed["enabled"] is True
    plugin.uninstall(place, "greet")
    assert os.listdir(place.folder) == [".lock"]
    assert plugin.listing(place, as_json=False) == "There are no plugins installed.\n"
    for change in (plugin.enable, plugin.disable, plugin.uninstall):
        with pytest.raises(plugin.PluginFailed, match='"greet": plugin not found'):
            change(place, "greet")


def linked(tmp_path: Path) -> str:
    member = zipfile.ZipInfo("greet/link.py")
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    path = wheel(tmp_path, CONTENT)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(member, "/etc/passwd")
    return path


def lying(tmp_path: Path) -> str:
    """Its table says that a file is smaller than it is."""
    path = Path(wheel(tmp_path, {**CONTENT, "greet/big.py": b"#" * 5000}))
    data = path.read_bytes().replace((5000).to_bytes(4, "little"), (50).to_bytes(4, "little"))
    path.write_bytes(data)
    return str(path)


HOSTILE = {
    "out": ({"../out.py": b""}, "a file of the name"),
    "deep": ({"greet/../../out.py": b""}, "a file of the name"),
    "absolute": ({"/etc/out.py": b""}, "a file of the name"),
    "backslash": ({"greet\\..\\out.py": b""}, "a file of the name"),
    "control": ({"greet/\x1b[2J.py": b""}, "a file of the name"),
    "folder": ({"../out/": b""}, "a file of the name"),
    "both": ({"greet": b""}, "is a file and a directory"),
    "library": ({"json.py": b""}, "module json has the name of one that is there"),
    "ours": ({"apptainer_py/x.py": b""}, "apptainer_py has the name"),
    "data": ({"greet-1.0.data/scripts/x": b""}, "files for places other than its own"),
    "two": ({"x-1.dist-info/METADATA": b""}, "it has 2 directories"),
    "binary": ({f"{INFO}/WHEEL": b"Root-Is-Purelib: false\n"}, "not pure Python"),
    "record": ({f"{INFO}/RECORD": b"greet/__init__.py,sha256=x,1\n"}, "not what its RECORD says"),
    "nameless": ({f"{INFO}/METADATA": b"Version: 1\n"}, "no Name"),
    "no text": ({f"{INFO}/METADATA": b"\xff\xfe\n"}, "metadata cannot be read"),
    "name": ({f"{INFO}/METADATA": b"Name: ../x\nVersion: 1\n"}, "no name of a plug-in"),
    "version": ({f"{INFO}/METADATA": b"Name: x\nVersion: 1/../..\n"}, "no Version"),
    "no entry": ({f"{INFO}/entry_points.txt": b"[x]\na = b:c\n"}, "nothing in the group"),
    "odd entry": ({f"{INFO}/entry_points.txt": b"[apptainer_py.plugins]\nx\n"}, ""),
    "target": (
        {f"{INFO}/entry_points.txt": b"[apptainer_py.plugins]\nx = greet\n"},
        "not MODULE:FUNCTION",
    ),
    "option": (
        {f"{INFO}/entry_points.txt": b"[apptainer_py.plugins]\n--x = greet:main\n"},
        "not of small letters",
    ),
    "elsewhere": (
        {f"{INFO}/entry_points.txt": b"[apptainer_py.plugins]\nx = shutil:rmtree\n"},
        "a module that it does not have",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_is_refused_and_leaves_nothing(place, tmp_path, name):
    content, said = HOSTILE[name]
    path = wheel(tmp_path, {**CONTENT, **content})
    with pytest.raises(plugin.PluginFailed, match="Failed to install plugin") as caught:
        plugin.install(place, path, ())
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["greet.whl"]


def test_an_installation_that_fails_half_way_leaves_what_was_there(place, tmp_path, monkeypatch):
    old = installed(place, tmp_path)
    write = plugins._write

    def full(fd: int, data: bytes) -> None:
        if data.startswith((b"Wheel", b"{")):
            os.close(fd)
            raise OSError(28, "No space left on device")
        write(fd, data)

    monkeypatch.setattr(plugins, "_write", full)
    with pytest.raises(plugin.PluginFailed, match="no space left on device"):
        installed(place, tmp_path)
    with pytest.raises(plugin.PluginFailed, match="no space left on device"):
        plugin.disable(place, "greet")
    assert place.rows() == (old,)
    assert set(os.listdir(place.folder)) == {".lock", "state.json", old.folder}


@pytest.mark.parametrize("made", [linked, lying], ids=lambda made: made.__name__)
def test_an_archive_with_a_lying_table_is_refused(place, tmp_path, made):
    with pytest.raises(plugin.PluginFailed):
        plugin.install(place, made(tmp_path), ())
    assert not place.rows()


@pytest.mark.parametrize("data", [b"", b"PK\x05\x06", b"root:x:0:0\n", b"PK\x03\x04" + bytes(99)])
def test_what_is_no_archive(tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(PluginError, match="it is no wheel"):
        plugin_content.read(str(tmp_path / "x"))


def test_a_bomb_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(plugin_content, "_BYTES_MAX", 1 << 20)
    path = tmp_path / "bomb.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("greet/big.py", bytes(2 << 20))
    with pytest.raises(PluginError, match="more than 2000 files or 1 MiB"):
        plugin_content.read(str(path))
    monkeypatch.setattr(plugin_content, "_FILES_MAX", 3)
    with pytest.raises(PluginError, match="more than 3 files"):
        plugin_content.read(wheel(tmp_path, CONTENT))


def test_a_directory_is_read_without_following_anything(place, tmp_path):
    source = tmp_path / "source"
    for name, data in CONTENT.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    (source / "greet/__pycache__").mkdir()
    (source / "greet/__pycache__/x.pyc").write_bytes(b"x")
    assert plugin_content.read(str(source)) == CONTENT
    (source / "greet/link.py").symlink_to("/etc/passwd")
    with pytest.raises(PluginError, match=r"greet/link.py is no plain file"):
        plugin_content.read(str(source))
    (source / "greet/link.py").unlink()
    os.mkfifo(source / "greet/pipe")
    with pytest.raises(PluginError, match="greet/pipe is no plain file"):
        plugin.install(place, str(source), ())
    with pytest.raises(PluginError, match="neither a file nor a directory"):
        plugin_content.read(str(source / "greet/pipe"))


def test_a_command_has_one_owner(place, tmp_path):
    path = wheel(tmp_path, CONTENT)
    with pytest.raises(PluginError, match="this program has a command greet already"):
        plugin.install(place, path, {"greet"})
    plugin.install(place, path, ())
    plugin.disable(place, "greet")
    other = {**CONTENT, f"{INFO}/METADATA": b"Name: other\nVersion: 1\n"}
    with pytest.raises(PluginError, match="the plug-in greet has a command greet already"):
        plugin.install(place, wheel(tmp_path, other), ())


def writable(path: Path) -> None:
    path.chmod(0o666)


def link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/passwd")


def foreign(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    os.chown(path, 1234, 0)


@pytest.mark.parametrize("change", [writable, link, foreign], ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", ["greet/__init__.py", f"{INFO}/METADATA"])
def test_what_somebody_else_could_have_written_is_not_used(place, tmp_path, change, name):
    row = installed(place, tmp_path)
    change(Path(place.path(row), name))
    with pytest.raises(PluginError, match=r"no plain file|belongs to uid 1234|can be written"):
        place.plugin(row)
    (listed,) = json.loads(plugin.listing(place, as_json=True))["plugins"]
    assert "error" in listed
    plugin.uninstall(place, "greet")
    assert not place.rows()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "[" * 100000,
        '{"version": 2, "plugins": []}',
        '{"version": 1, "plugins": [{"name": "x", "folder": "../x", "enabled": true}]}',
        '{"version": 1, "plugins": [{"name": "x"}]}',
    ],
)
def test_a_broken_list(place, tmp_path, text):
    installed(place, tmp_path)
    Path(place.folder, "state.json").write_text(text)
    with pytest.raises(PluginError, match=r"state\.json"):
        place.rows()


@pytest.mark.parametrize("change", [writable, link, foreign], ids=lambda change: change.__name__)
def test_a_list_that_somebody_else_could_have_written(place, tmp_path, change):
    installed(place, tmp_path)
    change(Path(place.folder, "state.json"))
    with pytest.raises(PluginError, match=r"state\.json"):
        place.rows()


# ---- making one ----


def test_a_new_plugin_can_be_compiled_and_installed(place, tmp_path):
    folder = tmp_path / "source"
    plugin_source.create(str(folder), "say-hello")
    with pytest.raises(PluginError, match="`plugin compile` makes a wheel"):
        plugin.install(place, str(folder), ())
    with pytest.raises(PluginError, match="file exists"):
        plugin_source.create(str(folder), "say-hello")
    environ = {"SOURCE_DATE_EPOCH": "1700000000"}
    made = plugin_source.compile(str(folder), "", environ)
    assert made == f"{folder}/say_hello-0.1.0-py3-none-any.whl"
    again = plugin_source.compile(str(folder), str(tmp_path / "again.whl"), environ)
    assert Path(made).read_bytes() == Path(again).read_bytes()
    plugin.install(place, made, ())
    text = plugin.inspect(place, "say-hello", as_json=False)
    assert text.startswith("Name: say-hello\nDescription: Says hello\n")
    assert text.endswith("Commands: say-hello\n")
    assert plugin.inspect(place, made, as_json=True).startswith('{\n    "name": "say-hello"')


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[", "cannot be read"),
        ("[project]\nname = 'x'", "needs a name and a version"),
        ("[project]\nname = 'x'\nversion = '1'", "is missing"),
        ("[project]\nname = ['x']\nversion = '1'", "one line each"),
        (
            "[project]\nname='x'\nversion='1'\n[project.entry-points.'apptainer_py.plugins']\nx='y:z'",
            "a module that it does not have",
        ),
    ],
)
def test_a_project_that_is_no_plugin(tmp_path, text, said):
    (tmp_path / "pyproject.toml").write_text(text)
    with pytest.raises(PluginError, match=said):
        plugin_source.compile(str(tmp_path), "", {})
    assert os.listdir(tmp_path) == ["pyproject.toml"]


@pytest.mark.parametrize("name", ["../x", "1st", "x y", ""])
def test_a_name_that_no_command_can_have(tmp_path, name):
    with pytest.raises(PluginError):
        plugin_source.create(str(tmp_path / "new"), name)
    assert not list(tmp_path.iterdir())


def test_an_archive_in_memory_is_what_its_name_leads_to(tmp_path):
    """Read once: what its owner changes later is not looked at."""
    path = wheel(tmp_path, CONTENT)
    content = plugin_content.read(path)
    Path(path).write_bytes(io.BytesIO(b"").read())
    assert plugin_content.judged(content).name == "greet"
