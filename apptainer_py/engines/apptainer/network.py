"""The network of a container: which one is wanted, who may have it, and its name servers."""

from __future__ import annotations

from apptainer_py.base import log
from apptainer_py.base.errors import LaunchError
from apptainer_py.engines.apptainer.policy import NotPermitted
from apptainer_py.model import protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from apptainer_py.model.request import ActionRequest
    from apptainer_py.runtime.contexts import Facts

DEFAULT = "bridge"
NONE = "none"


class RootOnly(NotPermitted):
    """A network that only root can have."""

    message = (
        "container creation failed: networks other than none are not supported yet for users other "
        "than root: use `--network none`, or leave --net out to share the host's network"
    )


class NotAnAddress(LaunchError):
    message = "container creation failed: dns ip {word} is not a valid IP address"


def judge(action: ActionRequest, facts: Facts) -> tuple[str, ...]:
    """Return the names of the networks that a container of its own network joins.

    Raises:
        RootOnly: this caller may join none of them.
    """
    if not action.net:
        log.info("Setting --net (required by --network)")
    names = tuple(name.strip() for name in (action.network or DEFAULT).split(","))
    if names == (NONE,):
        return ()
    if facts.flow != protocol.FLOW_ROOT:
        raise RootOnly
    raise LaunchError(text=f"the network {names[0]} is not supported yet: use `--network none`")


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
