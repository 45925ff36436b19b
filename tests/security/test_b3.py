"""Holes of Singularity, SingularityCE and Apptainer (facts, security B3): a test for each row.

Row T-S05 is `test_s05_...`, here or in a file beside; ELSEWHERE names what proves a row under
another name, ABSENT why there is nothing to attack.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from apptainer_py.model import protocol
from apptainer_py.model.directive_table import ROWS
from tests import fixtures, images, own_install
from tests.e2e import steps, test_oci_images
from tests.own_install import Installation, files, read_until
from tests.security.forge import without_hints

FLOWS = {"setuid": (), "userns": ("-u",)}
TESTS = Path(__file__).resolve().parent.parent
ELSEWHERE = {
    "S06": "unit/registry/test_client.py::test_an_account_does_not_follow_to_another_host",
    "S07": "e2e/test_leftovers.py::test_normal_end_with_everything",
    "S08": "security/test_sockets.py::test_hostile_frames_end_the_launch",
    "S10": "security/test_ecl.py::test_every_byte_that_counts",
    "S14": "unit/registry/test_library.py::test_an_exclusive_endpoint",
    "S15": "e2e/test_faults.py::test_a_call_that_fails_gives_nobody_more",
    "S18": "security/test_interpreter.py"
    "::test_no_interpreter_with_privilege_over_the_functional_suite",
    "S19": "e2e/test_policy.py::test_setuid_mount_squashfs",
    "S20": "security/test_ecl.py::test_weak_digests_of_a_signature",
    "S25": "e2e/test_cni.py::test_a_users_port_is_passed_on_and_nobody_elses",
    "S26": "e2e/test_policy.py::test_limit_paths_is_no_prefix_of_a_name",
    "S27": "security/test_layers.py::test_a_limit_is_not_met_by_what_the_user_serves",
}
ABSENT = {"S23": "no Dockerfile is built"}


own = fixtures.own(None)


@pytest.fixture
def place(own) -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="apptainer-py-b3-", dir="/var/tmp"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@pytest.fixture(params=list(FLOWS))
def flow(request) -> tuple[str, ...]:
    return FLOWS[request.param]


def give(own: Installation, *tops: Path) -> None:
    for top in tops:
        for path in [top, *top.rglob("*")]:
            os.chown(path, own.user.pw_uid, own.user.pw_gid, follow_symlinks=False)


def test_every_row_has_a_test_or_a_reason():
    texts = [path.read_text() for path in (TESTS / "security").rglob("*.py")]
    here = {
        name.upper() for text in texts for name in re.findall(r"^def test_(s\d\d)_", text, re.M)
    }
    for name, test in ELSEWHERE.items():
        file, _, function = test.partition("::")
        assert f"def {function}(" in (TESTS / file).read_text(), name
    known = here | set(ELSEWHERE) | set(ABSENT)
    assert known == {f"S{number:02}" for number in range(1, 28)}
    assert not here & set(ABSENT)


# ---- notes of 2.2 to 2.5 ----


@pytest.mark.parametrize("options", [
    ("-B", "{data}:/link/new"), ("-B", "{data}:/up/new"), ("-B", "{data}/file:/link/name"),
    ("-H", "{data}:/link/home"), ("-S", "/link/scratch"), ("-S", "/up/scratch"),
    ("-c", "-W", "{work}"), ("-w", "-B", "{data}:/link/new"),
    ("--underlay", "-B", "{data}:/link/new"),
])  # fmt: skip
def test_s01_nothing_is_made_on_the_host(own, place, flow, options):
    """Links in the image, and in a work directory, to a directory of root's."""
    host, tree, data, work = (place / name for name in ("host", "tree", "data", "work"))
    host.mkdir()
    shutil.copytree(images.small_tree(images.shared_folder()), tree, symlinks=True)
    (tree / "link").symlink_to(host)
    (tree / "up").symlink_to("../" * 12 + str(host).lstrip("/"))
    data.mkdir()
    (data / "file").write_text("")
    work.mkdir()
    (work / "home").symlink_to(host)
    (work / "tmp").symlink_to(host)
    give(own, tree, data, work)
    before = files(host)
    words = [word.format(data=data, work=work) for word in options]
    done = own.run("exec", *flow, *words, tree, "sh", "-c", "true", cwd="/")
    assert "Traceback" not in done.stderr
    assert files(host) == before
    assert not [path for path in host.rglob("*") if path.stat().st_mode & stat.S_IWOTH]


