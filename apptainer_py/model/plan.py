"""A container as data: what will be mounted and started, before anything is."""

from __future__ import annotations

from apptainer_py.base.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    Capabilities = tuple[int, int, int, int, int]

NO_CAPABILITIES: Final = (0, 0, 0, 0, 0)


class ContainerPlan(Record):
    """What the starter is asked for: numbers of starter/protocol.def.

    `caps` are the payload's effective, permitted, inheritable, bounding and ambient sets as bit
    masks; an empty `groups` keeps the caller's; `image` is what the audit record shows.
    """

    image: str
    uid: int
    gid: int
    spaces: int = 0
    flags: int = 0
    fuse_count: int = 0
    groups: tuple[int, ...] = ()
    caps: Capabilities = NO_CAPABILITIES


class Mount(Record):
    """One entry of the mount plan.

    `kind` is "bind", or a file system of the kernel ("proc", "sysfs", "devpts", "mqueue",
    "tmpfs"). `source` is looked up in `area` (AREA_* of the protocol). `create` says what the
    target becomes where the image lacks it: "directory", "file", or "" (then it must exist).
    A mount that is not `required` is left out with a warning. `options` is for devpts (group id),
    tmpfs (MiB), and a bind from an image beside the root (its number).
    """

    kind: str
    source: str
    target: str
    tag: str
    area: int = 0
    flags: int = 0
    create: str = ""
    required: bool = False
    quiet: bool = False
    options: int = 0
