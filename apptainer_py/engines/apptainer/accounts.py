"""The container's /etc/passwd and /etc/group: the image's own, with the caller in them."""

from __future__ import annotations

import os
import pwd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from apptainer_py.engines.apptainer.mounts import User

FILE_BYTES = 1 << 20
_asked: dict[int, pwd.struct_passwd | None] = {}


def entry_of(uid: int) -> pwd.struct_passwd | None:
    """Return what the host's name services say of a user; they are asked once."""
    if uid not in _asked:
        try:
            _asked[uid] = pwd.getpwuid(uid)
        except KeyError:
            _asked[uid] = None
    return _asked[uid]


def _field(text: str) -> bytes:
    """Return a field that can neither end its line nor begin another field."""
    return os.fsencode(text.replace("\n", " ").replace(":", " "))


def passwd(before: bytes, user: User) -> bytes:
    """Return the file with the user's line: a uid that is there keeps its group and shell."""
    entry = entry_of(user.uid)
    gecos, shell = (entry.pw_gecos, entry.pw_shell) if entry else ("", "/bin/sh")
    lines = before.split(b"\n")
    wanted = b"%d" % user.uid
    for number, line in enumerate(lines):
        fields = line.split(b":")
        if len(fields) != 7 or fields[2] != wanted:
            continue
        if user.uid != 0:
            fields[0], fields[4] = _field(user.name), _field(gecos)
        fields[5] = _field(user.home)
        lines[number] = b":".join(fields)
        return b"\n".join(lines)
    own = b":".join(
        (_field(user.name), b"x", wanted, b"%d" % user.gid, _field(gecos), _field(user.home),
         _field(shell or "/bin/sh"))
    )  # fmt: skip
    return before + (b"" if before.endswith(b"\n") or not before else b"\n") + own + b"\n"


def group(before: bytes, user: User) -> bytes:
    """Return the file with the caller's own and supplementary groups added."""
    import grp

    present = {line.split(b":")[2] for line in before.split(b"\n") if line.count(b":") >= 3}
    added = []
    for gid in dict.fromkeys((user.gid, *os.getgroups())):
        if b"%d" % gid in present:
            continue
        try:
            name = grp.getgrgid(gid).gr_name
        except KeyError:
            continue
        members = _field(user.name)
        added.append(b"%s:x:%d:%s\n" % (_field(name), gid, members))
    return before + (b"" if before.endswith(b"\n") or not before else b"\n") + b"".join(added)
