"""mounts[] of config.json as rows: a file system or a tree in hand, its attributes, its place."""

from __future__ import annotations

import posixpath

from apptainer_py.base.record import Record
from apptainer_py.engines.oci.keys import ConfigWrong
from apptainer_py.engines.oci.spaces import NEWUSER, id_maps, outside
from apptainer_py.engines.oci.texts import IN_INIT, path_bytes, quoted
from apptainer_py.model import protocol
from apptainer_py.model.oci_plan import IdMap, Row

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from apptainer_py.engines.oci.spaces import Spaces
    from apptainer_py.model.oci_plan import CgroupWish, HostFacts

# Flags of mount(2).
RDONLY, NOSUID, NODEV, NOEXEC = 1, 2, 4, 8
SYNCHRONOUS, REMOUNT, MANDLOCK, DIRSYNC = 16, 32, 64, 128
NOSYMFOLLOW, NOATIME, NODIRATIME = 256, 1024, 2048
BIND, REC, SILENT = 4096, 16384, 32768
UNBINDABLE, PRIVATE, SLAVE, SHARED = 1 << 17, 1 << 18, 1 << 19, 1 << 20
RELATIME, I_VERSION, STRICTATIME, LAZYTIME = 1 << 21, 1 << 23, 1 << 24, 1 << 25

# Attributes of mount_setattr(2).
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV, ATTR_NOEXEC = 1, 2, 4, 8
ATTR_ATIME, ATTR_NOATIME, ATTR_STRICTATIME = 0x70, 0x10, 0x20
ATTR_NODIRATIME, ATTR_IDMAP, ATTR_NOSYMFOLLOW = 0x80, 0x100000, 0x200000

PROPAGATIONS = {
    "private": PRIVATE,
    "rprivate": PRIVATE | REC,
    "shared": SHARED,
    "rshared": SHARED | REC,
    "slave": SLAVE,
    "rslave": SLAVE | REC,
    "unbindable": UNBINDABLE,
    "runbindable": UNBINDABLE | REC,
}

_SET = {
    "bind": BIND,
    "defaults": 0,
    "dirsync": DIRSYNC,
    "iversion": I_VERSION,
    "lazytime": LAZYTIME,
    "mand": MANDLOCK,
    "noatime": NOATIME,
    "nodev": NODEV,
    "nodiratime": NODIRATIME,
    "noexec": NOEXEC,
    "nosuid": NOSUID,
    "nosymfollow": NOSYMFOLLOW,
    "rbind": BIND | REC,
    "relatime": RELATIME,
    "remount": REMOUNT,
    "ro": RDONLY,
    "silent": SILENT,
    "strictatime": STRICTATIME,
    "sync": SYNCHRONOUS,
}
_CLEAR = {
    "async": SYNCHRONOUS,
    "atime": NOATIME,
    "dev": NODEV,
    "diratime": NODIRATIME,
    "exec": NOEXEC,
    "loud": SILENT,
    "noiversion": I_VERSION,
    "nolazytime": LAZYTIME,
    "nomand": MANDLOCK,
    "norelatime": RELATIME,
    "nostrictatime": STRICTATIME,
    "rw": RDONLY,
    "suid": NOSUID,
    "symfollow": NOSYMFOLLOW,
}
# Recursive attributes: (bits to set, bits to clear); an access time is one field, cleared whole.
_RECURSIVE = {
    "rro": (ATTR_RDONLY, 0),
    "rrw": (0, ATTR_RDONLY),
    "rnosuid": (ATTR_NOSUID, 0),
    "rsuid": (0, ATTR_NOSUID),
    "rnodev": (ATTR_NODEV, 0),
    "rdev": (0, ATTR_NODEV),
    "rnoexec": (ATTR_NOEXEC, 0),
    "rexec": (0, ATTR_NOEXEC),
    "rnodiratime": (ATTR_NODIRATIME, 0),
    "rdiratime": (0, ATTR_NODIRATIME),
    "rrelatime": (0, ATTR_ATIME),
    "rnorelatime": (0, 0),
    "rnoatime": (ATTR_NOATIME, ATTR_ATIME),
    "ratime": (0, ATTR_ATIME),
    "rstrictatime": (ATTR_STRICTATIME, ATTR_ATIME),
    "rnostrictatime": (0, ATTR_ATIME),
    "rnosymfollow": (ATTR_NOSYMFOLLOW, 0),
    "rsymfollow": (0, ATTR_NOSYMFOLLOW),
}
MOUNT_OPTIONS = sorted({*_SET, *_CLEAR, *PROPAGATIONS, *_RECURSIVE, "tmpcopyup", "idmap", "ridmap"})

