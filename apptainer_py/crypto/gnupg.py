"""OpenPGP private keys at work: Debian's gpg with a home of its own, which is gone afterwards.

The home lies in memory (a tmpfs), holds the one key in the form in which it was stored, and its
agent ends with the gpg that started it. Passphrases go through pipes, keys through standard input:
neither is ever an argument, a variable or a file's name.
"""

from __future__ import annotations

import os

from apptainer_py.base import held
from apptainer_py.base.errors import ApptainerError
from apptainer_py.crypto import packets

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import IO

    from apptainer_py.crypto.packets import Key

GPG, AGENT = "/usr/bin/gpg", "/usr/bin/gpg-agent"
_MEMORY = "/dev/shm"
_PREFIX = "apptainer-py-gpg-"
_SECONDS = 120
_AGENT_SETTINGS = "disable-scdaemon\nmax-cache-ttl 0\ndefault-cache-ttl 0\ns2k-count 65011712\n"
_OPTIONS = (
    "--batch", "--no-tty", "--no-options", "--no-autostart", "--pinentry-mode", "loopback",
    "--trust-model", "always", "--no-auto-key-locate", "--no-auto-check-trustdb",
    "--no-random-seed-file",
)  # fmt: skip
_BITS = range(1024, 4097)
_PARTS_MOST = 16


class GpgError(ApptainerError):
    message = "openpgp: {text}"


class WrongPassphrase(GpgError):
    """The passphrase does not open the key."""

    message = "openpgp: invalid data: private key checksum failure"


def sign(text: bytes, key: Key, passphrase: str = "", epoch: int | None = None) -> bytes:
    """Return a text with a clear signature around it, made at `epoch` if that is given.

    No signature is older than its key: that would be none.

    Raises:
        WrongPassphrase: the key is not opened by it.
        GpgError: gpg is not installed, or refuses the key.
    """
    with _Home() as home:
        home.run(["--import"], given=key.raw)
        argv = ["--digest-algo", "SHA256", "--local-user", f"{key.fingerprint}!"]
        if epoch is not None:
            argv += ["--faked-system-time", f"{max(epoch, key.created_s)}!"]
        signed = home.run([*argv, "--output", "-", "--clearsign"], passphrase, given=text)
    # The real one ends without a line break, and so does what is in the file.
    return signed.rstrip(b"\n")


def generate(user_id: str, bits: int, passphrase: str) -> Key:
    """Return a new RSA key with an encryption subkey, both without an end.

    Raises:
        GpgError: gpg is not installed, or cannot make such a key.
    """
    if bits not in _BITS:
        raise GpgError(text=f"a key has {_BITS[0]} to {_BITS[-1]} bits, not {bits}")
    parameters = (
        f"Key-Type: RSA\nKey-Length: {bits}\nKey-Usage: cert,sign\n"
        f"Subkey-Type: RSA\nSubkey-Length: {bits}\nSubkey-Usage: encrypt\nExpire-Date: 0\n"
        + ("" if passphrase else "%no-protection\n")
        + "".join(_named(user_id))
        + "%commit\n"
    )
    with _Home() as home:
        home.run(["--full-generate-key"], passphrase, given=parameters.encode())
        found = packets.read(home.run(["--export-secret-keys"], passphrase))
    if len(found) != 1 or not found[0].is_secret:
        raise GpgError(text="gpg has made no key")
    return found[0]


def reprotected(key: Key, old: str, new: str) -> Key:
    """Return a private key under another passphrase.

    Raises:
        WrongPassphrase: the old one does not open it.
        GpgError: gpg is not installed, or refuses the key.
    """
    with _Home() as home:
        home.run(["--import"], given=key.raw)
        home.change_passphrase(key.fingerprint, old, new)
        found = packets.read(home.run(["--export-secret-keys"], new))
    if len(found) != 1 or not found[0].is_secret or found[0].fingerprint != key.fingerprint:
        raise GpgError(text="gpg has lost the key")
    return found[0]


def _named(user_id: str) -> list[str]:
    """Return the parameters for a name, `Name (comment) <address>`."""
    if not user_id.isprintable():
        raise GpgError(text="a name, comment or address must be one line of printable characters")
    rest, _, address = user_id.rpartition(" <")
    name, opening, comment = rest.partition(" (")
    fields = {
        "Name-Real": name,
        "Name-Comment": comment.removesuffix(")") if opening else "",
        "Name-Email": address.removesuffix(">"),
    }
    return [f"{field}: {value}\n" for field, value in fields.items() if value]


