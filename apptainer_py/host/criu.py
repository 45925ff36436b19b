"""CRIU, driven as its own library drives it: `criu swrk` and messages of its rpc.proto.

Only the fields that are used here are named; the numbers are those of CRIU's images/rpc.proto.
"""

from __future__ import annotations

import os

from apptainer_py.base.errors import ApptainerError
from apptainer_py.base.files import read_at_most

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    # Field number → what was there, in order: numbers, or the bytes of texts and messages.
    Fields = dict[int, list[int | bytes]]
    # Called with a step's name, the process it is about, and a descriptor that came with it or -1.
    Notified = Callable[[str, int, int], None]

DUMP, RESTORE, PRE_DUMP, _NOTIFY, _FEATURE_CHECK, _VERSION = 1, 2, 4, 6, 9, 10
_NAMES = {
    DUMP: "DUMP", RESTORE: "RESTORE", PRE_DUMP: "PRE_DUMP", _NOTIFY: "NOTIFY",
    _FEATURE_CHECK: "FEATURE_CHECK", _VERSION: "VERSION",
}  # fmt: skip
CGROUP_MODES = {"ignore": 0, "soft": 3, "full": 4, "strict": 5, "": 6}
# criu_opts by name.
OPTIONS = {
    "images_dir_fd": 1, "pid": 2, "leave_running": 3, "ext_unix_sk": 4, "tcp_established": 5,
    "evasive_devices": 6, "shell_job": 7, "file_locks": 8, "log_level": 9, "log_file": 10,
    "ps": 11, "notify_scripts": 12, "root": 13, "parent_img": 14, "track_mem": 15,
    "auto_dedup": 16, "work_dir_fd": 17, "link_remap": 18, "ext_mnt": 23, "manage_cgroups": 24,
    "cg_root": 25, "rst_sibling": 26, "inherit_fd": 27, "manage_cgroups_mode": 34,
    "external": 37, "empty_ns": 38, "join_ns": 39, "freeze_cgroup": 44, "tcp_skip_in_flight": 46,
    "lazy_pages": 48, "status_fd": 49, "orphan_pts_master": 50, "config_file": 51,
    "lsm_profile": 53, "lsm_mount_context": 63,
}  # fmt: skip
_REQUEST_TYPE, _REQUEST_OPTIONS, _REQUEST_SUCCESS, _REQUEST_FEATURES = 1, 2, 3, 5
_ANSWER_TYPE, _ANSWER_SUCCESS, _ANSWER_NOTIFY, _ANSWER_ERRNO = 1, 2, 5, 7
_ANSWER_FEATURES, _ANSWER_VERSION = 8, 10
FEATURES = {"MemTrack": 1, "LazyPages": 2}
_MESSAGE_BYTES = 10 * 4096
_VARINT_BYTES = 10
_NUMBER, _BYTES = 0, 2
_FIXED = {1: 8, 5: 4}
# Numbers from here on are nobody's before the child has its own.
_HIGH_FD = 100
FIRST_PASSED_FD = 4


class CriuError(ApptainerError):
    """What CRIU cannot do, in the words that runc has for it."""

    message = "{text}"
    exit_code = 1


def _varint(number: int) -> bytes:
    number &= (1 << 64) - 1
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def field(number: int, value: int | str | bytes) -> bytes:
    """Return one field of a message: a number or truth value, or a text or message."""
    if isinstance(value, int):
        return _varint(number << 3 | _NUMBER) + _varint(value)
    data = value if isinstance(value, bytes) else os.fsencode(value)
    return _varint(number << 3 | _BYTES) + _varint(len(data)) + data


def pair(first: str, second: int | str) -> bytes:
    """Return a message with two fields: a key and a value, a name and a file."""
    return field(1, first) + field(2, second)


def options(values: Mapping[str, int | str | bytes | Sequence[str | bytes]]) -> bytes:
    """Return criu_opts; a sequence is a field that is there more than once."""
    parts = []
    for name, value in values.items():
        many = [value] if isinstance(value, (int, str, bytes)) else value
        parts += [field(OPTIONS[name], one) for one in many]
    return b"".join(parts)


def _take_varint(data: bytes, place: int) -> tuple[int, int]:
    number = shift = 0
    for byte in data[place : place + _VARINT_BYTES]:
        number |= (byte & 0x7F) << shift
        place += 1
        shift += 7
        if byte < 0x80:
            return number, place
    raise ValueError("a number does not end")


def fields_of(data: bytes) -> Fields:
    """Take a message apart.

    Raises:
        ValueError: it is none.
    """
    found: Fields = {}
    place = 0
    while place < len(data):
        key, place = _take_varint(data, place)
        kind = key & 7
        value: int | bytes
        if kind == _NUMBER:
            value, place = _take_varint(data, place)
        elif kind not in (_BYTES, *_FIXED):
            raise ValueError("a field of no known kind")
        else:
            size = _FIXED.get(kind, 0)
            if kind == _BYTES:
                size, place = _take_varint(data, place)
            if place + size > len(data):
                raise ValueError("a field is longer than its message")
            value = data[place : place + size]
            place += size
        found.setdefault(key >> 3, []).append(value)
    return found


def _number(found: Fields, key: int, default: int = 0) -> int:
    value = found.get(key, [default])[-1]
    return value if isinstance(value, int) else default