# Flags of a mount, and those of its superblock, which a new file system takes as parameters.
_ATTRS = (
    (RDONLY, ATTR_RDONLY),
    (NOSUID, ATTR_NOSUID),
    (NODEV, ATTR_NODEV),
    (NOEXEC, ATTR_NOEXEC),
    (NOSYMFOLLOW, ATTR_NOSYMFOLLOW),
)
_ALL_ATTRS = ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV | ATTR_NOEXEC | ATTR_NOSYMFOLLOW
_TIMES = NOATIME | NODIRATIME | RELATIME | STRICTATIME
_PARAMETERS = (
    (RDONLY, "ro"),
    (SYNCHRONOUS, "sync"),
    (DIRSYNC, "dirsync"),
    (MANDLOCK, "mand"),
    (I_VERSION, "iversion"),
    (LAZYTIME, "lazytime"),
)
_NAMES = (
    (RDONLY, "MS_RDONLY"),
    (NOSUID, "MS_NOSUID"),
    (NODEV, "MS_NODEV"),
    (NOEXEC, "MS_NOEXEC"),
    (SYNCHRONOUS, "MS_SYNCHRONOUS"),
    (REMOUNT, "MS_REMOUNT"),
    (MANDLOCK, "MS_MANDLOCK"),
    (DIRSYNC, "MS_DIRSYNC"),
    (NOSYMFOLLOW, "MS_NOSYMFOLLOW"),
    (NOATIME, "MS_NOATIME"),
    (NODIRATIME, "MS_NODIRATIME"),
    (BIND, "MS_BIND"),
    (REC, "MS_REC"),
    (SILENT, "MS_SILENT"),
    (RELATIME, "MS_RELATIME"),
    (I_VERSION, "MS_I_VERSION"),
    (STRICTATIME, "MS_STRICTATIME"),
    (LAZYTIME, "MS_LAZYTIME"),
)

# Files of procfs that programs like lxcfs stand in for; nothing else below /proc is mounted on.
_PROC_FILES = {
    f"/proc/{name}"
    for name in (
        "cpuinfo",
        "diskstats",
        "meminfo",
        "stat",
        "swaps",
        "uptime",
        "loadavg",
        "slabinfo",
        "net/dev",
        "sys/kernel/ns_last_pid",
        "sys/crypto/fips_enabled",
    )
}
_UNLABELED = ("proc", "sysfs", "mqueue")
_LONGEST_VALUE = 255  # fsconfig(2)

# Flags of rows.
TREE_RECURSIVE = 1
ATTR_ROW_RECURSIVE = 1
PLACE_MODE_OF_TARGET, PLACE_PROC = 2, 4


class MountOptions(Record):
    """options[] of a mount, sorted: flags of mount(2), attributes for the whole tree, the rest."""

    flags: int
    cleared: int
    propagation: tuple[int, ...]
    recursive_set: int
    recursive_clear: int
    copy_up: bool
    idmap: str
    data: tuple[str, ...]


class Mounts(Record):
    """What mounts[] become: rows before the root is changed, rows after it, and the rest."""

    assemble: tuple[Row, ...]
    read_only_later: tuple[Row, ...]
    idmaps: tuple[tuple[str, tuple[IdMap, ...], tuple[IdMap, ...]], ...]
    dev_is_bound: bool
    cgroup_writable: bool
    warnings: tuple[str, ...]


