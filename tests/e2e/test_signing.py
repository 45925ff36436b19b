"""`sign`, `verify` and `key` beside the real Apptainer: each accepts what the other has made."""

from __future__ import annotations

import http.server
import os
import shutil
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import images

REAL = images.REAL_APPTAINER
with_real = pytest.mark.skipif(
    not images.have_real_apptainer(), reason="did not run: no real Apptainer on this machine"
)


@pytest.fixture(scope="module")
def bench(product, user, as_user, readable_tmp):
    """A user's directory with two key pairs, a locked one and an open one, and an image."""
    place = Path(readable_tmp, "signing")
    place.mkdir()
    os.chown(place, user.pw_uid, user.pw_gid)
    environment = {"APPTAINER_KEYSDIR": str(place / "keys"), "HOME": str(place)}

    def run(program, *words, stdin="", env=None):
        done = as_user(
            [program, *words], env={**environment, **(env or {})}, cwd=place, stdin=stdin
        )
        assert "Traceback" not in done.stderr
        return done

    def ours(*words, **more):
        return run(product.program, *words, **more)

    def real(*words, **more):
        return run(REAL, *words, **more)

    def copy(source, name):
        target = place / name
        shutil.copyfile(place / source, target)
        os.chown(target, user.pw_uid, user.pw_gid)
        return name

    for name, passphrase in (("Locked", "quiet"), ("Open", "")):
        words = ("--name", name, "--email", f"{name}@here", "--bit-length", "2048")
        done = ours("key", "newpair", *words, stdin=f"note\n{passphrase}\n{passphrase}\ny\n")
        assert done.returncode == 0, done.stderr
    (place / "tree").write_bytes(b"x" * 5000)
    for words in (
        ("new", "plain.sif"),
        ("add", "--datatype", "4", "--partfs", "4", "--parttype", "2", "--partarch", "2",
         "--groupid", "1", "plain.sif", "tree"),
        ("add", "--datatype", "1", "--groupid", "1", "--filename", "f", "plain.sif", "tree"),
        ("add", "--datatype", "7", "--groupid", "2", "plain.sif", "tree"),
    ):  # fmt: skip
        done = ours("sif", *words)
        assert (done.returncode, done.stderr) == (0, "")
    return SimpleNamespace(place=place, ours=ours, real=real, copy=copy, uid=user.pw_uid)


def ring(bench) -> list[str]:
    rows = bench.ours("key", "list", "--secret").stdout.splitlines()
    return [row.split()[-1] for row in rows if "Fingerprint" in row]


def index(bench, name: str) -> str:
    text = bench.ours("key", "list", "--secret").stdout
    rows = [row for row in text.splitlines() if ")  User:" in row]
    return next(row.partition(")")[0] for row in rows if name in row)


def signed(bench, name: str, program) -> str:
    image = bench.copy("plain.sif", name)
    done = program("sign", "-k", index(bench, "Open"), image)
    assert done.returncode == 0, done.stderr
    return image


def test_what_we_sign_we_verify_and_notice_every_change(bench):
    image = signed(bench, "own.sif", bench.ours)
    done = bench.ours("verify", "--local", image)
    assert done.returncode == 0
    assert done.stdout.count("Signing entity: Open") == 2
    assert f"Verified signature(s) from image '{image}'" in done.stderr
    whole = (bench.place / image).read_bytes()
    for at, said in (
        (50, "header integrity compromised"),
        (4096 + 585 + 73, "data object descriptor integrity compromised: 2"),
        (32768 + 10, "data object integrity compromised: 1"),
    ):
        damaged = bytearray(whole)
        damaged[at] ^= 1
        (bench.place / "damaged.sif").write_bytes(damaged)
        done = bench.ours("verify", "--local", "damaged.sif")
        assert (done.returncode, said in done.stderr) == (255, True), done.stderr


def test_a_locked_key_needs_its_passphrase_which_is_nowhere_to_be_seen(bench):
    image = bench.copy("plain.sif", "locked.sif")
    number = index(bench, "Locked")
    wrong = bench.ours("sign", "-k", number, image, stdin="wrong-secret\n")
    assert (wrong.returncode, "checksum failure" in wrong.stderr) == (255, True)
    assert (bench.place / image).read_bytes() == (bench.place / "plain.sif").read_bytes()
    right = bench.ours("-d", "sign", "-k", number, image, stdin="quiet\n")
    assert right.returncode == 0, right.stderr
    assert "quiet" not in right.stdout + right.stderr
    assert bench.ours("verify", "-l", image).returncode == 0
    homes = [p for p in Path("/dev/shm").glob("apptainer-py-*") if p.stat().st_uid == bench.uid]
    assert not homes


