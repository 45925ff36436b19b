"""`build`: images from definition files, images and layouts; trees compared with the real one's."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pwd
import signal
import stat
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from apptainer_py.base import held
from apptainer_py.image import arch, sif
from tests.conftest import AsUser
from tests.own_install import descendants, read_until

HEADER = "Bootstrap: localimage\nFrom: base.sif\n"
WHOLE = (
    HEADER
    + """\
%setup
    echo "in setup" && test -d "$APPTAINER_ROOTFS/etc" && touch "$APPTAINER_ROOTFS/from-setup"
%pre
    echo in pre
%files
    hello.txt /opt/hello.txt
    hello.txt
    "two words" "/opt/two words"
    hello* /glob/
%post
    id -u; echo $HOME; pwd
    echo "export POSTVAR=1" >> $APPTAINER_ENVIRONMENT
    echo "postlabel yes" >> $APPTAINER_LABELS
    adduser -D -H -u 1234 owner 2>/dev/null || echo owner:x:1234:1234::/: >> /etc/passwd
    touch /owned; chown 1234:1234 /owned
%environment
    export FOO=bar
%labels
    Maintainer me
    Version 1.0 beta
%runscript
    echo running "$@"
%startscript
    echo starting
%test
    echo "in test $FOO $POSTVAR"
%help
    some help
%appinstall foo
    touch installed
%applabels foo
    A B
%appenv foo
    export APPFOO=1
%apprun foo
    echo app foo $APPFOO
%apphelp foo
    help foo
%appfiles foo
    hello.txt
%apptest foo
    echo test foo
"""
)
# What is said differently on purpose, and what is of the day.
OURS = ("actions/", "env/01-base.sh", "env/95-apps.sh", "env/99-base.sh", "env/99-runtimevars.sh")
OF_THE_DAY = ("org.label-schema.build-date", "org.label-schema.usage.apptainer.version")


@pytest.fixture(scope="module")
def place(
    readable_tmp: Path, demo_sif: Path, user: pwd.struct_passwd
) -> Iterator[Callable[[str], str]]:
    """A folder of the user's with a base image and files; a definition written by its text."""
    folder = readable_tmp / "build"
    folder.mkdir()
    (folder / "base.sif").symlink_to(demo_sif)
    (folder / "hello.txt").write_text("hello\n")
    (folder / "two words").write_text("two\n")
    (folder / "tmp").mkdir()
    for path in (folder, folder / "tmp"):
        os.chown(path, user.pw_uid, user.pw_gid)
    return SimpleNamespace(folder=folder)


@pytest.fixture(scope="module")
def build(product: SimpleNamespace, as_user: AsUser, place: SimpleNamespace) -> Callable[..., str]:
    """Build as the ordinary user; returns the finished process."""

    def run(*words: str, definition: str = "", program: str = "", **environ: str):
        if definition:
            name = hashlib.sha256(definition.encode()).hexdigest()[:12]
            (place.folder / f"{name}.def").write_text(definition)
            words = (*words, f"{name}.def")
        environ.setdefault("APPTAINER_TMPDIR", str(place.folder / "tmp"))
        return as_user([program or product.program, "build", *words], cwd=place.folder, env=environ)

    return run


@pytest.fixture(scope="module")
def real(build: Callable[..., str], place: SimpleNamespace, open_fuse: None) -> SimpleNamespace:
    """The same definition, built by Apptainer and by us, as a sandbox and as a SIF file."""
    program = "/usr/bin/apptainer"
    if not os.access(program, os.X_OK):
        pytest.skip("the real Apptainer is not installed: run ./check")
    made = {}
    for name, words in (("theirs", (program,)), ("ours", ("",))):
        for target in ((f"{name}.box", "--sandbox"), (f"{name}.sif",)):
            done = build("--fakeroot", *reversed(target), definition=WHOLE, program=words[0])
            assert done.returncode == 0, done.stderr
        made[name] = done
    return SimpleNamespace(**made, folder=place.folder)