def parse_options(words: list[str]) -> MountOptions:
    """Sort the option words of a mount; what is not known is for the file system."""
    flags = cleared = set_all = clear_all = 0
    propagation: list[int] = []
    data: list[str] = []
    idmap = ""
    copy_up = False
    for word in words:
        if _SET.get(word):
            flags |= _SET[word]
            cleared &= ~_SET[word]
        elif word in _CLEAR:
            flags &= ~_CLEAR[word]
            cleared |= _CLEAR[word]
        elif word in PROPAGATIONS:
            propagation.append(PROPAGATIONS[word])
        elif word in _RECURSIVE:
            to_set, to_clear = _RECURSIVE[word]
            if to_clear == ATTR_ATIME:
                set_all &= ~ATTR_ATIME
            set_all = set_all & ~to_clear | to_set
            clear_all = clear_all & ~to_set | to_clear
        elif word == "tmpcopyup":
            copy_up = True
        elif word in ("idmap", "ridmap"):
            idmap = word
        elif word != "defaults":
            data.append(word)
    return MountOptions(
        flags=flags,
        cleared=cleared,
        propagation=tuple(propagation),
        recursive_set=set_all,
        recursive_clear=clear_all,
        copy_up=copy_up,
        idmap=idmap,
        data=tuple(data),
    )


def clean(path: str) -> str:
    """Return a path of the container from its root on, without "." and ".."."""
    cleaned = posixpath.normpath(f"/{path}")
    return cleaned if cleaned[:2] != "//" else cleaned[1:]


