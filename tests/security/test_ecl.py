"""The execution control list (T-S10, T-S20): images that the real Apptainer has signed, whole and
altered."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from apptainer_py.base.errors import ApptainerError
from apptainer_py.cli import unsquash
from apptainer_py.crypto import openpgp
from apptainer_py.engines.apptainer import ecl as judge
from apptainer_py.engines.apptainer import policy
from apptainer_py.host.ecl import ExecGroup
from apptainer_py.image import detect, integrity, sif
from tests import fixtures, images
from tests.own_install import Installation
from tests.security import elsewhere

pytestmark = pytest.mark.skipif(
    not images.have_real_apptainer(), reason="did not run: no real Apptainer on this machine"
)
FLOWS = {"setuid": ([], False), "userns": (["-u"], False), "root": ([], True)}
NAMES = ("First", "Second")


def real(keys: Path, *words: str | Path) -> str:
    user = images.ordinary_user()
    done = subprocess.run(
        [images.REAL_APPTAINER, *words],
        env={"PATH": "/usr/bin:/bin", "HOME": user.pw_dir, "APPTAINER_KEYSDIR": str(keys)},
        cwd=keys, user=user.pw_uid, group=user.pw_gid, extra_groups=[],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def signed(readable_tmp: Path, require_root: None) -> SimpleNamespace:
    """Images with no signature, the first key's, the second's, and both; keys and fingerprints."""
    user = images.ordinary_user()
    folder = readable_tmp / "signed"
    keys = folder / "keys"
    for made in (folder, keys):
        made.mkdir()
        os.chown(made, user.pw_uid, user.pw_gid)
    for name in NAMES:
        real(keys, "key", "newpair", "-N", name, "-C", "test", "-E", "x@example.org", "-P", "",
             "-U=false", "-b", "2048")  # fmt: skip
    shown = real(keys, "key", "list")
    prints = [line.split()[1] for line in shown.splitlines() if "Fingerprint:" in line]
    plain = images.own_sif(images.shared_folder())
    found = {name: folder / f"{name}.sif" for name in ("none", "first", "second", "both")}
    for path in found.values():
        shutil.copy(plain, path)
        os.chown(path, user.pw_uid, user.pw_gid)
    for name, by in (("first", (0,)), ("second", (1,)), ("both", (0, 1))):
        for key in by:
            real(keys, "sign", "-k", str(key), found[name])
    keyring = (keys / "pgp-public").read_bytes()
    return SimpleNamespace(folder=folder, keyring=keyring, prints=prints, **found)


# ---- the list, in the flows ----


own = fixtures.own()


def write_list(own: Installation, signed: SimpleNamespace, text: str) -> None:
    for number, print_ in enumerate(signed.prints, 1):
        text = text.replace(f"@{number}", print_)
    for name, content in (("ecl.toml", text.encode()), ("global-pgp-public", signed.keyring)):
        file = own.sysconfdir / name
        file.unlink(missing_ok=True)
        file.write_bytes(content)
        file.chmod(0o644)


def rule(mode: str, keys: str, directory: str = "") -> str:
    return (
        f'activated = true\n[[execgroup]]\ntagname = "t"\nmode = "{mode}"\n'
        f'dirpath = "{directory}"\nkeyfp = [{keys}]\n'
    )


FIRST, SECOND, BOTH = '"@1"', '"@2"', '"@1", "@2"'
UNSIGNED = "image signature not valid: integrity: signature not found for object group 1"
REQUIRED = "image not signed by required entities"
FORBIDDEN = "image signed by a forbidden entity"
RULES = [
    (rule("whitelist", FIRST), {"none": UNSIGNED, "second": REQUIRED, "first": "", "both": ""}),
    (rule("whitelist", BOTH), {"none": UNSIGNED, "second": "", "first": "", "both": ""}),
    (rule("whitestrict", BOTH), {"first": REQUIRED, "second": REQUIRED, "both": ""}),
    (rule("whitestrict", FIRST), {"first": "", "second": REQUIRED, "both": ""}),
    (rule("blacklist", FIRST), {"none": UNSIGNED, "first": FORBIDDEN, "second": "",
                                "both": FORBIDDEN}),
    (rule("whitelist", ""), {"first": REQUIRED}),
    (rule("whitestrict", ""), {"first": REQUIRED}),
]  # fmt: skip


def test_an_overlay_of_another_group_is_no_part_of_it(own, signed):
    """A partition that is added beside what is signed leaves every signature as it was."""
    write_list(own, signed, rule("whitelist", FIRST))
    tree = signed.folder / "tree"
    (tree / "upper").mkdir(parents=True)
    (tree / "upper/added").write_text("added")
    packed = signed.folder / "packed.squashfs"
    subprocess.run(["mksquashfs", tree, packed, "-quiet"], check=True, stdout=subprocess.DEVNULL)
    images_ = {group: signed.folder / f"added-{group}.sif" for group in (1, 2)}
    for group, image in images_.items():
        shutil.copy(signed.first, image)
        os.chown(image, own.user.pw_uid, own.user.pw_gid)
        real(
            signed.folder, "sif", "add", "--datatype", "4", "--parttype", "4", "--partfs", "1",
            "--partarch", "2", "--groupid", str(group), image, packed,
        )  # fmt: skip
    script = "cat /added /upper/added; echo ran"
    for words in ((images_[2],), ("--overlay", f"{images_[2]}:ro", signed.first)):
        done = own.run("exec", *words, "sh", "-c", script)
        assert "added" not in done.stdout.replace("ran", "")
    done = own.run("exec", images_[1], "sh", "-c", script)
    assert (done.returncode, done.stdout) == (255, "")


def test_nobody_speaks_for_the_program_that_verifies(own, signed):
    """In the setuid flow it is a copy that its user cannot trace, and no other."""
    write_list(own, signed, rule("whitelist", FIRST))
    copy = own.libexec / "bin/gpgv"
    assert (copy.stat().st_uid, copy.stat().st_mode & 0o7777) == (0, 0o711)
    away = copy.with_name("gpgv.away")
    copy.rename(away)
    try:
        done = own.run("exec", signed.first, "true")
        assert done.returncode == 255
        assert f"{copy} is not installed" in done.stderr
        assert own.run("exec", "-u", signed.first, "true").returncode == 0
    finally:
        away.rename(copy)


@pytest.mark.parametrize("flow", sorted(FLOWS))
@pytest.mark.parametrize(("text", "answers"), RULES)
def test_who_has_signed(own, signed, flow, text, answers):
    write_list(own, signed, text)
    options, root = FLOWS[flow]
    for name, said in answers.items():
        done = own.run("exec", *options, getattr(signed, name), "echo", "ran", root=root)
        if not said:
            assert (done.returncode, done.stdout) == (0, "ran\n"), done.stderr
            continue
        assert (done.returncode, done.stdout) == (255, "")
        assert done.stderr == f"FATAL:   while checking container image with ECL: {said}\n"


def test_an_image_that_is_started_with_oci_is_judged_too(own, signed):
    for text, said in ((rule("whitelist", FIRST), REQUIRED), (rule("whitelist", SECOND), "")):
        write_list(own, signed, text)
        done = own.run("exec", "--oci", signed.second, "echo", "ran")
        assert said in done.stderr
        assert (REQUIRED in done.stderr, "ran" in done.stdout) == (bool(said), not said)


@pytest.mark.parametrize("flow", sorted(FLOWS))
def test_an_image_that_is_unpacked_is_judged_too(own, signed, flow):
    write_list(own, signed, rule("whitelist", FIRST))
    options, root = FLOWS[flow]
    with tempfile.TemporaryDirectory(dir="/var/tmp") as place:
        os.chmod(place, 0o1777)
        for image, said in ((signed.first, ""), (signed.second, REQUIRED), (signed.none, UNSIGNED)):
            words = ("exec", *options, "--unsquash", image, "echo", "ran")
            done = own.run(*words, root=root, env={"APPTAINER_TMPDIR": place})
            assert (done.returncode, done.stdout) == ((255, "") if said else (0, "ran\n"))
            wanted = f"FATAL:   while checking container image with ECL: {said}\n"
            assert not said or wanted in done.stderr
            assert [list(above.iterdir()) for above in Path(place).iterdir()] == [[]]


@pytest.mark.parametrize("owner", ["root", "me"])
def test_an_image_that_is_unpacked_is_limited_too(own, signed, owner):
    for name in ("ecl.toml", "global-pgp-public"):
        (own.sysconfdir / name).unlink(missing_ok=True)
    own.configure(f"limit container owners = {'root' if owner == 'root' else own.user.pw_name}")
    done = own.run("exec", "--unsquash", signed.none, "echo", "ran")
    own.configure()
    if owner == "me":
        assert (done.returncode, done.stdout) == (0, "ran\n"), done.stderr
        return
    assert (done.returncode, done.stdout) == (255, "")
    assert done.stderr == "FATAL:   apptainer image is not owned by required user(s)\n"


def test_what_is_unpacked_is_what_was_judged(signed, tmp_path, monkeypatch):
    """Whoever owns the file writes to it once its signature has been looked at."""
    file = tmp_path / "image.sif"
    shutil.copy(signed.first, file)
    file.chmod(0o644)
    whole = file.read_bytes()
    image = detect.open_image(str(file))

    def look(_caller: object, judged: detect.OpenImage) -> None:
        assert os.pread(judged.fd, len(whole) + 1, 0) == whole
        file.write_bytes(b"another" * 1000)

    monkeypatch.setattr(policy, "has_ecl", lambda: True)
    monkeypatch.setattr(policy, "check_limits", look)
    used = unsquash._judged(image, str(tmp_path), SimpleNamespace(userns=False))
    assert os.pread(used.fd, len(whole) + 1, 0) == whole
    os.close(used.fd)
    assert list(tmp_path.iterdir()) == [file]


def test_the_directory_decides_which_rule(own, signed):
    here = str(signed.folder)
    write_list(own, signed, rule("whitelist", FIRST, here))
    assert own.run("exec", signed.first, "true").returncode == 0
    above = os.path.dirname(here)
    for other in ("/tmp", above):
        write_list(own, signed, rule("whitelist", FIRST, other))
        done = own.run("exec", signed.first, "true")
        assert f"{signed.first} not part of any execgroup" in done.stderr
    write_list(own, signed, rule("blacklist", FIRST, here) + rule("whitelist", FIRST)[17:])
    assert FORBIDDEN in own.run("exec", signed.first, "true").stderr
    # A link elsewhere leads to the same file.
    link = signed.folder.parent / "link.sif"
    link.symlink_to(signed.first)
    assert FORBIDDEN in own.run("exec", link, "true").stderr


@pytest.mark.parametrize("how", ["bind", "tmpfs"])
def test_a_directory_of_another_namespace_is_none_of_a_rules(own, signed, readable_tmp, how):
    """There the user puts any file into any directory, and the kernel tells that path of it."""
    strict = readable_tmp / f"strict-{how}"
    strict.mkdir()
    shutil.copy(signed.first, strict / "image.sif")
    write_list(own, signed, rule("whitelist", SECOND, str(strict)))
    script = f"mount --bind {signed.folder} {strict}"
    if how == "tmpfs":
        script = f"mount -t tmpfs none {strict} && cp {signed.second} {strict}/second.sif"
    with elsewhere.namespace(own, script) as root:
        done = own.run("exec", f"{root}{strict}/second.sif", "echo", "ran")
    assert (done.returncode, done.stdout) == (255, "")
    assert f"{strict}/second.sif not part of any execgroup" in done.stderr


WRONG = [
    "rubbish",
    "activated = 1\n",
    "activate = true\n",
    rule("nomode", FIRST),
    rule("whitelist", '"xx"'),
    rule("whitelist", "1"),
    rule("whitelist", FIRST, "/nonexistent"),
    rule("whitelist", FIRST, "relative"),
    rule("whitelist", FIRST, "/tmp/"),
    rule("whitelist", FIRST) + rule("whitelist", FIRST)[17:],
    rule("whitelist", FIRST).replace("activated = true", "activated = false\nx = 1"),
    "activated = true\nexecgroup = [1]\n",
]


@pytest.mark.parametrize("text", WRONG)
def test_a_list_that_cannot_be_followed_starts_nothing(own, signed, text):
    write_list(own, signed, text)
    done = own.run("exec", signed.first, "echo", "ran")
    assert (done.returncode, done.stdout) == (255, "")
    assert done.stderr.startswith("FATAL:   while validating ECL configuration: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["ecl.toml", "global-pgp-public"])
@pytest.mark.parametrize("kind", ["user's", "writable", "link", "unreadable"])
def test_a_list_that_others_could_have_written_starts_nothing(own, signed, name, kind):
    write_list(own, signed, rule("whitelist", FIRST))
    file = own.sysconfdir / name
    if kind == "link":
        file.rename(own.sysconfdir / "aim")
        file.symlink_to("aim")
    else:
        os.chown(file, own.user.pw_uid if kind == "user's" else 0, 0)
        file.chmod({"writable": 0o664, "unreadable": 0o600}.get(kind, 0o644))
    done = own.run("exec", signed.first, "echo", "ran")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (255, "", 1)
    assert name in done.stderr
    if kind == "link":
        file.unlink()
        (own.sysconfdir / "aim").unlink()


def test_without_keys_nobody_has_signed(own, signed):
    write_list(own, signed, rule("whitelist", FIRST))
    (own.sysconfdir / "global-pgp-public").unlink()
    assert REQUIRED in own.run("exec", signed.first, "true").stderr


def test_switched_off_or_for_other_formats_it_says_nothing(own, signed):
    write_list(own, signed, rule("whitelist", SECOND).replace("= true", "= false"))
    assert own.run("exec", signed.first, "true").returncode == 0
    write_list(own, signed, rule("whitelist", SECOND))
    squash = images.bare_squashfs(images.shared_folder())
    assert own.run("exec", squash, "true").returncode == 0


def test_a_refusal_is_recorded(own, signed):
    log = own.sysconfdir / "audit"
    own.configure(audit=str(log))
    write_list(own, signed, rule("whitelist", SECOND))
    try:
        assert own.run("exec", signed.first, "true").returncode == 255
        assert "refused" in log.read_text().splitlines()[-1]
    finally:
        own.configure()


# ---- T-S10: every class of bytes of a signed image ----

TABLE, ROW = 4096, sif.DESCRIPTOR_BYTES
FIELDS = {"type": 0, "used": 4, "id": 5, "group": 9, "link": 13, "offset": 17, "size": 25,
          "created": 41, "uid": 57, "gid": 65, "name": 73, "extra": 201}  # fmt: skip


def judged(path: Path, signed: SimpleNamespace, mode: str = "whitelist") -> str:
    """Return why the list leaves the image out; "" where it does not."""
    group = ExecGroup(tag="", mode=mode, directory="", fingerprints=frozenset(signed.prints[:1]))
    fd = os.open(path, os.O_RDONLY)
    try:
        judge._judge(group, fd, signed.keyring)
    except ApptainerError as error:
        return str(error)
    finally:
        os.close(fd)
    return ""


def layout(path: Path) -> SimpleNamespace:
    fd = os.open(path, os.O_RDONLY)
    try:
        header = sif.read_header(fd)
        return SimpleNamespace(table=header.descriptors_offset, rows=sif.read_descriptors(fd))
    finally:
        os.close(fd)


def altered(path: Path, target: Path, at: int, data: bytes | None = None) -> Path:
    """Copy an image with one byte flipped at an offset, or with other bytes there."""
    shutil.copy(path, target)
    with open(target, "r+b") as file:
        file.seek(at)
        old = file.read(1)
        file.seek(at)
        file.write(bytes([old[0] ^ 1]) if data is None else data)
    return target


def places(path: Path) -> Iterator[tuple[str, int]]:
    facts = layout(path)
    yield from (("launch", 3), ("magic", 33), ("version", 42), ("identity", 50))
    for number, row in enumerate(facts.rows):
        start = facts.table + number * ROW
        # A signature's own row is no part of what it signs, but for its place and its subject.
        names = ("type", "used", "link", "offset") if row.data_type == sif.SIGNATURE else FIELDS
        for field in names:
            yield f"{row.id} {field}", start + FIELDS[field]
        for where in (0, row.size_bytes // 2, row.size_bytes - 1):
            # The armour's own last line says nothing.
            if row.data_type != sif.SIGNATURE or where == row.size_bytes // 2:
                yield f"{row.id} byte {where}", row.offset + where


def test_the_image_as_it_was_signed(signed):
    assert judged(signed.first, signed) == ""
    assert judged(signed.both, signed) == ""


def test_every_byte_that_counts(signed, tmp_path):
    passed = [
        name
        for name, at in places(signed.first)
        if judged(altered(signed.first, tmp_path / "altered.sif", at), signed) == ""
    ]
    assert passed == []


def test_a_second_good_signature_does_not_hide_a_change(signed, tmp_path):
    row = next(row for row in layout(signed.both).rows if row.data_type == sif.PARTITION)
    for mode in ("whitelist", "whitestrict", "blacklist"):
        changed = altered(signed.both, tmp_path / "altered.sif", row.offset + row.size_bytes - 1)
        assert "data object integrity compromised" in judged(changed, signed, mode)


def test_an_object_more_an_object_less(signed, tmp_path):
    facts = layout(signed.first)
    data = signed.first.read_bytes()
    free = facts.table + len(facts.rows) * ROW
    for kind in (sif.GENERIC, sif.PARTITION):
        row = next(row for row in facts.rows if row.data_type == sif.PARTITION)
        more = bytearray(row.raw)
        more[0:4] = kind.to_bytes(4, "little")
        more[5:9] = (99).to_bytes(4, "little")
        assert judged(altered(signed.first, tmp_path / "m.sif", free, bytes(more)), signed)
    assert data == signed.first.read_bytes()
    for number, row in enumerate(facts.rows):
        start = facts.table + number * ROW
        assert judged(altered(signed.first, tmp_path / "l.sif", start + 4, b"\0"), signed), row.id


def test_the_signature_of_another_image(signed, tmp_path):
    other = signed.folder / "other.sif"
    fresh = images.real_sif(images.shared_folder())
    shutil.copy(fresh, other)
    os.chown(other, images.ordinary_user().pw_uid, images.ordinary_user().pw_gid)
    real(signed.folder / "keys", "sign", "-k", "0", other)
    assert judged(other, signed) == ""
    theirs = next(row for row in layout(other).rows if row.data_type == sif.SIGNATURE)
    ours = next(row for row in layout(signed.first).rows if row.data_type == sif.SIGNATURE)
    size = min(theirs.size_bytes, ours.size_bytes)
    message = other.read_bytes()[theirs.offset : theirs.offset + size].ljust(ours.size_bytes, b"\0")
    assert judged(altered(signed.first, tmp_path / "x.sif", ours.offset, message), signed)


# ---- T-S20, and what gpgv is given ----


def clear_signed(tmp_path: Path, digest: str) -> tuple[bytes, bytes]:
    home = tmp_path / "gnupg"
    home.mkdir(mode=0o700, exist_ok=True)
    base = ["gpg", "--homedir", str(home), "--batch", "--no-autostart", "--passphrase", ""]
    base = [word for word in base if word != "--no-autostart"]
    subprocess.run([*base, "--quick-gen-key", "x@example.org", "rsa2048", "sign", "never"],
                   check=True, capture_output=True, timeout=60)  # fmt: skip
    text = subprocess.run([*base, "--digest-algo", digest, "--allow-weak-digest-algos",
                           "--clear-sign"], input=b"{}", check=True, capture_output=True,
                          timeout=60).stdout  # fmt: skip
    ring = subprocess.run([*base, "--export"], check=True, capture_output=True, timeout=60).stdout
    subprocess.run(["gpgconf", "--homedir", str(home), "--kill", "all"], check=False, timeout=60)
    return text, ring


@pytest.mark.parametrize(("digest", "good"), [("SHA256", True), ("SHA512", True), ("SHA1", False)])
def test_weak_digests_of_a_signature(tmp_path, digest, good):
    message, ring = clear_signed(tmp_path, digest)
    if good:
        assert openpgp.verify(message, ring).text.strip() == b"{}"
        for other in (message + message, b"\n" + message, message[:-200], b""):
            with pytest.raises(openpgp.BadSignature):
                openpgp.verify(other, ring)
        with pytest.raises(openpgp.UnknownEntity) as caught:
            openpgp.verify(message, b"")
        assert openpgp.is_fingerprint(str(caught.value.facts["claimed"]))
        return
    with pytest.raises(openpgp.BadSignature):
        openpgp.verify(message, ring)


@pytest.mark.parametrize("name", ["md5", "sha1", "crc", ""])
def test_weak_digests_of_an_object(signed, name):
    fd = os.open(signed.first, os.O_RDONLY)
    try:
        checker = integrity.Checker(fd, integrity.group_of(fd, 1))
        text = (
            f'{{"version":1,"header":{{"digest":"{name}:00"}},'
            '"objects":[{"relativeId":0,"descriptorDigest":"x","objectDigest":"x"}]}'
        )
        with pytest.raises(integrity.NotIntact, match="unknown digest"):
            checker.check(text.encode())
    finally:
        os.close(fd)