def tree(root: Path) -> dict[str, tuple[str, str]]:
    found = {}
    for folder, folders, files in os.walk(root):
        for name in folders + files:
            path = Path(folder, name)
            facts = path.lstat()
            # The real one gives its scripts umask 0002, we leave them the caller's.
            shown = oct(facts.st_mode & ~0o020)
            text = os.readlink(path) if stat.S_ISLNK(facts.st_mode) else ""
            found[str(path.relative_to(root))] = (shown, text)
    return found


def test_a_tree_is_the_real_ones_file_by_file(real: SimpleNamespace) -> None:
    theirs, ours = real.folder / "theirs.box", real.folder / "ours.box"
    assert tree(theirs) == tree(ours)
    for name in tree(ours):
        if not name.startswith((".singularity.d/", "scif/")) or (ours / name).is_dir():
            continue
        inner = name.removeprefix(".singularity.d/")
        if inner.startswith(OURS) or inner == "labels.json":
            continue
        if inner == "startscript":
            continue
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    found = []
    for root in (ours, theirs):
        labels = json.loads((root / ".singularity.d/labels.json").read_text())
        found.append({key: value for key, value in labels.items() if key not in OF_THE_DAY})
        assert set(OF_THE_DAY) <= set(labels)
    assert found[0] == found[1]
    assert (ours / "owned").stat().st_uid == (theirs / "owned").stat().st_uid > 65535


def test_sections_run_in_the_same_order_and_say_the_same(real: SimpleNamespace) -> None:
    said = [
        [line for line in done.stderr.splitlines() if line.startswith("INFO:")]
        for done in (real.theirs, real.ours)
    ]
    theirs = [line for line in said[0] if "mksquashfs output" not in line]
    ours = [line for line in said[1] if not line.endswith("Copying hello.txt to ")]
    theirs = [line for line in theirs if not line.endswith("Copying hello.txt to ")]
    assert [one.replace("theirs", "ours") for one in theirs] == ours
    assert "in test bar 1" in real.ours.stdout


@pytest.mark.parametrize("image", ["ours.sif", "theirs.sif", "ours.box"])
def test_either_program_runs_and_inspects_what_the_other_built(
    real: SimpleNamespace, as_user: AsUser, product: SimpleNamespace, image: str
) -> None:
    said = []
    for program in ("/usr/bin/apptainer", product.program):
        words = [
            (["run", image, "a", "b c"], "running a b c\n"),
            (["run", "--app", "foo", image], "app foo 1\n"),
            (["test", image], "in test bar 1\n"),
            (["run-help", image], "    some help"),
            (["exec", image, "sh", "-c", "echo $FOO $POSTVAR $DEMO"], "bar 1 busybox\n"),
        ]
        for argv, wanted in words:
            done = as_user([program, *argv], cwd=real.folder)
            assert done.stdout.startswith(wanted), (program, argv, done.stdout, done.stderr)
        said.append(as_user([program, "inspect", "--all", image], cwd=real.folder).stdout)
    assert said[0] == said[1]
    assert '"Maintainer": "me"' in said[0]


