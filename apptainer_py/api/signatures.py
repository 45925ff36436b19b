"""Signing and verifying, by the options of `sign` and `verify`; nothing is printed here."""

from __future__ import annotations

import os

from apptainer_py.base import build, epoch, log
from apptainer_py.base.errors import ApptainerError, UsageError
from apptainer_py.base.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from apptainer_py.crypto.packets import Key
    from apptainer_py.verbs.verify import Verdict

    Prover = Callable[[bytes], tuple[Verdict, bytes]]

_NUMBER_MAX = 0xFFFFFFF


class Asking(Record):
    """Who asks: an environment, the passphrase of a key, and what else can be asked of them."""

    environ: Mapping[str, str]
    passphrase: str = ""
    ask_hidden: Callable[[str], str] | None = None
    choose: Callable[[Sequence[Key]], int] | None = None

    def hidden(self, prompt: str) -> str:
        """Return a passphrase."""
        return self.passphrase if self.ask_hidden is None else self.ask_hidden(prompt)

    def chosen(self, keys: Sequence[Key]) -> int:
        """Return which of several keys is meant.

        Raises:
            UsageError: nobody can be asked.
        """
        if self.choose is None:
            raise UsageError(text=f"there are {len(keys)} private keys: say which by keyidx")
        return self.choose(keys)

    def __repr__(self) -> str:
        return "Asking()"


def keys_folder(environ: Mapping[str, str], given: str = "") -> str:
    """Return the directory of a user's keyrings."""
    for name in ("APPTAINER_KEYSDIR", "SINGULARITY_SYPGPDIR"):
        given = given or environ.get(name, "")
    if given:
        return os.path.abspath(given)
    base = environ.get("APPTAINER_CONFIGDIR", "")
    if not base:
        home = environ.get("HOME", "") or os.path.expanduser("~").removeprefix("~") or "/"
        base = os.path.join(home, ".apptainer")
    return os.path.join(base, "keys")


def sign(path: str, options: Mapping[str, Any], asking: Asking) -> None:
    """Sign an image; options are by their long names.

    Raises:
        ApptainerError: there is no such key or object, or the file cannot be written.
    """
    from apptainer_py.verbs import key, sign

    group, ident = _number(options, "group-id"), _number(options, "sif-id")
    now_s = epoch.of(asking.environ)
    if options["key"]:
        file = str(options["key"])
        log.info(f"Signing image with key material from '{file}'")
        signer = sign.with_key(file, ask_hidden=asking.hidden)
    else:
        log.info("Signing image with PGP key material")
        secret = key.of_user(keys_folder(asking.environ)).secret
        index = options["keyidx"]
        signer = sign.with_pgp(
            secret, index, choose=asking.chosen, ask_hidden=asking.hidden, epoch=now_s
        )
    sign.sign(path, signer, group=group, ident=ident, epoch=now_s)


def verify(
    path: str, options: Mapping[str, Any], asking: Asking, show: Callable[[Verdict], None]
) -> None:
    """Verify an image; `show` is told of each signature.

    Raises:
        ApptainerError: something is not signed, or not as it was, or by somebody unknown.
    """
    verify_by(path, options, prover(options, asking), show)


def verify_by(
    path: str, options: Mapping[str, Any], prove: Prover, show: Callable[[Verdict], None]
) -> None:
    """Do so with what `prover` has returned.

    Raises:
        ApptainerError: as `verify`.
    """
    from apptainer_py.verbs import verify

    wanted = verify.Wanted(
        group=_number(options, "group-id"),
        ident=_number(options, "sif-id"),
        legacy=bool(options["legacy-insecure"]),
        everything=bool(options["all"]),
    )
    verify.verify(path, wanted, prove, show)


def check_signed(path: str, environ: Mapping[str, str]) -> None:
    """Verify the OpenPGP signatures of an image that goes to a library, or comes from one.

    Raises:
        ApptainerError: it has none, or not good ones.
    """
    from apptainer_py.verbs import verify

    wanted = verify.Wanted(group=0, ident=0, legacy=False, everything=False)
    prove = _pgp_prover({}, Asking(environ=environ))
    verify.verify(path, wanted, prove, lambda verdict: None)


def prover(options: Mapping[str, Any], asking: Asking) -> Prover:
    """Return what proves signatures, by the key, certificate or keyrings that options name.

    Raises:
        ApptainerError: what they name cannot be had, or is not to be trusted.
    """
    from apptainer_py.verbs import verify

    if options["certificate"]:
        return verify.by_key(_certified_key(options))
    if options["key"]:
        from apptainer_py.crypto import dsse
        from apptainer_py.verbs import sign

        file = str(options["key"])
        log.info(f"Verifying image with key material from '{file}'")
        try:
            return verify.by_key(dsse.public_key(file))
        except dsse.KeyWrong as error:
            raise sign.NoKeyMaterial(reason=error) from None
    log.info("Verifying image with PGP key material")
    return _pgp_prover(options, asking)


def _pgp_prover(options: Mapping[str, Any], asking: Asking) -> Prover:
    from apptainer_py.crypto import keyring
    from apptainer_py.verbs import key, verify

    def fetch(fingerprint: str) -> bytes:
        from apptainer_py.registry import active

        given = str(options.get("url") or "")
        try:
            places = active.keyservers(asking.environ, given=given, every=True)
        except ApptainerError as error:
            log.warning(str(error))
            return b""
        for place in places:
            try:
                return b"".join(found.raw for found in key.fetch(place, fingerprint))
            except ApptainerError as error:
                log.warning(str(error))
        return b""

    try:
        rings = [
            (keyring.load_bytes(key.of_user(keys_folder(asking.environ)).public), True),
            (keyring.load_bytes(key.of_machine(build.SYSCONFDIR).public), True),
        ]
    except ApptainerError as error:
        raise verify.VerifyFailed(reason=error) from None
    return verify.by_keyrings(rings, None if options.get("local") else fetch)


def _certified_key(options: Mapping[str, Any]) -> Any:
    from apptainer_py.crypto import dsse
    from apptainer_py.verbs import verify

    file = str(options["certificate"])
    log.info(f"Verifying image with key material from certificate '{file}'")
    what = "certificate"
    try:
        leaf = dsse.certificates(file)[0]
        what = "intermediate certificates"
        between = str(options["certificate-intermediates"])
        intermediates = dsse.certificates(between) if between else []
        what = "root certificates"
        file = str(options["certificate-roots"])
        roots = dsse.certificates(file) if file else None
    except dsse.KeyWrong as error:
        raise verify.CertificateWrong(what=what, reason=error) from None
    try:
        key = dsse.check_chain(leaf, intermediates, roots)
        if options["ocsp-verify"]:
            verify.check_revocation(leaf, intermediates, roots)
    except (dsse.Untrusted, dsse.KeyWrong) as error:
        raise verify.VerifyFailed(reason=error) from None
    return key


def _number(options: Mapping[str, Any], name: str) -> int:
    value = options[name]
    assert isinstance(value, int)
    if not 0 <= value <= _NUMBER_MAX:
        raise UsageError(text=f"--{name}: {value} is not between 0 and {_NUMBER_MAX}")
    return value