def _message(found: Fields, key: int) -> Fields:
    value = found.get(key, [b""])[-1]
    return fields_of(value) if isinstance(value, bytes) else {}


def _text(found: Fields, key: int) -> str:
    value = found.get(key, [b""])[-1]
    return os.fsdecode(value) if isinstance(value, bytes) else ""


def _become(
    path: str, argv: list[str], environment: Mapping[str, str], passed: Sequence[int]
) -> None:
    import fcntl
    import signal

    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _HIGH_FD) for fd in passed]
    for number, fd in enumerate(high, 3):
        os.dup2(fd, number)
    # A mask of ours would be CRIU's, which waits for signals.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.execve(path, argv, dict(environment))


class Criu:
    """One `criu swrk` process, for one request (criu(8), rpc)."""

    def __init__(
        self, program: str, environment: Mapping[str, str], passed: Sequence[int] = ()
    ) -> None:
        """Start it with our own streams; `passed` are its descriptors from 4 on."""
        import shutil
        import socket

        path = shutil.which(program, path=environment.get("PATH", ""))
        if path is None:
            raise CriuError(text=f'exec: "{program}": executable file not found in $PATH')
        self._socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        failed, said = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            try:
                os.close(failed)
                _become(path, [program, "swrk", "3"], environment, [other.fileno(), *passed])
            except OSError as error:
                os.write(said, f"fork/exec {path}: {(error.strerror or '').lower()}".encode())
            finally:
                os._exit(127)
        # Ours must be the only end: if CRIU dies, we see it.
        other.close()
        os.close(said)
        self._waited = False
        text = read_at_most(failed, _MESSAGE_BYTES)
        if text:
            self.close()
            raise CriuError(text=text.decode("utf-8", "surrogateescape"))

    def close(self) -> None:
        """End the conversation, and wait for the process."""
        self._socket.close()
        if not self._waited:
            self._waited = True
            os.waitpid(self.pid, 0)

    def finish(self) -> int:
        """Say that nothing more comes; returns the wait status."""
        import socket

        self._socket.shutdown(socket.SHUT_WR)
        _, status = os.waitpid(self.pid, 0)
        self._waited = True
        return status

    def ask(
        self,
        kind: int,
        wanted: bytes = b"",
        features: bytes = b"",
        notified: Notified | None = None,
    ) -> Fields:
        """Send a request, and answer what CRIU asks meanwhile; returns its last message.

        Raises:
            CriuError: it fails, or ends.
        """
        request = field(_REQUEST_TYPE, kind)
        if wanted:
            request += field(_REQUEST_OPTIONS, wanted)
        if features:
            request += field(_REQUEST_FEATURES, features)
        self._send(request)
        while True:
            answer, fd = self._receive()
            answered = _number(answer, _ANSWER_TYPE)
            if not _number(answer, _ANSWER_SUCCESS):
                name = _NAMES.get(answered, str(answered))
                code = _number(answer, _ANSWER_ERRNO)
                raise CriuError(text=f"criu failed: type {name} errno {code}")
            if answered != _NOTIFY:
                return answer
            said = _message(answer, _ANSWER_NOTIFY)
            if notified is not None:
                notified(_text(said, 1), _number(said, 2), fd)
            self._send(field(_REQUEST_TYPE, _NOTIFY) + field(_REQUEST_SUCCESS, 1))

    def _send(self, data: bytes) -> None:
        try:
            self._socket.send(data)
        except OSError as error:
            text = f"write unix: {(error.strerror or '').lower()}"
            raise CriuError(text=text) from None

    def _receive(self) -> tuple[Fields, int]:
        import socket

        try:
            data, fds, _, _ = socket.recv_fds(
                self._socket, _MESSAGE_BYTES, 4, socket.MSG_CMSG_CLOEXEC
            )
        except OSError as error:
            raise CriuError(text=f"read unix: {(error.strerror or '').lower()}") from None
        for fd in fds[1:]:
            os.close(fd)
        if not data:
            raise CriuError(text="unexpected EOF")
        try:
            return fields_of(data), fds[0] if fds else -1
        except ValueError:
            raise CriuError(text="unable to parse the response of criu") from None


def version(program: str, environment: Mapping[str, str]) -> int:
    """Return CRIU's version as one number: 4.2.1 is 40201.

    Raises:
        CriuError: there is none.
    """
    try:
        criu = Criu(program, environment)
        try:
            said = _message(criu.ask(_VERSION), _ANSWER_VERSION)
        finally:
            criu.close()
    except CriuError as error:
        raise CriuError(text=f"CRIU version check failed: {error}") from None
    number = _number(said, 1) * 10000 + _number(said, 2) * 100 + _number(said, 4)
    if _text(said, 3):
        # A build between two versions is as good as the next.
        number -= number % 100
        number += 100
    return number


def check_feature(program: str, environment: Mapping[str, str], name: str) -> None:
    """Refuse what this CRIU, or this kernel, cannot do; `name` is one of FEATURES.

    Raises:
        CriuError: it is missing.
    """
    number = FEATURES[name]
    try:
        criu = Criu(program, environment)
        try:
            answer = criu.ask(_FEATURE_CHECK, features=field(number, 1))
        finally:
            criu.close()
    except CriuError as error:
        raise CriuError(text=f"CRIU feature check failed: {error}") from None
    if not _number(_message(answer, _ANSWER_FEATURES), number):
        raise CriuError(text=f"criu is missing features: [{name}]")