def test_as_root(product: SimpleNamespace, place: SimpleNamespace, tmp_path: Path) -> None:
    definition = tmp_path / "root.def"
    definition.write_text(HEADER + "%post\n touch /o; chown 5:6 /o\n%test\n test -e /o\n")
    argv = [product.program, "build", "--sandbox", tmp_path / "box", definition]
    done = subprocess.run(argv, cwd=place.folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    facts = (tmp_path / "box/o").stat()
    assert (facts.st_uid, facts.st_gid) == (5, 6)
    assert (tmp_path / "box").stat().st_uid == 0


def test_from_scratch_and_back(build: Callable[..., str], place: SimpleNamespace) -> None:
    scratch = "Bootstrap: scratch\n%files\n /bin/busybox /bin/busybox\n /bin/busybox /bin/sh\n"
    assert build("scratch.sif", definition=scratch).returncode == 0
    assert build("--sandbox", "scratch.box", "scratch.sif").returncode == 0
    assert build("again.sif", "scratch.box").returncode == 0
    box = place.folder / "scratch.box"
    assert (box / "bin/sh").read_bytes() == Path("/bin/busybox").read_bytes()
    again = place.folder / "again.sif"
    assert stat.S_IMODE(again.stat().st_mode) == 0o755
    with again.open("rb") as file:
        kinds = [entry.data_type for entry in sif.read_descriptors(file.fileno())]
    assert kinds == [sif.DEFFILE, sif.GENERIC_JSON, sif.PARTITION]
    # The first definition is history, the second says where the image came from.
    assert not (box / ".singularity.d/bootstrap_history/Apptainer1").exists()
    assert "scratch" in (box / ".singularity.d/bootstrap_history/Apptainer0").read_text()


def test_a_sandbox_of_somebody_else(
    build: Callable[..., str], place: SimpleNamespace, readable_tmp: Path
) -> None:
    tree = readable_tmp / "of-root"
    (tree / ".singularity.d/env").mkdir(parents=True)
    (tree / "etc").mkdir()
    (tree / "etc/file").write_text("x")
    for words in (("of-root.sif",), ("--sandbox", "of-root.box")):
        done = build(*words, str(tree))
        assert done.returncode == 0, done.stderr
    assert (place.folder / "of-root.box/etc/file").stat().st_uid != 0
    assert sorted(os.listdir(tree)) == [".singularity.d", "etc"]


def test_a_sandbox_of_a_group_that_is_nobodys(
    build: Callable[..., str], place: SimpleNamespace, user: pwd.struct_passwd
) -> None:
    """Its folders cannot be changed in a layer over it: the kernel has no name for their group."""
    tree = place.folder / "of-a-group"
    (tree / ".singularity.d/env").mkdir(parents=True)
    for path in (tree, tree / ".singularity.d", tree / ".singularity.d/env"):
        os.chown(path, user.pw_uid, 2_000_000_000)
    done = build("of-a-group.sif", str(tree))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("across", [False, True], ids=["apart", "across"])
def test_files_with_several_names(
    build: Callable[..., str], place: SimpleNamespace, user: pwd.struct_passwd, across: bool
) -> None:
    """Folders that the build leaves alone are packed from the sandbox, others through a layer."""
    tree = place.folder / f"linked-{across}"
    for name in ("usr/lib", "opt", "etc", "environment"):
        (tree / name).mkdir(parents=True)
    (tree / "usr/lib/one").write_text("one")
    os.setxattr(tree / "usr/lib/one", "user.note", b"kept")
    (tree / "opt/two").hardlink_to(tree / "usr/lib/one")
    if across:
        (tree / "etc/three").hardlink_to(tree / "usr/lib/one")
    for path in (tree, *tree.rglob("*")):
        os.chown(path, user.pw_uid, user.pw_gid)
    assert build(f"linked-{across}.sif", str(tree)).returncode == 0
    done = build("--sandbox", f"again-{across}.box", f"linked-{across}.sif")
    assert done.returncode == 0, done.stderr
    box = place.folder / f"again-{across}.box"
    names = [box / "usr/lib/one", box / "opt/two", *([box / "etc/three"] if across else [])]
    assert {path.stat().st_nlink for path in names} == {len(names)}
    assert os.getxattr(names[1], "user.note") == b"kept"
    assert (box / "environment").is_dir()
    assert sorted(os.listdir(tree)) == ["environment", "etc", "opt", "usr"]


def test_without_subordinate_ids(build: Callable[..., str], place: SimpleNamespace) -> None:
    definition = HEADER + "%post\n id -u; touch /o; chown 5:6 /o || echo no such id\n"
    words = ("--ignore-subuid", "--ignore-fakeroot-command")
    done = build(*words, "one-id.sif", definition=definition)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "0\nno such id\n"
    # The command is the host's, and needs the C library that a busybox image has not.
    done = build("--ignore-subuid", "one-id2.sif", definition=definition)
    assert done.returncode == 255 and "faked" in done.stderr


def test_stages(build: Callable[..., str], place: SimpleNamespace) -> None:
    one = "Stage: one\n%post\n mkdir -p /d/e; echo x >/d/f; ln -s ../f /d/e/l; ln -s /d/f /abs\n"
    two = "%files from one\n /d\n /d/e /new/\n /abs /file\n /d/* /all/\n"
    done = build("--sandbox", "stages", definition=HEADER + one + HEADER + two)
    assert done.returncode == 0, done.stderr
    root = place.folder / "stages"
    assert os.readlink(root / "d/e/l") == os.readlink(root / "new/e/l") == "../f"
    assert not (root / "file").is_symlink() and (root / "file").read_text() == "x\n"
    assert sorted(os.listdir(root / "all")) == ["e", "f"]


def test_files_are_never_written_through_links_of_the_base(
    build: Callable[..., str], place: SimpleNamespace
) -> None:
    outside = place.folder / "outside"
    outside.mkdir()
    os.chown(outside, *(place.folder.stat().st_uid,) * 2)
    post = "%post\n ln -s /inside /out; mkdir /inside\n"
    post += f" ln -s {outside}/f /file; ln -s {outside} /gone\n"
    assert build("--sandbox", "links", definition=HEADER + post).returncode == 0
    lost = HEADER.replace("base.sif", "links") + "%files\n hello.txt /gone/f\n"
    assert build("copied.sif", definition=lost).returncode == 255
    more = "%files\n hello.txt /out/f\n hello.txt /file\n"
    done = build("copied.sif", definition=HEADER.replace("base.sif", "links") + more)
    assert done.returncode == 0, done.stderr
    assert not list(outside.iterdir())
    meta = "%post\n rm -rf /.singularity.d; ln -s /tmp /.singularity.d\n"
    done = build("copied2.sif", definition=HEADER + meta)
    assert done.returncode == 255 and "of the image cannot be used" in done.stderr, done.stderr


@pytest.fixture(scope="module")
def layout(place: SimpleNamespace, demo_sif: Path, build: Callable[..., str]) -> str:
    """An OCI layout with two layers, the upper with a whiteout."""
    folder = place.folder / "layout"
    (folder / "blobs/sha256").mkdir(parents=True)

    def blob(data: bytes, kind: str) -> dict[str, object]:
        digits = hashlib.sha256(data).hexdigest()
        (folder / "blobs/sha256" / digits).write_bytes(data)
        return {"mediaType": kind, "digest": f"sha256:{digits}", "size": len(data)}

    def layer(*files: tuple[str, bytes, int]) -> dict[str, object]:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as archive:
            for name, data, uid in files:
                info = tarfile.TarInfo(name)
                info.size, info.mode, info.uid = len(data), 0o755, uid
                archive.addfile(info, io.BytesIO(data))
        return blob(file.getvalue(), "application/vnd.oci.image.layer.v1.tar")

    busybox = Path("/bin/busybox").read_bytes()
    layers = [
        layer(("bin/busybox", busybox, 0), ("bin/sh", busybox, 0), ("gone", b"x", 0)),
        layer((".wh.gone", b"", 0), ("mine", b"x", 33)),
    ]
    config = {
        "Env": ["PATH=/bin", 'ODD=a "q" $HOME'],
        "Entrypoint": ["/bin/busybox", "echo"],
        "Cmd": ["it's", "$ODD"],
        "Labels": {"of": "oci"},
        "StopSignal": "SIGUSR2",
        "User": "nobody:users",
        "WorkingDir": "/srv/work",
    }
    document = {"architecture": arch.host_arch(), "os": "linux", "config": config, "rootfs": {}}
    manifest = {
        "schemaVersion": 2,
        "config": blob(json.dumps(document).encode(), "application/vnd.oci.image.config.v1+json"),
        "layers": layers,
    }
    index = blob(json.dumps(manifest).encode(), "application/vnd.oci.image.manifest.v1+json")
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [index]}))
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    with tarfile.open(place.folder / "layout.tar", "w") as archive:
        archive.add(folder, ".")
    return "layout"