@with_real
def test_each_program_verifies_the_other(bench):
    shutil.rmtree(bench.place / ".apptainer", ignore_errors=True)
    for name, signer in (("ours.sif", bench.ours), ("theirs.sif", bench.real)):
        image = signed(bench, name, signer)
        for options in (("--local",), ("--local", "--json"), ("-l", "-g", "1"), ("-l", "-i", "2")):
            ours, real = (p("verify", *options, image) for p in (bench.ours, bench.real))
            assert ours.returncode == 0
            assert (ours.stdout, ours.stderr) == (real.stdout, real.stderr)
    for flag in ((), ("--secret",)):
        listed = [p("key", "list", *flag).stdout for p in (bench.ours, bench.real)]
        assert listed[0] == listed[1]
        assert "Fingerprint" in listed[0]


@with_real
@pytest.mark.parametrize(
    "words",
    [
        ("plain.sif",), ("--json", "plain.sif"), ("-g", "7", "one.sif"), ("-i", "9", "one.sif"),
        ("one.sif",), ("--json", "one.sif"), ("-i", "1", "one.sif"), ("-i", "2", "one.sif"),
        ("-g", "1", "-i", "2", "one.sif"), ("--legacy-insecure", "one.sif"), ("/etc/passwd",),
        ("nothing.sif",), ("more.sif",), ("less.sif",), ("--key", "nothing.pem", "one.sif"),
        ("--key", "/etc/passwd", "one.sif"), ("empty.sif",), ("no-group.sif",),
    ],
    ids=" ".join,
)  # fmt: skip
def test_verify_says_what_the_real_one_says(bench, words):
    if not (bench.place / "one.sif").exists():
        one = bench.copy("plain.sif", "one.sif")
        assert bench.ours("sign", "-k", index(bench, "Open"), "-i", "2", one).returncode == 0
        for name in ("more.sif", "less.sif"):
            signed(bench, name, bench.ours)
        assert bench.real("sif", "del", "2", "less.sif").returncode == 0
        more = ("--datatype", "7", "--groupid", "1", "more.sif", "tree")
        assert bench.real("sif", "add", *more).returncode == 0
        for name in ("empty.sif", "no-group.sif"):
            bench.ours("sif", "new", name)
        bench.ours("sif", "add", "--datatype", "7", "no-group.sif", "tree")
    ours, real = (p("verify", "-l", *words) for p in (bench.ours, bench.real))
    assert (ours.returncode, ours.stdout, ours.stderr) == (
        real.returncode, real.stdout, real.stderr,
    )  # fmt: skip


def pem(bench, kind: str) -> tuple[str, str]:
    private, public = f"{kind}.pem", f"{kind}.pub"
    options = {
        "rsa": ["-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"],
        "ec": ["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"],
        "ed25519": ["-algorithm", "ED25519"],
    }
    for argv in (
        ["openssl", "genpkey", *options[kind], "-out", private],
        ["openssl", "pkey", "-in", private, "-pubout", "-out", public],
    ):
        subprocess.run(argv, cwd=bench.place, check=True, capture_output=True)
    os.chown(bench.place / private, bench.uid, -1)
    return private, public


@pytest.mark.parametrize("kind", ["rsa", "ec", "ed25519"])
def test_pem_keys(bench, kind):
    private, public = pem(bench, kind)
    programs = [bench.ours, *([bench.real] if images.have_real_apptainer() else [])]
    for number, signer in enumerate(programs):
        image = bench.copy("plain.sif", f"{kind}{number}.sif")
        done = signer("sign", "--key", private, image)
        assert done.returncode == 0, done.stderr
        answers = [p("verify", "--key", public, image) for p in programs]
        assert {a.returncode for a in answers} == {0}
        assert len({a.stdout for a in answers}) == 1
        assert bench.ours("verify", "-l", image).returncode == 255
    other = "other.sif"
    bench.copy(f"{kind}0.sif", other)
    data = bytearray((bench.place / other).read_bytes())
    data[32768 + 5] ^= 1
    (bench.place / other).write_bytes(data)
    assert "integrity compromised: 1" in bench.ours("verify", "--key", public, other).stderr


