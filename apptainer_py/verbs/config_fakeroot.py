"""`config fakeroot`: who may have ranges of subordinate ids, in /etc/subuid and /etc/subgid."""

from __future__ import annotations

import os

from apptainer_py.base.errors import ApptainerError, ConfigError
from apptainer_py.host import subid_edit, subid_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Change = Callable[[str, str, int, str, Sequence[int]], str]

_DOING = {"add": "adding", "remove": "removing", "enable": "enabling", "disable": "disabling"}
OPERATIONS = tuple(_DOING)


class NeedsRoot(ApptainerError):
    message = '"apptainer-py config fakeroot" command requires root privileges'


class NotChanged(ApptainerError):
    message = "while {doing} {user}: {reason}"


def config_fakeroot(
    operation: str, user: str, *, subuid: str = subid_file.SUBUID, subgid: str = subid_file.SUBGID
) -> None:
    """Add, remove, enable or disable a user's ranges in both files, or in neither.

    Raises:
        ApptainerError: the caller is not root, the user is unknown, or a file is not good for it.
    """
    if os.geteuid() != 0:
        raise NeedsRoot
    doing = _DOING[operation]
    import pwd

    try:
        number = pwd.getpwnam(user).pw_uid
    except (KeyError, ValueError):
        reason = f"could not retrieve user information for {user}: user: unknown user {user}"
        raise NotChanged(doing=doing, user=user, reason=reason) from None
    try:
        with subid_edit.Lock(subuid), subid_edit.Lock(subgid):
            changes = []
            for file, others in ((subuid, _users()), (subgid, _groups())):
                text, facts = subid_edit.read_text(file)
                changes.append((file, text, _CHANGES[operation](text, user, number, file, others),
                                facts))  # fmt: skip
            for file, before, after, facts in changes:
                if before != after:
                    subid_edit.replace(file, after, facts)
    except ConfigError as error:
        raise NotChanged(doing=doing, user=user, reason=error) from None


def _users() -> list[int]:
    import pwd

    return [one.pw_uid for one in pwd.getpwall()]


def _groups() -> list[int]:
    import grp

    return [one.gr_gid for one in grp.getgrall()]


def _remove(text: str, user: str, number: int, file: str, _: Sequence[int]) -> str:
    return subid_edit.remove(text, user, number, file)


def _enable(text: str, user: str, number: int, file: str, _: Sequence[int]) -> str:
    return subid_edit.enable(text, user, number, file)


def _disable(text: str, user: str, number: int, file: str, _: Sequence[int]) -> str:
    return subid_edit.disable(text, user, number, file)


_CHANGES: dict[str, Change] = {
    "add": subid_edit.add,
    "remove": _remove,
    "enable": _enable,
    "disable": _disable,
}
