"""Instances: their records in the user's home, and which of them really run.

A record is Apptainer's, with five fields more, so that each program lists the other's instances.
It is the user's own file, and nothing in it is believed: an instance runs where its process is what
the record says, and only a process that has been looked at is ever sent a signal.
"""

from __future__ import annotations

import errno
import os
import stat

from apptainer_py.base.errors import ApptainerError
from apptainer_py.base.files import read_at_most, write_all
from apptainer_py.base.record import Record
from apptainer_py.kernel import _starter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


_NAME = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
_NAME_BYTES = 200
_CONFIGURATION = "APPTAINER_CONFIGDIR"
_RECORD_BYTES = 1 << 20
_NO_LINKS, _NO_MAGIC_LINKS = 0x04, 0x02  # RESOLVE_NO_SYMLINKS, _MAGICLINKS of linux/openat2.h
_SHIM = "appinit"
_LOG_MODE = 0o644


class BadName(ApptainerError):
    message = "{where}{name} is not a valid instance name"


class NoAccount(ApptainerError):
    message = "there is no user {name}"
    hint = "instances lie in the home directory of an account"


class NoInstance(ApptainerError):
    message = "While setting image/instance: no instance found with name {name}"


class NotUsable(ApptainerError):
    """A file or directory of the records cannot be used."""

    message = "{path}: {reason}"
    hint = "records and logs lie in ~/.apptainer/instances, or where APPTAINER_CONFIGDIR says"


class Owner(Record):
    """Whose instances: an account, and the directory below which links lead to its own alone."""

    name: str
    uid: int
    above: str
    folder: str


FAKEROOT_PARTS = ("namespace", "subids", "command")


class Instance(Record):
    """What a record says. `started` is in clock ticks since the machine's start."""

    pid: int
    ppid: int
    name: str
    user: str
    image: str
    userns: bool = False
    ip: str = ""
    log_err: str = ""
    log_out: str = ""
    started: int = 0
    boot: str = ""
    pid_space: int = 0
    stop_signal: str = ""
    cgroup: bool = False
    sharens: bool = False
    # Its first process is the image's own init.
    booted: bool = False
    # What it has of --fakeroot: namespace, subids, command.
    fakeroot: tuple[str, ...] = ()
    # What each of its payloads is bound by: label and filter, as stage 2's message has them.
    label: tuple[bytes, ...] = ()
    filter: tuple[bytes, ...] = ()


class Process(Record):
    """What the kernel says about a process."""

    name: str
    parent: int
    uids: tuple[int, ...]
    numbers: tuple[int, ...]
    started: int


def owner(who: str | int, environ: Mapping[str, str] | None = None) -> Owner:
    """Return the account of a name or number whose instances are meant.

    The caller's own environment may say where the caller's own instances lie.

    Raises:
        NoAccount: there is none.
    """
    import pwd

    try:
        entry = pwd.getpwnam(who) if isinstance(who, str) else pwd.getpwuid(who)
    except (KeyError, ValueError):
        raise NoAccount(name=who) from None
    chosen = (environ or {}).get(_CONFIGURATION, "")
    folder = f"{chosen or f'{entry.pw_dir}/.apptainer'}/instances"
    above = chosen or entry.pw_dir
    return Owner(name=entry.pw_name, uid=entry.pw_uid, above=above, folder=folder)


def owner_asked(user: str, uid: int, environ: Mapping[str, str]) -> Owner:
    """Return whose instances a command is about: a user's that is named, or the caller's own.

    Raises:
        NoAccount: there is no such user.
    """
    named = owner(user) if user else None
    return named if named and named.uid != uid else owner(uid, environ)


def is_name(name: str) -> bool:
    """Return whether a name is fit for an instance, and for a file."""
    fit = bool(name) and _NAME.issuperset(name)
    return fit and name not in (".", "..") and len(name) <= _NAME_BYTES


def check_name(name: str, where: str = "") -> str:
    """Return a name that is fit for an instance, and for a file.

    Raises:
        BadName: it is not.
    """
    if not is_name(name):
        raise BadName(name=name, where=where)
    return name


def hostname() -> str:
    """Return the first part of this machine's name, in which no slash is."""
    return os.uname().nodename.replace("/", "_") or "localhost"


def folder_of(owner: Owner) -> str:
    """Return the directory below which each instance has its own."""
    return f"{owner.folder}/app/{hostname()}/{owner.name}"


def logs_of(owner: Owner, name: str) -> tuple[str, str]:
    """Return the files of an instance's stderr and stdout."""
    start = f"{owner.folder}/logs/{hostname()}/{owner.name}/{name}"
    return f"{start}.err", f"{start}.out"


# ---- files: below the home a link is followed to a directory of the owner's, and to no file ----