@pytest.mark.parametrize("spec", ["oci:layout", "oci-archive:layout.tar"])
def test_an_oci_image(
    build: Callable[..., str], place: SimpleNamespace, as_user: AsUser, product, layout, spec
) -> None:
    name = spec.partition(":")[0]
    done = build("--force", f"{name}.sif", spec)
    assert done.returncode == 0, done.stderr
    image = place.folder / f"{name}.sif"
    done = as_user([product.program, "run", image])
    assert done.stdout == 'it\'s a "q" $HOME\n', done.stderr
    done = as_user([product.program, "run", image, 'x "y"'])
    assert done.stdout == 'x "y"\n'
    assert as_user([product.program, "exec", image, "busybox", "ls", "/gone"]).returncode != 0
    labels = as_user([product.program, "inspect", image]).stdout
    for line in (
        "of: oci",
        "org.apptainer-py.oci.user: nobody:users",
        "org.apptainer-py.oci.working-dir: /srv/work",
        "org.opencontainers.image.stopSignal: SIGUSR2",
    ):
        assert f"{line}\n" in labels
    with image.open("rb") as file:
        names = [entry.name for entry in sif.read_descriptors(file.fileno())]
    assert names[1:3] == [b"inspect-metadata.json", b"oci-config.json"]


def test_the_same_input_gives_the_same_bytes(
    build: Callable[..., str], place: SimpleNamespace
) -> None:
    definition = HEADER + "%post\n date >/dev/null; touch /now\n"
    for name in ("same1.sif", "same2.sif"):
        done = build(name, definition=definition, SOURCE_DATE_EPOCH="1700000000")
        assert done.returncode == 0, done.stderr
    first, second = ((place.folder / name).read_bytes() for name in ("same1.sif", "same2.sif"))
    assert first == second
    assert build("same3.sif", "base.sif", SOURCE_DATE_EPOCH="x").returncode == 255


