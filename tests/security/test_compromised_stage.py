"""I-4: a stage 1 that ignores the administrator's file is stopped by the C side.

A second installation is built whose master reads another file: it plans, and mounts, as if that
one held. What it asks for is what a taken-over stage 1 could ask for, one directive at a time.
"""

from __future__ import annotations

import grp
import json
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from apptainer_py.model import protocol
from tests import extfs_images, images, own_install
from tests.e2e.subids import both, launch, range_of
from tests.e2e.test_cni import PLUGINS, Host, allow
from tests.own_install import Installation, eventually

READS = '    if info["config_fd"] >= 0:\n'
READS_ANOTHER = """\
    believed = os.path.join(os.path.dirname(build.SYSCONFDIR), "believed")
    if info["stage"] == protocol.STAGE_MASTER and os.path.exists(believed):
        values, lines, problems = _starter.parse_config_fd(os.open(believed, os.O_RDONLY))
    elif info["config_fd"] >= 0:
"""
PLANS = '        if degree not in (RANGES, ONE_ID) or not words or not words[0].startswith("/"):\n'
# Frames that this engine never sends: devices, and the host's tree without a user namespace.
PLANS_ANYTHING = """\
        if degree == "device":
            from apptainer_py.kernel import _starter

            keeper = context._info["keeper_fd"]
            for word in words:
                fd = -1 if word == "none" else os.open(word, os.O_RDWR)
                _starter.send_operation(keeper, protocol.OP_FUSE_DEVICE, 0, (), None, None, fd)
                os.write(2, b"said %d\\n" % _starter.receive_reply(keeper)[1])
            raise Misused
        if degree == "plain":
            facts, none = context.facts, (0, 0, 0, 0, 0)
            flags = protocol.PLANFLAG_NO_NEW_PRIVS | protocol.PLANFLAG_SLAVE
            context.plan(
                ContainerPlan(image="/", uid=facts.uid, gid=facts.gid, flags=flags, caps=none)
            )
            parts = [context.cwd, str(len(words)), *words]
            context.tell_start(b"\\0".join(map(os.fsencode, parts)))
            return
"""
LOOK = ("sh", "-c", "ls -d $* 2>/dev/null; exit 0", "sh")


# A master that never says that it has ended: its end stays open in a process that outlives it.
MADE = "        self.container_pid = container_pid\n"
KEEPS_IT = """\
        from apptainer_py.base import build
        keeps = os.path.join(os.path.dirname(build.SYSCONFDIR), "keeps")
        if os.path.exists(keeps) and os.fork() == 0:
            os.setsid()
            os.closerange(0, 3)
            import time
            while os.path.exists(keeps):
                time.sleep(0.1)
            os._exit(0)
"""
ENDS = "            channel.shutdown(socket.SHUT_WR)\n"


@pytest.fixture(scope="module")
def rogue(require_root: None) -> Iterator[Installation]:
    """An installation whose master has a configuration of its own."""
    tree = Path(tempfile.mkdtemp(prefix="apptainer-py-rogue-", dir="/var/tmp"))
    place = Path(tempfile.mkdtemp(prefix="apptainer-py-rogue-", dir="/opt"))
    place.chmod(0o755)
    try:
        left_out = shutil.ignore_patterns("build", ".git", "__pycache__", ".*_cache", "tests")
        shutil.copytree(own_install.REPOSITORY, tree, ignore=left_out, dirs_exist_ok=True)
        stages = tree / "apptainer_py/runtime/stages.py"
        text = stages.read_text()
        assert text.count(READS) == 1
        text = text.replace(READS, READS_ANOTHER)
        stages.write_text(text.replace("\nTYPE_CHECKING", _IMPORT, 1))
        janitor = tree / "apptainer_py/runtime/janitor.py"
        text = janitor.read_text()
        assert text.count(MADE) == 1
        assert text.count(ENDS) == 1
        janitor.write_text(text.replace(MADE, MADE + KEEPS_IT).replace(ENDS, ""))
        engine = tree / "apptainer_py/engines/fakeroot/__init__.py"
        text = engine.read_text()
        assert text.count(PLANS) == 1
        engine.write_text(text.replace(PLANS, PLANS_ANYTHING + PLANS))
        grants = tree / "apptainer_py/engines/apptainer/capabilities.py"
        text = grants.read_text()
        assert text.count(GRANTS) == 1
        grants.write_text(text.replace(GRANTS, OTHER_GRANTS))
        made = Installation(place)
        argv = [tree / "install", "--prefix", made.prefix, "--sysconfdir", made.sysconfdir]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        yield made
    finally:
        shutil.rmtree(tree)
        shutil.rmtree(place)


