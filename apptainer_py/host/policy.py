"""What the administrator's rules depend on beside his file: the user, the kernel, the starter."""

from __future__ import annotations

import os

from apptainer_py.base import build
from apptainer_py.base.errors import UsageError
from apptainer_py.model.directives import Person


class NoSuchUser(UsageError):
    message = "there is no user {user}"


def starter_obstacles() -> tuple[str, ...]:
    """Return why the setuid starter cannot help anybody, whatever the file says."""
    if not build.SETUID:
        return ("this installation has no setuid starter",)
    starter = build.STARTER_SUID
    try:
        status = os.stat(starter, follow_symlinks=False)
        nosuid = os.statvfs(starter).f_flag & os.ST_NOSUID
    except OSError as error:
        return (f"{starter}: {error.strerror}",)
    found = []
    if status.st_uid != 0 or not status.st_mode & 0o4000:
        found.append(f"{starter}: must belong to root and have the setuid bit")
    if nosuid:
        found.append(f"{starter}: lies on a file system that is mounted nosuid")
    return tuple(found)


def user_namespaces_allowed(proc: str = "/proc") -> bool:
    """Return whether the kernel lets ordinary users make user namespaces."""
    for name in ("user/max_user_namespaces", "kernel/unprivileged_userns_clone"):
        try:
            with open(f"{proc}/sys/{name}", encoding="ascii") as source:
                if source.read().strip() == "0":
                    return False
        except OSError:
            continue
    return True


def person(user: str | None) -> Person:
    """Return a user by name or number, the calling one for None, with all groups.

    Raises:
        NoSuchUser: there is none.
    """
    import grp
    import pwd

    try:
        if user is None:
            entry = pwd.getpwuid(os.getuid())
        elif user.isascii() and user.isdecimal():
            entry = pwd.getpwuid(int(user))
        else:
            entry = pwd.getpwnam(user)
    except (KeyError, ValueError, OverflowError):
        raise NoSuchUser(user=os.getuid() if user is None else user) from None
    groups = []
    for number in os.getgrouplist(entry.pw_name, entry.pw_gid):
        try:
            groups.append((grp.getgrgid(number).gr_name, number))
        except KeyError:
            groups.append((str(number), number))
    return Person(name=entry.pw_name, uid=entry.pw_uid, groups=tuple(groups))