def test_certificates(bench):
    script = """
    openssl req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -subj /CN=root -days 9
    openssl req -newkey rsa:2048 -nodes -keyout leaf.key -out leaf.csr -subj /CN=leaf
    sign() { openssl x509 -req -in leaf.csr -CA ca.pem -CAkey ca.key -CAcreateserial "$@"; }
    echo extendedKeyUsage=serverAuth > web.ext
    sign -out leaf.pem -days 9
    sign -out web.pem -days 9 -extfile web.ext
    chmod 644 *.key
    """
    subprocess.run(["sh", "-ec", script], cwd=bench.place, check=True, capture_output=True)
    image = bench.copy("plain.sif", "certified.sif")
    assert bench.ours("sign", "--key", "leaf.key", image).returncode == 0
    trusted = ("--certificate-roots", "ca.pem")
    answers = {
        "good": bench.ours("verify", "--certificate", "leaf.pem", *trusted, image),
        "unknown": bench.ours("verify", "--certificate", "leaf.pem", image),
        "use": bench.ours("verify", "--certificate", "web.pem", *trusted, image),
        "other": bench.ours("verify", "--certificate", "ca.pem", *trusted, image),
        "none": bench.ours("verify", "--certificate", "leaf.csr", *trusted, image),
    }
    assert [a.returncode for a in answers.values()] == [0, 255, 255, 255, 255]
    assert "signed by unknown authority" in answers["unknown"].stderr
    assert "incompatible key usage" in answers["use"].stderr
    assert "do not match threshold" in answers["other"].stderr


@with_real
def test_keys_go_from_one_program_to_the_other(bench, as_user):
    fingerprints = ring(bench)
    number = index(bench, "Open")
    for armor in ((), ("--armor",)):
        done = bench.ours("key", "export", "-s", *armor, "secret.key", stdin=f"{number}\n")
        assert done.returncode == 0, done.stderr
        assert (bench.place / "secret.key").stat().st_mode & 0o077 == 0
        other = {"APPTAINER_KEYSDIR": str(bench.place / f"other{len(armor)}")}
        Path(other["APPTAINER_KEYSDIR"]).mkdir(mode=0o700)
        os.chown(other["APPTAINER_KEYSDIR"], bench.uid, -1)
        done = bench.real("key", "import", "secret.key", env=other)
        assert done.returncode == 0, done.stderr
        again = bench.ours("key", "import", "secret.key", env=other)
        assert (again.returncode, "already belongs" in again.stderr) == (255, True)
        assert bench.real("key", "list", "-s", env=other).stdout.count("Fingerprint") == 1
        removed = bench.ours("key", "remove", "-b", fingerprints[int(number)], env=other)
        assert removed.returncode == 0
        assert "Fingerprint" not in bench.real("key", "list", env=other).stdout
        (bench.place / "secret.key").unlink()


class Server(http.server.BaseHTTPRequestHandler):
    """A key server, honest or not, by the path that it is asked under."""

    key, other, posted = b"", b"", []

    def do_GET(self):
        kind = self.path.split("/")[1]
        body = {"good": self.key, "other": self.other, "junk": b"\0" * 100}.get(kind, b"")
        if kind == "moved":
            self.send_response(302)
            self.send_header("Location", "file:///etc/passwd")
        elif kind == "round":
            self.send_response(302)
            self.send_header("Location", self.path)
        else:
            self.send_response(404 if kind == "none" else 200)
        self.end_headers()
        if "op=index" in self.path:
            body = b"info:1:1\npub:" + b"A" * 40 + b":1:2048:1700000000::\nuid:B%1b[1m <b@c>:::\n"
        try:
            self.wfile.write(b"x" * (1 << 21) if kind == "huge" else body)
        except OSError:
            pass

    def do_POST(self):
        self.posted.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture(scope="module")
def server(bench):
    for name in ("Open", "Locked"):
        bench.ours("key", "export", "-a", f"{name}.asc", stdin=f"{index(bench, name)}\n")
    Server.key, Server.other = ((bench.place / f"{n}.asc").read_bytes() for n in ("Open", "Locked"))
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()
    made.server_close()


