"""`key list|newpair|import|export|remove|search|pull|push`, in the words of Apptainer 1.4.

The keyrings are the same files that the real one has; each program reads what the other one wrote.
"""

from __future__ import annotations

import os

from apptainer_py.base.errors import ApptainerError
from apptainer_py.base.record import Record
from apptainer_py.crypto import gnupg, keyring, packets

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from apptainer_py.crypto.packets import Key
    from apptainer_py.registry.keyserver import Place

_ALGORITHMS = {
    "1": "RSA", "2": "RSA", "3": "RSA", "16": "Elgamal", "17": "DSA", "18": "ECDH", "19": "ECDSA",
    "22": "EdDSA",
}  # fmt: skip
_FINGERPRINT_CHARS, _LONG_CHARS, _SHORT_CHARS = 40, 16, 8
_ROWS_MAX = 100
_DIGITS_MAX = 18


class KeyFailed(ApptainerError):
    """What a command could not do; the real one has a status of its own for each command."""

    message = "{doing} failed: {reason}"


class ExportFailed(KeyFailed):
    """Nothing to export."""


class RemoveFailed(ApptainerError):
    message = "Unable to remove {reason}"


class ListFailed(ApptainerError):
    message = "Could not list keys: {reason}"


class NotYours(ApptainerError):
    message = (
        '"apptainer key {command}" command with --global requires root privileges or an '
        "unprivileged installation"
    )


class Rings(Record):
    """Where the rings are: the user's two, or the machine's one."""

    public: str
    secret: str = ""
    mode: int = 0o600


def of_user(folder: str) -> Rings:
    """Return the rings in a directory."""
    return Rings(
        public=os.path.join(folder, keyring.PUBLIC), secret=os.path.join(folder, keyring.SECRET)
    )


def of_machine(sysconfdir: str) -> Rings:
    """Return the ring of the machine."""
    return Rings(public=os.path.join(sysconfdir, "global-pgp-public"), mode=0o644)


def listing(rings: Rings, *, secret: bool) -> str:
    """Return the keys of a ring as a text.

    Raises:
        ListFailed: it cannot be read.
    """
    path = rings.secret if secret else rings.public
    kind = "Private" if secret else "Public"
    try:
        keys = keyring.load(path)
    except ApptainerError as error:
        raise ListFailed(reason=error) from None
    return f"{kind} key listing ({path}):\n\n" + described(keys)


def described(keys: Sequence[Key]) -> str:
    """Return the numbered list of some keys."""
    return "".join(
        f"{number})  User:              {_shown_id(key)}\n"
        f"    Creation time:     {_time(key.created_s)}\n"
        f"    Fingerprint:       {key.fingerprint}\n"
        f"    Length (in bits):  {key.bits}\n\n"
        for number, key in enumerate(keys)
    )


def choices(keys: Sequence[Key]) -> str:
    """Return the list of private keys that `sign` lets its user choose from."""
    return "".join(
        f"{number}) U: {_shown_id(key)}\n   C: {_time(key.created_s)}\n   F: {key.fingerprint}\n"
        f"   L: {key.bits}\n   --------\n"
        for number, key in enumerate(keys)
    )


def newpair(rings: Rings, user_id: str, *, bits: int, passphrase: str) -> Key:
    """Make a key pair and add it to the rings.

    Raises:
        KeyFailed: it cannot be made or stored.
    """
    try:
        key = gnupg.generate(user_id, bits, passphrase)
        keyring.add(rings.secret, key)
        keyring.add(rings.public, packets.public_of(key))
    except ApptainerError as error:
        raise KeyFailed(doing="key newpair command", reason=error) from None
    return key


def user_id(name: str, comment: str, email: str) -> str:
    """Return the text that names a key's owner.

    Raises:
        KeyFailed: a part has characters that would end it.
    """
    for text in (name, comment, email):
        if any(c in "()<>" or not c.isprintable() for c in text):
            reason = "name, comment and e-mail must be printable and without ( ) < >"
            raise KeyFailed(doing="key newpair command", reason=reason)
    middle = f" ({comment})" if comment else ""
    return f"{name}{middle} <{email}>"


def import_file(
    rings: Rings, path: str, changed: Callable[[Key], Key] = lambda key: key
) -> list[str]:
    """Add the keys of a file to the rings, private ones as `changed` has them; return what to say.

    Raises:
        KeyFailed: it holds none, or a key is there already.
    """
    doing = "key import command"
    said = []
    try:
        found = _read_keys(path)
        for key in found:
            if key.is_secret and not rings.secret:
                raise KeyFailed(doing=doing, reason="the global keyring holds public keys only")
        for key in found:
            if key.is_secret:
                keyring.add(rings.secret, changed(key), mode=rings.mode)
                said.append(_added(key, "private"))
            keyring.add(rings.public, packets.public_of(key), mode=rings.mode)
            said.append(_added(key, "public"))
    except KeyFailed:
        raise
    except ApptainerError as error:
        raise KeyFailed(doing=doing, reason=error) from None
    return said


