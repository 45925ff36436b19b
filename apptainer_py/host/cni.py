"""CNI: networks as the administrator's files define them, and the plugins that carry them out.

Everything is root's own file, and what a caller says is of a strict alphabet: CNI_ARGS has no
quoting, so that a `;` would be one more argument.
"""

from __future__ import annotations

import os
import stat

from apptainer_py.base.errors import LaunchError
from apptainer_py.base.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_ENDINGS = (".conflist", ".conf", ".json")
_FILE_BYTES_MAX = 1 << 20
_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
_NAME = _LETTERS | frozenset("_-")
_VALUE = _NAME | frozenset(".:/")
_PROTOCOLS = ("tcp", "udp", "sctp")
_NAME_MAX, _VALUE_MAX = 63, 128


class NetworkWrong(LaunchError):
    """A network's definition or argument cannot be used."""

    message = "container creation failed: {text}"


class PluginFailed(LaunchError):
    message = 'container creation failed: plugin type="{plugin}" failed (add): {reason}'


class Network(Record):
    """One network: its plugins in order, as JSON objects."""

    name: str
    version: str
    plugins: tuple[dict[str, Any], ...]


def read_own(path: str, most: int = _FILE_BYTES_MAX) -> bytes:
    """Return the content of a file that is root's and that nobody else can write.

    Raises:
        NetworkWrong: it is not, or cannot be read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise NetworkWrong(text=f"open {path}: {(error.strerror or '').lower()}") from None
    try:
        check_own(path, os.fstat(fd), regular=True)
        return os.read(fd, most)
    finally:
        os.close(fd)


def check_own(path: str, found: os.stat_result, *, regular: bool) -> None:
    """Refuse what somebody other than root could change.

    Raises:
        NetworkWrong: says so.
    """
    right_kind = stat.S_ISREG(found.st_mode) if regular else stat.S_ISDIR(found.st_mode)
    if not right_kind or found.st_uid != 0 or found.st_mode & 0o022:
        raise NetworkWrong(text=f"{path} must belong to root and be writable by nobody else")


def find_networks(directory: str, names: tuple[str, ...]) -> tuple[Network, ...]:
    """Return the networks of these names, each from the first file that defines it.

    Raises:
        NetworkWrong: there is none, or a file is not what it should be.
    """
    import json

    try:
        check_own(directory, os.stat(directory), regular=False)
        files = sorted(name for name in os.listdir(directory) if name.endswith(_ENDINGS))
    except OSError as error:
        reason = (error.strerror or "").lower()
        raise NetworkWrong(text=f"network setup failed: {directory}: {reason}") from None
    known: dict[str, Network] = {}
    for file in files:
        if known.keys() >= {*names}:
            break  # what is wrong in a file behind them is nobody's concern who has these
        path = f"{directory}/{file}"
        try:
            network = _network(path, json.loads(read_own(path)))
        except (ValueError, RecursionError) as error:
            raise NetworkWrong(text=f"{path}: {str(error).splitlines()[0].lower()}") from None
        known.setdefault(network.name, network)
    for name in names:
        if name not in known:
            text = f'network setup failed: no net configuration with name "{name}" in {directory}'
            raise NetworkWrong(text=text)
    return tuple(known[name] for name in names)


def _network(path: str, found: object) -> Network:
    if not isinstance(found, dict):
        raise NetworkWrong(text=f"{path}: this is no network")
    plugins = found.get("plugins", [found])
    name, version = found.get("name"), found.get("cniVersion", "0.2.0")
    fit = isinstance(plugins, list) and 0 < len(plugins) <= 8
    fit = fit and all(isinstance(one, dict) and is_name(one.get("type")) for one in plugins)
    if not fit or not is_name(name) or not isinstance(version, str):
        raise NetworkWrong(text=f"{path}: this is no network")
    return Network(name=str(name), version=version, plugins=tuple(plugins))


def is_name(text: object) -> bool:
    """Return whether something is fit to be the name of a network or plugin."""
    return isinstance(text, str) and 0 < len(text) <= _NAME_MAX and _NAME.issuperset(text)


class Arguments:
    """What a caller says about one network: CNI_ARGS, and ports to pass on."""

    __slots__ = ("pairs", "ports")

    def __init__(self) -> None:
        self.pairs: list[tuple[str, str]] = []
        self.ports: list[dict[str, Any]] = []

    def text(self) -> str:
        """Return them as CNI_ARGS has them."""
        return ";".join(f"{key}={value}" for key, value in self.pairs)


def parse_arguments(words: tuple[str, ...], networks: tuple[str, ...]) -> list[Arguments]:
    """Return the arguments for each network from `[network:]KEY=value[;KEY=value]` words.

    Raises:
        NetworkWrong: one cannot be understood, or would be more than one argument.
    """
    found = [Arguments() for _ in networks]
    for word in words:
        before, colon, after = word.partition(":")
        name, pairs = (before, after) if colon and "=" not in before else (networks[0], word)
        if name not in networks:
            raise _wrong(f"network {name} wasn't specified in --network option")
        for pair in pairs.split(";"):
            key, equals, value = pair.partition("=")
            fit = 0 < len(value) <= _VALUE_MAX and _VALUE.issuperset(value)
            if not equals or not is_name(key) or not fit:
                raise _wrong(f"invalid argument: {pair}")
            arguments = found[networks.index(name)]
            if key == "portmap":
                arguments.ports.append(port_mapping(value))
            else:
                arguments.pairs.append((key, value))
    return found


def _wrong(reason: str) -> NetworkWrong:
    return NetworkWrong(text=f"error while setting network arguments: {reason}")


def port_mapping(text: str) -> dict[str, Any]:
    """Return the `portMappings` entry of `hostPort:containerPort/protocol`.

    Raises:
        NetworkWrong: it has another form, or a number is no port.
    """
    ports, slash, layer = text.partition("/")
    host, colon, inside = ports.partition(":")
    if not slash or layer not in _PROTOCOLS:
        raise _wrong(
            f"badly formatted portmap argument '{text}', must be of form "
            "portmap=hostPort:containerPort/protocol"
        )
    numbers = []
    for word in (host, inside if colon else host):
        number = int(word) if word.isascii() and word.isdigit() and len(word) <= 5 else 0
        if not 0 < number < 65536:
            raise _wrong(f"'{word}' is no port")
        numbers.append(number)
    return {"hostPort": numbers[0], "containerPort": numbers[1], "protocol": layer}


def check_use(network: Network, arguments: Arguments) -> None:
    """Refuse ports for a network without a plugin that passes them on.

    Raises:
        NetworkWrong: says so.
    """
    able = [one.get("capabilities") for one in network.plugins]
    if arguments.ports and not any(isinstance(x, dict) and x.get("portMappings") for x in able):
        raise _wrong(f"the network {network.name} passes no port on")


def plugin_reason(path: str, error: int, said: bytes) -> str:
    """Return why a plugin has failed: what could not be done, or what it says itself."""
    import errno
    import json

    if error == errno.ETIME:
        return "it did not end within a minute, and was killed"
    if error:
        return f"{path}: {os.strerror(error).lower()}"
    try:
        result = json.loads(said)
    except (ValueError, RecursionError):
        result = None
    text = result.get("msg") if isinstance(result, dict) else None
    return str(text or "it gave no reason").replace("\n", " ")


def address_of(said: bytes) -> str:
    """Return the address that a network's result gives the container, "" for none; IPv4 first."""
    import json

    try:
        result = json.loads(said)
        older = [result[key]["ip"] for key in ("ip4", "ip6") if key in result]
        found = [one["address"] for one in result.get("ips", ())] or older
        alone = [str(one).partition("/")[0] for one in found]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return ""
    return next((one for one in alone if ":" not in one), alone[0] if alone else "")


def port_taken(port: dict[str, Any], error: int) -> NetworkWrong:
    """Return what says that a port of the host cannot be had."""
    reason = os.strerror(error).lower() if error else "this protocol is root's"
    text = f"host port {port['hostPort']}/{port['protocol']} cannot be used: {reason}"
    return _wrong(text)


def check_ports(arguments: Arguments) -> None:
    """Refuse a port that the caller could not bind, or that is asked for twice.

    Raises:
        NetworkWrong: names it.
    """
    import socket

    bound = []
    try:
        for port in arguments.ports:
            stream = port["protocol"] == "tcp"
            one = socket.socket(socket.AF_INET, socket.SOCK_STREAM if stream else socket.SOCK_DGRAM)
            bound.append(one)
            if stream:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                one.bind(("", port["hostPort"]))
                if stream:
                    one.listen(1)
            except OSError as error:
                raise port_taken(port, error.errno or 0) from None
    finally:
        for one in bound:
            one.close()