def test_key_servers_are_not_trusted(bench, server):
    wanted = ring(bench)[int(index(bench, "Open"))]
    empty = {"APPTAINER_KEYSDIR": str(bench.place / "pulled")}
    for kind, said in (
        ("none", "404"), ("other", "another key"), ("junk", "no armored data"),
        ("huge", "more than"), ("moved", "no place of HTTP"), ("round", "without end"),
    ):  # fmt: skip
        done = bench.ours("key", "pull", "-u", f"{server}/{kind}", wanted, env=empty)
        assert (done.returncode, said in done.stderr) == (255, True), (kind, done.stderr)
        assert "Fingerprint" not in bench.ours("key", "list", env=empty).stdout
    image = signed(bench, "remote.sif", bench.ours)
    stranger = bench.ours("verify", "-u", f"{server}/other", image, env=empty)
    assert (stranger.returncode, "unknown entity" in stranger.stderr) == (255, True)
    known = bench.ours("verify", "-u", f"{server}/good", image, env=empty)
    assert (known.returncode, known.stdout.count("[REMOTE]")) == (0, 4)
    pulled = bench.ours("key", "pull", "-u", f"{server}/good", wanted, env=empty)
    assert pulled.stdout.startswith("1 key(s) added")
    assert bench.ours("verify", "-l", image, env=empty).returncode == 0
    pushed = bench.ours("key", "push", "-u", server, wanted, env=empty)
    assert (pushed.returncode, Server.posted[-1][:12]) == (0, b"keytext=----")
    found = bench.ours("key", "search", "-u", server, "b").stdout
    assert "2048  B\\x1b[1m <b@c>" in found


def test_the_machines_ring_is_roots(bench):
    done = bench.ours("key", "import", "-g", "Open.asc")
    assert (done.returncode, "requires root privileges" in done.stderr) == (255, True)


@with_real
def test_sif_commands_leave_what_the_real_ones_leave(bench):
    rows = (
        ("new", "@"), ("add", "--datatype", "1", "@", "tree"),
        ("add", "--datatype", "4", "--partfs", "1", "--parttype", "2", "--partarch", "2",
         "--groupid", "1", "@", "tree"),
        ("add", "--datatype", "4", "--partfs", "2", "--parttype", "1", "--partarch", "4",
         "--alignment", "512", "@", "tree"),
        ("add", "--datatype", "5", "--signhash", "2", "--signentity", "AB" * 20, "--link", "1",
         "@", "tree"),
        ("add", "--datatype", "9", "--sbomformat", "spdx-json", "--filename", "n", "@", "tree"),
        ("add", "--datatype", "2", "@", "tree"), ("add", "--datatype", "3", "@", "tree"),
        ("add", "--datatype", "6", "--filename", "j.json", "@", "tree"),
        ("add", "--datatype", "8", "@", "tree"), ("add", "--datatype", "11", "@", "tree"),
        ("add", "--datatype", "10", "@", "tree"), ("setprim", "3", "@"), ("setprim", "1", "@"),
        ("del", "1", "@"), ("del", "9", "@"), ("del", "0", "@"),
        ("add", "--datatype", "7", "@", "tree"), ("add", "@", "tree"),
        ("add", "--datatype", "4", "@", "tree"), ("add", "--datatype", "7", "@", "nothing"),
        ("add", "--datatype", "5", "@", "tree"), ("setprim", "3", "nothing.sif"),
    )  # fmt: skip
    for row in rows:
        answers = []
        for program, name in ((bench.ours, "o.sif"), (bench.real, "r.sif")):
            done = program("sif", *[name if word == "@" else word for word in row])
            said = done.stderr.replace(name, "@").splitlines()
            table = program("sif", "list", name).stdout
            answers.append((done.returncode, said[:1], table))
        assert answers[0] == answers[1], row
    for number in ("2", "8"):
        words = ("sif", "dump", number)
        dumps = (bench.ours(*words, "r.sif"), bench.real(*words, "o.sif"))
        assert {done.stdout for done in dumps} == {"x" * 5000}
    ours, real = ((bench.place / name).read_bytes() for name in ("o.sif", "r.sif"))
    assert len(ours) == len(real)
    assert ours[32176:] == real[32176:]
    assert ours[80:4096] == real[80:4096]


