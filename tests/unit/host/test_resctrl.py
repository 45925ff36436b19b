"""Cache and bandwidth classes, on a directory that stands for resctrl."""

from __future__ import annotations

import pytest

from apptainer_py.host import resctrl


def make_group(root, name: str):
    group = root / name
    group.mkdir()
    (group / "schemata").write_text("")
    (group / "tasks").write_text("")
    return group


def test_a_class_is_set_before_it_is_joined(tmp_path):
    group = make_group(tmp_path, "box")
    wish = {"l3CacheSchema": "L3:0=f", "memBwSchema": "MB:0=50", "schemata": ["L2:0=1"]}
    resctrl.join(wish, "box", 7, str(tmp_path))
    assert (group / "schemata").read_text() == "L3:0=f\nMB:0=50\nL2:0=1\n"
    assert (group / "tasks").read_text() == "7"


def test_a_named_class_without_limits_must_be_there(tmp_path):
    with pytest.raises(resctrl.ResctrlError, match="clos dir not accessible"):
        resctrl.join({"closID": "gold"}, "box", 7, str(tmp_path))
    group = make_group(tmp_path, "gold")
    resctrl.join({"closID": "gold"}, "box", 7, str(tmp_path))
    assert (group / "tasks").read_text() == "7"
    resctrl.remove({"closID": "gold"}, "box", str(tmp_path))
    assert group.is_dir()


def test_monitoring_has_a_group_of_its_own(tmp_path):
    group = make_group(tmp_path, "gold")
    monitor = group / "mon_groups/box"
    monitor.mkdir(parents=True)
    (monitor / "tasks").write_text("")
    wish = {"closID": "gold", "enableMonitoring": True}
    resctrl.join(wish, "box", 7, str(tmp_path))
    assert (monitor / "tasks").read_text() == "7"


def test_what_was_made_is_removed_when_it_is_refused(tmp_path):
    with pytest.raises(resctrl.ResctrlError, match="no such file"):
        resctrl.join({"l3CacheSchema": "L3:0=f"}, "box", 7, str(tmp_path))
    assert not (tmp_path / "box").exists()


def test_delete_removes_the_group_of_a_container(tmp_path, monkeypatch):
    """Of a container that nobody waits for, only its configuration is left to tell of it."""
    from types import SimpleNamespace

    from apptainer_py.engines.oci import cleanup

    (tmp_path / "box").mkdir()
    monkeypatch.setattr(resctrl, "find_root", lambda: str(tmp_path))
    state = SimpleNamespace(
        name="box",
        read=lambda name: b'{"linux": {"intelRdt": {"l3CacheSchema": "L3:0=f"}}}',
        remove=lambda: None,
    )
    groups = SimpleNamespace(pids=list, remove=lambda: None)
    monkeypatch.setattr(cleanup, "groups_of", lambda *_: groups)
    record = SimpleNamespace(init_pid=0, init_start=0, poststop=b"")
    monkeypatch.setattr(cleanup, "run_frame", lambda *_: "")
    cleanup.delete(state, record, {})
    assert not (tmp_path / "box").exists()
