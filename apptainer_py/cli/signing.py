"""`sign`, `verify`, `key` and what changes SIF files: from a parsed command line to a verb."""

from __future__ import annotations

import os
import sys

from apptainer_py.base import build, log
from apptainer_py.cli import ask, environment

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from apptainer_py.api.signatures import Asking
    from apptainer_py.crypto.packets import Key
    from apptainer_py.model.request import Parsed
    from apptainer_py.registry.keyserver import Place
    from apptainer_py.verbs.key import Rings
    from apptainer_py.verbs.verify import Verdict

# No argument of a command can hold it.
_NOT_GIVEN = "\0"
_TABLE = "ID  |GROUP   |LINK    |TYPE\n" + "-" * 48 + "\n"


def _keys_folder(parsed: Parsed) -> str:
    from apptainer_py.api import signatures

    environ = environment.of_caller()
    return signatures.keys_folder(environ, str(parsed.options.get("keysdir") or ""))


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
    environ = environment.of_caller()
    return active.keyservers(environ, given=given, every=False)


def _server(parsed: Parsed) -> Place:
    return _servers(parsed)[0]


def _asking() -> Asking:
    from apptainer_py.api import signatures

    def choose(keys: Sequence[Key]) -> int:
        from apptainer_py.verbs import key, sign

        sys.stdout.write(key.choices(keys))
        try:
            return ask.number("Enter # of private key to use : ")
        except ValueError as error:
            raise sign.SignFailed(reason=f"{error}; --keyidx names a key") from None

    environ = environment.of_caller()
    return signatures.Asking(environ=environ, ask_hidden=ask.ask_hidden, choose=choose)


def _sign(parsed: Parsed) -> int:
    from apptainer_py.api import signatures

    path = parsed.arguments[0]
    signatures.sign(path, parsed.options, _asking())
    log.info(f"Signature created and applied to image '{path}'")
    return 0


def _verify(parsed: Parsed) -> int:
    from apptainer_py.api import signatures

    path = parsed.arguments[0]
    verdicts: list[Verdict] = []
    as_json = bool(parsed.options["json"])

    def show(verdict: Verdict) -> None:
        verdicts.append(verdict)
        if not as_json:
            _show_verdict(verdict)

    prove = signatures.prover(parsed.options, _asking())
    try:
        signatures.verify_by(path, parsed.options, prove, show)
    finally:
        if as_json:
            sys.stdout.write(_verdicts_json(verdicts))
            sys.stdout.flush()
    if not as_json:
        log.info(f"Verified signature(s) from image '{path}'")
    return 0


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


def _new_passphrase(doing: str = "key newpair command") -> str:
    from apptainer_py.verbs import key

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

    rings, path = _rings(parsed), parsed.arguments[0]
    if parsed.options["new-password"]:
        said = key.import_file(rings, path, _with_new_passphrase)
    else:
        said = key.import_file(rings, path)
    for line in said:
        sys.stdout.write(line)
    return 0


def _with_new_passphrase(found: Key) -> Key:
    from apptainer_py.crypto import gnupg

    old = ask.ask_hidden("Enter your old password : ")
    return gnupg.reprotected(found, old, _new_passphrase("key import command"))


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
    sif_change.sif_add(path, content, sif_change.ObjectOptions(**options), epoch=_epoch())
    return 0


def _sif_del(parsed: Parsed) -> int:
    from apptainer_py.verbs import sif_change

    number, path = parsed.arguments
    sif_change.sif_del(path, number, epoch=_epoch())
    return 0


def _epoch() -> int | None:
    from apptainer_py.base import epoch

    return epoch.of(environment.of_caller())


def _sif_new(parsed: Parsed) -> int:
    from apptainer_py.verbs import sif_change

    sif_change.sif_new(parsed.arguments[0], epoch=_epoch())
    return 0


def _sif_setprim(parsed: Parsed) -> int:
    from apptainer_py.verbs import sif_change

    number, path = parsed.arguments
    sif_change.sif_setprim(path, number, epoch=_epoch())
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
