"""Properties of a container's unit that annotations ask for: `org.systemd.property.NAME`."""

from __future__ import annotations

from apptainer_py.engines.oci.keys import ConfigWrong
from apptainer_py.host.gvariant import GVariantWrong, parse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

_PREFIX = "org.systemd.property."
_NAME_LEAST = 3
_NUMBERS = "ynqiuxtd"
_MICROSECONDS = 1_000_000


def unit_properties(annotations: Mapping[str, str]) -> tuple[tuple[str, tuple[str, Any]], ...]:
    """Return (name, (signature, value)) of each, in the order of their names.

    A time in seconds (`TimeoutStopSec`) is handed over in microseconds (`TimeoutStopUSec`), which
    is the only form that systemd takes over D-Bus.

    Raises:
        ConfigWrong: a name or value is none.
    """
    found = []
    for key in sorted(annotations):
        name = key.removeprefix(_PREFIX)
        if name == key:
            continue
        _check_name(key, name)
        text = annotations[key]
        try:
            signature, value = parse(text)
            stem = name.removesuffix("Sec")
            if stem != name and stem[-1:].islower():
                name = f"{stem}USec"
                if signature not in _NUMBERS:
                    raise GVariantWrong("not a number")
                signature, value = "t", int(value * _MICROSECONDS)
                if value < 0:
                    raise GVariantWrong("less than 0")
        except GVariantWrong as error:
            said = f"annotation {key}={text} value parse error: {error}"
            raise ConfigWrong(key=f"annotations.{key}", text=said) from None
        found.append((name, (signature, value)))
    return tuple(found)


def _check_name(key: str, name: str) -> None:
    why = ""
    if len(name) < _NAME_LEAST:
        why = f"name too short: {name}"
    elif not (name.isascii() and name.isalpha()):
        why = f"name contains non-alphabetic character: {name}"
    if why:
        text = f"annotation {key} name incorrect: {why}"
        raise ConfigWrong(key=f"annotations.{key}", text=text)
