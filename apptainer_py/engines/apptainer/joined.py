"""Networks that a container joins as they are: pasta's without privilege, and existing ones."""

from __future__ import annotations

import os

from apptainer_py.base import build, log
from apptainer_py.base.errors import LaunchError
from apptainer_py.engines.apptainer.policy import NotPermitted
from apptainer_py.model import protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from apptainer_py.host.cni import Arguments
    from apptainer_py.host.pasta import Pasta
    from apptainer_py.model.request import ActionRequest
    from apptainer_py.runtime.contexts import PrepareContext
    from apptainer_py.runtime.mounting import Mounting


class NotAllowed(NotPermitted):
    """The administrator's file does not let this caller join the namespace at that path."""

    message = '"{path}" is not an allowed netns path in {file}'


class NoNetwork(LaunchError):
    message = "while checking netns path: {reason}"


class UserNetwork:
    """`--network user`: pasta runs as the caller, outside; the container has one interface of it.

    Where the container has a user namespace of its own, pasta enters that one; in the other flows
    the container joins the network of pasta's own user namespace, which is the caller's too.
    """

    __slots__ = ("_arguments", "_own_namespace", "_pasta", "flags")

    def __init__(self, arguments: Arguments, context: PrepareContext) -> None:
        self._arguments = arguments
        self._own_namespace = context.facts.flow == protocol.FLOW_USERNS
        self._pasta: Pasta | None = None
        self.flags = 0
        if not self._own_namespace:
            if context.join_network(self._start(None).network_fd) != protocol.ERR_OK:
                raise NoNetwork(reason="the starter refuses pasta's network")
            self.flags = protocol.PLANFLAG_JOIN_NET

    def _start(self, spaces: tuple[int, int] | None) -> Pasta:
        from apptainer_py.host.pasta import Pasta

        self._pasta = Pasta(self._arguments.ports, spaces)
        return self._pasta

    def connect(self, mounting: Mounting) -> None:
        """Connect a container that has begun with an empty network."""
        if self._own_namespace:
            spaces = (mounting.space(0), mounting.space(1))
            self._start(spaces)
            for fd in spaces:
                os.close(fd)

    def close(self) -> None:
        """End pasta."""
        if self._pasta is not None:
            self._pasta.close()


class Existing:
    """`--netns-path`: a namespace that somebody else looks after."""

    __slots__ = ("flags",)

    def __init__(self, action: ActionRequest, context: PrepareContext) -> None:
        path = action.netns_path
        if action.net or action.network:
            log.warning(
                "cannot join existing --netns-path and create a new network namespace with --net/-n"
            )
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
            same = os.path.samestat(os.fstat(fd), os.stat("/proc/self/ns/net"))
        except OSError as error:
            reason = (error.strerror or "").lower()
            raise NoNetwork(reason=f"stat {path}: {reason}") from None
        code = context.join_network(fd)
        os.close(fd)
        if code == protocol.ERR_KIND:
            raise NoNetwork(reason=f"{path} is no network namespace")
        if code != protocol.ERR_OK:
            raise NotAllowed(path=path, file=os.path.basename(build.CONFIG_FILE))
        self.flags = 0 if same else protocol.PLANFLAG_JOIN_NET

    def connect(self, mounting: Mounting) -> None:
        """Do nothing: it is there."""

    def close(self) -> None:
        """Do nothing: it stays."""