class MountCompiler:
    """Collects the rows of one container's mounts."""

    __slots__ = (
        "_bundle", "_cgroup", "_host", "_label", "_root", "_spaces", "cgroup_writable",
        "dev_is_bound", "idmaps", "later", "rows", "warnings",
    )  # fmt: skip

    def __init__(self, bundle: str, root: str, label: str, spaces: Spaces, host: HostFacts) -> None:
        self._bundle = bundle
        self._root = root
        self._label = label
        self._spaces = spaces
        self._host = host
        self.rows: list[Row] = []
        self.later: list[Row] = []
        self.idmaps: list[tuple[str, tuple[IdMap, ...], tuple[IdMap, ...]]] = []
        self.warnings: list[str] = []
        self.dev_is_bound = False
        self.cgroup_writable = False

    def compile(self, mounts: list[dict[str, Any]], wish: CgroupWish) -> Mounts:
        """Compile mounts[] in their order.

        Raises:
            ConfigWrong: a mount contradicts itself or goes where none may go.
        """
        for index, mount in enumerate(mounts):
            self._mount(mount, f"mounts[{index}]", wish)
        return Mounts(
            assemble=tuple(self.rows),
            read_only_later=tuple(self.later),
            idmaps=tuple(self.idmaps),
            dev_is_bound=self.dev_is_bound,
            cgroup_writable=self.cgroup_writable,
            warnings=tuple(self.warnings),
        )

    def _mount(self, mount: dict[str, Any], key: str, wish: CgroupWish) -> None:
        source, target = mount.get("source", ""), mount.get("destination", "")
        kind = mount.get("type", "")
        if "\0" in source or "\0" in target or "\0" in kind:
            text = f"invalid mount {_go_mount(mount)}: mount field contains null byte"
            raise ConfigWrong(key=key, text=text)
        if not target.startswith("/"):
            self.warnings.append(
                f"mount destination {target} is not absolute. Support for non-absolute mount"
                " destinations will be removed in a future release."
            )
        options = parse_options(mount.get("options", []))
        if options.flags & BIND:
            kind = "bind"
            if not source.startswith("/"):
                source = posixpath.normpath(f"{self._bundle}/{source}")
        self._check(mount, options, source, kind, key)
        place = clean(target)
        proc = self._check_place(source, target, place, kind, key)
        if kind == "cgroup":
            self._cgroups(mount, options, target, place, wish)
            return
        says = _sentence(source, target, options, kind)
        if options.flags & REMOUNT:
            self._remount(options, place, says)
        elif options.flags & BIND:
            self.dev_is_bound |= place == "/dev"
            self._tree(mount, options, source, says)
            self._finish(options, place, says, PLACE_PROC if proc else 0)
        else:
            flags = self._file_system(options, kind, source, place, says)
            self._finish(options, place, says, flags | (PLACE_PROC if proc else 0))

    def _check(
        self, mount: dict[str, Any], options: MountOptions, source: str, kind: str, key: str
    ) -> None:
        """The rules of runc's validator for one mount."""
        why = ""
        mapped = options.idmap or mount.get("uidMappings") or mount.get("gidMappings")
        if options.flags & BIND and options.data:
            why = "bind mounts cannot have any filesystem-specific options applied"
        elif mapped and not options.flags & BIND:
            why = "id-mapped mounts are only supported for bind-mounts"
        elif mapped and self._host.rootless:
            why = "id-mapped mounts are not supported for rootless containers"
        elif mapped and not self._has_maps(mount):
            why = "id-mapped mounts must have both uid and gid mappings specified"
        if why:
            target = mount.get("destination", "")
            shown = _go_config_mount(options, source, target, kind, mapped=bool(mapped))
            raise ConfigWrong(key=key, text=f"invalid mount {shown}: {why}")
        if self._host.rootless:
            self._check_rootless(options, key)

    def _has_maps(self, mount: dict[str, Any]) -> bool:
        uids, gids = mount.get("uidMappings"), mount.get("gidMappings")
        if uids or gids:
            return bool(uids and gids)
        return bool(self._spaces.present & NEWUSER)

    def _check_rootless(self, options: MountOptions, key: str) -> None:
        for word in options.data:
            name, _, number = word.partition("=")
            if name not in ("uid", "gid") or not number.isdecimal():
                continue
            maps = self._spaces.host_uids if name == "uid" else self._spaces.host_gids
            if outside(maps, int(number)) is None:
                text = (
                    f"cannot specify {word} mount option for rootless container: user namespaces"
                    f" enabled, but no mapping found for {name} {number}"
                )
                raise ConfigWrong(key=key, text=text)

    def _check_place(self, source: str, target: str, place: str, kind: str, key: str) -> bool:
        """Return whether the target may lie in /proc.

        Raises:
            ConfigWrong: it is the root itself, or in /proc where no mount may hide anything.
        """
        if place == "/":
            why = f"mountpoint {quoted(self._root)} is on the top of rootfs {quoted(self._root)}"
        elif place == "/proc":
            if kind in ("proc", "bind"):  # of a bind, init asks what it is a bind of
                return True
            where = quoted(self._root + place)
            why = f"check proc-safety of {target} mount: {where} cannot be mounted because it is "
            why += "not of type proc"
        elif place.startswith("/proc/"):
            if place in _PROC_FILES:
                return True
            where = quoted(self._root + place)
            why = f"check proc-safety of {target} mount: {where} cannot be mounted because it is "
            why += "inside /proc"
        else:
            return False
        text = f"{IN_INIT}error mounting {quoted(source)} to rootfs at {quoted(target)}: "
        raise ConfigWrong(key=key, text=f"{text}create mountpoint for {target} mount: {why}")

    def _cgroups(
        self,
        mount: dict[str, Any],
        options: MountOptions,
        target: str,
        place: str,
        wish: CgroupWish,
    ) -> None:
        if self._host.mount_cgroups is None:
            text = f'{IN_INIT}error mounting "cgroup" to rootfs at {quoted(target)}: no cgroups'
            raise ConfigWrong(key="mounts", text=text)
        if place == "/sys/fs/cgroup" and not options.flags & RDONLY:
            self.cgroup_writable = True
        words = tuple(mount.get("options", ()))
        self.rows += self._host.mount_cgroups(wish, place, words, wish.private_namespace)

    def _remount(self, options: MountOptions, place: str, says: str) -> None:
        to_set, to_clear = _attributes(options.flags, exact=True)
        self._add(protocol.OP_REMOUNT, says, place, numbers=(to_set, to_clear))

    def _tree(self, mount: dict[str, Any], options: MountOptions, source: str, says: str) -> None:
        recursive = TREE_RECURSIVE if options.flags & REC else 0
        missing = f"failed to fulfil mount request: open {source}: {{error}}"
        self._add(protocol.OP_TREE, missing, source, flags=recursive)
        self._map_ids(mount, options, says)
        # As runc: a mount without one word about flags keeps those of its source, and one with
        # any has exactly those, so that what was not asked for is cleared too.
        if options.flags & ~(BIND | REC) or options.cleared:
            to_set, to_clear = _attributes(options.flags, exact=True)
            explicit = _attributes(options.cleared, exact=False)[0]
            self._attr(says, to_set, to_clear, explicit=explicit)

    def _map_ids(self, mount: dict[str, Any], options: MountOptions, says: str) -> None:
        uids, gids = id_maps(mount.get("uidMappings")), id_maps(mount.get("gidMappings"))
        if not uids and not options.idmap:
            return
        name = "" if uids else self._spaces.path_of(NEWUSER)
        if not name:
            uids, gids = uids or self._spaces.uid_maps, gids or self._spaces.gid_maps
            name = self._known_maps(uids, gids)
        elif all(known != name for known, _, _ in self.idmaps):
            self.idmaps.append((name, (), ()))
        recursive = ATTR_ROW_RECURSIVE if options.idmap == "ridmap" else 0
        self._add(protocol.OP_ATTR, says, flags=recursive, numbers=(ATTR_IDMAP, 0, 0), fd=name)

    def _known_maps(self, uids: tuple[IdMap, ...], gids: tuple[IdMap, ...]) -> str:
        """Mounts with the same maps share a user namespace: each costs a process."""
        for name, known_uids, known_gids in self.idmaps:
            if (known_uids, known_gids) == (uids, gids):
                return name
        name = f"idmap{len(self.idmaps)}"
        self.idmaps.append((name, uids, gids))
        return name

    def _file_system(
        self, options: MountOptions, kind: str, source: str, place: str, says: str
    ) -> int:
        """Add the rows of a new file system; return flags for its place."""
        flags = options.flags
        if flags & RDONLY and (kind == "tmpfs" or place == "/dev"):
            # Things are still made in it; it becomes read-only when they are.
            flags &= ~RDONLY
            later = f"error remounting {quoted(place)} as readonly: {{error}}"
            self.later.append(
                Row(
                    op=protocol.OP_REMOUNT,
                    numbers=(ATTR_RDONLY, 0),
                    first=place.encode(),
                    says=later,
                )
            )
        self._add(protocol.OP_FS, says, kind, source or None)
        self._parameters(options, flags, kind, says)
        to_set, to_clear = _attributes(flags, exact=False)
        if to_set or to_clear:
            self._attr(says, to_set, to_clear)
        if kind != "tmpfs":
            return 0
        if options.copy_up:
            self._add(protocol.OP_COPYUP, "tmpcopyup: {error}", place)
        has_mode = any(word.startswith("mode=") for word in options.data)
        return 0 if has_mode else PLACE_MODE_OF_TARGET

    def _parameters(self, options: MountOptions, flags: int, kind: str, says: str) -> None:
        words = [word for text in options.data for word in _split(text) if word]
        label = self._label if kind not in _UNLABELED else ""
        if label:
            words.append(f"context={label}")
        if any(len(word.partition("=")[2].encode()) > _LONGEST_VALUE for word in words):
            whole = [*words]
            if label:
                whole[-1] = f'context="{label}"'
            self._add(protocol.OP_FSOPT, says, "", ",".join(whole))
            words = []
        for bit, parameter in _PARAMETERS:
            if flags & bit:
                self._add(protocol.OP_FSOPT, says, parameter)
        for word in words:
            name, equals, value = word.partition("=")
            self._add(protocol.OP_FSOPT, says, name, value if equals else None)

    def _finish(self, options: MountOptions, place: str, says: str, flags: int) -> None:
        """What every new mount ends with: attributes of the whole tree, propagation, its place."""
        if options.recursive_set or options.recursive_clear:
            self._attr(
                says,
                options.recursive_set,
                options.recursive_clear,
                flags=ATTR_ROW_RECURSIVE,
            )
        last = 0
        if options.propagation:
            *first, last = options.propagation
            for kind in first:
                recursive = ATTR_ROW_RECURSIVE if kind & REC else 0
                numbers = (0, 0, kind & ~REC)
                self._add(protocol.OP_ATTR, says, flags=recursive, numbers=numbers)
        says = says.partition(": mount src=")[0] + self._place_says(options, place)
        self._add(protocol.OP_PLACE, says, place, flags=flags, numbers=(last,))

    def _place_says(self, options: MountOptions, place: str) -> str:
        """What fails last is nearly always to make what the mount goes on."""
        text = f": create mountpoint for {place} mount: "
        where = self._root + place
        if place == "/proc" and options.flags & BIND:
            # That it is no procfs is what init refuses here.
            text += f"check proc-safety of {place} mount: {quoted(where)} cannot be mounted because"
            return text + " it is not of type proc"
        return text + f"make mountpoint {quoted(place)}: mkdirat {where}: {{error}}"

    def _attr(
        self, says: str, to_set: int, to_clear: int, *, explicit: int = 0, flags: int = 0
    ) -> None:
        numbers = (to_set, to_clear, 0, explicit) if explicit else (to_set, to_clear, 0)
        self._add(protocol.OP_ATTR, says, flags=flags, numbers=numbers)

    def _add(
        self,
        op: int,
        says: str,
        *words: str | None,
        flags: int = 0,
        numbers: tuple[int, ...] = (),
        fd: str = "",
    ) -> None:
        first, second = (
            None if word is None else path_bytes(word, "mounts", says)
            for word in (*words, None, None)[:2]
        )
        self.rows.append(
            Row(
                op=op,
                flags=flags,
                numbers=numbers,
                first=first,
                second=second,
                fd=fd,
                says=says,
            )
        )