def to_export(rings: Rings, *, secret: bool) -> tuple[Key, ...]:
    """Return the keys that can be exported.

    Raises:
        ExportFailed: there is none.
    """
    try:
        keys = keyring.load(rings.secret if secret else rings.public)
    except ApptainerError as error:
        raise ExportFailed(doing="key export command", reason=error) from None
    if not keys:
        raise ExportFailed(doing="key export command", reason="keyring is empty")
    return keys


def export(key: Key, path: str, *, armor: bool) -> str:
    """Write a key to a file as it is stored, private ones with their passphrase on; say so.

    Raises:
        ExportFailed: the file cannot be written.
    """
    content = packets.armored(key) if armor else key.raw
    try:
        fd = os.open(
            path,
            os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOCTTY,
            0o600 if key.is_secret else 0o644,
        )
        with open(fd, "wb") as file:
            file.write(content)
    except OSError as error:
        reason = f"unable to create file: open {path}: {(error.strerror or '').lower()}"
        raise ExportFailed(doing="key export command", reason=reason) from None
    kind = "Private" if key.is_secret else "Public"
    return f"{kind} key with fingerprint {key.fingerprint} correctly exported to file: {path}\n"


def remove(rings: Rings, fingerprint: str, *, public: bool, secret: bool) -> None:
    """Remove a key; of both kinds, it is enough if one is there.

    Raises:
        RemoveFailed: there is none, or the ring cannot be changed.
    """
    wanted = [
        (kind, path)
        for kind, path, asked in (
            ("public", rings.public, public),
            ("private", rings.secret, secret),
        )
        if asked
    ]
    troubles = []
    for kind, path in wanted:
        try:
            keyring.remove(path, fingerprint, mode=rings.mode)
        except ApptainerError as error:
            troubles.append(f"{kind} key: {error}")
    if len(troubles) == len(wanted):
        raise RemoveFailed(reason=("neither " if troubles[1:] else "") + ", nor ".join(troubles))


def pull(rings: Rings, server: Place, fingerprint: str) -> str:
    """Fetch a key and add it to the public ring; return what to say.

    Raises:
        KeyFailed: the server has not this key, or the ring cannot be changed.
    """
    doing = "pull"
    if len(fingerprint) not in (_SHORT_CHARS, _LONG_CHARS, _FINGERPRINT_CHARS):
        reason = "not a valid key length: only accepts 8, 16 or 40 chars"
        raise KeyFailed(doing=doing, reason=f"unable to pull key from server: {reason}")
    try:
        found = fetch(server, fingerprint)
        count = 0
        for key in found:
            try:
                keyring.add(rings.public, key, mode=rings.mode)
                count += 1
            except keyring.AlreadyThere:
                pass
    except ApptainerError as error:
        raise KeyFailed(doing=doing, reason=f"unable to pull key from server: {error}") from None
    return f"{count} key(s) added to keyring of trust {rings.public}\n"


def fetch(server: Place, fingerprint: str) -> list[Key]:
    """Return the key that a server has for a fingerprint; whatever else it sends is left out.

    Raises:
        KeyserverError: it does not answer, or with something else.
        RingError: what it sends is no key.
    """
    from apptainer_py.registry import keyserver

    wanted = fingerprint.upper().removeprefix("0X")
    if not wanted or any(c not in "0123456789ABCDEF" for c in wanted):
        raise keyserver.KeyserverError(reason="not a fingerprint", status=0)
    try:
        answer = keyserver.get(server, wanted)
    except keyserver.KeyserverError as error:
        raise keyserver.KeyserverError(reason=f"failed to get key: {error}", status=0) from None
    public = [packets.public_of(key) for key in packets.read(packets.dearmored(answer))]
    found = [key for key in public if key.fingerprint.endswith(wanted)]
    if not found:
        raise keyserver.KeyserverError(reason="the server sent another key", status=0)
    return found


def push(rings: Rings, server: Place, fingerprint: str) -> str:
    """Send a public key to a server; return what to say.

    Raises:
        KeyFailed: there is no such key, or the server does not take it.
    """
    from apptainer_py.registry import keyserver

    if len(fingerprint) not in (_LONG_CHARS, _FINGERPRINT_CHARS):
        reason = "please provide a keyid(16 chars) or a full fingerprint(40 chars)"
        raise KeyFailed(doing="push", reason=reason)
    try:
        keys = [
            key
            for key in keyring.load(rings.public)
            if key.fingerprint.endswith(fingerprint.upper())
        ]
        if not keys:
            raise KeyFailed(doing="push", reason=keyring.NoSuchKey())
        keyserver.add(server, packets.armored(keys[0]))
    except keyserver.KeyserverError as error:
        reason = f"key server did not accept PGP key: {error}"
        raise KeyFailed(doing="push", reason=reason) from None
    except KeyFailed:
        raise
    except ApptainerError as error:
        raise KeyFailed(doing="push", reason=error) from None
    return f"public key `{fingerprint}' pushed to server successfully\n"


