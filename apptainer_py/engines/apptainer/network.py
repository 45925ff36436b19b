"""The network of a container: which one is wanted, who may have it, and its name servers."""

from __future__ import annotations

from apptainer_py.base import build, log
from apptainer_py.base.errors import LaunchError, NotSupported
from apptainer_py.engines.apptainer.policy import NotPermitted
from apptainer_py.host import cni
from apptainer_py.model import protocol
from apptainer_py.runtime.mounting import refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from apptainer_py.engines.apptainer.joined import Existing, UserNetwork
    from apptainer_py.host.cni import Arguments, Network
    from apptainer_py.model.request import ActionRequest
    from apptainer_py.runtime.contexts import PrepareContext
    from apptainer_py.runtime.janitor import Janitor
    from apptainer_py.runtime.mounting import Mounting


DEFAULT = "bridge"
NONE = "none"
USER = "user"
FAKEROOT = "fakeroot"
_PLUGINS = 8
_PROTOCOLS = {"tcp": 6, "udp": 17, "sctp": 132}
_WISHES = "a user may ask for `portmap` and, of a range that host-local keeps, for `IP`"
DIRECTORY = f"{build.SYSCONFDIR}/network"


class NotAllowed(NotPermitted):
    """A network that this caller cannot have."""

    message = (
        "container creation failed: network {name} is for root, and in the setuid flow for those "
        "whom `allow net users` or `allow net groups` names, if `allow net networks` has it"
    )
    hint = "use `--network user` or `--network none`, or leave --net out for the host's network"


class NoFakerootNetwork(NotPermitted):
    message = (
        "container creation failed: network fakeroot is for root and for --fakeroot in the setuid "
        "flow"
    )
    hint = "use `--network none`, or leave --net out for the host's network"


class NotAnAddress(LaunchError):
    message = "container creation failed: dns ip {word} is not a valid IP address"


class Networks:
    """The administrator's networks of one container, and what the caller says about each."""

    __slots__ = ("address", "arguments", "directory", "flags", "names", "plugins", "user")

    def __init__(
        self, names: tuple[str, ...], networks: tuple[Network, ...], arguments: list[Arguments],
        *, directory: str, user: bool,
    ) -> None:  # fmt: skip
        self.directory = directory
        self.names = names
        self.plugins = [[str(one["type"]) for one in network.plugins] for network in networks]
        self.arguments = arguments
        self.user = user
        self.flags = 0
        self.address = ""

    def close(self) -> None:
        """Leave it to the janitor."""


def judge(
    action: ActionRequest, context: PrepareContext
) -> Existing | Networks | UserNetwork | None:
    """Return the networks that a container of its own network joins, None for none.

    Raises:
        NotPermitted: this caller may not join one of them.
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
        return _users_own(action, context)
    user = facts.flow != protocol.FLOW_ROOT
    if user:
        setuid = facts.flow == protocol.FLOW_SETUID
        listed = _listed(facts.configuration) if setuid else ()
        names = _of_fakeroot(names, setuid=setuid) if action.fakeroot else _among(listed, names)
    directory = str(facts.configuration["cni configuration path"]) or DIRECTORY
    networks = cni.find_networks(directory, names)
    arguments = cni.parse_arguments(action.network_args, names)
    for network, one in zip(networks, arguments, strict=True):
        cni.check_use(network, one)
    directory = str(facts.configuration["cni plugin path"])
    return Networks(names, networks, arguments, directory=directory, user=user)


def _users_own(action: ActionRequest, context: PrepareContext) -> UserNetwork:
    from apptainer_py.engines.apptainer.joined import UserNetwork

    (arguments,) = cni.parse_arguments(action.network_args, (USER,))
    if arguments.pairs:
        raise cni.NetworkWrong(text="the network user takes no argument but portmap")
    if any(port["protocol"] == "sctp" for port in arguments.ports):
        raise cni.NetworkWrong(text="the network user passes on tcp and udp, and no sctp")
    cni.check_ports(arguments)
    return UserNetwork(arguments, context)


def _listed(configuration: Mapping[str, object]) -> tuple[str, ...]:
    listed = configuration["allow net networks"]
    return tuple(listed) if isinstance(listed, tuple | list) else ()


def _among(listed: tuple[str, ...], names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if name not in listed:
            raise NotAllowed(name=name)
    return names


def _of_fakeroot(names: tuple[str, ...], *, setuid: bool) -> tuple[str, ...]:
    if not setuid:
        raise NoFakerootNetwork
    if names != (FAKEROOT,):
        log.warning(f"network {','.join(names)} is replaced by `{FAKEROOT}`, the one of --fakeroot")
    return (FAKEROOT,)


def join(networks: Networks, mounting: Mounting, janitor: Callable[[], Janitor]) -> None:
    """Have the starter judge each network and port, and then the janitor run the plugins.

    Raises:
        NotAllowed: the starter refuses a network.
        NetworkWrong: it cannot use it, or a port.
        PluginFailed: a plugin could not do its part.
    """
    for at, name in enumerate(networks.names):
        _add(networks, mounting, at, name)
    code, error, which, said = janitor().connect()
    if code not in (protocol.ERR_OK, protocol.ERR_PLUGIN):
        raise refused(f"networks {','.join(networks.names)}", code, error)
    if code != protocol.ERR_OK:
        plugin = networks.plugins[which // _PLUGINS][which % _PLUGINS]
        path = f"{networks.directory}/{plugin}"
        raise cni.PluginFailed(plugin=plugin, reason=cni.plugin_reason(path, error, said))
    networks.address = cni.address_of(said)


def _add(networks: Networks, mounting: Mounting, at: int, name: str) -> None:
    arguments = networks.arguments[at]
    code, error = mounting.network(name, arguments.text())
    if code == protocol.ERR_REFUSED and networks.user and arguments.pairs:
        raise cni.NetworkWrong(text=f"network {name}: {_WISHES}")
    if code == protocol.ERR_REFUSED:
        raise NotAllowed(name=name)
    if code not in (protocol.ERR_OK, protocol.ERR_NETWORK):
        raise refused(f"network {name}", code, error)
    if code == protocol.ERR_NETWORK:
        text = f"network {name}: its files and their directories must be root's down from /"
        raise cni.NetworkWrong(text=text)
    for port in arguments.ports:
        numbers = (at, port["hostPort"], port["containerPort"], _PROTOCOLS[port["protocol"]])
        code, error = mounting.port(numbers)
        if code != protocol.ERR_OK:
            raise cni.port_taken(port, error)


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
