"""Encrypted SIF files as an ordinary user's Apptainer writes them, in the three flows."""

from __future__ import annotations

import os
import shutil
import signal
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import images, sif_bytes
from tests.e2e import steps, three_flows
from tests.own_install import HostState, assert_nothing_left, eventually, household

PYTHON = "/usr/bin/python3"
SECRET = "a secret that is nowhere else"
# Writes gocryptfs's files of argv[1], with the key on stdin, to the directory argv[2]; and what a
# SIF file has for a private key, by the PEM file argv[3], to argv[4].
WRITER = r"""
import base64, json, os, sys, hashlib
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
plain, folder, pem, message = sys.argv[1:]
password = sys.stdin.buffer.read()
def cipher(key):
    info = b"AES-GCM file content encryption"
    return AESGCM(HKDF(hashes.SHA256(), length=32, salt=None, info=info).derive(key))
def seal(key, block, associated):
    nonce = os.urandom(16)
    return nonce + cipher(key).encrypt(nonce, block, associated)
master, salt, ident = os.urandom(32), os.urandom(32), os.urandom(16)
hashed = hashlib.scrypt(password, salt=salt, n=1024, r=8, p=1, dklen=32)
scrypt = {"Salt": base64.b64encode(salt).decode(), "N": 1024, "R": 8, "P": 1, "KeyLen": 32}
flags = ["HKDF", "GCMIV128", "PlaintextNames"]
sealed = base64.b64encode(seal(hashed, master, bytes(8))).decode()
conf = {"Creator": "test", "EncryptedKey": sealed, "ScryptObject": scrypt, "Version": 2,
        "FeatureFlags": flags}
open(folder + "/gocryptfs.conf", "w").write(json.dumps(conf))
data = open(plain, "rb").read()
with open(folder + "/squashfs-1", "wb") as out:
    out.write(b"\0\2" + ident)
    for number, at in enumerate(range(0, len(data), 4096)):
        out.write(seal(master, data[at:at + 4096], number.to_bytes(8, "big") + ident))
private = rsa.generate_private_key(65537, 2048)
form = serialization.PrivateFormat.TraditionalOpenSSL
none = serialization.NoEncryption()
open(pem, "wb").write(private.private_bytes(serialization.Encoding.PEM, form, none))
oaep = padding.OAEP(mgf=padding.MGF1(hashes.SHA256()), algorithm=hashes.SHA256(), label=None)
der = b"\x04\x82\x01\x00" + private.public_key().encrypt(password, oaep)
text = base64.b64encode(der).decode()
lines = [text[at:at + 64] for at in range(0, len(text), 64)]
begin, end = "-----BEGIN MESSAGE-----", "-----END MESSAGE-----"
open(message, "w").write("\n".join([begin, *lines, end]) + "\n")
"""


@pytest.fixture(scope="module")
def made(installed) -> Iterator[SimpleNamespace]:
    """Images encrypted with a passphrase and for a key, the key, and another key."""
    place = images.shared_folder() / "encrypted"
    (place / "outer").mkdir(parents=True)
    plain = images.bare_squashfs(images.shared_folder())
    found = SimpleNamespace(place=place, pem=place / "key.pem", other=place / "other.pem")
    for pem in (found.other, found.pem):
        words = [PYTHON, "-I", "-B", "-c", WRITER, plain, place / "outer", pem, place / "message"]
        done = subprocess.run(words, input=SECRET.encode(), capture_output=True, check=False)
        if b"ModuleNotFoundError" in done.stderr:
            pytest.skip("python3-cryptography is not installed: run ./install")
        assert done.returncode == 0, done.stderr
        pem.chmod(0o644)
    for path in (place / "outer").iterdir():
        path.chmod(0o644)
    outer = place / "outer.sqfs"
    words = ["mksquashfs", place / "outer", outer, "-quiet", "-no-progress", "-all-root"]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    content, message = outer.read_bytes(), (place / "message").read_bytes()
    found.passphrase, found.key = place / "passphrase.sif", place / "key.sif"
    part = sif_bytes.partition(size=len(content), fs=6)
    found.passphrase.write_bytes(sif_bytes.sif([part], content=content))
    at = sif_bytes.PARTITION_OFFSET + len(content)
    extra = struct.pack("<ii", 2, 0x200)
    crypto = sif_bytes.entry(0x4008, 4, at, len(message), link=3, extra=extra)
    found.key.write_bytes(sif_bytes.sif([part, crypto], content=content + message))
    yield found
    shutil.rmtree(place)