def _attributes(flags: int, *, exact: bool) -> tuple[int, int]:
    """Return attr_set and attr_clr of mount_setattr(2) for flags of mount(2).

    With `exact` nothing but `flags` remains; access times stay as they are if no word is about
    them, as in the kernel's own remount.
    """
    to_set = 0
    for flag, attr in _ATTRS:
        if flags & flag:
            to_set |= attr
    to_clear = _ALL_ATTRS & ~to_set if exact else 0
    if flags & _TIMES:
        to_clear |= ATTR_ATIME
        if flags & STRICTATIME:
            to_set |= ATTR_STRICTATIME
        elif flags & NOATIME:
            to_set |= ATTR_NOATIME
        if flags & NODIRATIME:
            to_set |= ATTR_NODIRATIME
        elif exact:
            to_clear |= ATTR_NODIRATIME
    return to_set, to_clear


def _split(text: str) -> list[str]:
    """Split file system data at commas that overlay's backslash does not protect."""
    if "\\," not in text:
        return text.split(",")
    return [part.replace("\0", "\\,") for part in text.replace("\\,", "\0").split(",")]


def _sentence(source: str, target: str, options: MountOptions, kind: str) -> str:
    flags = options.flags
    if kind == "tmpfs":
        flags &= ~RDONLY
    text = f"error mounting {quoted(source)} to rootfs at {quoted(target)}: "
    text += f"mount src={source}, dst={target}"
    if flags:
        text += f", flags={'|'.join(name for bit, name in _NAMES if flags & bit)}"
    if options.data:
        text += f", data={','.join(options.data)}"
    return text + ": {error}"