def test_s02_no_variable_overrules_the_administrator(own, place):
    """Every directive's name, and every option's, as a variable; and a configuration of his own."""
    mine = place / "mine.conf"
    mine.write_text("user bind control = yes\nenable overlay = yes\nmount home = yes\n")
    (place / ".apptainer").mkdir()
    shutil.copy(mine, place / ".apptainer/apptainer-py.conf")
    give(own, place)
    own.configure("user bind control = no\nenable overlay = no\nmount home = no\nmount tmp = no")
    image = images.own_sif(images.shared_folder())
    odd = {"HOME": str(place)}
    for key in (row[1] for row in ROWS if row[1] != "allow setuid"):  # an option's name, too
        for prefix in ("APPTAINER_", "SINGULARITY_", ""):
            odd[prefix + key.upper().replace(" ", "_").replace("-", "_")] = "yes"
    words = ("exec", "-B", "/var:/mnt", image, "cat", "/proc/self/mountinfo")
    plain, asked = own.run(*words, cwd="/"), own.run(*words, cwd="/", env=odd)
    points = [[line.split()[4] for line in done.stdout.splitlines()] for done in (plain, asked)]
    assert points[0] == points[1], asked.stderr
    seen = own.run("exec", "-B", f"{place}:/mnt", image, "ls", "/mnt", cwd="/", env=odd)
    assert seen.stdout == ""
    assert "user bind control disabled by system administrator" in seen.stderr
    refused = own.run("exec", "--writable-tmpfs", image, "true", env=odd)
    assert refused.returncode == 255
    assert "'enable overlay'" in refused.stderr
    for how in ({"env": {"APPTAINER_CONFIG_FILE": str(mine)}}, {}):
        first = () if how else ("-c", mine)
        done = own.run(*first, "exec", "--writable-tmpfs", image, "true", **how)
        assert done.returncode != 0
    own.restore()


def test_s03_headers_of_images_hurt_nobody(own, place, flow):
    """Bytes of the SIF header, its descriptors and the superblock, changed at random."""
    good = images.own_sif(images.shared_folder()).read_bytes()
    at = good.index(b"hsqs")
    chance = random.Random(3)
    broken = place / "broken.sif"
    for _ in range(25):
        content = bytearray(good)
        for _ in range(chance.randrange(1, 9)):
            start = chance.choice((0, 128, 4096, at))
            content[start + chance.randrange(96)] = chance.choice((0, 0x7F, 0x80, 0xFF))
        broken.write_bytes(content)
        done = own.run("exec", *flow, broken, "true", timeout_s=60)
        assert done.returncode in (0, 255), done.stderr
        assert "Traceback" not in done.stderr
        assert "internal error" not in done.stderr, done.stderr
        assert done.stderr.count("FATAL") == (done.returncode == 255), done.stderr


@pytest.mark.parametrize("name", [
    "/", "//", "/../", "/./", "/usr/..", "{link}", "{place}/link/.", "/proc/self/root",
    "/proc/1/cwd", ".", "./", "../../..",
])  # fmt: skip
def test_s05_the_hosts_root_is_no_image(own, place, flow, name):
    (place / "link").symlink_to("/")
    name = name.format(link=place / "link", place=place)
    done = own.run("exec", *flow, name, "true", cwd="/")
    assert done.returncode == 255
    assert len(without_hints(done.stderr)) == 1, done.stderr


