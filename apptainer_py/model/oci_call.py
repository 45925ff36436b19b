"""A command line of the `oci` engine, understood but not yet judged."""

from __future__ import annotations

from apptainer_py.base.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from apptainer_py.model.request import ActionRequest


class OciCall(Record):
    """One call: `options` has every flag of `command` by its long name.

    `program` is the program's name as typed, which messages begin with. `apptainer` tells the
    surface: runc's command line and messages, or those of Apptainer's own `oci` commands.
    `action` is an image that is to be started (`apptainer-py run --oci`), in place of a bundle.
    `root_given` tells that `root` is not the default.
    `rootless` is "true", "false" or "auto"; `cgroup_manager` "cgroupfs", "systemd" or "disabled".
    """

    program: str
    command: str
    options: Mapping[str, object]
    arguments: tuple[str, ...] = ()
    root: str = ""
    root_given: bool = False
    log: str = ""
    log_format: str = "text"
    debug: bool = False
    cgroup_manager: str = "cgroupfs"
    rootless: str = "auto"
    criu: str = "criu"
    apptainer: bool = False
    action: ActionRequest | None = None

    def text(self, name: str) -> str:
        """Return the value of a flag that takes text; "" if it was not given."""
        value = self.options.get(name, "")
        return value if isinstance(value, str) else ""

    def number(self, name: str) -> int:
        """Return the value of a flag that takes a number; 0 if it was not given."""
        value = self.options.get(name, 0)
        return value if isinstance(value, int) else 0

    def flag(self, name: str) -> bool:
        """Return whether a flag without a value was given."""
        return bool(self.options.get(name, False))

    def words(self, name: str) -> tuple[str, ...]:
        """Return all values of a flag that may be repeated."""
        value = self.options.get(name, ())
        return tuple(map(str, value)) if isinstance(value, tuple) else ()
