"""`import apptainer_py` for users: it is found, works, and the page's examples run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PYTHON = "/usr/bin/python3"
DEFINITION = """\
Bootstrap: localimage
From: image.sif

%runscript
    echo "made: $@"

%labels
    Maintainer me
"""


@pytest.fixture(scope="module")
def packages(product):
    """The directory that a user names to Python."""
    version = "".join(re.findall(r"lib/(python3\.\d+)/", subprocess.run(
        [PYTHON, "-c", "import os; print(os.__file__)"], capture_output=True, text=True, check=True
    ).stdout))  # fmt: skip
    return Path(product.prefix, "lib", version, "dist-packages")


@pytest.fixture(params=["user", "root"])
def script(request, packages, as_user, user_tmp, demo_sif, user):
    """Runs a script in a directory with an image and a definition file; returns what it prints."""
    shutil.copyfile(demo_sif, user_tmp / "image.sif")
    os.chown(user_tmp / "image.sif", user.pw_uid, user.pw_gid)
    (user_tmp / "image.def").write_text(DEFINITION)
    environment = {"PYTHONPATH": str(packages), "HOME": str(user_tmp)}

    def run(text: str) -> str:
        (user_tmp / "script.py").write_text(text)
        argv = [PYTHON, "-B", "-W", "error", "script.py"]
        if request.param == "user":
            done = as_user(argv, env=environment, cwd=user_tmp)
        else:
            environ = {"PATH": "/usr/bin:/bin", **environment}
            done = subprocess.run(
                argv, env=environ, cwd=user_tmp, capture_output=True, text=True, check=False
            )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    return run


def test_the_examples_of_the_page(script, repository):
    page = (repository / "docs/python.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(examples) > 5
    assert script("\n".join(examples)) == ""


def test_debian_finds_it_where_it_is_installed(product, packages):
    assert packages.joinpath("apptainer_py").resolve() == Path(product.libdir, "apptainer_py")
    if product.prefix == "/usr/local":
        argv = [PYTHON, "-I", "-c", "import apptainer_py; print(apptainer_py.__file__)"]
        done = subprocess.run(argv, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == f"{packages}/apptainer_py/__init__.py"


def test_types_come_with_it(packages):
    assert (packages / "apptainer_py/py.typed").exists()
    assert "class Exec(" in (packages / "apptainer_py/api/keywords.pyi").read_text()


def test_a_failed_build_tells_why_and_prints_nothing(script):
    said = script("""
import pathlib
import apptainer_py
head = "Bootstrap: localimage\\nFrom: image.sif\\n"
pathlib.Path("bad.def").write_text(head + "%post\\n echo word\\n exit 7\\n")
heard = []
try:
    apptainer_py.build("bad.sif", "bad.def", on_message=lambda *message: heard.append(message))
except apptainer_py.ApptainerError as error:
    print(error)
    print(error.__notes__[0])
    print("word" in error.__notes__[1])
print(heard[0])
with open("log", "wb") as log:
    apptainer_py.build("good.sif", "image.def", output=log)
print("Build complete" in pathlib.Path("log").read_text())
""")
    first, *rest = said.splitlines()
    assert first.endswith("exit status 7")
    where = "it failed in line 5 of section %post: exit 7"
    assert rest == [where, "True", "('INFO', 'Starting build...')", "True"]


def test_threads_build_and_run_at_the_same_time(script):
    said = script("""
import threading
import apptainer_py

def work(number):
    image = apptainer_py.build(f"{number}.sif", "image.def")
    found[number] = image.run([str(number)]).text

found = {}
threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(sorted(found.items()))
""")
    assert said == "[(0, 'made: 0\\n'), (1, 'made: 1\\n'), (2, 'made: 2\\n')]\n"


def test_signatures(script):
    said = script("""
import subprocess
import apptainer_py
for name in ("right", "other"):
    words = ["openssl", "genpkey", "-algorithm", "ed25519", "-out", f"{name}.pem"]
    subprocess.run(words, check=True, capture_output=True)
    words = ["openssl", "pkey", "-in", f"{name}.pem", "-pubout", "-out", f"{name}.pub"]
    subprocess.run(words, check=True)