GRANTS = 'FILE = f"{SYSCONFDIR}/capability.json"\n'
OTHER_GRANTS = 'FILE = os.path.join(os.path.dirname(SYSCONFDIR), "believed.json")\n'
_IMPORT = "\nfrom apptainer_py.base import build\n\nTYPE_CHECKING"


def configure(rogue: Installation, holds: str, believed: str) -> None:
    rogue.configure(holds)
    file = rogue.place / "believed"
    file.write_text(believed + "\naudit log = none\n")
    file.chmod(0o644)


@pytest.fixture(scope="module")
def sif(rogue: Installation) -> Path:
    return images.own_sif(images.shared_folder())


BELIEVED = "bind path = /etc/hosts"


@pytest.mark.parametrize(
    ("words", "seen"),
    [
        (("-B", "/etc:/given"), "/given/shadow"),
        (("-B", "/etc:/etc"), "/etc/shadow"),
        (("-B", "/tmp/../etc:/tmp"), "/tmp/shadow"),
        (("-B", "/dev/shm:/given"), "/given"),
        (("--mount", "type=bind,src=/etc,dst=/given"), "/given/shadow"),
        (("-S", "/given", "-W", "{work}"), "/given/marked"),
        (("-H", "/etc:{home}"), "{home}/shadow"),
        (("-H", "{work}"), "{work}/marked"),
        (("-c", "-W", "{work}"), "/tmp/marked"),
    ],
)
def test_user_bind_control(rogue, sif, words, seen):
    """The same words show the file where the administrator allows it, and do not where not."""
    work = Path(tempfile.mkdtemp(dir=rogue.user.pw_dir))
    os.chown(work, rogue.user.pw_uid, -1)
    for name in ("", "tmp", "scratch/given"):
        (work / name).mkdir(parents=True, exist_ok=True)
        (work / name / "marked").touch()
    facts = {"work": work, "home": rogue.user.pw_dir}
    argv = ["exec", *(word.format(**facts) for word in words), sif, *LOOK, seen.format(**facts)]
    try:
        configure(rogue, "user bind control = yes", BELIEVED)
        free = rogue.run(*argv, cwd="/")
        configure(rogue, "user bind control = no", BELIEVED)
        bound = rogue.run(*argv, cwd="/")
    finally:
        shutil.rmtree(work)
    assert free.stdout.split() == [seen.format(**facts)], free.stderr
    assert bound.stdout == "", bound.stderr
    assert "Traceback" not in bound.stderr


@pytest.mark.parametrize(
    ("holds", "words"),
    [
        ("", ()),
        ("allow net users = {name}", ()),
        ("allow net networks = bridge", ()),
        ("allow net users = root\nallow net networks = bridge", ()),
        ("allow net users = {name}\nallow net networks = ptp", ()),
        ("allow net users = {name}\nallow net networks = bridge", ("-u",)),
    ],
)
def test_cni_networks(rogue, sif, holds, words):
    """A network, and that its plugins run as root, is the starter's to allow."""
    name = rogue.user.pw_name
    believed = f"{BELIEVED}\nallow net users = {name}\nallow net networks = bridge"
    configure(rogue, holds.format(name=name), believed)
    done = rogue.run("exec", *words, "--net", sif, "true", cwd="/")
    assert done.returncode == 255
    assert "network bridge is for root" in done.stderr