def test_update_changes_a_sandbox_in_place(
    build: Callable[..., str], place: SimpleNamespace
) -> None:
    assert build("--sandbox", "up", "base.sif").returncode == 0
    inode = (place.folder / "up").stat().st_ino
    (place.folder / "up/kept").write_text("kept")
    done = build("--sandbox", "--update", "up", definition=HEADER + "%post\n touch /more\n")
    assert done.returncode == 0, done.stderr
    assert (place.folder / "up/more").exists() and (place.folder / "up/kept").exists()
    assert (place.folder / "up").stat().st_ino == inode
    done = build("--sandbox", "--update", "up", definition=HEADER + "%post\n false\n")
    assert done.returncode == 255 and (place.folder / "up/kept").exists()


@pytest.mark.parametrize(
    ("chosen", "there", "missing"),
    [
        ("none", (), ("from-post", "hello.txt")),
        ("files", ("hello.txt",), ("from-post",)),
        ("post", ("from-post",), ("hello.txt",)),
        ("all", ("from-post", "hello.txt"), ()),
    ],
)
def test_sections_can_be_chosen(
    build: Callable[..., str], place: SimpleNamespace, chosen: str, there, missing
) -> None:
    text = HEADER + "%files\n hello.txt\n%post\n touch /from-post\n%test\n exit 0\n"
    done = build("--force", "--section", chosen, "--sandbox", f"sec-{chosen}", definition=text)
    assert done.returncode == 0, done.stderr
    root = place.folder / f"sec-{chosen}"
    assert all((root / name).exists() for name in there)
    assert not any((root / name).exists() for name in missing)