# ---- files of ours in the user's directories ----


def test_s09_nothing_is_written_in_an_open_home(own, place, flow):
    """Nor in a cache or temporary directory that somebody else has prepared."""
    home, prepared = place / "home", place / "prepared"
    (home / ".apptainer").mkdir(parents=True)
    (home / ".apptainer").chmod(0o777)
    prepared.mkdir()
    give(own, home)
    before = files(place)
    env = {
        "HOME": str(home),
        "APPTAINER_CACHEDIR": str(prepared),
        "APPTAINER_TMPDIR": str(prepared),
    }
    image = images.own_sif(images.shared_folder())
    for words in (("exec", *flow, image, "true"), ("run", *flow, image), ("inspect", image)):
        done = own.run(*words, env=env, umask=0)
        assert done.returncode == 0, done.stderr
    assert files(place) == before


@pytest.fixture
def layout(place) -> Path:
    tree = images.small_tree(images.shared_folder())
    packed = subprocess.run(["tar", "-C", tree, "-c", "."], capture_output=True, check=True).stdout
    before = test_oci_images.CONFIG
    test_oci_images.CONFIG = {"Env": ["PATH=/bin"]}
    try:
        test_oci_images.make_layout(place / "layout", packed)
    finally:
        test_oci_images.CONFIG = before
    return place / "layout"


def test_s12_an_unpacked_image_is_closed_to_others(own, place, layout, home):
    temporary = place / "temporary"
    temporary.mkdir()
    give(own, temporary)
    temporary.chmod(0o777)
    process = home.adopt(own.start(
        "exec", "--oci", f"oci:{layout}", "sh", "-c", "echo ready; exec sleep 1000",
        env=own.environment({"APPTAINER_TMPDIR": str(temporary)}),
    ))  # fmt: skip
    read_until(process.stdout.fileno(), b"ready")
    made = list(temporary.iterdir())
    assert made
    for path in made:
        facts = path.stat()
        assert (facts.st_mode & 0o7777, facts.st_uid) == (0o700, own.user.pw_uid)
        other = {"user": 65534, "group": 65534, "extra_groups": []}
        done = subprocess.run(["ls", path], capture_output=True, check=False, **other)
        assert done.returncode != 0


