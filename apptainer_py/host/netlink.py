"""Network devices that move into a container, by rtnetlink(7)."""

from __future__ import annotations

import os
import struct

from apptainer_py.base.errors import ApptainerError
from apptainer_py.kernel import _container

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_AF_NETLINK, _SOCK_RAW, _NETLINK_ROUTE = 16, 3, 0
_NEWLINK, _GETLINK, _NEWADDR, _GETADDR = 16, 18, 20, 22
_ERROR, _DONE = 2, 3
_REQUEST, _ACK, _DUMP, _CREATE, _EXCLUSIVE = 1, 4, 0x300, 0x400, 0x200
_IFLA_IFNAME, _IFLA_NET_NS_FD = 3, 28
_IFA_ADDRESS, _IFA_LOCAL, _IFA_BROADCAST, _IFA_FLAGS = 1, 2, 4, 8
_PERMANENT = 0x80
_UP = 1
_SCOPE_UNIVERSE = 0
_HEADER, _LINK, _ADDRESS, _ATTRIBUTE = "=IHHII", "=BxHiII", "=BBBBi", "=HH"
_NAME_BYTES_MAX = 15


class NetlinkError(ApptainerError):
    message = "{text}"


def attribute(kind: int, value: bytes) -> bytes:
    """Return one attribute, padded to four bytes."""
    size = struct.calcsize(_ATTRIBUTE) + len(value)
    return struct.pack(_ATTRIBUTE, size, kind) + value + bytes(-len(value) % 4)


def attributes(data: bytes) -> dict[int, bytes]:
    """Return the attributes in a message's tail by kind; what is cut off is left out."""
    found = {}
    place = 0
    while place + 4 <= len(data):
        size, kind = struct.unpack_from(_ATTRIBUTE, data, place)
        if size < 4 or place + size > len(data):
            break
        found[kind & 0x3FFF] = data[place + 4 : place + size]
        place += size + -size % 4
    return found


def messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (type, body) for each message of a datagram."""
    place = 0
    while place + 16 <= len(data):
        size, kind, _, _, _ = struct.unpack_from(_HEADER, data, place)
        if size < 16 or place + size > len(data):
            return
        yield kind, data[place + 16 : place + size]
        place += size + -size % 4


class Route:
    """A route socket in one network namespace: the caller's own, or that of a descriptor."""

    def __init__(self, namespace: int = -1) -> None:
        self._fd = _container.socket_in(namespace, _AF_NETLINK, _SOCK_RAW, _NETLINK_ROUTE)
        self._sequence = 0

    def close(self) -> None:
        """Close the socket."""
        os.close(self._fd)

    def ask(self, kind: int, flags: int, body: bytes) -> list[tuple[int, bytes]]:
        """Send one request and return the answers to it.

        Raises:
            OSError: as the kernel refuses.
        """
        self._sequence += 1
        header = struct.pack(
            _HEADER, 16 + len(body), kind, flags | _REQUEST | _ACK, self._sequence, 0
        )
        os.write(self._fd, header + body)
        found: list[tuple[int, bytes]] = []
        while True:
            for answer, data in messages(os.read(self._fd, 1 << 16)):
                if answer == _DONE:
                    return found
                if answer == _ERROR:
                    (number,) = struct.unpack_from("=i", data)
                    if number:
                        raise OSError(-number, os.strerror(-number))
                    return found
                found.append((answer, data))

    def index_of(self, name: str) -> int:
        """Return the index of a device."""
        body = struct.pack(_LINK, 0, 0, 0, 0, 0) + attribute(_IFLA_IFNAME, name.encode() + b"\0")
        for kind, data in self.ask(_GETLINK, 0, body):
            if kind == _NEWLINK:
                return int(struct.unpack_from(_LINK, data)[2])
        raise OSError(19, os.strerror(19))

    def set_link(self, index: int, *, up: bool, more: bytes = b"") -> None:
        """Set a device up or down, and what `more` has for attributes."""
        body = struct.pack(_LINK, 0, 0, index, _UP if up else 0, _UP)
        self.ask(_NEWLINK, 0, body + more)

    def kept_addresses(self, index: int) -> list[bytes]:
        """Return the addresses that a device should not lose: permanent and valid everywhere.

        Each is a message for add_address(), but for the index.
        """
        found = []
        body = struct.pack(_ADDRESS, 0, 0, 0, 0, 0)
        for kind, data in self.ask(_GETADDR, _DUMP, body):
            if kind != _NEWADDR:
                continue
            family, prefix, flags, scope, owner = struct.unpack_from(_ADDRESS, data)
            tail = attributes(data[8:])
            if _IFA_FLAGS in tail:
                (flags,) = struct.unpack_from("=I", tail[_IFA_FLAGS])
            if owner != index or scope != _SCOPE_UNIVERSE or not flags & _PERMANENT:
                continue
            kept = b"".join(
                attribute(key, tail[key])
                for key in (_IFA_ADDRESS, _IFA_LOCAL, _IFA_BROADCAST)
                if key in tail
            )
            found.append(bytes((family, prefix, _PERMANENT, scope)) + kept)
        return found

    def add_address(self, index: int, kept: bytes) -> None:
        """Give a device an address that kept_addresses() has returned."""
        body = kept[:4] + struct.pack("=i", index) + kept[4:]
        self.ask(_NEWADDR, _CREATE | _EXCLUSIVE, body)


def move_devices(devices: dict[str, str], pid: int) -> None:
    """Move network devices into a process's network namespace, under new names, and set them up.

    Their permanent global addresses go with them (config-linux.md, Network Devices).

    Raises:
        NetlinkError: there is no such device, or the kernel does not let it go.
    """
    namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        here, there = Route(), Route(namespace)
        try:
            for name, new_name in devices.items():
                _move(here, there, namespace, (name, new_name or name))
        finally:
            here.close()
            there.close()
    finally:
        os.close(namespace)


def _move(here: Route, there: Route, namespace: int, names: tuple[str, str]) -> None:
    name, new_name = names
    try:
        if not 0 < len(new_name.encode()) <= _NAME_BYTES_MAX:
            raise OSError(22, os.strerror(22))
        index = here.index_of(name)
        kept = here.kept_addresses(index)
        # Its name can only be changed while it is down, and it goes under the new one at once: the
        # old may be taken there.
        target = attribute(_IFLA_IFNAME, new_name.encode() + b"\0")
        target += attribute(_IFLA_NET_NS_FD, struct.pack("=I", namespace))
        here.set_link(index, up=False)
        here.set_link(index, up=False, more=target)
        index = there.index_of(new_name)
        for address in kept:
            there.add_address(index, address)
        there.set_link(index, up=True)
    except OSError as error:
        why = (error.strerror or "").lower()
        text = f'unable to move network device "{name}" to "{new_name}": {why}'
        raise NetlinkError(text=text) from None