def test_a_definition_as_json(build: Callable[..., str], place: SimpleNamespace) -> None:
    scripts = {"post": {"script": "echo {{ A }} >/written"}, "arguments": {"script": "A=1"}}
    fields = {
        "header": {"bootstrap": "localimage", "from": "base.sif"},
        "buildData": {"buildScripts": scripts},
        "imageData": {"imageScripts": {"runScript": {"script": "echo {{ A }}"}}},
    }
    done = build("--json", "--sandbox", "json.box", definition=json.dumps(fields))
    assert done.returncode == 0, done.stderr
    assert (place.folder / "json.box/written").read_text() == "1\n"
    assert "echo 1" in (place.folder / "json.box/.singularity.d/runscript").read_text()
    done = build("--json", "json.sif", definition=HEADER)
    assert done.returncode == 255 and "it is no JSON" in done.stderr


def test_another_architecture(build: Callable[..., str], place: SimpleNamespace) -> None:
    other = "arm64" if arch.host_arch() != "arm64" else "amd64"
    done = build("--arch", other, "arch.sif", "base.sif")
    assert done.returncode == 0, done.stderr
    assert f"does not match build arch {other}" in done.stderr
    with (place.folder / "arch.sif").open("rb") as file:
        # What is in it says what it is, not what was asked for.
        assert sif.primary_partition(file.fileno()).arch == arch.host_arch()
    done = build("--arch", other, "--sandbox", "arch.box", "base.sif")
    labels = json.loads((place.folder / "arch.box/.singularity.d/labels.json").read_text())
    assert labels["org.label-schema.build-arch"] == other
    done = build("--arch", "nope", "arch2.sif", "base.sif")
    assert done.returncode == 255
    assert "arch: nope is not valid, supported archs are: [arm arm64 amd64" in done.stderr


def test_what_post_of_the_base_set_stays(build: Callable[..., str], place: SimpleNamespace) -> None:
    post = '%post\n echo "export FROM_{}=1" >> $APPTAINER_ENVIRONMENT\n%help\n {}\n'
    assert build("--sandbox", "e1", definition=HEADER + post.format("A", "A")).returncode == 0
    text = HEADER.replace("base.sif", "e1") + post.format("B", "B")
    done = build("--sandbox", "e2", definition=text)
    assert done.returncode == 0, done.stderr
    assert "Help message already exists" in done.stderr
    folder = place.folder / "e2/.singularity.d"
    assert "FROM_A=1\nexport FROM_B=1" in (folder / "env/91-environment.sh").read_text()
    assert (folder / "runscript.help").read_text().strip() == "A"


def test_binds_and_arguments(build: Callable[..., str], place: SimpleNamespace) -> None:
    text = HEADER + "%arguments\n A=1\n%post\n cat /mnt/hello.txt; echo {{ A }} {{ B }}\n"
    done = build("--bind", f"{place.folder}:/mnt", "--build-arg", "B=b", "ba.sif", definition=text)
    assert done.stdout == "hello\n1 b\n", done.stderr
    done = build("--build-arg", "X=1", "--build-arg", "B=b", "ba2.sif", definition=text)
    assert done.returncode == 255 and "unused build args: X" in done.stderr


FAILURES = [
    (HEADER + "%post\n echo a\n exit 3\n", "%post section: exit status 3", "line 5 of section"),
    (HEADER + "%post\n cd /\n if true; then\n  ls /none\n fi\n", "exit status 1", "line 6 of"),
    (HEADER + "%pre\n exit 4\n", "failed to run %pre script: exit status 4", "line 4 of section"),
    (HEADER + "%setup\n false\n", "failed to run %setup script: exit status 1", "line 4 of"),
    (HEADER + "%test\n exit 5\n", "failed to execute %test script: exit status 5", ""),
    (HEADER + "%files\n /none /a\n", "unable to copy files from host", "line 4 of the definition"),
    (HEADER + "%files from x\n /a\n", "stage x was not found", ""),
    (HEADER + "%foo\n", "invalid section(s) specified: foo (line 3)", ""),
    (HEADER + "%post\n echo {{ U }}\n", "build var U is not defined", ""),
    ("Bootstrap: nope\n", "unable to get conveyorpacker: invalid build source nope", ""),
    ("Bootstrap: shub\nFrom: x\n", "Singularity Hub ended", "docker://"),
    ("Bootstrap: yum\n", "yum needs the header key MirrorURL", "line 1: Bootstrap: yum"),
    ("Bootstrap: localimage\nFrom: none.sif\n", "no such file or directory", ""),
    ("Bootstrap: localimage\nFrom: hello.txt\n", "image format not recognized", ""),
    ("Bootstrap: oci\nFrom: tmp\n", "conveyor failed to get", ""),
    (" \n", "no stages found in definition file", ""),
]


