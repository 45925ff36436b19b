"""systemd's manager over D-Bus, by the pure-Python library jeepney (Debian: python3-jeepney)."""

from __future__ import annotations

import os
import sys

from apptainer_py.base.errors import ApptainerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType
    from typing import Any

    # A property's name and its (signature, value), as D-Bus writes a variant.
    Property = tuple[str, tuple[str, Any]]

SYSTEM_BUS = "unix:path=/run/dbus/system_bus_socket"
_NAME = "org.freedesktop.systemd1"
_PATH = "/org/freedesktop/systemd1"
_INTERFACE = f"{_NAME}.Manager"
_PROPERTIES = "org.freedesktop.DBus.Properties"
_TIMEOUT_S = 30.0
_DISTRIBUTION = "/usr/lib/python3/dist-packages"


class DbusError(ApptainerError):
    """`name`, where the other side refused, is among the facts."""

    message = "{text}"


def user_bus(uid: int) -> str:
    """Return the address of a user's own bus."""
    return f"unix:path=/run/user/{uid}/bus"


def _library(name: str) -> ModuleType:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError:
        if os.path.isdir(f"{_DISTRIBUTION}/jeepney") and _DISTRIBUTION not in sys.path:
            # A stage and main.py look at the standard library alone.
            sys.path.append(_DISTRIBUTION)
            return _library(name)
        text = "the systemd cgroup manager needs the package python3-jeepney"
        raise DbusError(text=text) from None


class Systemd:
    """A connection to one instance of systemd."""

    def __init__(self, address: str) -> None:
        self._words = _library("jeepney")
        blocking = _library("jeepney.io.blocking")
        try:
            # A bus may be started by this very connection.
            self._connection = blocking.open_dbus_connection(address, auth_timeout=_TIMEOUT_S)
        except (OSError, ValueError, StopIteration, self._words.AuthenticationError) as error:
            text = f"unable to connect to systemd at {address}: {error}"
            raise DbusError(text=text) from None
        self._listening = False

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def call(self, member: str, signature: str, *body: object) -> tuple[Any, ...]:
        """Call a method of the manager and return what it answers.

        Raises:
            DbusError: it refuses, or does not answer.
        """
        return self._call(_INTERFACE, member, signature, body)

    def _call(
        self, interface: str, member: str, signature: str, body: tuple[object, ...]
    ) -> tuple[Any, ...]:
        target = self._words.DBusAddress(_PATH, bus_name=_NAME, interface=interface)
        message = self._words.new_method_call(target, member, signature or None, body)
        try:
            answer = self._connection.send_and_get_reply(message, timeout=_TIMEOUT_S)
        except (OSError, TimeoutError) as error:
            raise DbusError(text=f"systemd does not answer {member}: {error}") from None
        if answer.header.message_type is self._words.MessageType.error:
            fields = self._words.HeaderFields
            name = answer.header.fields.get(fields.error_name, "")
            text = str(answer.body[0]) if answer.body else name
            raise DbusError(text=text, name=name)
        return tuple(answer.body)

    def get(self, name: str) -> Any:
        """Return a property of the manager."""
        answer = self._call(_PROPERTIES, "Get", "ss", (_INTERFACE, name))
        return answer[0][1]

    def version(self) -> int:
        """Return systemd's version, such as 252; 0 if it says nothing that is one."""
        text = str(self.get("Version")).lstrip('"v')
        digits = text[: len(text) - len(text.lstrip("0123456789"))]
        return int(digits) if digits else 0

    def run_job(self, member: str, signature: str, *body: object) -> str:
        """Call a method that returns a job, wait for its end and return the result: `done`.

        Raises:
            DbusError: systemd refuses, or the job takes too long.
        """
        if not self._listening:
            # systemd sends signals only to who subscribes, and the bus only to who asks for them.
            self.call("Subscribe", "")
            rule = self._words.MatchRule(
                type="signal", interface=_INTERFACE, member="JobRemoved", path=_PATH
            )
            self._connection.bus_proxy.AddMatch(rule)
            self._rule = rule
            self._listening = True
        with self._connection.filter(self._rule, bufsize=64) as queue:
            (job,) = self.call(member, signature, *body)
            while True:
                try:
                    signal = self._connection.recv_until_filtered(queue, timeout=_TIMEOUT_S)
                except (OSError, TimeoutError):
                    raise DbusError(text=f"systemd does not finish {member}") from None
                _, removed, _, result = signal.body
                if removed == job:
                    return str(result)

    def start_unit(self, name: str, properties: Sequence[Property]) -> None:
        """Start a transient unit; one that has failed under this name before is put aside.

        Raises:
            DbusError: systemd refuses, or the unit does not start.
        """
        body: tuple[object, ...] = (name, "replace", list(properties), [])
        try:
            result = self.run_job("StartTransientUnit", "ssa(sv)a(sa(sv))", *body)
        except DbusError as error:
            if error.facts.get("name") != f"{_NAME}.UnitExists":
                raise
            self.reset_failed(name)
            result = self.run_job("StartTransientUnit", "ssa(sv)a(sa(sv))", *body)
        if result != "done":
            self.reset_failed(name)
            raise DbusError(text=f"error creating systemd unit `{name}`: got `{result}`")

    def attach(self, name: str, pids: Sequence[int]) -> None:
        """Have processes moved into a unit's group, from groups that are not this manager's.

        Raises:
            DbusError: systemd refuses.
        """
        self.call("AttachProcessesToUnit", "ssau", name, "", list(pids))

    def stop_unit(self, name: str) -> None:
        """Stop a unit; one that is gone already is fine.

        Raises:
            DbusError: systemd refuses.
        """
        try:
            self.run_job("StopUnit", "ss", name, "replace")
        except DbusError as error:
            if error.facts.get("name") != f"{_NAME}.NoSuchUnit":
                raise
        self.reset_failed(name)

    def reset_failed(self, name: str) -> None:
        """Have systemd forget a unit that has failed, if it has."""
        try:
            self.call("ResetFailedUnit", "s", name)
        except DbusError:
            return

    def set_properties(self, name: str, properties: Sequence[Property]) -> None:
        """Change a unit until the next boot.

        Raises:
            DbusError: systemd refuses.
        """
        at_run_time = True
        self.call("SetUnitProperties", "sba(sv)", name, at_run_time, list(properties))
