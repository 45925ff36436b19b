"""config.md: what every platform's configuration has, and how unknown things are treated."""

from __future__ import annotations

import pytest

from tests.oci.bed import PROBE


@pytest.mark.parametrize("version", ["1.0.0", "1.0.2-dev", "1.2.0"])
def test_a_version_of_the_specification(bed, bundle, version):
    bundle.config["ociVersion"] = version
    bed.output(bundle.args("true"))


@pytest.mark.parametrize("version", ["", "one", "1", "v1.0.0"])
def test_a_version_that_is_none(bed, bundle, version):
    bundle.config["ociVersion"] = version
    bed.refused(bundle)


def test_an_unknown_property_is_ignored(bed, bundle):
    bundle.config["unheardOf"] = {"a": 1}
    bundle.process["unheardOf"] = True
    bundle.linux["unheardOf"] = []
    bundle.linux["resources"]["unheardOf"] = {"limit": 1}
    bed.output(bundle.args("true"))


def test_keys_of_another_case(bed, bundle):
    """Go's decoder, and so every runtime of that family, matches keys without regard to case."""
    bundle.config["HostName"] = bundle.config.pop("hostname")
    bundle.process["ARGS"] = ["hostname"]
    del bundle.process["args"]
    bundle.linux["Namespaces"] = [{"Type": row["type"]} for row in bundle.linux.pop("namespaces")]
    assert bed.output(bundle) == "runc\n"


def test_root_is_required(bed, bundle):
    del bundle.config["root"]
    assert "root" in bed.refused(bundle.args("true"))


def test_root_must_exist(bed, bundle):
    bundle.config["root"]["path"] = "nowhere"
    assert "rootfs" in bed.refused(bundle)


def test_root_may_be_absolute(bed, bundle):
    bundle.config["root"]["path"] = str(bundle.rootfs)
    bed.output(bundle.args("true"))


def test_root_is_relative_to_the_bundle(bed, bundle):
    (bundle.path / "deep").mkdir()
    bundle.rootfs.rename(bundle.path / "deep/tree")
    bundle.config["root"]["path"] = "deep/tree"
    bed.output(bundle.args("true"))


def test_root_is_not_a_link(bed, bundle):
    (bundle.path / "link").symlink_to("rootfs")
    bundle.config["root"]["path"] = "link"
    assert "invalid rootfs" in bed.refused(bundle)


def test_root_readonly(bed, bundle):
    done = bed.run(bundle.shell("touch /file"))
    assert done.returncode == 1
    assert "Read-only file system" in done.stderr
    bundle.config["root"]["readonly"] = False
    bed.output(bundle.shell("touch /file"))
    assert (bundle.rootfs / "file").exists()


def test_hostname(bed, bundle):
    bundle.config["hostname"] = "a-name.of-it"
    assert bed.facts(bundle)["hostname"] == "a-name.of-it"


def test_hostname_needs_a_namespace(bed, bundle):
    bundle.without_space("uts")
    assert "unable to set hostname without a private UTS namespace" in bed.refused(bundle)


def test_domainname(bed, bundle):
    bundle.config["domainname"] = "domain.example"
    assert bed.facts(bundle)["domainname"] == "domain.example"


def test_domainname_needs_a_namespace(bed, bundle):
    bundle.without_space("uts")
    del bundle.config["hostname"]
    bundle.config["domainname"] = "domain"
    assert "domainname" in bed.refused(bundle)


WRONG = {
    "namespace": ("linux", {"namespaces": [{"type": "mount"}, {"type": "unheard"}]}),
    "namespace twice": ("linux", {"namespaces": [{"type": "mount"}, {"type": "mount"}]}),
    "propagation": ("linux", {"rootfsPropagation": "unheard"}),
    "personality": ("linux", {"personality": {"domain": "UNHEARD"}}),
    "device type": ("linux", {"devices": [{"path": "/dev/x", "type": "z"}]}),
    "sysctl": ("linux", {"sysctl": {"vm.swappiness": "1"}}),
    "rlimit": ("process", {"rlimits": [{"type": "NOFILE", "soft": 1, "hard": 1}]}),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_value_that_is_wrong_leaves_nothing(bed, bundle, name):
    place, change = WRONG[name]
    bundle.config[place].update(change)
    bed.refused(bundle)


TYPES = {
    "args": ("process", "args", "sh"),
    "env": ("process", "env", {"A": "1"}),
    "cwd": ("process", "cwd", 1),
    "terminal": ("process", "terminal", "yes"),
    "user": ("process", "user", "root"),
    "rlimits": ("process", "rlimits", {}),
    "capabilities": ("process", "capabilities", ["CAP_KILL"]),
    "namespaces": ("linux", "namespaces", {"pid": True}),
    "resources": ("linux", "resources", []),
    "maskedPaths": ("linux", "maskedPaths", "/proc/kcore"),
    "devices": ("linux", "devices", "null"),
    "sysctl": ("linux", "sysctl", ["a"]),
    "seccomp": ("linux", "seccomp", "default"),
}


@pytest.mark.parametrize("name", TYPES)
def test_a_value_of_another_type(bed, bundle, name):
    place, key, value = TYPES[name]
    bundle.config[place][key] = value
    bed.refused(bundle)


def test_the_whole_configuration_of_spec_runs(bed, bundle):
    found = bed.facts(bundle)
    assert found["hostname"] == "runc"
    assert found["rlimits"][7] == [1024, 1024]
    assert found["no_new_privs"] == 1


def test_a_minimal_configuration(bed, bundle):
    bundle.config = {
        "ociVersion": "1.0.0",
        "root": {"path": "rootfs"},
        "process": {"cwd": "/", "args": [PROBE], "user": {"uid": 0, "gid": 0}},
        "linux": {"namespaces": [{"type": "mount"}]},
    }
    bed.output(bundle)


def test_a_configuration_without_namespaces(bed, bundle):
    bundle.linux["namespaces"] = []
    bed.refused(bundle)
