"""What tests of a real installation share: the product, an ordinary user, an image."""

from __future__ import annotations

import os
import pwd
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Protocol

import pytest

if TYPE_CHECKING:
    from tests.own_install import Household

REPOSITORY = Path(__file__).resolve().parent.parent
ORDINARY_USER = "apytest"
SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin"
# ./check installs there; somebody who works beside others names a prefix of their own.
PREFIX = os.environ.get("APY_TEST_PREFIX", "/usr/local")


def pytest_configure() -> None:
    """A payload that a signal is to end must not ignore it because nohup(1) started the tests."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


class AsUser(Protocol):
    """Runs a command as the ordinary user."""

    def __call__(
        self,
        argv: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        stdin: str = "",
        timeout_s: float = 120,
    ) -> subprocess.CompletedProcess[str]:
        """Return what it printed and its status; `env` is added to a plain environment."""


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def tracked_files() -> list[Path]:
    """Every file that is, or would be, committed."""
    argv = ["git", "-c", f"safe.directory={REPOSITORY}", "ls-files", "-z"]
    argv += ["--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, check=True, text=True)
    names = [name for name in listed.stdout.split("\0") if name]
    return [REPOSITORY / name for name in names if (REPOSITORY / name).is_file()]


@pytest.fixture(scope="session")
def require_root() -> None:
    """For tests that create users, mounts or root-owned files."""
    if os.geteuid() != 0:
        pytest.skip("needs root")


@pytest.fixture(scope="session")
def product(require_root: None) -> SimpleNamespace:
    """The names compiled into the installation under test, in lower case, and its `program`."""
    installed = Path(PREFIX, "lib/apptainer-py/apptainer_py/base/build.py")
    if not installed.exists():
        pytest.fail("nothing is installed: run ./check, or ./install first")
    facts = {name.lower(): value for name, value in runpy.run_path(str(installed)).items()}
    here = REPOSITORY / "apptainer_py/base/build.py"
    if here.exists() and runpy.run_path(str(here))["BUILD_ID"] != facts["build_id"]:
        pytest.fail("what is installed was not built from this checkout: run ./check")
    return SimpleNamespace(**facts, program=f"{facts['bindir']}/apptainer-py")


@pytest.fixture(scope="session")
def user(require_root: None) -> pwd.struct_passwd:
    """An ordinary user with a home and subordinate ids."""
    try:
        return pwd.getpwnam(ORDINARY_USER)
    except KeyError:
        argv = ["useradd", "--create-home", "--user-group", "--shell", "/bin/bash", ORDINARY_USER]
        subprocess.run(argv, check=True)
        return pwd.getpwnam(ORDINARY_USER)


@pytest.fixture(scope="session")
def as_user(user: pwd.struct_passwd) -> AsUser:
    """Runs a command with the user's ids, groups, home and a plain environment."""
    plain = {"PATH": SYSTEM_PATH, "HOME": user.pw_dir, "USER": user.pw_name, "LANG": "C.UTF-8"}

    def run(
        argv: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        stdin: str = "",
        timeout_s: float = 120,
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(word) for word in argv],
            env={**plain, **(env or {})},
            cwd=cwd or user.pw_dir,
            input=stdin,
            timeout=timeout_s,
            user=user.pw_uid,
            group=user.pw_gid,
            extra_groups=os.getgrouplist(user.pw_name, user.pw_gid),
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def readable_tmp(require_root: None) -> Iterator[Path]:
    """A directory of root's that everybody can read (pytest's own are private)."""
    made = Path(tempfile.mkdtemp(prefix="apptainer-py-test-", dir="/var/tmp"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture
def user_tmp(readable_tmp: Path, user: pwd.struct_passwd) -> Iterator[Path]:
    """A fresh directory that belongs to the ordinary user."""
    made = Path(tempfile.mkdtemp(dir=readable_tmp))
    os.chown(made, user.pw_uid, user.pw_gid)
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture(scope="session")
def demo_sif(product: SimpleNamespace, readable_tmp: Path) -> Path:
    """A small busybox image, written by our own SIF writer."""
    target = readable_tmp / "demo.sif"
    script = REPOSITORY / "tools/demo.py"
    argv = ["/usr/bin/python3", "-I", "-B", script, "--prefix", product.prefix, "--write", target]
    subprocess.run(argv, check=True)
    target.chmod(0o644)
    return target


@pytest.fixture(scope="session", autouse=True)
def open_fuse() -> Iterator[None]:
    """Lets everybody open /dev/fuse: the real Apptainer needs that, and so do user namespaces."""
    device = Path("/dev/fuse")
    if os.geteuid() != 0 or not device.exists():
        yield
        return
    before = device.stat().st_mode & 0o7777
    device.chmod(0o666)
    yield
    device.chmod(before)


@pytest.fixture(scope="session")
def tool() -> Iterator[object]:
    """Finds a checker beside the running Python or on the system; none is an error in CI."""

    def find(name: str) -> str:
        folder = str(Path(sys.executable).parent)
        found = shutil.which(name, path=f"{folder}:/usr/bin:/bin")
        if found is None:
            if os.environ.get("CI") == "true":
                pytest.fail(f"{name} is not installed")
            pytest.skip(f"{name} is not installed: run ./check")
        return found

    yield find


@pytest.fixture
def home(require_root: None) -> Iterator[Household]:
    """The processes that a test starts, orphans included."""
    from tests.own_install import household

    with household() as found:
        yield found