@pytest.mark.skipif(not PLUGINS.exists(), reason="no CNI plugins: run ./check")
def test_a_network_ends_with_its_container(rogue, sif):
    """Whoever still holds the janitor's socket; it would hold an address and ports, too."""
    host = Host(rogue, sif)
    keeps = rogue.place / "keeps"
    keeps.touch()
    try:
        allow(host)
        status, out, err = host.run("--net", sif, "echo", "ran", user=True)
        assert (status, out, err) == (0, "ran\n", "")
        eventually(lambda: host.traces() == [], "nothing is left of the network")
    finally:
        keeps.unlink()
        host.end()


def test_the_directory_of_the_caller(rogue, sif):
    place = Path(tempfile.mkdtemp(dir=rogue.place))
    place.chmod(0o755)
    (place / "seen").touch()
    for value, seen in (("yes", f"{place}/seen\n"), ("no", "")):
        configure(rogue, f"user bind control = {value}", BELIEVED)
        assert rogue.run("exec", sif, *LOOK, place / "seen", cwd=place).stdout == seen


def test_a_home_that_the_environment_names(rogue, sif):
    """Somebody without an account has no home, whatever HOME says."""
    configure(rogue, "user bind control = no", BELIEVED)
    done = subprocess.run(
        [rogue.program, "exec", sif, *LOOK, "/usr/lib", "/usr/share"],
        env=rogue.environment({"HOME": "/usr"}), cwd="/", user=54321, group=54321,
        extra_groups=[], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == "", done.stderr


@pytest.mark.parametrize(
    ("holds", "words", "seen"),
    [
        ("mount proc = no", (), "/proc/self"),
        ("mount proc = no", ("-p",), "/proc/self"),
        ("mount sys = no", (), "/sys/kernel"),
        ("mount dev = no", (), "/dev/null"),
        ("mount dev = minimal", (), "/dev/fuse"),
        ("mount dev = no", ("-c",), "/dev/pts/ptmx"),
        ("mount devpts = no", ("-c",), "/dev/pts/ptmx"),
        ("mount home = no", (), "{home}/.profile"),
        ("mount tmp = no", (), "{tmp}"),
        ("config resolv_conf = no", (), "/etc/resolv.conf"),
    ],
)
def test_what_is_mounted_by_default(rogue, sif, holds, words, seen):
    """Binds among these could be had with -B where the user may bind at all: here not."""
    marks = [Path(rogue.user.pw_dir) / ".profile"]
    marks[0].touch()
    with tempfile.NamedTemporaryFile(dir="/tmp") as file:
        facts = {"home": rogue.user.pw_dir, "tmp": file.name}
        look: tuple[str | Path, ...] = (*LOOK, seen.format(**facts))
        if seen == "/etc/resolv.conf":
            look = ("sh", "-c", f"cat {seen} 2>/dev/null; exit 0")
        configure(rogue, "bind path = /etc/hosts", BELIEVED)
        free = rogue.run("exec", *words, sif, *look, cwd="/")
        configure(rogue, f"user bind control = no\n{holds}", BELIEVED)
        bound = rogue.run("exec", *words, sif, *look, cwd="/")
    assert free.stdout, free.stderr
    assert bound.stdout == "", bound.stderr


def test_paths_of_the_administrator(rogue, sif):
    believed = "bind path = /etc:/given"
    for holds, seen in (
        (believed, "/given/shadow\n"),
        ("bind path = /etc", ""),
        ("bind path = /etc:/other", ""),
        ("", ""),
    ):
        configure(rogue, f"user bind control = no\n{holds}", believed)
        done = rogue.run("exec", sif, *LOOK, "/given/shadow", cwd="/")
        assert (done.returncode, done.stdout) == (0, seen), done.stderr


@pytest.mark.parametrize(
    ("holds", "believed", "words"),
    [
        ("allow pid ns = no", "", ("-p",)),
        ("allow ipc ns = no", "", ("-i",)),
        ("allow uts ns = no", "", ("--uts",)),
        ("mount slave = no", "", ()),
        ("enable overlay = no", "enable underlay = no", ()),
        ("enable overlay = no", "", ("--writable-tmpfs",)),
        ("enable underlay = no", "enable overlay = no", ()),
        ("allow container sif = no", "", ()),
        ("limit container owners = daemon", "", ()),
        ("limit container groups = daemon", "", ()),
        ("limit container paths = /nonexistent", "", ()),
        ("allow setuid-mount squashfs = no", "allow setuid-mount squashfs = yes", ()),
        ("sessiondir max size = 8", "sessiondir max size = 16", ()),
    ],
)
def test_what_ends_the_launch(rogue, sif, holds, believed, words):
    configure(rogue, believed, believed)
    assert rogue.run("exec", *words, sif, "true").returncode == 0
    configure(rogue, holds, believed)
    done = rogue.run("exec", *words, sif, "true")
    assert done.returncode == 255, done.stderr
    assert "FATAL" in done.stderr


@pytest.fixture
def places(rogue: Installation) -> Iterator[dict[str, Path]]:
    """An image in two directories of which one's name begins with the other's; links to both."""
    place = Path(tempfile.mkdtemp(dir=rogue.place))
    place.chmod(0o755)
    found = {name: place / name for name in ("safe", "safe-not", "alias", "link", "hard")}
    for name in ("safe", "safe-not"):
        found[name].mkdir()
        shutil.copy(images.own_sif(images.shared_folder()), found[name] / "i.sif")
    found["alias"].symlink_to("safe")
    found["link"].symlink_to("safe-not/i.sif")
    os.link(found["safe"] / "i.sif", found["hard"])
    yield found
    shutil.rmtree(place)


@pytest.mark.parametrize(
    ("permitted", "image", "runs"),
    [
        ("safe", "safe/i.sif", True),
        ("safe", "alias/i.sif", True),
        ("alias", "safe/i.sif", True),
        ("safe", "safe-not/i.sif", False),
        ("safe", "link", False),
        ("safe", "hard", False),
        ("safe", "safe/../safe-not/i.sif", False),
    ],
)
def test_paths_are_judged_by_the_open_file(rogue, places, permitted, image, runs):
    """Component by component, and by the name that the kernel knows it by."""
    configure(rogue, f"limit container paths = {places[permitted]}", "")
    done = rogue.run("exec", places["safe"].parent / image, "echo", "ran")
    assert (done.returncode, done.stdout) == ((0, "ran\n") if runs else (255, "")), done.stderr


@pytest.mark.parametrize("value", ["yes", "no"])
def test_ids_of_a_user_who_may_have_no_namespace(rogue, value):
    tree = images.small_tree(images.shared_folder())
    configure(rogue, f"allow user ns = {value}", "")
    done = launch(rogue, "exec", "-f", tree, "id", "-u", files=both(range_of(rogue)))
    assert (done.returncode, done.stdout) == ((0, "0\n") if value == "yes" else (255, ""))


NET_RAW = 1 << 13


@pytest.mark.parametrize(
    ("text", "granted"),
    [
        ('{"users": {"@user": ["CAP_NET_RAW"]}}', True),
        ('{"groups": {"@group": ["CAP_NET_RAW"]}}', True),
        ('{"groups": {"@user": ["CAP_CHOWN"], "games": ["CAP_NET_RAW"]}}', False),
        ('{"groups": {"no-such-group": ["CAP_NET_RAW"], "root": ["CAP_NET_RAW"]}}', False),
        ('{"users": {"root": ["CAP_NET_RAW"], "@user2": ["CAP_NET_RAW"]}}', False),
        ('{"users": {"@user": ["CAP_CHOWN"]}}', False),
        ('{"users": {"@user": ["CAP_NET_RAW"]}} ', True),
        ('{"users": {"@user": ["CAP_NET_RAW"]}} x', False),
        ('{"users": {"@user": ["CAP_NET_RAW"]}, "users": {}}', False),
        ("", False),
        (None, False),
    ],
)
def test_what_was_granted(rogue, sif, text, granted):
    """Whatever master believes, C reads the administrator's own file."""
    name = rogue.user.pw_name
    configure(rogue, "", "")
    believed = rogue.place / "believed.json"
    believed.write_text(json.dumps({"users": {name: ["CAP_NET_RAW"]}}))
    believed.chmod(0o644)
    file = rogue.sysconfdir / "capability.json"
    file.unlink(missing_ok=True)
    if text is not None:
        group = grp.getgrgid(rogue.user.pw_gid).gr_name
        file.write_text(text.replace("@user", name).replace("@group", group))
        file.chmod(0o644)
    look = ("sh", "-c", "grep CapEff /proc/self/status")
    done = rogue.run("exec", "--add-caps", "net_raw", sif, *look)
    if granted:
        assert int(done.stdout.split()[1], 16) == NET_RAW, done.stderr
    else:
        assert (done.returncode, done.stdout) == (255, ""), done.stderr
        assert protocol.ERR_TEXTS[protocol.ERR_CAPABILITY] in done.stderr


@pytest.mark.parametrize("fault", ["owner", "mode", "link"])
def test_grants_that_others_could_have_written(rogue, sif, fault):
    test_what_was_granted(rogue, sif, '{"users": {"@user": ["CAP_NET_RAW"]}}', granted=True)
    file = rogue.sysconfdir / "capability.json"
    if fault == "link":
        file.rename(rogue.sysconfdir / "aim")
        file.symlink_to("aim")
    else:
        os.chown(file, rogue.user.pw_uid if fault == "owner" else 0, 0)
        file.chmod(0o664 if fault == "mode" else 0o644)
    done = rogue.run("exec", "--add-caps", "net_raw", sif, "true")
    file.unlink()
    (rogue.sysconfdir / "aim").unlink(missing_ok=True)
    assert done.returncode == 255
    assert protocol.ERR_TEXTS[protocol.ERR_CAPABILITY] in done.stderr


@pytest.mark.parametrize("value", ["yes", "no"])
def test_the_kernel_reads_no_extfs(rogue, sif, value):
    place = Path(tempfile.mkdtemp(dir=rogue.place))
    place.chmod(0o755)
    image = extfs_images.extfs(place / "data.img", owner=rogue.user.pw_uid)
    os.chown(image, rogue.user.pw_uid, rogue.user.pw_gid)
    configure(rogue, f"allow setuid-mount extfs = {value}", "allow setuid-mount extfs = yes")
    done = rogue.run("exec", "-B", f"{image}:/mnt:image-src=/", sif, "true")
    assert done.returncode == (0 if value == "yes" else 255), done.stderr
    shutil.rmtree(place)


def test_another_kind_of_image(rogue):
    folder = images.shared_folder()
    for kind, image in (
        ("squashfs", images.bare_squashfs(folder)),
        ("dir", images.described_tree(folder)),
    ):
        configure(rogue, f"allow container {kind} = yes", "")
        assert rogue.run("exec", image, "true").returncode == 0
        configure(rogue, f"allow container {kind} = no", "")
        assert rogue.run("exec", image, "true").returncode == 255


def test_an_encrypted_image(rogue):
    """What master has decrypted has no name and no owner of note: C sees that by the file."""
    place = Path(tempfile.mkdtemp(dir=rogue.place))
    os.chown(place, rogue.user.pw_uid, rogue.user.pw_gid)
    tree = images.small_tree(images.shared_folder())
    env = {"APPTAINER_ENCRYPTION_PASSPHRASE": "secret", "APPTAINER_TMPDIR": str(place)}
    built = rogue.run("build", "--encrypt", place / "x.sif", tree, env=env)
    assert built.returncode == 0, built.stderr

    def runs(holds: str) -> int:
        configure(rogue, holds, "")
        return rogue.run("exec", place / "x.sif", "true", env=env).returncode

    assert runs("") == 0
    # Its content is a squashfs, but that is not what it came as.
    assert runs("allow container squashfs = no") == 0
    assert runs("allow container encrypted = no") == 255
    assert runs(f"limit container owners = {rogue.user.pw_name}") == 255


def engine_fakeroot(rogue: Installation, flow: str, *words: str) -> str:
    """Return what a launch of the engine fakeroot says."""
    number = {"setuid": protocol.FLOW_SETUID, "userns": protocol.FLOW_USERNS}[flow]
    request = own_install.sealed(
        own_install.request_bytes(
            rogue.facts()["BUILD_ID"], ["fakeroot", *words], {}, flow=number, cwd="/",
            engine="fakeroot",
        )
    )  # fmt: skip
    program = rogue.suid if flow == "setuid" else rogue.libexec / "starter"
    try:
        done = subprocess.run(
            ["fakeroot", str(request)], executable=program, pass_fds=[request], env={}, cwd="/",
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=60,
            **rogue.identity(),
        )  # fmt: skip
    finally:
        os.close(request)
    return done.stdout + done.stderr


@pytest.mark.parametrize("flow", ["setuid", "userns"])
def test_the_hosts_tree_is_for_a_user_namespace(rogue, flow):
    """As a root it keeps device files: only where root inside is nobody's but the caller's own."""
    configure(rogue, "", "")
    text = protocol.ERR_TEXTS[protocol.ERR_REFUSED]
    said = engine_fakeroot(rogue, flow, "plain", "/usr/bin/id", "-u")
    assert said.startswith(
        f"FATAL:   container creation failed: cannot show the host's files: {text}"
    )


def test_the_hosts_tree_follows_user_bind_control(rogue):
    """It shows no more than the caller may bind, and nothing where images are limited."""
    believed = "user bind control = yes"
    for holds, shown in (
        (believed, True),
        ("user bind control = no", False),
        ("limit container paths = /", False),
        ("limit container owners = root", False),
    ):
        configure(rogue, holds, believed)
        said = engine_fakeroot(rogue, "setuid", "ranges", "/usr/bin/id", "-u")
        assert (said == "0\n") == shown, said


@pytest.mark.parametrize(
    ("flow", "words", "said"),
    [
        ("setuid", ("/dev/fuse",), protocol.ERR_REFUSED),
        ("setuid", ("none",), "malformed"),
        ("userns", ("/dev/null",), protocol.ERR_KIND),
        ("userns", ("none",), "malformed"),
        ("userns", ("/dev/fuse", "/dev/fuse"), "once too often"),
    ],
)
def test_a_device_that_is_handed_over(rogue, flow, words, said):
    """FUSE_DEVICE: a device that the caller has opened, where keeper has nothing of root's."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("there is no /dev/fuse")
    configure(rogue, "", "")
    heard = engine_fakeroot(rogue, flow, "device", *words)
    assert (f"said {said}\n" if isinstance(said, int) else said) in heard


def test_the_plan_is_not_changed_where_nothing_is_forbidden(rogue, sif):
    """With the same file on both sides this installation is like any other."""
    configure(rogue, "", "")
    done = rogue.run("exec", "-B", "/etc:/given", sif, *LOOK, "/given/shadow")
    assert (done.returncode, done.stdout) == (0, "/given/shadow\n")
    assert socket.gethostname() in rogue.run("exec", sif, "uname", "-n").stdout
