"""The engine that runs a program of the host as root of a user namespace, in no container.

It has the host's files, its own mounts, and under it all ids that /etc/subuid and /etc/subgid give
its caller, or one. Where the setuid flow is to be had, it needs no right of the caller's to make
user namespaces. mknod(2) of a device seems to succeed.

    fakeroot DEGREE PROGRAM [ARGUMENT...]      DEGREE: ranges, or one
"""

from __future__ import annotations

import os

from apptainer_py.base.errors import LaunchError
from apptainer_py.model import protocol
from apptainer_py.model.plan import ContainerPlan
from apptainer_py.runtime.engine import Operations, register_operations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from apptainer_py.runtime.contexts import (
        CreateContext,
        InitContext,
        PrepareContext,
        StartContext,
    )

RANGES, ONE_ID = "ranges", "one"
_SESSION_MIB: Final = 1


class Misused(LaunchError):
    message = "the engine fakeroot is told a degree, which is ranges or one, and a program"


class Forbidden(LaunchError):
    message = "User namespace required but not allowed by configuration."


class CannotRun(LaunchError):
    message = "{program}: {reason}"


class Fakeroot(Operations):
    """Shows the host's own tree, and starts the program in it."""

    def init_config(self, context: InitContext) -> None:
        """Load the filter's words while the host's modules can be."""
        super().init_config(context)
        if context.stage == "stage2":
            import apptainer_py.host.fake_devices  # noqa: F401  before the seal

    def prepare_config(self, context: PrepareContext) -> None:
        """Plan a namespace with these ids; C judges who may have them."""
        degree, words = "".join(context.arguments[1:2]), context.arguments[2:]
        if degree not in (RANGES, ONE_ID) or not words or not words[0].startswith("/"):
            raise Misused
        facts = context.facts
        if not facts.configuration["allow user ns"] and facts.flow != protocol.FLOW_ROOT:
            raise Forbidden
        flags = protocol.PLANFLAG_FAKEROOT | protocol.PLANFLAG_SLAVE
        if facts.flow == protocol.FLOW_SETUID and not facts.configuration["mount slave"]:
            flags &= ~protocol.PLANFLAG_SLAVE
        if degree == RANGES:
            flags |= protocol.PLANFLAG_SUBIDS | protocol.PLANFLAG_NO_NEW_PRIVS
        from apptainer_py.engines.apptainer.capabilities import of_a_namespace

        every = of_a_namespace()
        caps = (every, every, every, every, every)
        context.plan(ContainerPlan(image="/", uid=0, gid=0, flags=flags, caps=caps))
        environment = [f"{name}={value}" for name, value in context.environment.items()]
        parts = [context.cwd, str(len(words)), *words, *environment]
        context.tell_start(b"\0".join(map(os.fsencode, parts)))

    def create_container(self, context: CreateContext) -> None:
        """Put the host's tree in the place of an image."""
        mounting = context.mounting
        os.close(mounting.session(_SESSION_MIB))
        what = "cannot show the host's files"
        host = os.stat("/")
        flags = protocol.BINDFLAG_DEVICES
        os.close(mounting.root_directory("/", host.st_dev, host.st_ino, flags, what))
        os.close(mounting.layer(protocol.LAYERKIND_NONE, what))
        mounting.pivot()

    def start_process(self, context: StartContext) -> None:
        """Become the program, in the caller's directory."""
        from apptainer_py.host import fake_devices

        cwd, count, *rest = context.message.split(b"\0")
        words, environment = rest[: int(count)], rest[int(count) :]
        try:
            os.chdir(cwd or b"/")
        except OSError:
            os.chdir(b"/")
        code = fake_devices.program()
        if code:
            context.filter_calls(code, 0)
        error = context.execve(words[0], words, environment)
        reason = (error.strerror or "").lower()
        raise CannotRun(program=os.fsdecode(words[0]), reason=reason)


register_operations("fakeroot", Fakeroot)
