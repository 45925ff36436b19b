"""`--fakeroot` in its four degrees, in the setuid, user-namespace and root flows."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import fixtures, images
from tests.e2e.subids import BASE, both, launch, range_of
from tests.own_install import HostState, Installation, assert_nothing_left, eventually, household

ALL = (2 << int(Path("/proc/sys/kernel/cap_last_cap").read_text())) - 1
NS_GET_OWNER_UID = 0xB704
IDS = "cat /proc/self/uid_map /proc/self/gid_map /proc/self/setgroups"
TRYING = "INFO:    User not listed in /etc/subuid, trying root-mapped namespace\n"
ONLY = "INFO:    fakeroot command not found, using only root-mapped namespace\n"
COMBINED = "INFO:    Using fakeroot command combined with root-mapped namespace\n"
ALONE = "INFO:    No user namespaces available, using only the fakeroot command\n"
FLOWS = {"setuid": (), "userns": ("-u",)}


own = fixtures.own()


@pytest.fixture(scope="module")
def tree(own) -> Path:
    """A sandbox of the user's, with an account beside root's."""
    place = images.shared_folder() / "fakeroot"
    if not place.exists():
        source = images.small_tree(images.shared_folder())
        shutil.copytree(source, place, symlinks=True)
        with (place / "etc/passwd").open("a") as accounts:
            accounts.write("apt:x:42:43:apt:/:/bin/sh\n")
        ids = f"{own.user.pw_uid}:{own.user.pw_gid}"
        subprocess.run(["chown", "-hR", ids, place], check=True)
    return place


@pytest.fixture(scope="module")
def sif(own) -> Path:
    return images.own_sif(images.shared_folder())


@pytest.fixture(scope="module")
def dynamic(own) -> Iterator[Path]:
    """A sandbox of the user's whose programs have a C library: LD_PRELOAD needs one."""
    place = Path(tempfile.mkdtemp(prefix="apptainer-py-dynamic-", dir="/var/tmp"))
    for name in ("bin", "usr/bin", "etc", "dev", "proc", "sys", "tmp", "var/tmp", "root", "home"):
        (place / name).mkdir(parents=True)
    for name in ("sh", "bash", "cat", "chown", "cut", "env", "getopt", "id", "mknod", "rm", "sed",
                 "stat", "touch", "tr", "faked-sysv"):  # fmt: skip
        program = Path(shutil.which(name) or "").resolve()
        shutil.copy(program, place / "usr/bin" / name)
        shutil.copy(program, place / "bin" / name)
        found = subprocess.run(["ldd", program], capture_output=True, text=True, check=True)
        for word in found.stdout.split():
            if word.startswith("/"):
                (place / word[1:]).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(word, place / word[1:])
    (place / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (place / "etc/group").write_text("root:x:0:\n")
    subprocess.run(["chown", "-R", str(own.user.pw_uid), place], check=True)
    place.chmod(0o755)
    yield place
    shutil.rmtree(place)


@pytest.fixture
def shared(own) -> Iterator[Path]:
    """A directory of the user's, below /tmp, which containers see."""
    place = Path(tempfile.mkdtemp(dir="/tmp"))
    place.chmod(0o755)
    os.chown(place, own.user.pw_uid, own.user.pw_gid)
    yield place
    shutil.rmtree(place)


def ranges(own: Installation, first: int = BASE, count: int = 65536) -> str:
    """The ids of a container with ranges, as the kernel shows them."""
    lines = [
        " ".join(str(word) for word in row)
        for own_id in (own.user.pw_uid, own.user.pw_gid)
        for row in ((0, own_id, 1), (1, first, count))
    ]
    return "\n".join([*lines, "allow"])


def squeezed(text: str) -> str:
    return "\n".join(" ".join(line.split()) for line in text.splitlines())


def status(text: str) -> dict[str, list[str]]:
    pairs = (line.partition(":") for line in text.splitlines() if ":" in line)
    return {name: value.split() for name, _, value in pairs}


# ---- with ranges ----


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("kind", ["tree", "sif"])
def test_ranges(own, tree, sif, flow, kind):
    if kind == "sif" and flow == "userns" and os.stat("/dev/fuse").st_mode & 0o006 != 0o006:
        pytest.skip("did not run: /dev/fuse is closed to ordinary users")
    image = tree if kind == "tree" else sif
    words = ["exec", "-f", *FLOWS[flow], image, "sh", "-c"]
    files = both(range_of(own))
    done = launch(own, *words, IDS, files=files)
    assert (squeezed(done.stdout), done.stderr) == (ranges(own), "")
    done = launch(own, *words, "cat /proc/self/status; id; echo $HOME", files=files)
    found = status(done.stdout)
    assert found["Uid"] == found["Gid"] == ["0"] * 4
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(found[name][0], 16) == ALL, name
    assert found["NoNewPrivs"] == ["1"]
    assert "uid=0(root) gid=0(root)" in done.stdout and done.stdout.endswith("/root\n")


def test_a_larger_range_is_mapped_whole_and_the_exact_one_preferred(own, tree):
    text = f"nobody:1:5\n{range_of(own, 300_000, 70_000)}"
    for flow in FLOWS.values():
        done = launch(own, "exec", "-f", *flow, tree, "sh", "-c", IDS, files=both(text))
        assert squeezed(done.stdout) == ranges(own, 300_000, 70_000), done.stderr
    text += f"{own.user.pw_uid}:500000:65536\n"
    done = launch(own, "exec", "-f", tree, "sh", "-c", IDS, files=both(text))
    assert squeezed(done.stdout) == ranges(own, 500_000), done.stderr


@pytest.mark.parametrize("flow", FLOWS)
def test_files_of_other_ids(own, tree, shared, flow):
    """What package managers do: owners, groups and modes of files, as several users."""
    script = f"""set -e
        cd {shared}; touch a; mkdir d; touch d/b; busybox=/bin/busybox
        $busybox chown 42:43 a; $busybox chown -R 65534:65534 d; $busybox chmod 4755 a
        stat -c %u:%g a d/b
        $busybox start-stop-daemon -S -q -p /none -c 42:43 -x /bin/sh \
            -- -c 'id -u; id -g; echo x >a'
        $busybox chown 0:0 d/b d"""
    words = ["exec", "-f", *FLOWS[flow], tree, "sh", "-c", script]
    done = launch(own, *words, files=both(range_of(own)))
    assert done.stdout.split() == ["42:43", "65534:65534", "42", "43"], done.stderr
    facts = (shared / "a").stat()
    assert (facts.st_uid, facts.st_gid) == (BASE + 41, BASE + 42)
    assert (shared / "d/b").stat().st_uid == own.user.pw_uid


def test_another_user_inside_reads_the_image(own, sif, shared):
    accounts = shared / "passwd"
    accounts.write_text("root:x:0:0::/root:/bin/sh\napt:x:42:43::/:/bin/sh\n")
    script = "/bin/busybox start-stop-daemon -S -q -p /none -c 42 -x /bin/cat -- /etc/test-release"
    words = ["exec", "-f", "-B", f"{accounts}:/etc/passwd", sif, "sh", "-c", script]
    done = launch(own, *words, files=both(range_of(own)))
    assert done.stdout == "a small tree\n", done.stderr


def test_writable_tmpfs_and_sandbox(own, tree):
    copy = Path(tempfile.mkdtemp(prefix="apptainer-py-sandbox-", dir="/var/tmp")) / "tree"
    shutil.copytree(tree, copy, symlinks=True)
    subprocess.run(["chown", "-R", f"{own.user.pw_uid}:{own.user.pw_gid}", copy.parent], check=True)
    script = "mkdir /opt/new && /bin/busybox chown 7:8 /opt/new && stat -c %u:%g /opt/new"
    files = both(range_of(own))
    try:
        for option in ("--writable-tmpfs", "-w"):
            done = launch(own, "exec", "-f", option, copy, "sh", "-c", script, files=files)
            assert done.stdout == "7:8\n", (option, done.stderr)
        facts = (copy / "opt/new").stat()
        assert (facts.st_uid, facts.st_gid) == (BASE + 6, BASE + 7)
    finally:
        shutil.rmtree(copy.parent)


def test_dropped_capabilities(own, tree):
    words = [
        "exec",
        "-f",
        "--drop-caps",
        "chown,kill",
        tree,
        "busybox",
        "grep",
        "Cap",
        "/proc/self/status",
    ]
    found = status(launch(own, *words, files=both(range_of(own))).stdout)
    assert {int(words[0], 16) for words in found.values()} == {ALL & ~0b100001}
    words[2:4] = ["--no-privs"]
    found = status(launch(own, *words, files=both(range_of(own))).stdout)
    assert {int(words[0], 16) for words in found.values()} == {0}


def test_mknod_is_the_kernels_to_refuse(own, tree, shared):
    words = ["exec", "-f", tree, "/bin/busybox", "mknod", shared / "disk", "b", "8", "0"]
    done = launch(own, *words, files=both(range_of(own)))
    assert done.returncode == 1 and "Operation not permitted" in done.stderr
    assert not list(shared.iterdir())


def test_root_needs_a_range_too(own, tree):
    done = launch(own, "exec", "-f", tree, "id", files=both(range_of(own)), root=True)
    assert done.returncode == 255
    first = done.stderr.splitlines()[0]
    assert (
        first == "FATAL:   could not use fakeroot: no mapping entry found in /etc/subuid for root"
    )
    for flow in ((), ("-u",)):
        words = ["exec", "-f", *flow, tree, "sh", "-c", IDS]
        done = launch(own, *words, files=both("root:200000:65536\n"), root=True)
        rows = "0 0 1\n1 200000 65536\n"
        assert squeezed(done.stdout) == f"{rows}{rows}allow", done.stderr


def test_the_variable_and_the_option(own, tree):
    files = both(range_of(own))
    for prefix in ("APPTAINER_", "SINGULARITY_"):
        env = {f"{prefix}FAKEROOT": "1"}
        done = launch(own, "-q", "exec", tree, "id", "-u", files=files, env=env)
        assert done.stdout == "0\n", done.stderr
        done = launch(own, "-q", "exec", "-f=0", tree, "id", "-u", files=files, env=env)
        assert done.stdout == f"{own.user.pw_uid}\n", done.stderr
    env = {"APPTAINER_FAKEROOT": "1", "APPTAINER_IGNORE_SUBUID": "1",
           "APPTAINER_IGNORE_FAKEROOT_COMMAND": "1"}  # fmt: skip
    done = launch(own, "exec", tree, "id", "-u", files=files, env=env)
    assert (done.stdout, done.stderr) == ("0\n", TRYING + ONLY)


# ---- without ----


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("text", ["", "other:100000:65536\n", "!{name}:100000:65536\n"])
def test_one_id(own, tree, flow, text):
    files = both(text.format(name=own.user.pw_name))
    words = ["exec", "-f", "--ignore-fakeroot-command", *FLOWS[flow], tree, "sh", "-c"]
    done = launch(own, *words, IDS, files=files)
    user, group = own.user.pw_uid, own.user.pw_gid
    assert squeezed(done.stdout) == f"0 {user} 1\n0 {group} 1\ndeny"
    assert done.stderr == TRYING + ONLY
    found = status(launch(own, *words, "cat /proc/self/status", files=files).stdout)
    assert found["Uid"] == found["Gid"] == ["0"] * 4
    assert int(found["CapPrm"][0], 16) == ALL
    assert found["NoNewPrivs"] == ["0"]


def test_ignoring_the_ranges(own, tree):
    words = ["exec", "-f", "--ignore-subuid", "--ignore-fakeroot-command", tree, "sh", "-c", IDS]
    done = launch(own, *words, files=both(range_of(own)))
    assert squeezed(done.stdout).startswith(f"0 {own.user.pw_uid} 1\n0 ")
    assert done.stderr == TRYING + ONLY


SCRIPT = "touch {0}/a; chown 42:43 {0}/a; mknod {0}/b b 8 1; stat -c %u:%g:%F {0}/a {0}/b; id -u"
PRETENDED = "42:43:regular empty file\n0:0:block special file\n0\n"
needs_command = pytest.mark.skipif(
    not Path("/usr/bin/faked-sysv").exists(), reason="did not run: fakeroot is not installed"
)


@needs_command
@pytest.mark.parametrize("flow", FLOWS)
def test_the_command_in_a_namespace(own, dynamic, shared, flow):
    words = ["exec", "-f", *FLOWS[flow], dynamic, "sh", "-c"]
    done = launch(own, *words, SCRIPT.format(shared), files=both(""))
    assert (done.stdout, done.stderr) == (PRETENDED, TRYING + COMBINED)
    assert (shared / "a").stat().st_uid == own.user.pw_uid
    done = launch(own, *words, "env; cat /proc/self/uid_map", files=both(""))
    assert "\nLD_PRELOAD=/.singularity.d/libs/libfakeroot.so\n" in done.stdout
    assert "\nFAKEROOTDONTTRYCHOWN=1\n" in done.stdout
    libs = "/.singularity.d/libs"
    shown = f"APPTAINER_BIND={libs}/fakeroot,{libs}/faked,{libs}/libfakeroot.so\n"
    assert shown in done.stdout and "\nHOME=/root\n" in done.stdout
    assert done.stdout.split()[-3:] == ["0", str(own.user.pw_uid), "1"]


@needs_command
def test_the_command_alone(own, dynamic, tree, sif, shared):
    alone = ["exec", "-f", "--ignore-userns"]
    done = launch(own, *alone, dynamic, "sh", "-c", SCRIPT.format(shared), files=both(""))
    assert (done.stdout, done.stderr) == (PRETENDED, TRYING + ALONE)
    done = launch(own, *alone, dynamic, "sh", "-c", "cat /proc/self/status", files=both(""))
    found = status(done.stdout)
    assert found["Uid"] == [str(own.user.pw_uid)] * 4 and int(found["CapPrm"][0], 16) == 0
    done = launch(own, *alone, sif, "id", files=both(""))
    assert done.returncode == 255
    assert done.stderr.splitlines()[-1] == (
        "FATAL:   --fakeroot used without sandbox image or user namespaces"
    )


def test_nothing_is_left(own, tree):
    words = ["exec", "-f", "--ignore-userns", "--ignore-fakeroot-command", tree, "id"]
    done = launch(own, *words, files=both(""))
    assert done.returncode == 255
    assert done.stderr.splitlines()[1] == (
        "FATAL:   --fakeroot requires either being in /etc/subuid, unprivileged user namespaces, "
        "or the fakeroot command"
    )


# ---- instances ----

JOIN = (
    "id -u; grep -c . /proc/self/uid_map; grep -E 'CapEff|NoNew' /proc/self/status; "
    "cat /proc/1/comm"
)
NAME = "apy-test-f"


@pytest.fixture
def instance(own, tree):
    """Starts an instance, and stops what is left of it."""

    def start(files, *options, root=False):
        done = launch(
            own, "-q", "instance", "start", "-f", *options, tree, NAME, files=files, root=root
        )
        assert (done.returncode, done.stderr) == (0, "")
        return lambda *words: launch(own, *words, files=files, root=root)

    yield start
    for root in (False, True):
        launch(own, "instance", "stop", "-F", NAME, root=root)


@pytest.mark.parametrize("joining", FLOWS)
@pytest.mark.parametrize("flow", FLOWS)
def test_joining_an_instance_with_ranges(instance, own, flow, joining):
    """Its owner enters the namespace: no starter with privilege is needed for that."""
    run = instance(both(range_of(own)), *FLOWS[flow])
    done = run("exec", *FLOWS[joining], f"instance://{NAME}", "sh", "-c", JOIN)
    lines = done.stdout.split("\n")
    assert lines[:2] == ["0", "2"], done.stderr
    assert (int(lines[2].split()[1], 16), lines[3].split()[1], lines[4]) == (ALL, "1", "appinit")
    made = run("exec", *FLOWS[joining], f"instance://{NAME}", "sh", "-c",
               "touch /tmp/apy-of-42 && chown 42:43 /tmp/apy-of-42 && stat -c %u /tmp/apy-of-42; "
               "rm /tmp/apy-of-42; echo $HOME; exit 7")  # fmt: skip
    assert (made.returncode, made.stdout) == (7, "42\n/root\n"), made.stderr


def test_joining_an_instance_with_one_id(instance, own):
    run = instance(both(""), "--ignore-fakeroot-command")
    done = run("exec", "-f", f"instance://{NAME}", "sh", "-c", JOIN)
    assert done.stderr == "INFO:    --fakeroot ignored when joining instance\n"
    assert done.stdout.split("\n")[:2] == ["0", "1"]
    dropped = run("exec", "--drop-caps", "all", f"instance://{NAME}", "sh", "-c", JOIN)
    assert int(dropped.stdout.split("\n")[2].split()[1], 16) == 0


def test_joining_an_instance_of_root(instance, own):
    files = both("root:200000:65536\n")
    run = instance(files, root=True)
    done = run("exec", f"instance://{NAME}", "sh", "-c", JOIN)
    lines = done.stdout.split("\n")
    assert (lines[:2], lines[4]) == (["0", "2"], "appinit"), done.stderr


@needs_command
@pytest.mark.parametrize("options", [(), ("--ignore-userns",)], ids=["namespace", "alone"])
def test_joining_an_instance_with_the_command(own, dynamic, shared, options):
    words = ["-q", "instance", "start", "-f", *options, dynamic, NAME]
    files = both("")
    try:
        assert launch(own, *words, files=files).returncode == 0
        joined = ["exec", f"instance://{NAME}", "sh", "-c", SCRIPT.format(shared)]
        done = launch(own, *joined, files=files)
        assert (done.stdout, done.stderr) == (PRETENDED, "")
    finally:
        launch(own, "instance", "stop", "-F", NAME)


@pytest.mark.parametrize("lie", [[], ["namespace"], ["command"], "x"])
@pytest.mark.parametrize("fakeroot", [(), ("-f",)], ids=["plain", "fakeroot"])
def test_a_record_that_lies_about_the_degree(own, tree, lie, fakeroot):
    """Who joins is told what it says; the starter finds out what there is."""
    files = both(range_of(own))
    launch(own, "-q", "instance", "start", *fakeroot, tree, NAME, files=files)
    account = own.user.pw_name
    record = next(Path(own.user.pw_dir).glob(f".apptainer/instances/app/*/{account}/{NAME}/*.json"))
    try:
        said = json.loads(record.read_text())
        assert said["fakeroot"] == (["namespace", "subids"] if fakeroot else [])
        record.write_text(json.dumps({**said, "fakeroot": lie}))
        done = launch(own, "exec", f"instance://{NAME}", "id", "-u", files=files)
        inside = lie == ["namespace"]
        if inside == bool(fakeroot) and lie != ["command"]:
            assert done.stdout == ("0\n" if inside else f"{own.user.pw_uid}\n")
        else:
            assert (done.returncode, done.stdout) == (255, "")
            assert len([line for line in done.stderr.splitlines() if "FATAL" in line]) == 1
        record.write_text(json.dumps(said))
    finally:
        launch(own, "instance", "stop", "-F", NAME)


# ---- what stays true ----


def test_the_other_engine_says_no(own, tree):
    done = launch(own, "exec", "--oci", "-f", tree, "id")
    assert done.returncode == 255
    assert "`--fakeroot` is not supported with --oci" in done.stderr


@pytest.mark.parametrize("options", [(), ("-u",), ("-p",)], ids=["setuid", "userns", "pid"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_keeper_ends_a_payload_that_has_become_somebody_else(own, tree, options, number):
    """Its namespace belongs to its caller, who may end all that runs in it."""
    script = "exec /bin/busybox start-stop-daemon -S -q -p /none -c 42 -x /bin/sleep -- 600"
    with household() as home:
        host = HostState(own.session)
        process = home.adopt(own.start("exec", "-f", *options, tree, "sh", "-c", script))

        def other() -> int:
            for pid in home.alive():
                try:
                    facts = status(Path(f"/proc/{pid}/status").read_text())
                except OSError:
                    continue
                if facts["Uid"][1] not in ("0", str(own.user.pw_uid)):
                    return int(pid)
            return 0

        eventually(lambda: other() != 0, "the payload is another user")
        fd = os.open(f"/proc/{other()}/ns/user", os.O_RDONLY)
        owner = fcntl.ioctl(fd, NS_GET_OWNER_UID, bytes(4))
        os.close(fd)
        assert int.from_bytes(owner, "little") == own.user.pw_uid
        process.send_signal(number)
        process.wait(timeout=15)
        if number == signal.SIGTERM or options == ("-p",):
            assert_nothing_left(home, host)
        else:  # as a payload with CAP_SETUID: -p keeps a hold on it
            left = other()
            if left:
                os.kill(left, signal.SIGKILL)
            assert_nothing_left(home, host)
