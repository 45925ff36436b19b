"""--security: labels, where the machine has what sets them and where not."""

from __future__ import annotations

import errno
import json
import os
from types import SimpleNamespace

import pytest

from apptainer_py.base.errors import LaunchError
from apptainer_py.engines.apptainer import joining, security
from apptainer_py.engines.apptainer.message import refused_label
from apptainer_py.model import protocol
from apptainer_py.runtime import instances

FACTS = SimpleNamespace(flow=protocol.FLOW_SETUID)


@pytest.fixture
def modules(monkeypatch):
    """Say which security modules the kernel has."""

    def there(*names: str) -> None:
        kinds = {"apparmor": protocol.LABELKIND_APPARMOR, "selinux": protocol.LABELKIND_SELINUX}
        rows = [(key, kind, lambda key=key: key in names) for key, kind in kinds.items()]
        monkeypatch.setattr(security, "_LABELS", tuple(rows))

    return there


@pytest.mark.parametrize(
    ("word", "label"),
    [
        ("apparmor:some-profile", (protocol.LABELKIND_APPARMOR, "some-profile")),
        ("selinux:u:r:container_t:s0", (protocol.LABELKIND_SELINUX, "u:r:container_t:s0")),
    ],
)
def test_a_label(modules, word, label):
    modules("apparmor", "selinux")
    assert security.read((word,), FACTS).label == label


@pytest.mark.parametrize(
    ("words", "there", "said"),
    [
        (("apparmor:x",), (), "apparmor requested, but is not enabled"),
        (("selinux:x",), ("apparmor",), "selinux requested, but is not enabled"),
        (("apparmor:x", "selinux:y"), ("apparmor", "selinux"), "can't specify both"),
        (("apparmor:" + "x" * 4000,), ("apparmor",), "this is no label"),
        (("selinux:a\nb",), ("selinux",), "this is no label"),
    ],
)
def test_what_cannot_be_set_starts_nothing(modules, words, there, said):
    modules(*there)
    with pytest.raises(LaunchError, match=said):
        security.read(words, FACTS)


@pytest.mark.parametrize(
    ("kind", "number", "said"),
    [
        (protocol.LABELKIND_APPARMOR, errno.ENOENT, "AppArmor profile x: no profile of this name"),
        (protocol.LABELKIND_APPARMOR, errno.EACCES, "AppArmor profile x: permission denied"),
        (protocol.LABELKIND_SELINUX, errno.EINVAL, "SELinux context x: the policy knows no such"),
        (protocol.LABELKIND_SELINUX, errno.ENOENT, "SELinux context x: no such file"),
    ],
)
def test_why_the_kernel_refuses(kind, number, said):
    assert said in refused_label(kind, "x", number)


def record(label=(), code=()):
    return SimpleNamespace(label=label, filter=code)


def test_what_binds_who_joins():
    none = (0,) * 5
    assert joining.bound(record(), none) == 0
    assert joining.bound(record((b"1", b"x")), none) == protocol.PLANFLAG_LABEL
    code = (b"0600000000000000", b"0")
    assert joining.bound(record(code=code), none) == protocol.PLANFLAG_NO_NEW_PRIVS
    assert joining.bound(record(code=code), (1 << 21,) * 5) == 0


@pytest.mark.parametrize(
    "damaged",
    [
        record((b"x", b"y")),
        record((b"-1", b"y")),
        record((b"99999999999", b"y")),
        record(code=(b"zz", b"0")),
        record(code=(b"", b"0")),
        record(code=(b"00", b"")),
        record(code=(b"\xff", b"1")),
    ],
)
def test_a_record_that_is_damaged(damaged):
    with pytest.raises(LaunchError, match="damaged"):
        joining.bound(damaged, (0,) * 5)


@pytest.mark.parametrize("key", ["label", "filter"])
@pytest.mark.parametrize(
    "value", [["1"], list("1xy"), ["1", 2], [1, "x"], "1x", {}, 0, ["1", "\ud800"]]
)
def test_what_binds_an_instance_is_never_dropped_from_a_damaged_record(tmp_path, key, value):
    (tmp_path / "x.json").write_text(json.dumps({key: value}))
    folder = os.open(tmp_path, os.O_RDONLY)
    owner = SimpleNamespace(uid=os.getuid(), name="somebody")
    found = instances._read_record(folder, "x.json", owner)
    os.close(folder)
    assert found is not None
    with pytest.raises(LaunchError):
        joining.bound(found, (0,) * 5)
