"""SOURCE_DATE_EPOCH: what stands for now where the same input is to give the same bytes."""

from __future__ import annotations

from apptainer_py.base.errors import ApptainerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

_DIGITS_MAX = 11


def of(environ: Mapping[str, str]) -> int | None:
    """Return it in seconds since 1970, None where it is not set.

    Raises:
        ApptainerError: it is no number.
    """
    text = environ.get("SOURCE_DATE_EPOCH", "")
    if not text:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) <= _DIGITS_MAX):
        raise ApptainerError(text=f"SOURCE_DATE_EPOCH is no number of seconds: {text!a}")
    return int(text)
