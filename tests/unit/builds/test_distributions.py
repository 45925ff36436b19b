"""What the agents of distributions run, and what they say where they cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

from apptainer_py.builds import agents, distributions
from apptainer_py.builds.agents import ConveyorFailed, Order

SLE = {
    "product": "SLE-15",
    "user": "u@x",
    "regcode": "r",
    "osversion": "15.1",
    "mirrorurl": "http://h/%{OSVersion}",
    "modules": "base, server",
    "otherurl1": "http://h/1",
    "otherurl10": "http://h/10",
    "otherurl2": "http://h/2",
}


def order(header: dict[str, str], folder: Path, agent: str = "zypper") -> Order:
    header = {"bootstrap": agent, **header}
    root = str(folder / "root")
    return Order(
        header=header, root=root, folder=str(folder), owns_all=True, may_share=False, environ={}
    )


@pytest.fixture
def no_programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(distributions, "TOOLS", str(tmp_path))


PACKAGES = [
    ("debootstrap", "debootstrap", "debootstrap"),
    ("yum", "dnf", "dnf"),
    ("zypper", "zypper", "zypper"),
    ("arch", "pacstrap", "arch-install-scripts"),
]


@pytest.mark.parametrize(("agent", "program", "package"), PACKAGES)
@pytest.mark.usefixtures("no_programs")
def test_a_missing_program_is_named_with_its_package(
    tmp_path: Path, agent: str, program: str, package: str
) -> None:
    header = {"osversion": "x", "mirrorurl": "http://h"}
    with pytest.raises(ConveyorFailed) as caught:
        agents.find(agent)(order(header, tmp_path, agent))
    assert f"{program} is not installed" in str(caught.value)
    assert package in str(caught.value.advice())
    assert not list(tmp_path.iterdir())


def test_a_registered_distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributions, "find", lambda name, *_: f"/bin/{name}")
    machine = distributions.os.uname().machine
    found = distributions.zypper_commands(order(SLE, tmp_path), "/bin/zypper")
    lines = [" ".join(argv).replace(f" --root {tmp_path}/root", "") for argv in found]
    connect = "/bin/SUSEConnect --product"
    assert lines[0] == "/bin/zypper --non-interactive ar -- http://h/15.1 repo"
    assert lines[2] == f"{connect} SLE-15/15.1/{machine} --email u@x --regcode r"
    assert lines[3] == f"{connect} base/15.1/{machine}"
    assert [line.split()[-2:] for line in lines if " -f " in line] == [
        ["http://h/1", "repo-0"],
        ["http://h/2", "repo-1"],
        ["http://h/10", "repo-2"],
    ]
    assert lines[-1].endswith("-- aaa_base SUSEConnect")
    assert "--releasever=15.1 install" in lines[-1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"regcode": ""}, "needs the header key RegCode"),
        ({"osversion": "leap"}, "is not of the form 15.1"),
        ({"mirrorurl": ""}, "needs the header key MirrorURL"),
        ({"productpgp": "x"}, "not supported yet"),
    ],
)
def test_a_registered_distribution_that_lacks_something(
    tmp_path: Path, change: dict[str, str], says: str
) -> None:
    with pytest.raises(ConveyorFailed, match=says):
        distributions.zypper_commands(order({**SLE, **change}, tmp_path), "/bin/zypper")


def test_repositories_of_yum() -> None:
    text = distributions.yum_conf("http://m", "", signed=True)
    assert "baseurl=http://m\n" in text and "[updates]" not in text
    assert text.count("gpgcheck=1") == 2 and "reposdir=/dev/null" in text
    assert "[updates]" in distributions.yum_conf("http://m", "http://u", signed=False)