@pytest.mark.parametrize(("definition", "says", "hint"), FAILURES, ids=[one[1] for one in FAILURES])
def test_a_failure_says_where_and_leaves_nothing(
    build: Callable[..., str], place: SimpleNamespace, definition: str, says: str, hint: str
) -> None:
    before = sorted(os.listdir(place.folder))
    done = build("failed.sif", definition=definition)
    assert done.returncode == 255
    fatal = [line for line in done.stderr.splitlines() if line.startswith("FATAL:")]
    assert says in fatal[-1], done.stderr
    assert hint in done.stderr.splitlines()[-1]
    left = [name for name in os.listdir(place.folder) if not name.endswith(".def")]
    assert sorted(left) == [name for name in before if not name.endswith(".def")]
    assert not os.listdir(place.folder / "tmp")


TARGETS = [
    (["base.sif", "base.sif"], "already exists. Use --force"),
    (["--update", "x.sif", "base.sif"], "only sandbox update is supported"),
    (["--section", "all,none", "x.sif", "base.sif"], "cannot have all and any other option"),
    (["--section", "bad", "x.sif", "base.sif"], "bad is none of"),
    (["--sandbox", "tmp/..", "base.sif"], "is not empty and is not an Apptainer sandbox"),
    (["tmp", "base.sif"], "is a directory"),
    (["--sandbox", "--update", "tmp", "base.sif"], "is not an Apptainer sandbox"),
    (["none/x.sif", "base.sif"], "the directory"),
    (["x.sif", "none"], "unable to open file none: open none: no such file or directory"),
    (["--encrypt", "x.sif", "base.sif"], "Missing encryption info"),
    (["--build-arg", "x", "x.sif", "some.def"], "no such file"),
    (["--sandbox", "--force", "/", "base.sif"], "root directory is no build target"),
    (["--mksquashfs-args", "-nonsense", "x.sif", "base.sif"], "mksquashfs could not pack"),
]