class _Home:
    """A home of gpg's; an agent of it lives as long as one call."""

    def __enter__(self) -> _Home:
        import shutil
        import tempfile

        if not os.access(GPG, os.X_OK) or not os.access(AGENT, os.X_OK):
            raise GpgError(text="gpg is not installed: install the packages gpg and gpg-agent")
        place = _MEMORY if os.access(_MEMORY, os.W_OK) else None
        # Keys lie in it: what a killed command has left is not to stay.
        for path in held.abandoned(place or tempfile.gettempdir(), _PREFIX):
            shutil.rmtree(path, ignore_errors=True)
        self.path = tempfile.mkdtemp(prefix=_PREFIX, dir=place)
        self._lock = held.hold(self.path)
        with open(f"{self.path}/gpg-agent.conf", "w", encoding="ascii") as file:
            file.write(_AGENT_SETTINGS)
        self._start_agent()
        return self

    def __exit__(self, *_: object) -> None:
        import shutil

        # The agent ends when its socket is gone, or the program that it was started with.
        shutil.rmtree(self.path, ignore_errors=True)
        for stream in (self._holder.stdin, self._holder.stdout):
            if stream is not None:
                stream.close()
        self._holder.wait()
        os.close(self._lock)

    def _start_agent(self) -> None:
        import subprocess

        # What holds the agent ends with us, however we end: its standard input closes.
        self._holder = subprocess.Popen(
            [AGENT, "--homedir", self.path, "--daemon", "--", "/bin/cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=self._environment(),
            cwd="/",
        )
        os.write(self._pipe(self._holder.stdin), b"\n")
        os.read(self._pipe(self._holder.stdout), 1)

    def _pipe(self, stream: IO[bytes] | None) -> int:
        assert stream is not None
        return stream.fileno()

    def _environment(self) -> dict[str, str]:
        return {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "HOME": self.path}

    def run(self, argv: Sequence[str], passphrase: str = "", *, given: bytes = b"") -> bytes:
        """Return what gpg prints.

        Raises:
            WrongPassphrase: it could not open a key.
            GpgError: it has failed otherwise.
        """
        return self._run("--passphrase-fd", argv, [passphrase], given)

    def change_passphrase(self, fingerprint: str, old: str, new: str) -> None:
        """Put a key, and what belongs to it, under another passphrase.

        Raises:
            WrongPassphrase: the old one does not open it.
            GpgError: it has failed otherwise.
        """
        # It asks for the old one if there is one, then for the new one, once for each part.
        answers = [*([old] if old else []), *[new] * _PARTS_MOST]
        argv = ["--no-batch", "--change-passphrase", fingerprint]
        self._run("--command-fd", argv, answers, b"")

    def _run(self, way: str, argv: Sequence[str], answers: Sequence[str], given: bytes) -> bytes:
        import subprocess

        told = "".join(f"{answer}\n" for answer in answers)
        reading, writing = os.pipe()
        # Files, not pipes: the agent outlives gpg by a moment, and nobody is to wait for it.
        output, errors = (os.memfd_create(name, os.MFD_CLOEXEC) for name in ("output", "errors"))
        try:
            os.write(writing, told.encode("utf-8", "surrogateescape"))
            os.close(writing)
            ended = subprocess.run(
                [GPG, "--homedir", self.path, *_OPTIONS, way, str(reading), *argv],
                input=given,
                stdout=output,
                stderr=errors,
                env=self._environment(),
                pass_fds=(reading,),
                cwd="/",
                timeout=_SECONDS,
                check=False,
            ).returncode
            text, said = (os.pread(fd, os.fstat(fd).st_size, 0) for fd in (output, errors))
        except (OSError, subprocess.SubprocessError) as error:
            raise GpgError(text=f"gpg cannot be run: {type(error).__name__}") from None
        finally:
            for fd in (reading, output, errors):
                os.close(fd)
        lines = said.decode("utf-8", "replace").strip().splitlines()
        # Of a key whose parts have different passphrases it gives some, and says nothing else.
        if any("Bad passphrase" in line or "No passphrase" in line for line in lines):
            raise WrongPassphrase
        if ended == 0:
            return text
        raise GpgError(text=lines[-1] if lines else "gpg has failed")
