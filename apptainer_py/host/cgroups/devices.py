"""Rules for devices as sets, so that drivers change only what differs.

The rules of `linux.resources.devices` are applied in order, as the kernel's v1 controller would, to
a default and the exceptions from it.
"""

from __future__ import annotations

from apptainer_py.host.cgroups.driver import CgroupError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

ANY = -1
# (kind, major, minor): "c" or "b", ANY for all numbers.
Device = tuple[str, int, int]
# What every container may do: make nodes, and use those that the specification provides.
DEFAULTS: tuple[tuple[Device, str], ...] = (
    (("c", ANY, ANY), "m"),
    (("b", ANY, ANY), "m"),
    (("c", 1, 3), "rwm"),
    (("c", 1, 8), "rwm"),
    (("c", 1, 7), "rwm"),
    (("c", 5, 0), "rwm"),
    (("c", 1, 5), "rwm"),
    (("c", 1, 9), "rwm"),
    (("c", 136, ANY), "rwm"),
    (("c", 5, 2), "rwm"),
    (("c", 10, 200), "rwm"),
)
_ORDER = "rwm"


def ordered(access: str) -> str:
    """Return access letters in the kernel's order, each once."""
    return "".join(letter for letter in _ORDER if letter in access)


def number_text(number: int) -> str:
    """Return a major or minor number as the kernel writes it."""
    return "*" if number == ANY else str(number)


class Rules:
    """A default, and for devices the access that differs from it."""

    def __init__(self, *, default_allow: bool = False) -> None:
        self.default_allow = default_allow
        self.exceptions: dict[Device, str] = {}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Rules):
            return NotImplemented
        both = self.exceptions == other.exceptions
        return both and self.default_allow == other.default_allow

    __hash__ = None  # type: ignore[assignment]

    def apply(self, device: Device | None, access: str, *, allow: bool) -> None:
        """Apply one rule; None stands for all devices of both kinds.

        Raises:
            CgroupError: v1 could not make a hole in a rule that covers more.
        """
        if device is None:
            self.default_allow = allow
            self.exceptions.clear()
        elif allow != self.default_allow:
            known = self.exceptions.get(device, "")
            self.exceptions[device] = ordered(known + access)
        else:
            self._take_away(device, access)

    def _take_away(self, device: Device, access: str) -> None:
        kind, major, minor = device
        for wider in ((kind, ANY, minor), (kind, major, ANY), (kind, ANY, ANY)):
            known = self.exceptions.get(wider, "")
            if wider != device and set(known) & set(access):
                exception = "deny" if self.default_allow else "allow"
                text = (
                    f"unable to remove '{exception}' exception: requested rule "
                    f"[{_internal(device)} {access}] not supported by devices cgroupv1 (cannot "
                    f"punch hole in existing wildcard rule [{_internal(wider)} {known}])"
                )
                raise CgroupError(text=text)
        rest = "".join(letter for letter in self.exceptions.get(device, "") if letter not in access)
        if rest:
            self.exceptions[device] = rest
        else:
            self.exceptions.pop(device, None)

    def transition(self, target: Rules) -> list[tuple[bool, str]]:
        """Return (allow, line for devices.allow or devices.deny) for the shortest way to target."""
        lines = []
        old = self.exceptions
        if self.default_allow != target.default_allow:
            lines.append((target.default_allow, "a"))
            old = {}
        for device, access in sorted(old.items()):
            gone = "".join(c for c in access if c not in target.exceptions.get(device, ""))
            if gone:
                lines.append((target.default_allow, f"{describe(device)} {gone}"))
        for device, access in sorted(target.exceptions.items()):
            new = "".join(c for c in access if c not in old.get(device, ""))
            if new:
                lines.append((not target.default_allow, f"{describe(device)} {new}"))
        return lines


def _internal(device: Device) -> str:
    # As runc prints its own structure: the kind's character code, then the numbers.
    kind, major, minor = device
    return f"{{{ord(kind)} {major} {minor}}}"


def describe(device: Device) -> str:
    """Return a device as the kernel writes it: `c 1:3`."""
    kind, major, minor = device
    return f"{kind} {number_text(major)}:{number_text(minor)}"


def read_rules(text: str) -> Rules:
    """Return the state that the text of devices.list describes."""
    rules = Rules()
    for line in text.splitlines():
        kind, numbers, access = line.split(" ")
        if kind == "a":
            rules.apply(None, "rwm", allow=True)
            continue
        major, _, minor = numbers.partition(":")
        device = (kind, ANY if major == "*" else int(major), ANY if minor == "*" else int(minor))
        rules.apply(device, access, allow=True)
    return rules


def _device(entry: dict[str, Any]) -> Device | None:
    kind = entry.get("type") or "a"
    if kind not in ("a", "b", "c"):
        raise CgroupError(text=f'invalid device type "{kind}" in a cgroup device rule')
    if kind == "a":
        return None
    numbers = []
    for key in ("major", "minor"):
        number = entry.get(key)
        if number is not None and number < ANY:
            raise CgroupError(text=f"invalid device {key} number {number}")
        numbers.append(ANY if number is None else number)
    return (kind, numbers[0], numbers[1])


def wanted_rules(entries: Sequence[dict[str, Any]]) -> Rules:
    """Return the state that `linux.resources.devices` asks for, every container's defaults last.

    Raises:
        CgroupError: a rule is not valid.
    """
    rules = Rules()
    for place, entry in enumerate(entries):
        access = entry.get("access") or ""
        if not access:
            raise CgroupError(text=f"device access at {place} field cannot be empty")
        if access.strip(_ORDER):
            raise CgroupError(text=f'invalid device access "{access}" at {place}')
        rules.apply(_device(entry), access, allow=bool(entry.get("allow")))
    for device, access in DEFAULTS:
        rules.apply(device, access, allow=True)
    return rules