@pytest.mark.parametrize(("words", "says"), TARGETS, ids=[" ".join(one[0]) for one in TARGETS])
def test_a_wrong_command_line(build: Callable[..., str], place, words, says) -> None:
    before = sorted(os.listdir(place.folder))
    done = build(*words)
    assert done.returncode == 255
    assert says in done.stderr, done.stderr
    assert sorted(os.listdir(place.folder)) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_build_leaves_nothing(
    product: SimpleNamespace, place: SimpleNamespace, user: pwd.struct_passwd, number: int
) -> None:
    (place.folder / "slow.def").write_text(HEADER + "%post\n sleep 1077 & sleep 1078\n")
    before = sorted(os.listdir(place.folder))
    child = subprocess.Popen(
        [product.program, "build", "interrupted.sif", "slow.def"],
        cwd=place.folder,
        env={"PATH": "/usr/bin:/bin", "TMPDIR": str(place.folder / "tmp")},
        user=user.pw_uid,
        group=user.pw_gid,
        extra_groups=[],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert child.stderr is not None
    while b"sleep 1078" not in child.stderr.readline():
        assert child.poll() is None
    assert os.listdir(place.folder / "tmp")
    child.send_signal(number)
    assert child.wait() in (130, -number)
    with child:
        child.stderr.read()  # until the last process that has it is gone

    def left() -> list[str]:
        return [*sorted(os.listdir(place.folder)), *os.listdir(place.folder / "tmp"), *sleepers()]

    deadline = time.monotonic() + 60
    while left() != before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left() == before


def test_what_is_killed_as_a_whole_goes_with_the_next_build(
    product: SimpleNamespace, build: Callable[..., str], place: SimpleNamespace, user, home
) -> None:
    """Nobody is left to clean up; what another build holds stays."""
    tmp, target = place.folder / "tmp", place.folder / "whole.sif"
    busy = tmp / "build-temp-busy"
    busy.mkdir()
    os.chown(busy, user.pw_uid, user.pw_gid)
    lock = held.hold(str(busy))
    (place.folder / "slow.def").write_text(HEADER + "%post\n echo on\n sleep 1079\n")
    child = home.adopt(subprocess.Popen(
        [product.program, "build", target, "slow.def"], cwd=place.folder,
        env={"PATH": "/usr/bin:/bin", "TMPDIR": str(tmp)}, user=user.pw_uid,
        group=user.pw_gid, extra_groups=[], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ))  # fmt: skip
    read_until(child.stdout.fileno(), b"on\n")
    # Keeper first: a container that loses another process goes on to its end.
    for pid in [*descendants(child.pid), child.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    child.wait()
    left = [*tmp.glob("build-temp-*"), *place.folder.glob(".whole.sif.build-temp-*")]
    assert len(left) == 3
    for path in left:
        os.utime(path, (0, 0))
    done = build(target, definition=HEADER + "%post\n true\n")
    os.close(lock)
    assert done.returncode == 0, done.stderr
    assert [path for path in left if path.exists()] == [busy]
    busy.rmdir()


def test_who_encrypts_is_closed_to_others_of_the_same_user(
    product: SimpleNamespace, place: SimpleNamespace, user: pwd.struct_passwd
) -> None:
    """The password is in the memory of its processes: the kernel shows that to root alone."""
    (place.folder / "closed.def").write_text(HEADER + "%setup\n sleep 1079\n")
    child = subprocess.Popen(
        [product.program, "build", "--encrypt", "closed.sif", "closed.def"],
        cwd=place.folder,
        env={"PATH": "/usr/bin:/bin", "APPTAINER_ENCRYPTION_PASSPHRASE": "words"},
        user=user.pw_uid,
        group=user.pw_gid,
        extra_groups=[],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while not sleepers() and time.monotonic() < deadline:
            assert child.poll() is None
            time.sleep(0.02)
        owners = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # another's, over
                if b"\0closed.sif\0" in Path("/proc", pid, "cmdline").read_bytes():
                    owners.append(Path("/proc", pid, "mem").stat().st_uid)
        assert owners == [0] * 3
    finally:
        child.terminate()
        child.wait()


@pytest.mark.parametrize("together", [True, False])
def test_what_post_prints_is_in_its_order(
    product: SimpleNamespace, place: SimpleNamespace, as_user: AsUser, together: bool
) -> None:
    """In one log, that is; a question without an end of line is shown as it is."""
    script = (
        "%post\n for i in 1 2 3 4; do echo out $i; echo err $i >&2; done; printf 'sure? ' >&2\n"
    )
    (place.folder / "order.def").write_text(HEADER + script)
    line = f"{product.program} build --force --sandbox order order.def" + " 2>&1" * together
    done = as_user(["/bin/sh", "-c", line], cwd=place.folder)
    assert done.returncode == 0, done.stderr
    shown = [one for one in (done.stdout + done.stderr).splitlines() if one[:1] != "I"]
    assert any("sure? " in one for one in shown)
    if together:
        at = [shown.index(f"{word} {number}") for number in "1234" for word in ("out", "err")]
        assert at == sorted(at)
        for number in "1234":
            out = shown.index(f"out {number}")
            assert shown[out - 1].endswith(f"echo out {number}"), shown
    else:
        assert done.stdout.splitlines()[:4] == [f"out {number}" for number in "1234"]


def sleepers() -> list[str]:
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            line = Path("/proc", pid, "cmdline").read_bytes()
        except OSError:
            continue
        if line.startswith(b"sleep\x00107"):
            found.append(pid)
    return found
