"""The one interface of all engines: hooks, and the registry by name.

An engine is a subclass of `Operations`. Each hook gets the context of its stage
(runtime/contexts.py), and that context has nothing but what the stage may do. The stages, their
processes and identities: docs/architecture.md.
"""

from __future__ import annotations

from apptainer_py.base.errors import LaunchError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from apptainer_py.runtime.contexts import (
        CleanupContext,
        CleanupHostContext,
        CreateContext,
        InitContext,
        MonitorContext,
        PostStartContext,
        PostStartHostContext,
        PrepareContext,
        PrepareHostContext,
        StartContext,
    )

    RpcMethod = Callable[[bytes], bytes]


class UnknownEngine(LaunchError):
    """No engine of that name is registered."""

    message = "there is no engine named {name}"


class EngineTaken(LaunchError):
    """Two engines, or sets of methods, want one name."""

    message = "an engine named {name} is registered already"


class Operations:
    """The hooks of an engine; a hook that is not overridden does nothing.

    One instance lives in each Python stage: what one hook leaves on `self` the later hooks of the
    same stage find, and no other stage does.

    Where `process_is_data` is true no Python enters the container: there is no stage 2, its part is
    carried out in C from what `create_container` has sent (CreateContext.nest). `stays` tells the
    driver, after `create_container`, whether to wait for the payload.
    """

    process_is_data = False
    stays = True

    def __init__(self) -> None:
        self._config: object = None

    def config(self) -> object:
        """Return the engine's configuration, as `init_config` left it."""
        return self._config

    def init_config(self, context: InitContext) -> None:
        """Read the configuration; runs once in every Python stage, before any other hook."""
        self._config = context.configuration

    def prepare_config(self, context: PrepareContext) -> None:
        """Judge the request and plan the container; runs as the user, before anything exists."""

    def create_container(self, context: CreateContext) -> None:
        """Have the container put together, mount by mount, by the mounting process."""

    def rehearse(self, message: bytes) -> None:
        """Run what `start_process` will, in vain, while stage 2 has nothing to do but wait.

        No hook: it looks at nothing outside of the process, and what it returns is dropped.
        """

    def start_process(self, context: StartContext) -> None:
        """Become the payload; runs inside the container with the payload's identity."""

    def let_go(self, context: CreateContext) -> int:
        """Tell a container whose process is data to become its payload; returns the pid."""
        return context.first_pid

    def post_start_process(self, context: PostStartContext) -> None:
        """Note that the payload runs; no privileged process is left by now."""

    def monitor_container(self, context: MonitorContext) -> int:
        """Return the payload's wait status (waitpid(2)) when it has ended."""
        return context.wait()

    def cleanup_container(self, context: CleanupContext) -> None:
        """Undo what outlives the container; also runs when the container was never made."""

    def prepare_host(self, context: PrepareHostContext) -> None:
        """Make in the host's namespaces what the container needs; where `tell_host` asked for it.

        It runs in the process of `cleanup_host`, which so knows what there is to undo.
        """

    def post_start_host(self, context: PostStartHostContext) -> None:
        """Run in the host's namespaces once the payload has started."""

    def cleanup_host(self, context: CleanupHostContext) -> None:
        """Run in the host's namespaces after everything, even if the launch was killed."""


_operations: dict[str, type[Operations]] = {}
_methods: dict[str, dict[str, RpcMethod]] = {}


def register_operations(name: str, operations: type[Operations]) -> None:
    """Make an engine known by its name.

    Raises:
        EngineTaken: the name is in use.
    """
    if name in _operations:
        raise EngineTaken(name=name)
    _operations[name] = operations


def find_operations(name: str) -> type[Operations]:
    """Return the engine of that name.

    Raises:
        UnknownEngine: nobody has registered it.
    """
    try:
        return _operations[name]
    except KeyError:
        raise UnknownEngine(name=name) from None


def register_rpc_methods(name: str, methods: dict[str, RpcMethod]) -> None:
    """Add methods that run in the container's namespaces with the mounting process's identity.

    They serve the engine `name` in the user-namespace and root flows; the setuid flow has the
    built-in operations only. A method takes and returns bytes (at most 64 KiB).

    Raises:
        EngineTaken: the engine has methods already.
    """
    if name in _methods:
        raise EngineTaken(name=name)
    _methods[name] = dict(methods)


def find_rpc_methods(name: str) -> dict[str, RpcMethod]:
    """Return the extra methods of an engine; empty where it has none."""
    return _methods.get(name, {})
