"""The network of a container: which one is wanted, who may have it, and its name servers."""

from __future__ import annotations

import os
import time

from apptainer_py.base import build, log
from apptainer_py.base.errors import LaunchError, NotSupported
from apptainer_py.engines.apptainer.policy import NotPermitted
from apptainer_py.host import cni
from apptainer_py.model import protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from apptainer_py.engines.apptainer.joined import Existing, UserNetwork
    from apptainer_py.host.cni import Arguments, Network
    from apptainer_py.model.request import ActionRequest
    from apptainer_py.runtime.contexts import PrepareContext
    from apptainer_py.runtime.janitor import Janitor


DEFAULT = "bridge"
NONE = "none"
USER = "user"
DIRECTORY = f"{build.SYSCONFDIR}/network"


class RootOnly(NotPermitted):
    """A network that only root can have."""

    message = (
        "container creation failed: CNI networks are for root, whatever `allow net networks` says: "
        "their plugins run as root, and nothing of a user's launch does"
    )
    hint = "use `--network user` or `--network none`, or leave --net out for the host's network"


class NotAnAddress(LaunchError):
    message = "container creation failed: dns ip {word} is not a valid IP address"


class Networks:
    """The networks of one container, and what the caller says about each."""

    __slots__ = ("arguments", "flags", "networks", "plugins")

    def __init__(
        self, networks: tuple[Network, ...], arguments: list[Arguments], plugins: str
    ) -> None:
        self.networks = networks
        self.arguments = arguments
        self.plugins = plugins
        self.flags = 0

    def close(self) -> None:
        """Leave it to the janitor."""


def judge(
    action: ActionRequest, context: PrepareContext
) -> Existing | Networks | UserNetwork | None:
    """Return the networks that a container of its own network joins, None for none.

    Raises:
        RootOnly: this caller may join none of them.
        NetworkWrong: there is no such network, or an argument is wrong.
    """
    facts = context.facts
    if action.fakeroot and (action.netns_path or action.network.strip() == USER):
        option = "--netns-path" if action.netns_path else "--network user"
        raise NotSupported(what=f"`{option}` with --fakeroot")
    if action.netns_path:
        from apptainer_py.engines.apptainer.joined import Existing

        return Existing(action, context)
    if not action.net:
        log.info(f"Setting --net (required by --network{'' if action.network else '-args'})")
    names = tuple(name.strip() for name in (action.network or DEFAULT).split(","))
    if names == (NONE,):
        return None
    if names == (USER,):
        from apptainer_py.engines.apptainer.joined import UserNetwork

        arguments = cni.parse_arguments(action.network_args, names)
        if arguments[0].pairs:
            raise cni.NetworkWrong(text="the network user takes no argument but portmap")
        cni.check_ports(arguments[0])
        return UserNetwork(arguments[0], context)
    if facts.flow != protocol.FLOW_ROOT:
        raise RootOnly
    directory = str(facts.configuration["cni configuration path"]) or DIRECTORY
    networks = cni.find_networks(directory, names)
    arguments = cni.parse_arguments(action.network_args, names)
    for one in arguments:
        cni.check_ports(one)
    return Networks(networks, arguments, str(facts.configuration["cni plugin path"]))


def join(networks: Networks, janitor: Janitor) -> None:
    """Have the plugins connect the container; what they make, the janitor has them undo."""
    number = time.time_ns()
    for at, network in enumerate(networks.networks):
        Joining(networks, janitor, (number, at)).run(network)


class Joining:
    """One network that a container joins as its interface `eth<N>`."""

    def __init__(self, networks: Networks, janitor: Janitor, numbers: tuple[int, int]) -> None:
        self.numbers = numbers
        self.janitor = janitor
        self.arguments = networks.arguments[numbers[1]]
        self.directory = networks.plugins
        self.configs: list[int] = []

    def run(self, network: Network) -> None:
        """Run the plugins in order; each begins with what the one before it has done."""
        previous = None
        for number, plugin in enumerate(network.plugins):
            self.register(network, number, previous)
            config = cni.plugin_config(network, number, self.arguments, previous)
            program = f"{self.directory}/{plugin['type']}"
            done = cni.run_plugin(program, self.variables(), config, self.janitor.fd)
            previous = done or previous
            for at, fd in enumerate(self.configs):
                self.write(fd, network, at, previous)
        for fd in self.configs:
            os.close(fd)

    def register(self, network: Network, number: int, previous: dict[str, Any] | None) -> None:
        """Tell the janitor before anything is made; it reads the file when all has ended."""
        fd = os.memfd_create("network", os.MFD_CLOEXEC)
        self.configs.append(fd)
        self.write(fd, network, number, previous)
        plugin = network.plugins[number]["type"]
        self.janitor.network(self.numbers, plugin, self.arguments.text(), fd)

    def write(
        self, fd: int, network: Network, number: int, previous: dict[str, Any] | None
    ) -> None:
        """Write what undoing needs, in one call: a reader finds the old text or the new."""
        text = cni.plugin_config(network, number, self.arguments, previous)
        os.pwrite(fd, text.ljust(os.fstat(fd).st_size), 0)

    def variables(self) -> dict[str, str]:
        """Return the environment of a plugin, which has nothing of the caller's."""
        return {
            "CNI_COMMAND": "ADD",
            "CNI_CONTAINERID": f"apptainer-py-{self.numbers[0]}",
            "CNI_NETNS": f"/proc/{self.janitor.container_pid}/ns/net",
            "CNI_IFNAME": f"eth{self.numbers[1]}",
            "CNI_PATH": self.directory,
            "CNI_ARGS": self.arguments.text(),
        }


def resolv_conf(servers: str) -> bytes:
    """Return the resolv.conf that names these servers, which have commas between them.

    Raises:
        NotAnAddress: one is no address.
    """
    import ipaddress

    lines = []
    for word in servers.split(","):
        try:
            lines.append(f"nameserver {ipaddress.ip_address(word.strip())}\n")
        except ValueError:
            raise NotAnAddress(word=word.strip()) from None
    return "".join(lines).encode()