def ways(made: SimpleNamespace) -> dict[str, tuple[list[object], dict[str, str], str]]:
    pem = made.pem.read_text()
    return {
        "option": (["--pem-path", made.pem, made.key], {}, ""),
        "path": ([made.key], {"APPTAINER_ENCRYPTION_PEM_PATH": str(made.pem)}, ""),
        "data": ([made.key], {"SINGULARITY_ENCRYPTION_PEM_DATA": pem}, ""),
        "variable": ([made.passphrase], {"APPTAINER_ENCRYPTION_PASSPHRASE": SECRET}, ""),
        "asked": (["--passphrase", made.passphrase], {}, SECRET + "\nleft\n"),
    }


@pytest.mark.parametrize("flow", three_flows.FLOWS)
@pytest.mark.parametrize("way", ["option", "path", "data", "variable", "asked"])
def test_an_image_is_decrypted(own, open_fuse, made, flow, way):
    words, env, stdin = ways(made)[way]
    script = "cat /etc/test-release; cat; env"
    line = ["exec", *words, "sh", "-c", script]
    done = three_flows.run(own.program, flow, line, env=env, stdin=stdin)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("a small tree\n" + ("left\n" if stdin else ""))
    # Neither the payload nor the user's terminal sees the secret again.
    assert SECRET not in done.stdout + done.stderr
    assert "PRIVATE KEY" not in done.stdout


def test_with_fakeroot_and_in_an_instance(own, made):
    env = {"APPTAINER_ENCRYPTION_PASSPHRASE": SECRET}
    done = own.run("exec", "-f", made.passphrase, "id", "-u", env=env)
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr
    done = own.run("instance", "start", made.passphrase, "sealed", env=env)
    assert done.returncode == 0, done.stderr
    try:
        done = own.run("exec", "instance://sealed", "cat", "/etc/test-release")
        assert done.stdout == "a small tree\n"
    finally:
        own.run("instance", "stop", "sealed")


def test_the_secret_is_in_no_command_line_environment_or_trace(own, made):
    trace = own.place / "trace"
    trace.touch()
    os.chown(trace, own.user.pw_uid, own.user.pw_gid)
    env = own.environment({"APPTAINER_ENCRYPTION_PASSPHRASE": SECRET})
    with household() as home:
        words = ["--trace", trace, "-d", "exec", made.passphrase, "sh", "-c", "echo; exec sleep 60"]
        process = home.adopt(own.start(*words, env=env))
        eventually(lambda: steps.has_spoken(process), "the payload runs")
        for pid in home.alive():
            for name in ("cmdline", "environ"):
                assert SECRET.encode() not in Path(f"/proc/{pid}/{name}").read_bytes()
        process.terminate()
        _, told = process.communicate(timeout=20)
    assert SECRET.encode() not in told
    assert SECRET not in trace.read_text()
    trace.unlink()


@pytest.mark.parametrize("victim", ["keeper", "server"])
def test_whoever_is_killed_nothing_is_left(own, made, victim):
    env = own.environment({"APPTAINER_ENCRYPTION_PASSPHRASE": SECRET})
    with household() as home:
        host = HostState(own.session)
        words = ["exec", made.passphrase, "sh", "-c", "echo; exec sleep 60"]
        process = home.adopt(own.start(*words, env=env))
        eventually(lambda: steps.has_spoken(process), "the payload runs")
        found = steps.processes(home)
        os.kill(process.pid if victim == "keeper" else found["IMAGE_SERVER"], signal.SIGKILL)
        process.communicate(timeout=20)
        assert_nothing_left(home, host)


def refused(own, said: str, *words: object, env: dict[str, str] | None = None) -> None:
    done = own.run("exec", *words, "true", env=env)
    assert done.returncode == 255
    failures = [x for x in done.stderr.splitlines() if not x.startswith("INFO")]
    assert failures == [f"FATAL:   {said}"]


CHECKING = "While checking container encryption: "