image = apptainer_py.Image("image.sif")
try:
    image.verify(key="right.pub")
except apptainer_py.ApptainerError as error:
    print(error)
image.sign(key="right.pem")
print(len(image.verify(key="right.pub")))
try:
    image.verify(key="other.pub")
except apptainer_py.ApptainerError as error:
    print(error)
""")
    unsigned, count, other = said.splitlines()
    assert unsigned.startswith("Failed to verify container: integrity: signature not found")
    assert count == "1"
    assert "accepted signatures do not match" in other


def test_an_instance_that_is_gone(script):
    said = script("""
import apptainer_py
for call in (
    lambda: apptainer_py.Instance.get("apy-none"),
    lambda: apptainer_py.Instance.start("nothing.sif", "apy-none"),
    lambda: apptainer_py.Instance.start("image.sif", "a/b"),
):
    try:
        call()
    except apptainer_py.ApptainerError as error:
        print(type(error).__name__, str(error).count("\\n"), str(error)[:60])
""")
    lines = said.splitlines()
    assert lines[0] == "UsageError 0 no instance found with name apy-none"
    assert len(lines) == 3
    assert all(" 0 " in line for line in lines)


def test_the_test_venv_sees_the_same_package(packages):
    """A virtual environment imports what needs no module of Debian's Python."""
    argv = [sys.executable, "-B", "-c", "import apptainer_py; print(apptainer_py.exec)"]
    environ = {"PYTHONPATH": str(packages), "PATH": os.environ["PATH"]}
    done = subprocess.run(argv, env=environ, capture_output=True, text=True, check=False, cwd="/")
    assert (done.returncode, done.stderr) == (0, "")


def test_what_is_not_wanted_any_more_ends_with_all_that_it_started(script):
    assert script(
        """
import os
import signal
import threading
import time

import apptainer_py

# A shell that waits for a program, which holds the pipe.
WAITS = ["sh", "-c", "echo begun; sleep 61; echo never"]


# What is still there in a while: a kill is no wait.
def left():
    for _ in range(100):
        found = sleeping()
        if not found:
            break
        time.sleep(0.1)
    return found


def sleeping():
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/cmdline", "rb") as file:
                words = file.read().split(b"\\0")
            if words[:2] == [b"sleep", b"61"] and os.stat(f"/proc/{name}").st_uid == os.getuid():
                found.append(name)
        except OSError:
            continue
    return found


try:
    apptainer_py.exec("image.sif", WAITS, timeout=3)
except apptainer_py.TimedOut as error:
    assert error.stdout == b"begun\\n", error.stdout
assert not left()

with apptainer_py.stream("image.sif", WAITS) as running:
    assert next(running.lines()) == "begun"
assert running.returncode == 137 and not left()

threading.Timer(1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    apptainer_py.exec("image.sif", WAITS)
except KeyboardInterrupt:
    print("interrupted")
assert not left()

with open("slow.def", "w") as file:
    file.write("Bootstrap: localimage\\nFrom: image.sif\\n%post\\n    sleep 61\\n")
stop = threading.Event()
threading.Timer(0.5, stop.set).start()
before = sorted(os.listdir("."))
for how, kind in (
    ({"cancel": stop}, apptainer_py.Cancelled),
    ({"timeout": 0.3}, apptainer_py.TimedOut),
):
    try:
        apptainer_py.build("slow.sif", "slow.def", **how)
    except kind as error:
        print(error)
threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    apptainer_py.build("slow.sif", "slow.def")
except KeyboardInterrupt:
    print("interrupted")
assert not left() and sorted(os.listdir(".")) == before
"""
    ) == (
        "interrupted\n"
        "the build was cancelled; nothing of it is left\n"
        "build slow.sif slow.def did not end within 0.3 s\n"
        "interrupted\n"
    )