def _go_mount(mount: dict[str, Any]) -> str:
    """A mount as Go prints the structure of the specification."""
    words = " ".join(mount.get("options", ()))
    maps = [
        " ".join(
            f"{{ContainerID:{line.inside} HostID:{line.outside} Size:{line.count}}}"
            for line in id_maps(mount.get(name))
        )
        for name in ("uidMappings", "gidMappings")
    ]
    return (
        f"{{Destination:{mount.get('destination', '')} Type:{mount.get('type', '')}"
        f" Source:{mount.get('source', '')} Options:[{words}] UIDMappings:[{maps[0]}]"
        f" GIDMappings:[{maps[1]}]}}"
    )


def _go_config_mount(
    options: MountOptions, source: str, target: str, kind: str, *, mapped: bool
) -> str:
    """A mount as Go prints the structure of runc, but for its addresses."""
    recursive = options.recursive_set | options.recursive_clear
    propagation = " ".join(map(str, options.propagation))
    return (
        f"&{{Source:{source} Destination:{target} Device:{kind} Flags:{options.flags}"
        f" ClearedFlags:{options.cleared} PropagationFlags:[{propagation}]"
        f" Data:{','.join(options.data)} Relabel: RecAttr:{'0x1' if recursive else '<nil>'}"
        f" Extensions:{int(options.copy_up)} IDMapping:{'0x1' if mapped else '<nil>'}}}"
    )