def test_what_cannot_be(own, made):
    refused(own, CHECKING + "required option --passphrase or --pem-path missing", made.key)
    refused(own, "Specified PEM file /none: does not exist.", "--pem-path", "/none", made.key)
    failed = CHECKING + "cannot decrypt {}: {}"
    wrong = {"APPTAINER_ENCRYPTION_PASSPHRASE": "wrong"}
    refused(own, failed.format(made.key, "the key is wrong"), made.key, env=wrong)
    reason = "the private key is not the one that the image was encrypted for"
    refused(own, failed.format(made.key, reason), "--pem-path", made.other, made.key)
    reason = "it was encrypted with a passphrase, not with a key"
    refused(own, failed.format(made.passphrase, reason), "--pem-path", made.pem, made.passphrase)
    done = own.run("exec", "--pem-path", "/etc/hostname", made.key, "true")
    assert "Invalid encryption private key" in done.stderr


def test_a_changed_block_is_noticed(own, made):
    plain = made.passphrase.read_bytes()
    cipher = (made.place / "outer/squashfs-1").read_bytes()
    at = plain.find(cipher[4200:4300])
    if at < 0:
        pytest.skip("mksquashfs has compressed what cannot be compressed")
    changed = made.place / "changed.sif"
    changed.write_bytes(plain[:at] + bytes([plain[at] ^ 1]) + plain[at + 1 :])
    env = {"APPTAINER_ENCRYPTION_PASSPHRASE": SECRET}
    said = f"{CHECKING}cannot decrypt {changed}: block 1 of the image was changed"
    refused(own, said, changed, env=env)


def test_what_the_administrator_says(own, made):
    env = {"APPTAINER_ENCRYPTION_PASSPHRASE": SECRET}
    own.configure("allow container sif = no")
    assert own.run("exec", made.passphrase, "true", env=env).returncode == 0
    own.configure("allow container encrypted = no")
    said = "configuration disallows users from running encrypted SIF containers"
    refused(own, said, made.passphrase, env=env)
    own.configure("limit container owners = root")
    said = (
        f"{made.passphrase}: encrypted images cannot be used in the setuid flow where `limit "
        "container` directives or an execution control list are in force"
    )
    refused(own, said, made.passphrase, env=env)


def test_images_of_the_real_one(own, made, open_fuse):
    if not images.have_real_apptainer() or not shutil.which("gocryptfs"):
        pytest.skip("Apptainer or gocryptfs is not installed")
    place = made.place / "real"
    place.mkdir()
    os.chown(place, own.user.pw_uid, own.user.pw_gid)
    public = place / "public.pem"
    words = ["openssl", "rsa", "-in", made.pem, "-RSAPublicKey_out", "-out", public]
    subprocess.run(words, check=True, capture_output=True)
    public.chmod(0o644)
    tree = images.small_tree(images.shared_folder())
    built = images.real_apptainer("build", "--encrypt", "--pem-path", public, place / "x.sif", tree)
    if built.returncode != 0:
        pytest.skip(f"the real one cannot: {built.stderr[-200:]}")
    done = own.run("exec", "--pem-path", made.pem, place / "x.sif", "cat", "/etc/test-release")
    assert (done.returncode, done.stdout) == (0, "a small tree\n"), done.stderr


# ---- build --encrypt ----

TELLTALE = """\
Bootstrap: localimage
From: {tree}
%pre
    env > pre.said
%setup
    env > setup.said
%post
    env > /post.said
%test
    env
"""


@pytest.fixture(scope="module")
def bench(installed, made) -> SimpleNamespace:
    """A directory of the user's with public keys and a tree, and how to build there."""
    place = Path(made.place, "bench")
    place.mkdir()
    for form, name in (("-RSAPublicKey_out", "public.pem"), ("-pubout", "spki.pem")):
        words = ["openssl", "rsa", "-in", made.pem, form, "-out", place / name]
        subprocess.run(words, check=True, capture_output=True)
        (place / name).chmod(0o644)
    tree = place / "tree"
    shutil.copytree(images.small_tree(images.shared_folder()), tree, symlinks=True)
    (place / "image.def").write_text(TELLTALE.format(tree=tree))
    for path in (place, tree, *tree.rglob("*")):
        os.chown(path, installed.user.pw_uid, installed.user.pw_gid, follow_symlinks=False)

    def build(*words: object, env: dict[str, str] | None = None, **how: object):
        more = {"APPTAINER_TMPDIR": str(place), **(env or {})}
        return installed.run("build", *words, env=more, cwd=place, **how)

    return SimpleNamespace(place=place, tree=tree, build=build)