def search(server: Place, words: str, *, in_full: bool) -> str:
    """Return the keys that a server has for some words, as a table.

    Raises:
        KeyFailed: it does not answer.
    """
    from apptainer_py.registry import keyserver

    try:
        answer = keyserver.index(server, words)
    except keyserver.KeyserverError as error:
        if error.facts["status"] == 404:
            raise KeyFailed(doing="search", reason="no matching keys found for fingerprint") from (
                None
            )
        raise KeyFailed(doing="search", reason=f"failed to get key: {error}") from None
    rows = _found(answer.decode("utf-8", "replace"))[:_ROWS_MAX]
    return f"Showing {len(rows)} results\n\n" + (_long(rows) if in_full else _short(rows))


class _Found(Record):
    fingerprint: str
    algorithm: str
    bits: str
    created: str
    expires: str
    status: str
    names: list[str]


def _found(text: str) -> list[_Found]:
    """Return the keys of an index in the form that machines read (draft-shaw, 5.2)."""
    from urllib.parse import unquote

    rows: list[_Found] = []
    for line in text.splitlines():
        kind, *fields = [_clean(unquote(field)) for field in line.split(":")]
        if kind == "pub":
            fingerprint, algorithm, bits, created, expires, flags = [*fields, *[""] * 6][:6]
            status = "revoked" if "r" in flags else "expired" if "e" in flags else "enabled"
            rows.append(
                _Found(
                    fingerprint=fingerprint,
                    algorithm=_ALGORITHMS.get(algorithm, "unknown"),
                    bits=bits,
                    created=_told_time(created),
                    expires=_told_time(expires),
                    status=f"[{'disabled' if 'd' in flags else status}]",
                    names=[],
                )
            )
        elif kind == "uid" and rows and fields:
            rows[-1].names.append(fields[0])
    return rows


def _short(rows: Sequence[_Found]) -> str:
    lines = ["KEY ID    BITS  NAME/EMAIL"]
    for row in rows:
        names = row.names or [""]
        lines.append(f"{row.fingerprint[-8:]:<8}  {row.bits}  {names[0]}")
        lines += [f"               {name}" for name in names[1:]]
        lines.append("")
    return "\n".join(lines) + "\n"


def _long(rows: Sequence[_Found]) -> str:
    lines = []
    for row in rows:
        lines.append(
            f"Fingerprint:  {row.fingerprint}\nAlgorithm:    {row.algorithm}\n"
            f"Bits:         {row.bits}\nCreated:      {row.created}\nExpires:      {row.expires}\n"
            f"Status:       {row.status}"
        )
        lines += [f"Name:         {name}" for name in row.names]
        lines.append("")
    return "\n".join(lines) + "\n"


def _read_keys(path: str) -> tuple[Key, ...]:
    if not os.path.exists(path):
        reason = f"unable to get entity from: {path}: open {path}: no such file or directory"
        raise KeyFailed(doing="key import command", reason=reason)
    try:
        found = keyring.load(path)
    except ApptainerError as error:
        reason = f"unable to get entity from: {path}: {error}"
        raise KeyFailed(doing="key import command", reason=reason) from None
    if not found:
        reason = f"unable to get entity from: {path}: no key in it"
        raise KeyFailed(doing="key import command", reason=reason)
    return found


def _added(key: Key, kind: str) -> str:
    return f"Key with fingerprint {key.fingerprint} successfully added to the {kind} keyring\n"


def _shown_id(key: Key) -> str:
    rest, bracket, email = key.user_id.rpartition(" <")
    if not bracket:
        return _clean(key.user_id)
    name, _, comment = rest.partition(" (")
    return _clean(f"{name} ({comment.removesuffix(')')}) <{email}")


def _clean(text: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _told_time(text: str) -> str:
    """Return a time that a server tells in seconds; "" for what is no such number."""
    is_number = text.isascii() and text.isdigit() and len(text) <= _DIGITS_MAX
    return _time(int(text)) if is_number else ""


def _time(seconds: int) -> str:
    import time

    if not 0 <= seconds < 1 << 36:
        return "unknown"
    return time.strftime("%Y-%m-%d %H:%M:%S +0000 UTC", time.gmtime(seconds))