@pytest.fixture(scope="module")
def authority(bench):
    """Certificates with a responder that says what is written to a file; images signed by two."""
    folder = bench.place / "authority"
    folder.mkdir()
    program = Path(__file__).resolve().parent.parent / "ocsp_responder.py"
    words = ["/usr/bin/python3", "-I", "-B", str(program), str(folder)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline().strip().isdigit()
        for path in folder.iterdir():
            path.chmod(0o644)
        for name in ("leaf", "deaf"):
            image = bench.copy("plain.sif", f"{name}.sif")
            done = bench.ours("sign", "--key", folder / f"{name}.key", image)
            assert done.returncode == 0, done.stderr
        yield folder
        child.kill()


def asked(program, authority, answer: str, name: str = "leaf", *more: str):
    (authority / "answer").write_text(answer)
    certificates = ("--certificate", authority / f"{name}.pem")
    certificates += ("--certificate-intermediates", authority / "between.pem")
    certificates += ("--certificate-roots", authority / "root.pem")
    return program("verify", *certificates, "--ocsp-verify", *more, f"{name}.sif")


ANSWERS = {
    "good": "",
    "delegated": "",
    "revoked": "Leaf: certificate revoked at 20",
    "revoked between": "Between: certificate revoked at 20",
    "unknown": "Leaf: status unknown, the certificate cannot be trusted",
    "unknown between": "Between: status unknown",
    "refused": "refuses to answer: unauthorized",
    "forged": "Leaf: the answer is signed by somebody else",
    "stranger": "Leaf: the answer is signed by somebody else",
    "stale": "Leaf: the answer is out of date",
    "endless": "",
    "kept": "Leaf: the answer is out of date",
    "other": "Leaf: the answer is about another certificate",
    "silent": "answers with status 503",
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_revoked_certificate_proves_nothing(bench, authority, answer):
    done = asked(bench.ours, authority, answer)
    if not ANSWERS[answer]:
        assert done.returncode == 0, done.stderr
        assert "INFO:    Validate: cert:Leaf  issuer:Between\n" in done.stderr
        assert "INFO:    Validate: cert:Between  issuer:Root\n" in done.stderr
        assert "Verified signature(s)" in done.stderr
        return
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 255
    assert last.startswith("FATAL:   Failed to verify container: OCSP")
    assert ANSWERS[answer] in last
    assert "Objects verified" not in done.stdout


# "kept": the real one takes an answer without an end for ever.
@with_real
@pytest.mark.parametrize("answer", [one for one in ANSWERS if one not in ("delegated", "kept")])
def test_ocsp_is_judged_as_by_the_real_one(bench, authority, answer):
    real, ours = (asked(program, authority, answer) for program in (bench.real, bench.ours))
    assert (ours.returncode, ours.stdout) == (real.returncode, real.stdout)


def test_a_certificate_without_a_responder_is_not_good(bench, authority):
    done = asked(bench.ours, authority, "good", "deaf")
    assert done.returncode == 255
    assert done.stderr.endswith("Deaf: certificate does not support OCSP\n")
    (authority / "answer").write_text("revoked")
    certificates = ("--certificate", authority / "leaf.pem", "--certificate-roots")
    trusted = bench.ours("verify", *certificates, authority / "leaf.pem", "leaf.sif")
    assert trusted.returncode == 0, trusted.stderr


def test_the_same_input_gives_the_same_bytes(bench):
    """With SOURCE_DATE_EPOCH: an empty file, objects, and signatures that are not random."""
    env = {"SOURCE_DATE_EPOCH": "1900000000"}
    subprocess.run(
        ["openssl", "genpkey", "-algorithm", "ed25519", "-out", bench.place / "ed.pem"],
        check=True, capture_output=True,
    )  # fmt: skip
    (bench.place / "ed.pem").chmod(0o644)
    made = []
    for name in ("first.sif", "second.sif"):
        for words in (
            ("sif", "new", name),
            ("sif", "add", "--datatype", "7", "--groupid", "1", "--filename", "f", name, "tree"),
            ("sign", "-k", index(bench, "Open"), name),
            ("sign", "--key", "ed.pem", name),
        ):
            done = bench.ours(*words, env=env)
            assert done.returncode == 0, done.stderr
        made.append((bench.place / name).read_bytes())
    assert made[0] == made[1]
    assert "2030-03-17 17:46:40" in bench.ours("sif", "info", "2", "first.sif").stdout
    assert bench.ours("verify", "first.sif").returncode == 255  # one signature is not OpenPGP's
    done = bench.ours("sif", "new", "third.sif", env={"SOURCE_DATE_EPOCH": "soon"})
    assert done.returncode == 255
    assert "SOURCE_DATE_EPOCH is no number of seconds: 'soon'" in done.stderr


def test_a_signature_of_a_fixed_time_is_good(bench):
    """Not older than its key, whatever the time says."""
    image = bench.copy("plain.sif", "fixed.sif")
    words = ("sign", "-k", index(bench, "Open"), image)
    assert bench.ours(*words, env={"SOURCE_DATE_EPOCH": "1"}).returncode == 0
    done = bench.ours("verify", image)
    assert done.returncode == 0, done.stderr