def locks(made: SimpleNamespace, bench: SimpleNamespace) -> dict[str, tuple[list[object], dict]]:
    pem = (bench.place / "public.pem").read_text()
    return {
        "pem": (["--pem-path", "public.pem"], {}),
        "spki": (["-e"], {"SINGULARITY_ENCRYPTION_PEM_PATH": "spki.pem"}),
        "data": ([], {"APPTAINER_ENCRYPT": "1", "APPTAINER_ENCRYPTION_PEM_DATA": pem}),
        "passphrase": (["--encrypt"], {"APPTAINER_ENCRYPTION_PASSPHRASE": SECRET}),
    }


@pytest.mark.parametrize("way", ["pem", "spki", "data", "passphrase"])
def test_what_we_encrypt_both_programs_run(own, made, bench, open_fuse, way):
    words, env = locks(made, bench)[way]
    target = bench.place / f"{way}.sif"
    done = bench.build(*words, target.name, "tree", env=env)
    assert done.returncode == 0, done.stderr
    assert b"a small tree" not in target.read_bytes()
    opens: dict[str, str] = {"APPTAINER_ENCRYPTION_PASSPHRASE": SECRET}
    if way != "passphrase":
        opens = {"APPTAINER_ENCRYPTION_PEM_PATH": str(made.pem)}
    done = own.run("exec", target, "cat", "/etc/test-release", env=opens)
    assert (done.returncode, done.stdout) == (0, "a small tree\n"), done.stderr
    done = own.run("exec", target, "true")
    assert "required option --passphrase or --pem-path missing" in done.stderr
    if not images.have_real_apptainer() or not shutil.which("gocryptfs"):
        pytest.skip("Apptainer or gocryptfs is not installed: only our own program was asked")
    done = subprocess.run(
        [images.REAL_APPTAINER, "exec", target, "cat", "/etc/test-release"],
        env=own.environment(opens), capture_output=True, text=True, check=False,
        cwd=own.user.pw_dir, **own.identity(),
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "a small tree\n"), done.stderr
    kinds = subprocess.run(
        [images.REAL_APPTAINER, "sif", "list", target], capture_output=True, text=True, check=True
    ).stdout
    assert "FS (Gocryptfs squashfs/*System/amd64)" in kinds
    assert ("|3       |" in kinds and "(PEM/RSA-OAEP)" in kinds) == (way != "passphrase")


def test_a_passphrase_is_typed(own, bench):
    done = bench.build("--passphrase", "typed.sif", "tree", input=SECRET + "\n", stdin=None)
    assert done.returncode == 0, done.stderr
    assert "Enter encryption passphrase: " in done.stdout
    assert SECRET not in done.stdout + done.stderr
    env = {"APPTAINER_ENCRYPTION_PASSPHRASE": SECRET}
    assert own.run("exec", bench.place / "typed.sif", "true", env=env).returncode == 0


@pytest.mark.parametrize(
    ("words", "env", "says"),
    [
        (["--encrypt"], {}, "Missing encryption info, please add `--passphrase` or"),
        (["--pem-path", "none.pem"], {}, "Specified PEM file none.pem: does not exist."),
        (["--pem-path", "{pem}"], {}, "Invalid encryption public key: it is a private key"),
        (["--pem-path", "image.def"], {}, "Invalid encryption public key: "),
        (["--pem-path", "public.pem", "--sandbox"], {}, "a sandbox cannot be encrypted"),
        (["--pem-path", "public.pem", "--reproducible"], {}, "exclude each other"),
        (["-e"], {"PASSPHRASE": "two\nlines"}, "it has more than one line"),
        (["-e"], {"PASSPHRASE": "x" * 3000}, "it has more than 2048 bytes"),
    ],
)
def test_what_cannot_be_encrypted(made, bench, words, env, says):
    before = sorted(bench.place.iterdir())
    words = [word.format(pem=made.pem) for word in words]
    more = {f"APPTAINER_ENCRYPTION_{name}": value for name, value in env.items()}
    done = bench.build(*words, "refused.sif", "tree", env=more)
    assert done.returncode == 255
    (line,) = done.stderr.splitlines()
    assert line.startswith("FATAL:   ")
    assert says in line
    assert sorted(bench.place.iterdir()) == before


