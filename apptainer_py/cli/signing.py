"""`sign`, `verify`, `key` and what changes SIF files: from a parsed command line to a verb."""

from __future__ import annotations

import os
import sys

from apptainer_py.base import build, log
from apptainer_py.base.errors import ApptainerError, UsageError
from apptainer_py.cli import ask

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from apptainer_py.crypto.packets import Key
    from apptainer_py.model.request import Parsed
    from apptainer_py.registry.keyserver import Place
    from apptainer_py.verbs.key import Rings
    from apptainer_py.verbs.verify import Verdict

_NUMBER_MAX = 0xFFFFFFF
_VERIFYING = ("verify", "push", "pull")
# No argument of a command can hold it.
_NOT_GIVEN = "\0"
_TABLE = "ID  |GROUP   |LINK    |TYPE\n" + "-" * 48 + "\n"


def _keys_folder(parsed: Parsed) -> str:
    environ = os.environ  # noqa: TID251 as in main: read here, once
    given = str(parsed.options.get("keysdir") or "")
    for name in ("APPTAINER_KEYSDIR", "SINGULARITY_SYPGPDIR"):
        given = given or environ.get(name, "")
    if given:
        return os.path.abspath(given)
    base = environ.get("APPTAINER_CONFIGDIR", "")
    if not base:
        home = environ.get("HOME", "") or os.path.expanduser("~").removeprefix("~") or "/"
        base = os.path.join(home, ".apptainer")
    return os.path.join(base, "keys")


def _rings(parsed: Parsed) -> Rings:
    from apptainer_py.verbs import key

    if not parsed.options.get("global"):
        return key.of_user(_keys_folder(parsed))
    changes = ("key import", "key remove", "key pull")
    if parsed.command in changes and os.geteuid() != 0 and build.SETUID:
        raise key.NotYours(command=parsed.command.removeprefix("key "))
    return key.of_machine(build.SYSCONFDIR)


def _servers(parsed: Parsed) -> list[Place]:
    """Return the key servers that are asked, one after the other."""
    from apptainer_py.registry import active

    given = str(parsed.options.get("url") or "")
    environ = dict(os.environ)  # noqa: TID251 as in main: read here, once
    return active.keyservers(environ, given=given, every=parsed.command in _VERIFYING)


def _server(parsed: Parsed) -> Place:
    return _servers(parsed)[0]


def _number(parsed: Parsed, name: str) -> int:
    value = parsed.options[name]
    assert isinstance(value, int)
    if not 0 <= value <= _NUMBER_MAX:
        raise UsageError(text=f"--{name}: {value} is not between 0 and {_NUMBER_MAX}")
    return value


def _sign(parsed: Parsed) -> int:
    from apptainer_py.verbs import key, sign

    options, path = parsed.options, parsed.arguments[0]
    group, ident = _number(parsed, "group-id"), _number(parsed, "sif-id")

    def choose(keys: Sequence[Key]) -> int:
        sys.stdout.write(key.choices(keys))
        try:
            return ask.number("Enter # of private key to use : ")
        except ValueError as error:
            raise sign.SignFailed(reason=str(error)) from None

    if options["key"]:
        file = str(options["key"])
        log.info(f"Signing image with key material from '{file}'")
        signer = sign.with_key(file, ask_hidden=ask.ask_hidden)
    else:
        log.info("Signing image with PGP key material")
        secret = key.of_user(_keys_folder(parsed)).secret
        index = options["keyidx"]
        assert isinstance(index, int)
        signer = sign.with_pgp(secret, index, choose=choose, ask_hidden=ask.ask_hidden)
    sign.sign(path, signer, group=group, ident=ident)
    log.info(f"Signature created and applied to image '{path}'")
    return 0


def _verify(parsed: Parsed) -> int:
    from apptainer_py.verbs import verify

    options, path = parsed.options, parsed.arguments[0]
    wanted = verify.Wanted(
        group=_number(parsed, "group-id"),
        ident=_number(parsed, "sif-id"),
        legacy=bool(options["legacy-insecure"]),
        everything=bool(options["all"]),
    )
    verdicts: list[Verdict] = []
    as_json = bool(options["json"])
    prove = _prover(parsed)
    try:
        show = verdicts.append if as_json else _show_verdict
        verify.verify(path, wanted, prove, show)
    finally:
        if as_json:
            sys.stdout.write(_verdicts_json(verdicts))
            sys.stdout.flush()
    if not as_json:
        log.info(f"Verified signature(s) from image '{path}'")
    return 0


