"""`User` of an image, looked up in the image's own passwd and group files."""

from __future__ import annotations

from apptainer_py.base.errors import ImageError
from apptainer_py.base.record import Record

_NO_ID = 0xFFFFFFFF


class User(Record):
    """Numbers of the container."""

    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()


class UserUnknown(ImageError):
    """The image's user is not in the image."""

    message = "{image}: its {what} `{name}` is not in the image's {file}"


def _number(text: bytes) -> int | None:
    return int(text) if text.isdigit() and len(text) < 11 and int(text) < _NO_ID else None


def _rows(data: bytes, fields: int) -> list[list[bytes]]:
    rows = [line.split(b":") for line in data.split(b"\n")]
    return [row for row in rows if len(row) >= fields]


def find_user(wanted: str, passwd: bytes, group: bytes, *, image: str) -> User:
    """Return who `wanted` is: "", or a user and maybe a group, each by name or number.

    As Docker does it: a name in the file comes before a number; a number need not be there; without
    a group of its own the user has that of the passwd file, and those that list it.

    Raises:
        UserUnknown: a name that is not there.
    """
    user, _, own_group = wanted.partition(":")
    uid, gid, name = _find_account(user, passwd, image)
    groups: tuple[int, ...] = ()
    if own_group:
        gid = _find_group(own_group, group, image)
    elif name:
        rows = _rows(group, 4)
        listed = [_number(row[2]) for row in rows if name in row[3].split(b",")]
        groups = tuple(number for number in listed if number is not None)
    return User(uid=uid, gid=gid, groups=groups)


def _find_account(user: str, passwd: bytes, image: str) -> tuple[int, int, bytes]:
    wanted = user.encode("utf-8", "surrogateescape") or b"0"
    number = _number(wanted)
    rows = _rows(passwd, 4)
    for row in rows:
        if row[0] == wanted or (number is not None and _number(row[2]) == number):
            uid, gid = _number(row[2]), _number(row[3])
            if uid is not None and gid is not None:
                return uid, gid, row[0]
    if number is None:
        raise UserUnknown(image=image, what="user", name=user, file="/etc/passwd")
    return number, 0, b""


def _find_group(wanted: str, group: bytes, image: str) -> int:
    name = wanted.encode("utf-8", "surrogateescape")
    number = _number(name)
    for row in _rows(group, 3):
        if row[0] == name and _number(row[2]) is not None:
            return int(row[2])
    if number is None:
        raise UserUnknown(image=image, what="group", name=wanted, file="/etc/group")
    return number