def test_variables_alone_encrypt_nothing_and_say_so(own, bench):
    env = {"APPTAINER_ENCRYPTION_PASSPHRASE": SECRET}
    done = bench.build("plain.sif", "tree", env=env)
    assert "WARNING: Encryption related env vars found, but --encrypt was not" in done.stderr
    assert own.run("exec", bench.place / "plain.sif", "true").returncode == 0


def told_to_others(home, own_programs: set[str], secret: bytes, seen: set[str]) -> None:
    """Look at every process of ours: command lines of all, environments of other programs."""
    for pid in home.alive():
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
            assert secret not in line
            program = line.split(b"\0")[0].decode()
            environ = Path(f"/proc/{pid}/environ").read_bytes()
            if b"apptainer-py\0build" not in line and program not in own_programs:
                seen.add(os.path.basename(program))
                assert secret not in environ, line
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it has ended, or is closed to all


def test_a_build_tells_its_secret_to_nobody(own, bench):
    """Scripts of the definition print what they have; whoever runs meanwhile is looked at."""
    env = own.environment({
        "APPTAINER_ENCRYPTION_PASSPHRASE": SECRET, "APPTAINER_TMPDIR": str(bench.place),
        "SINGULARITY_ENCRYPTION_PASSPHRASE": SECRET,
    })  # fmt: skip
    words = ["-d", "build", "--fakeroot", "-e", "told.sif", "image.def"]
    seen: set[str] = set()
    with household() as home:
        process = home.adopt(own.start(*words, env=env, cwd=bench.place, stderr=subprocess.STDOUT))
        said = b""
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        program = str(own.program)

        def ended() -> bool:
            nonlocal said
            said += process.stdout.read() or b""
            told_to_others(home, {program, PYTHON}, SECRET.encode(), seen)
            return process.poll() is not None

        eventually(ended, "the build ends", 60)
        said += process.stdout.read() or b""
    assert process.returncode == 0, said[-2000:]
    assert "mksquashfs" in seen
    assert SECRET.encode() not in said
    assert b"PATH=" in said
    for name in ("pre.said", "setup.said"):
        found = list(bench.place.rglob(name))
        assert found or name == "pre.said"
        assert all(SECRET not in path.read_text() for path in found)
    done = own.run("exec", bench.place / "told.sif", "cat", "/post.said", env={
        "APPTAINER_ENCRYPTION_PASSPHRASE": SECRET})  # fmt: skip
    assert "PATH=" in done.stdout, done.stderr
    assert SECRET not in done.stdout


# ---- root ----


def status_of(pid: int) -> dict[str, list[str]]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {line.partition(":")[0]: line.partition(":")[2].split() for line in lines}


@pytest.mark.parametrize("mode", [0o755, 0o600])
def test_root_reads_an_encrypted_image_as_nobody(own, made, mode):
    """While it waits for the passphrase, nothing of the image has been read yet."""
    image = made.place / f"root-{mode:o}.sif"
    shutil.copy(made.passphrase, image)
    image.chmod(mode)
    with household() as home:
        words = ["exec", "--passphrase", image, "cat", "/etc/test-release"]
        process = home.adopt(
            subprocess.Popen(
                [own.program, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, env=own.environment(), cwd="/", start_new_session=True,
            )
        )  # fmt: skip
        found: list[int] = []

        def waits() -> bool:
            for pid in home.alive():
                line = Path(f"/proc/{pid}/cmdline").read_bytes()
                if b"gocryptfs" in line and status_of(pid)["Uid"][0] != "0":
                    found.append(pid)
            return bool(found)

        eventually(waits, "the program that decrypts is there")
        status = status_of(found[0])
        assert status["Uid"] == status["Gid"] == ["65534"] * 4
        assert status["Groups"] == []
        assert {int(status[f"Cap{name}"][0], 16) for name in ("Inh", "Prm", "Eff", "Amb")} == {0}
        eventually(lambda: status_of(found[0])["NoNewPrivs"] == ["1"], "it gains nothing")
        ours = os.stat("/proc/self/ns/net").st_ino
        assert os.stat(f"/proc/{found[0]}/ns/net").st_ino != ours
        out, err = process.communicate(SECRET.encode() + b"\n", timeout=30)
    assert (process.returncode, out) == (0, b"a small tree\n"), err
