"""`instance list`: which instances run, as a table or as JSON."""

from __future__ import annotations

from apptainer_py.base.errors import ApptainerError
from apptainer_py.base.glob import name_test
from apptainer_py.runtime import instances

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_GAP = 4


class TwoForms(ApptainerError):
    message = "more than one flags have been set"


class ListForRoot(ApptainerError):
    message = "Only root user can list user's instances"


def matching(
    pattern: str, environ: Mapping[str, str], *, user: str, uid: int, with_shared: bool
) -> list[instances.Instance]:
    """Return the instances whose names match, of the caller or of another user.

    Raises:
        ListForRoot: somebody else's instances are asked for.
        NoAccount: there is no such user.
        BadPattern: it is no pattern.
    """
    if user and uid != 0:
        raise ListForRoot
    fits = name_test(pattern or "*")
    return [
        instance
        for instance in instances.every(instances.owner_asked(user, uid, environ))
        if fits(instance.name) and (with_shared or not instance.sharens)
    ]


def check_form(*, as_json: bool, with_logs: bool) -> None:
    """Look whether a list can be shown as it is asked for.

    Raises:
        TwoForms: JSON and logs are asked for together.
    """
    if as_json and with_logs:
        raise TwoForms


def shown(found: list[instances.Instance], *, as_json: bool, with_logs: bool) -> str:
    """Return a list of instances as a table or as JSON."""
    if as_json:
        return _json(found)
    if with_logs:
        return _table([("INSTANCE NAME", "PID", "LOGS"), *_log_rows(found)])
    rows = [(one.name, str(one.pid), one.ip, one.image) for one in found]
    return _table([("INSTANCE NAME", "PID", "IP", "IMAGE"), *rows])


def _log_rows(found: list[instances.Instance]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for one in found:
        rows += [(one.name, str(one.pid), one.log_err), ("", "", one.log_out)]
    return rows


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) + _GAP for column in zip(*rows, strict=True)]
    widths[-1] = 0
    lines = (
        "".join(_plain(cell).ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "".join(f"{line}\n" for line in lines)


def _plain(text: str) -> str:
    """A record is a user's file: nothing in it may speak to root's terminal."""
    return "".join(c if c.isprintable() or 0xDC80 <= ord(c) <= 0xDCFF else "?" for c in text)


def _json(found: list[instances.Instance]) -> str:
    import json

    shown = [
        {
            "instance": one.name,
            "pid": one.pid,
            "img": one.image,
            "ip": one.ip,
            "logErrPath": one.log_err,
            "logOutPath": one.log_out,
        }
        for one in found
    ]
    return json.dumps({"instances": shown}, indent="\t") + "\n"