def check_signed(parsed: Parsed, path: str) -> None:
    """Verify the OpenPGP signatures of an image that goes to a library, or comes from one.

    Raises:
        ApptainerError: it has none, or not good ones.
    """
    from apptainer_py.verbs import verify

    wanted = verify.Wanted(group=0, ident=0, legacy=False, everything=False)
    verify.verify(path, wanted, _pgp_prover(parsed), lambda verdict: None)


def _prover(parsed: Parsed) -> Callable[..., Any]:
    from apptainer_py.verbs import verify

    options = parsed.options
    if options["certificate"]:
        return verify.by_key(_certified_key(parsed))
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
    return _pgp_prover(parsed)


def _pgp_prover(parsed: Parsed) -> Callable[..., Any]:
    from apptainer_py.crypto import keyring
    from apptainer_py.verbs import key, verify

    def fetch(fingerprint: str) -> bytes:
        try:
            places = _servers(parsed)
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
            (keyring.load_bytes(key.of_user(_keys_folder(parsed)).public), True),
            (keyring.load_bytes(key.of_machine(build.SYSCONFDIR).public), True),
        ]
    except ApptainerError as error:
        raise verify.VerifyFailed(reason=error) from None
    return verify.by_keyrings(rings, None if parsed.options.get("local") else fetch)


def _certified_key(parsed: Parsed) -> Any:
    from apptainer_py.crypto import dsse
    from apptainer_py.verbs import verify

    options = parsed.options
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
    except (dsse.Untrusted, dsse.KeyWrong) as error:
        raise verify.VerifyFailed(reason=error) from None
    return key


def _show_verdict(verdict: Verdict) -> None:
    from apptainer_py.verbs import sif

    out = sys.stdout.write
    if verdict.is_pgp:
        tag = f"{'[LOCAL]' if verdict.is_local else '[REMOTE]':<18}"
        out(f"{tag} Signing entity: {_plain(verdict.name)}\n")
        out(f"{tag} Fingerprint: {verdict.fingerprint}\n")
    if verdict.verified:
        out("Objects verified:\n" + _TABLE)
        for entry in verdict.verified:
            group = str(entry.group) if entry.group else "NONE"
            link = "NONE"
            if entry.link:
                link = f"{entry.link} (G)" if entry.link_is_group else str(entry.link)
            out(f"{entry.id:<4}|{group:<8}|{link:<8}|{sif.type_name(entry)}\n")
    if verdict.error:
        out(f"\nError encountered during signature verification: {_plain(verdict.error)}\n")
    sys.stdout.flush()


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _verdicts_json(verdicts: Sequence[Verdict]) -> str:
    from apptainer_py.model import json_out
    from apptainer_py.verbs import sif

    rows = []
    for verdict in verdicts:
        entries = [(entry, True) for entry in verdict.verified]
        if verdict.failed is not None:
            entries.append((verdict.failed, False))
        rows += [
            {
                "Signer": {
                    "Partition": sif.type_name(entry),
                    "Name": verdict.name if verdict.is_pgp else "unknown",
                    "Fingerprint": verdict.fingerprint.lower(),
                    "KeyLocal": verdict.is_local,
                    "KeyCheck": verdict.is_pgp,
                    "DataCheck": is_whole,
                }
            }
            for entry, is_whole in entries
        ]
    return json_out.dumps({"Signatures": len(verdicts), "SignerKeys": rows or None}, "  ") + "\n"


def _key_list(parsed: Parsed) -> int:
    from apptainer_py.verbs import key

    sys.stdout.write(key.listing(_rings(parsed), secret=bool(parsed.options["secret"])))
    return 0


def _key_newpair(parsed: Parsed) -> int:
    from apptainer_py.verbs import key

    options = parsed.options
    name = str(options["name"]) or ask.ask("Enter your name (e.g., John Doe) : ")
    email = str(options["email"]) or ask.ask(
        "Enter your email address (e.g., john.doe@example.com) : "
    )
    comment = str(options["comment"])
    if comment == _NOT_GIVEN:
        comment = ask.ask("Enter optional comment (e.g., development keys) : ")
    owner = key.user_id(name, comment, email)
    passphrase = _new_passphrase() if parsed.options["password"] == _NOT_GIVEN else ""
    passphrase = passphrase or str(options["password"]).removeprefix(_NOT_GIVEN)
    bits = options["bit-length"]
    assert isinstance(bits, int)
    sys.stdout.write("Generating Entity and OpenPGP Key Pair... ")
    sys.stdout.flush()
    made = key.newpair(key.of_user(_keys_folder(parsed)), owner, bits=bits, passphrase=passphrase)
    sys.stdout.write("done\n")
    if options["push"]:
        rings = key.of_user(_keys_folder(parsed))
        sys.stdout.write(key.push(rings, _server(parsed), made.fingerprint))
    return 0