def _open_folder(owner: Owner, path: str, *, make: bool) -> int:
    """Open a directory below the home, and make what is missing of it, for its owner alone.

    Raises:
        OSError: it cannot be had, and what part of it.
    """
    if make and not os.path.exists(owner.above):
        os.makedirs(owner.above, 0o700)
    here = os.open(owner.above, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    at = owner.above
    for part in path.removeprefix(owner.above).strip("/").split("/"):
        at = f"{at}/{part}"
        try:
            below = _open_part(here, part, owner, make=make)
        except OSError as error:
            error.filename = at
            raise
        finally:
            os.close(here)
        here = below
    return here


def _open_part(above: int, part: str, owner: Owner, *, make: bool) -> int:
    try:
        return _open_at(above, part, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        if not make:
            raise
        _make_folder(part, above)
        return _open_at(above, part, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        # With O_DIRECTORY a link is no directory.
        if error.errno not in (errno.ELOOP, errno.ENOTDIR):
            raise
        return _follow(above, part, owner)


def _follow(above: int, link: str, owner: Owner) -> int:
    """Open the directory to which a link leads, as where a home is small, if it is the owner's."""
    flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
    found = _starter.openat2(above, os.fsencode(link), flags, _NO_MAGIC_LINKS)
    try:
        if os.fstat(found).st_uid != owner.uid:
            raise PermissionError(errno.EACCES, f"the link leads to no directory of {owner.name}")
        return _open_at(found, ".", os.O_RDONLY | os.O_DIRECTORY)
    finally:
        os.close(found)


def _make_folder(name: str, above: int) -> None:
    try:
        os.mkdir(name, 0o700, dir_fd=above)
    except FileExistsError:
        return  # somebody else's start was quicker


def _open_at(folder: int, name: str, flags: int) -> int:
    return _starter.openat2(folder, os.fsencode(name), flags | os.O_CLOEXEC, _NO_LINKS)


def _unusable(path: str, error: OSError) -> NotUsable:
    reason = error.strerror or "it cannot be used"
    where = str(error.filename or "")
    return NotUsable(path=where if where.startswith("/") else path, reason=reason.lower())


def open_log(owner: Owner, path: str) -> int:
    """Open a log for appending: a regular file of the owner's, never one behind a link.

    Raises:
        NotUsable: it is none.
    """
    above, _, name = path.rpartition("/")
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOCTTY | os.O_NONBLOCK | os.O_NOFOLLOW
    try:
        folder = _open_folder(owner, above, make=True)
        try:
            fd = os.open(name, flags | os.O_CLOEXEC, _LOG_MODE, dir_fd=folder)
        finally:
            os.close(folder)
        facts = os.fstat(fd)
    except OSError as error:
        raise _unusable(path, error) from None
    if not stat.S_ISREG(facts.st_mode) or facts.st_uid != owner.uid:
        os.close(fd)
        raise NotUsable(path=path, reason="it is no file of yours")
    os.set_blocking(fd, True)
    return fd


class Place:
    """The directory of one instance, held against others who want the same name.

    The lock goes with the process that holds it, whatever that dies of.
    """

    __slots__ = ("_fd", "_file", "_owner")

    def __init__(self, owner: Owner, name: str) -> None:
        self._owner = owner
        self._file = f"{name}.json"
        path = f"{folder_of(owner)}/{name}"
        try:
            self._fd = _open_folder(owner, path, make=True)
        except OSError as error:
            raise _unusable(path, error) from None

    def lock(self) -> bool:
        """Take the name; False where another start has it."""
        import fcntl

        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return True  # a file system without locks
        return True

    def holder(self) -> int:
        """Return the number of the process that has the name, as proc_locks(5) tells; or 0."""
        facts = os.fstat(self._fd)
        device = f"{os.major(facts.st_dev):02x}:{os.minor(facts.st_dev):02x}:{facts.st_ino}"
        try:
            lines = read_at_most(os.open("/proc/locks", os.O_RDONLY | os.O_CLOEXEC), 1 << 20)
        except OSError:
            return 0
        for line in lines.decode("ascii", "replace").splitlines():
            words = line.split()
            if len(words) > 5 and words[1] == "FLOCK" and words[5] == device and words[4].isdigit():
                return int(words[4])
        return 0

    def read(self) -> Instance | None:
        """Return what the record says, if there is one that can be understood."""
        return _read_record(self._fd, self._file, self._owner)

    def write(self, instance: Instance) -> None:
        """Write the record, all at once.

        Raises:
            NotUsable: it cannot be written.
        """
        fresh = f".{self._file}.fresh"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            write_all(os.open(fresh, flags, 0o600, dir_fd=self._fd), _encoded(instance))
            os.rename(fresh, self._file, src_dir_fd=self._fd, dst_dir_fd=self._fd)
        except OSError as error:
            raise _unusable(f"{folder_of(self._owner)}/{instance.name}", error) from None

    def remove(self, name: str) -> None:
        """Remove record and directory, which are ours while the lock is."""
        try:
            os.unlink(self._file, dir_fd=self._fd)
        except OSError:
            pass
        try:
            above = _open_folder(self._owner, folder_of(self._owner), make=False)
        except OSError:
            return
        try:
            os.rmdir(name, dir_fd=above)
        except OSError:
            pass  # something else is in it
        os.close(above)

    def close(self) -> None:
        """Let the name go."""
        os.close(self._fd)


def _encoded(instance: Instance) -> bytes:
    import binascii
    import json

    config = {"engineName": "apptainer", "containerID": instance.name, "engineConfig": {}}
    packed = binascii.b2a_base64(json.dumps(config).encode(), newline=False)
    fields = {
        "pid": instance.pid,
        "ppid": instance.ppid,
        "name": instance.name,
        "user": instance.user,
        "image": instance.image,
        "config": packed.decode(),
        "userns": instance.userns,
        "cgroup": instance.cgroup,
        "ip": instance.ip,
        "logErrPath": instance.log_err,
        "logOutPath": instance.log_out,
        "checkpoint": "",
        "sharensMode": instance.sharens,
        "startTime": instance.started,
        "bootId": instance.boot,
        "pidNamespace": instance.pid_space,
        "stopSignal": instance.stop_signal,
        "fakeroot": list(instance.fakeroot),
        "booted": instance.booted,
        "label": [os.fsdecode(item) for item in instance.label],
        "filter": [os.fsdecode(item) for item in instance.filter],
    }
    return json.dumps(fields, separators=(",", ":")).encode("utf-8", "surrogateescape")


_TEXTS = {
    "image": "image",
    "ip": "ip",
    "log_err": "logErrPath",
    "log_out": "logOutPath",
    "boot": "bootId",
    "stop_signal": "stopSignal",
}
_NUMBERS = {"pid": "pid", "ppid": "ppid", "started": "startTime", "pid_space": "pidNamespace"}


def _read_record(folder: int, file: str, owner: Owner) -> Instance | None:
    import json

    try:
        fd = _open_at(folder, file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode) or facts.st_uid != owner.uid:
            os.close(fd)
            return None
        found = json.loads(read_at_most(fd, _RECORD_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    fields: dict[str, object] = {}
    for ours, theirs in _TEXTS.items():
        value = found.get(theirs, "")
        fields[ours] = value if isinstance(value, str) else ""
    for ours, theirs in _NUMBERS.items():
        value = found.get(theirs, 0)
        fields[ours] = value if type(value) is int and 0 <= value < 1 << 63 else 0
    fields["userns"] = found.get("userns") is True
    fields["cgroup"] = found.get("cgroup") is True
    fields["booted"] = found.get("booted") is True
    parts = found.get("fakeroot")
    fields["fakeroot"] = tuple(
        part for part in FAKEROOT_PARTS if isinstance(parts, list) and part in parts
    )
    fields["label"] = _pair(found.get("label"))
    fields["filter"] = _pair(found.get("filter"))
    fields["sharens"] = found.get("sharensMode") is True
    return Instance(name=file.removesuffix(".json"), user=owner.name, **fields)  # type: ignore[arg-type]


def _pair(found: object) -> tuple[bytes, ...]:
    """Return two strings, or none; what is neither is two that no joiner takes for valid."""
    if found is None or found == []:
        return ()
    if isinstance(found, list) and len(found) == 2 and all(isinstance(item, str) for item in found):
        try:
            return tuple(item.encode("utf-8", "surrogateescape") for item in found)
        except UnicodeEncodeError:
            pass  # half of a pair of surrogates, which JSON can hold and no file's name
    return (b"", b"")


# ---- processes ----


def process_folder(pid: int) -> int:
    """Open what /proc says of a process: a descriptor for this one, whatever becomes of its number.

    Raises:
        OSError: there is no such process.
    """
    return os.open(f"/proc/{pid}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def read_at(folder: int, name: str) -> str:
    """Return a file of /proc about a process whose directory is open."""
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
    return read_at_most(fd, 1 << 16).decode("utf-8", "surrogateescape")


def look(folder: int) -> Process:
    """Return what the kernel says of a process whose directory is open.

    Raises:
        OSError: it has ended.
        ValueError: this is no process.
    """
    fields: dict[str, str] = {}
    for line in read_at(folder, "status").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key, value.strip())
    try:
        numbers = fields.get("NSpid", fields["Pid"])
        return Process(
            name=fields["Name"],
            parent=int(fields["PPid"]),
            uids=tuple(map(int, fields["Uid"].split())),
            numbers=tuple(map(int, numbers.split())),
            # Behind the name, which may hold brackets of its own, this is the 20th field.
            started=int(read_at(folder, "stat").rpartition(")")[2].split()[19]),
        )
    except (KeyError, IndexError):
        raise ValueError("this is no process") from None


def is_stopped(pid: int) -> bool:
    """Return whether a process does nothing until SIGCONT."""
    try:
        folder = process_folder(pid)
    except OSError:
        return False
    try:
        return read_at(folder, "stat").rpartition(")")[2].split()[0] == "T"
    except (OSError, IndexError):
        return False
    finally:
        os.close(folder)


def boot_id() -> str:
    """Return what stands for the time from this start of the machine to the next."""
    try:
        fd = os.open("/proc/sys/kernel/random/boot_id", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    return read_at_most(fd, 64).decode("ascii", "replace").strip()


def pid_space() -> int:
    """Return the pid namespace in which numbers mean what they mean to us."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def _title_of(pid: int) -> str | None:
    """Return how a process calls itself; None where /proc does not show it (hidepid)."""
    try:
        folder = process_folder(pid)
    except OSError:
        return None
    try:
        return read_at(folder, "cmdline").partition("\0")[0]
    except OSError:
        return None
    finally:
        os.close(folder)


def title(owner: Owner, name: str) -> str:
    """Return what an instance's keeper calls itself."""
    return f"Apptainer instance: {owner.name} [{name}]"


def are_hidden() -> bool:
    """Return whether /proc hides what is closed to its user, as the starter's processes are."""
    try:
        folder = process_folder(os.getppid())
    except OSError:
        return True
    try:
        look(folder)
    except (OSError, ValueError):
        return True
    finally:
        os.close(folder)
    return False


def is_running(instance: Instance, folder: int, owner: Owner) -> bool:
    """Return whether the process of an open directory of /proc is the one of the record.

    It is the first of a pid namespace below ours, named as our shim and Apptainer's, belongs to the
    owner of the record in every id, and its parent shows the instance's name; where /proc hides
    the parent, the first process has begun when the record says. Root's own may be the image's
    init, which is named as it likes.
    """
    if instance.pid_space not in (0, pid_space()) or instance.boot not in ("", boot_id()):
        return False
    try:
        process = look(folder)
    except (OSError, ValueError):
        return False
    return (
        (process.name == _SHIM or (instance.booted and owner.uid == 0))
        and process.numbers[-1:] == (1,)
        and len(process.numbers) > 1
        and process.parent == instance.ppid
        and instance.started in (0, process.started)
        and (owner.uid == 0 or set(process.uids) == {owner.uid})
        and _is_keeper(instance, owner)
    )


def _is_keeper(instance: Instance, owner: Owner) -> bool:
    shown = _title_of(instance.ppid)
    if shown is None:
        return bool(instance.started and instance.boot)
    return shown == title(owner, instance.name)


def open_running(instance: Instance, owner: Owner) -> int:
    """Return the open directory of /proc of an instance's process; -1 where it does not run."""
    if instance.pid <= 1:
        return -1
    try:
        folder = process_folder(instance.pid)
    except OSError:
        return -1
    if is_running(instance, folder, owner):
        return folder
    os.close(folder)
    return -1


def runs(instance: Instance, owner: Owner) -> bool:
    """Return whether an instance runs."""
    folder = open_running(instance, owner)
    if folder >= 0:
        os.close(folder)
    return folder >= 0


def find(owner: Owner, name: str) -> Instance | None:
    """Return the record of a name; it may be out of date."""
    try:
        folder = _open_folder(owner, f"{folder_of(owner)}/{name}", make=False)
    except OSError:
        return None
    try:
        return _read_record(folder, f"{name}.json", owner)
    finally:
        os.close(folder)


def every(owner: Owner) -> Iterator[Instance]:
    """Return the instances of an owner that run, by name; records of others are removed."""
    try:
        folder = _open_folder(owner, folder_of(owner), make=False)
        names = sorted(os.listdir(folder))
        os.close(folder)
    except OSError:
        return
    for name in names:
        if not is_name(name):
            continue
        found = find(owner, name)
        if found is not None and runs(found, owner):
            yield found
        elif found is not None and os.getuid() == owner.uid:
            forget(owner, name)


def forget(owner: Owner, name: str) -> None:
    """Remove the record of an instance that does not run, unless one of that name just starts."""
    try:
        place = Place(owner, name)
    except NotUsable:
        return
    if place.lock():
        found = place.read()
        if found is None or not runs(found, owner):
            place.remove(name)
    place.close()