def add_layer(layout: Path, entry: bytes) -> None:
    """Put one more layer over those of a layout."""
    import hashlib

    def blob(data: bytes) -> tuple[str, int]:
        digits = hashlib.sha256(data).hexdigest()
        (layout / "blobs/sha256" / digits).write_bytes(data)
        return f"sha256:{digits}", len(data)

    index = json.loads((layout / "index.json").read_text())
    row = index["manifests"][0]
    manifest = json.loads((layout / "blobs/sha256" / row["digest"][7:]).read_text())
    digest, size = blob(entry)
    kind = manifest["layers"][0]["mediaType"]
    manifest["layers"].append({"mediaType": kind, "digest": digest, "size": size})
    row["digest"], row["size"] = blob(json.dumps(manifest).encode())
    (layout / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("name", [".", "/", "./", "..", "../x", "/etc/../..", "bin/../../x", "bin"])
@pytest.mark.parametrize("kind", ["link", "hard link", "file"])
def test_s13_no_entry_of_a_layer_leaves_the_image(own, place, layout, name, kind):
    import io
    import tarfile

    host = place / "host"
    host.mkdir(mode=0o777)
    host.chmod(0o777)
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        first, second = tarfile.TarInfo(name), tarfile.TarInfo(f"{name}/escaped")
        first.linkname = str(host)
        first.type = {
            "link": tarfile.SYMTYPE,
            "hard link": tarfile.LNKTYPE,
            "file": tarfile.REGTYPE,
        }[kind]
        archive.addfile(first)
        archive.addfile(second)
    add_layer(layout, file.getvalue())
    before = files(host)
    done = own.run("exec", "--oci", f"oci:{layout}", "true", env={"APPTAINER_TMPDIR": "/var/tmp"})
    assert "Traceback" not in done.stderr
    assert files(host) == before
    assert not (place / "x").exists()
    assert not Path("/var/tmp/escaped").exists()


@pytest.mark.parametrize("digest", [
    "sha256:../../../../etc/passwd", "sha256:" + "A" * 64, "sha256:" + "a" * 63,
    "sha256:" + "a" * 65, "sha512:" + "a" * 64, "md5:" + "a" * 32, "sha256", "",
    "../x:" + "a" * 64, "sha256:" + "a" * 64 + "\n",
])  # fmt: skip
@pytest.mark.parametrize("where", ["index", "manifest", "reference"])
def test_s22_a_digest_is_no_path(own, layout, digest, where):
    index = json.loads((layout / "index.json").read_text())
    row = index["manifests"][0]
    reference = ""
    if where == "index":
        row["digest"] = digest
    elif where == "reference":
        reference = f"@{digest}"
    else:
        file = layout / "blobs/sha256" / row["digest"][7:]
        manifest = json.loads(file.read_text())
        manifest["layers"][0]["digest"] = digest
        add_manifest(layout, row, manifest)
    (layout / "index.json").write_text(json.dumps(index))
    done = own.run("exec", "--oci", f"oci:{layout}{reference}", "true")
    assert done.returncode not in (0, 1)
    assert "Traceback" not in done.stderr
    assert "root:" not in done.stdout + done.stderr


def add_manifest(layout: Path, row: dict[str, object], manifest: object) -> None:
    import hashlib

    data = json.dumps(manifest).encode()
    digits = hashlib.sha256(data).hexdigest()
    (layout / "blobs/sha256" / digits).write_bytes(data)
    row["digest"], row["size"] = f"sha256:{digits}", len(data)


def test_s17_a_document_is_an_index_or_a_manifest(own, layout):
    """With the members of both, or named as the other, it is refused."""
    index = json.loads((layout / "index.json").read_text())
    row = index["manifests"][0]
    good = dict(row)
    manifest = json.loads((layout / "blobs/sha256" / row["digest"][7:]).read_text())
    for change in ({"manifests": [good]}, {"mediaType": "application/vnd.oci.image.index.v1+json"}):
        add_manifest(layout, row, {**manifest, **change})
        (layout / "index.json").write_text(json.dumps(index))
        done = own.run("exec", "--oci", f"oci:{layout}", "true")
        assert done.returncode == 255, change
        assert len(done.stderr.splitlines()) == 1, done.stderr


def test_s16_identities_are_random(tmp_path):
    from apptainer_py.image import sif_write

    packed = images.bare_squashfs(images.shared_folder())
    seen = set()
    for number in range(4):
        target = tmp_path / f"{number}.sif"
        sif_write.write_sif(str(target), str(packed), arch="amd64")
        seen.add(target.read_bytes()[48:64])
    assert len(seen) == 4


def test_s21_only_the_administrators_plugins_run(own, place):
    """CVE-2023-38496: what runs with a right for a user is root's, down from /."""
    ran = place / "ran"
    plugin = place / "bridge"
    plugin.write_text(f"#!/bin/sh\ntouch {ran}\n")
    plugin.chmod(0o755)
    (place / "x.conf").write_text('{"name": "bridge", "type": "bridge"}')
    name = own.user.pw_name
    allowed = f"allow net users = {name}\nallow net networks = bridge"
    image = images.own_sif(images.shared_folder())
    for text, said in (
        (f"cni plugin path = {place}\n{allowed}", 'plugin type="bridge" failed (add)'),
        (f"cni configuration path = {place}\n{allowed}", "must be root's down from /"),
        (f"cni plugin path = {place}\nallow net users = {name}", "network bridge is for root"),
    ):
        own.configure(text)
        done = own.run("exec", "--net", image, "true")
        assert done.returncode == 255
        assert said in done.stderr
    own.configure(f"cni plugin path = {place}\n{allowed}")
    for words in (("-u", "--net"), ("--net", "--network-args", "MAC=02:00:00:00:00:01")):
        assert own.run("exec", *words, image, "true").returncode == 255
    assert not ran.exists()


# In an engine that mounts a tree (tests/e2e/steps.py): what root's launch tells its janitor.
CLEANING = """
        janitor = mounting.janitor()
        for path in {paths}:
            janitor.group(path)
        mounting.pivot()
        janitor.end(wait=False)
"""


def test_s21_nothing_but_control_groups_is_removed(own, place):
    """Whatever is told to be undone: a directory that is none of cgroupfs stays, root's too."""
    victim, link = place / "victim", place / "link"
    (victim / "below").mkdir(parents=True)
    link.symlink_to("/sys/fs/cgroup")
    told = [str(victim), f"{place}/../{place.name}/victim", str(link), "/proc/1", "/nonexistent"]
    engine = place / "engine.py"
    text = steps.ENGINE.format(tree=images.small_tree(images.shared_folder()))
    text = text.replace("        os.close(mounting.space(0))\n", "")  # a user namespace's alone
    engine.write_text(text.replace("        mounting.pivot()\n", CLEANING.format(paths=told)))
    content = own_install.request_bytes(
        own.facts()["BUILD_ID"],
        ["apptainer-py", "x"],
        own.environment(), flow=protocol.FLOW_ROOT, cwd="/", engine="engine",
        engine_file=str(engine),
    )  # fmt: skip
    request = own_install.sealed(content)
    try:
        done = subprocess.run(
            ["Apptainer runtime parent", str(request)], executable=own.libexec / "starter",
            pass_fds=(request,), env={}, cwd="/", capture_output=True, check=False, timeout=60,
        )  # fmt: skip
    finally:
        os.close(request)
    assert (done.returncode, done.stdout) == (0, b"ran\n"), done.stderr
    assert sorted(path.name for path in place.iterdir()) == ["engine.py", "link", "victim"]
    assert (victim / "below").is_dir()


# ---- what a false /proc could hide ----


@pytest.mark.parametrize("options", [("-B", "{fake}:/proc"), ("-B", "{fake}:/proc/thread-self"),
                                     ("-B", "{fake}/attr:/proc/self/attr"),
                                     ("--no-mount", "proc")])  # fmt: skip
def test_s24_a_false_proc_leaves_the_payload_as_closed(own, place, options):
    """What /proc says of the payload outside, whatever lies over it inside."""
    fake = place / "fake"
    (fake / "self/attr").mkdir(parents=True)
    (fake / "attr").mkdir()
    for path in (fake / "self/attr/exec", fake / "attr/exec", fake / "self/status"):
        path.write_text("")
    give(own, fake)
    words = [word.format(fake=fake) for word in options]
    image = images.own_sif(images.shared_folder())
    process = own.start("exec", *words, image, "sh", "-c", "echo ready; exec cat",
                        stdin=subprocess.PIPE)  # fmt: skip
    try:
        try:
            read_until(process.stdout.fileno(), b"ready")
        except AssertionError:
            process.stdin.close()
            assert process.wait(timeout=20) == 255  # refused: no start with a lie
            return
        payload: list[int] = []

        def runs() -> bool:
            found = own_install.descendants(process.pid).items()
            payload[:] = [pid for pid, (_, _, name) in found if name == "cat"]
            return bool(payload)

        own_install.eventually(runs, "the payload is cat")
        assert len(payload) == 1
        said = Path(f"/proc/{payload[0]}/status").read_text()
        assert re.search(r"^NoNewPrivs:\s+1$", said, re.M)
        for name in ("Inh", "Prm", "Eff", "Bnd", "Amb"):
            assert re.search(rf"^Cap{name}:\s+0+$", said, re.M), name
    finally:
        process.kill()
        process.communicate(timeout=20)