def _new_passphrase() -> str:
    from apptainer_py.verbs import key

    doing = "key newpair command"
    for _ in range(3):
        first = ask.ask_hidden("Enter a passphrase : ")
        if first == ask.ask_hidden("Retype your passphrase : "):
            break
        sys.stdout.write("Passphrases do not match\n")
    else:
        raise key.KeyFailed(doing=doing, reason="passphrases do not match")
    if not first:
        question = (
            "WARNING: if there is no password set, your key is not secure. "
            "Do you want to continue? [y/n] "
        )
        if ask.ask(question).strip().lower() not in ("y", "yes"):
            raise key.KeyFailed(doing=doing, reason="empty passphrase")
    return first


def _key_import(parsed: Parsed) -> int:
    from apptainer_py.verbs import key

    for line in key.import_file(_rings(parsed), parsed.arguments[0]):
        sys.stdout.write(line)
    return 0


def _key_export(parsed: Parsed) -> int:
    from apptainer_py.verbs import key

    secret = bool(parsed.options["secret"])
    keys = key.to_export(_rings(parsed), secret=secret)
    chosen = 0
    if len(keys) > 1:
        sys.stdout.write(key.described(keys))
        kind = "private" if secret else "public"
        try:
            chosen = ask.number(f"Enter # of {kind} key to use : ")
        except ValueError as error:
            raise key.ExportFailed(doing="key export command", reason=error) from None
        if not 0 <= chosen < len(keys):
            raise key.ExportFailed(doing="key export command", reason="index out of range")
    armor = bool(parsed.options["armor"])
    sys.stdout.write(key.export(keys[chosen], parsed.arguments[0], armor=armor))
    return 0


def _key_remove(parsed: Parsed) -> int:
    from apptainer_py.verbs import key

    options = parsed.options
    both = bool(options["both"]) or bool(options["public"] and options["secret"])
    rings = _rings(parsed)
    secret = (both or bool(options["secret"])) and bool(rings.secret)
    key.remove(rings, parsed.arguments[0], public=both or not options["secret"], secret=secret)
    return 0


def _key_pull(parsed: Parsed) -> int:
    from apptainer_py.verbs import key

    sys.stdout.write(key.pull(_rings(parsed), _server(parsed), parsed.arguments[0]))
    return 0


def _key_push(parsed: Parsed) -> int:
    from apptainer_py.verbs import key

    sys.stdout.write(key.push(_rings(parsed), _server(parsed), parsed.arguments[0]))
    return 0


def _key_search(parsed: Parsed) -> int:
    from apptainer_py.verbs import key

    in_full = bool(parsed.options["long-list"])
    sys.stdout.write(key.search(_server(parsed), parsed.arguments[0], in_full=in_full))
    return 0


def _sif_add(parsed: Parsed) -> int:
    from apptainer_py.verbs import sif_change

    path, content = parsed.arguments
    options: dict[str, Any] = dict(parsed.options)
    sif_change.sif_add(path, content, sif_change.ObjectOptions(**options))
    return 0


def _sif_del(parsed: Parsed) -> int:
    from apptainer_py.verbs import sif_change

    number, path = parsed.arguments
    sif_change.sif_del(path, number)
    return 0


def _sif_new(parsed: Parsed) -> int:
    from apptainer_py.verbs import sif_change

    sif_change.sif_new(parsed.arguments[0])
    return 0


def _sif_setprim(parsed: Parsed) -> int:
    from apptainer_py.verbs import sif_change

    number, path = parsed.arguments
    sif_change.sif_setprim(path, number)
    return 0


COMMANDS: dict[str, Callable[[Parsed], int]] = {
    "key export": _key_export,
    "key import": _key_import,
    "key list": _key_list,
    "key newpair": _key_newpair,
    "key pull": _key_pull,
    "key push": _key_push,
    "key remove": _key_remove,
    "key search": _key_search,
    "sif add": _sif_add,
    "sif del": _sif_del,
    "sif new": _sif_new,
    "sif setprim": _sif_setprim,
    "sign": _sign,
    "verify": _verify,
}
