"""Ranks of one job, or with --sharens the launches of one parent, in one container.

Memory that ranks read of each other, and descriptors, the kernel gives only to those of the same
user namespace. In the user-namespace flow each launch would have one of its own; so the first makes
the container, and who starts the same image with the same mounts on this machine enters it.
"""

from __future__ import annotations

import os

from apptainer_py.base import build, log
from apptainer_py.base.errors import LaunchError
from apptainer_py.engines.apptainer import mounts, process
from apptainer_py.engines.apptainer.joining import Joined
from apptainer_py.host import mpi
from apptainer_py.model import protocol
from apptainer_py.model.plan import ContainerPlan
from apptainer_py.runtime import meeting

TYPE_CHECKING = False
if TYPE_CHECKING:
    from apptainer_py.engines.apptainer.environ import Environment
    from apptainer_py.engines.apptainer.prepare import Prepared
    from apptainer_py.host.mpi import Rank
    from apptainer_py.model.plan import Mount
    from apptainer_py.model.request import ActionRequest
    from apptainer_py.runtime.contexts import PrepareContext

_KEY_BYTES = 20


class NotShared(LaunchError):
    """--sharens, and something that one container cannot be for several."""

    message = "--sharens cannot be used with {what}"
    hint = "leave one of them out"


class Launch:
    """One of them: what it has planned so far."""

    __slots__ = ("action", "binds", "context", "environment", "prepared")

    def __init__(
        self,
        prepared: Prepared,
        action: ActionRequest,
        context: PrepareContext,
        environment: Environment,
        binds: str,
    ) -> None:
        self.prepared = prepared
        self.action = action
        self.context = context
        self.environment = environment
        self.binds = binds


def arrange(launch: Launch, plan: ContainerPlan) -> ContainerPlan:
    """Return the plan of a container to share, or of a process in one that is there.

    Raises:
        NotShared: --sharens cannot be had.
    """
    prepared, action = launch.prepared, launch.action
    rank = mpi.find(launch.context.environment, launch.context.facts.caller_pid)
    who = _company(launch, plan, rank)
    if who:
        try:
            prepared.meeting = meeting.meet(_key(launch, plan, who))
        except meeting.Alone as error:
            log.warning(f"Sharing no container with other ranks: {error.why}")
    found = prepared.meeting
    if found is not None and found.mounts >= 0:
        return _enter(launch, plan, found.mounts)
    if rank is not None and (found is not None or rank.rank == 0):
        prepared.rank = rank
        prepared.program = action.arguments[0] if action.command == "exec" else ""
    if found is None:
        return plan
    return plan.replace(flags=plan.flags | protocol.PLANFLAG_SHARED)


def _company(launch: Launch, plan: ContainerPlan, rank: Rank | None) -> str:
    """Return what stands for those with whom it may live in one container; nothing: with nobody.

    Raises:
        NotShared: --sharens cannot be had.
    """
    asked = launch.action.sharens
    if launch.context.facts.flow != protocol.FLOW_USERNS:
        return ""
    if not asked and (rank is None or rank.local == 1):
        return ""
    what = _obstacle(launch, plan)
    if what and asked:
        raise NotShared(what=what)
    if what:
        log.verbose(f"Sharing no container with other ranks: it has {what}")
        return ""
    return rank.job if rank is not None else mpi.parent(launch.context.facts.caller_pid)


def _obstacle(launch: Launch, plan: ContainerPlan) -> str:
    """Return what no two launches can have together."""
    prepared, action = launch.prepared, launch.action
    found = (
        ("a namespace of its own", plan.spaces),
        ("--fakeroot", action.fakeroot),
        ("an instance", action.instance),
        ("limits of resources", prepared.limits),
        ("--security", action.security),
        ("--fusemount", action.fusemount),
        ("overlays and image binds", prepared.shown),
        ("an ext3 image", prepared.root_fs == "ext3"),
    )
    return next((what for what, there in found if there), "")


def _enter(launch: Launch, plan: ContainerPlan, mounts_fd: int) -> ContainerPlan:
    prepared, context = launch.prepared, launch.context
    context.process_fd = mounts_fd
    prepared.joined = Joined(
        process.lists(
            launch.action, context, prepared.image.path, prepared.user.home, launch.environment,
            launch.binds,
        )
    )  # fmt: skip
    kept = plan.flags & protocol.PLANFLAG_NO_NEW_PRIVS
    return ContainerPlan(
        image=plan.image, uid=plan.uid, gid=plan.gid, caps=plan.caps,
        flags=protocol.PLANFLAG_JOIN | protocol.PLANFLAG_SHARED | kept,
    )  # fmt: skip


def _key(launch: Launch, plan: ContainerPlan, who: str) -> str:
    """Return what is the same for all that may live in one container, and for nobody else."""
    import _blake2

    prepared, image = launch.prepared, launch.prepared.image
    facts = os.fstat(image.fd)
    user = prepared.user
    spaces = [os.stat(f"/proc/self/ns/{name}").st_ino for name in ("user", "mnt", "pid", "net")]
    parts = (
        build.BUILD_ID, who, spaces, os.getgroups(), plan,
        (facts.st_dev, facts.st_ino, facts.st_mtime_ns, facts.st_size, prepared.offset),
        (prepared.layer, prepared.session_mib, prepared.writable_root, prepared.underlay_allowed),
        (user.name, user.home, user.home_source), prepared.links,
        # Each may have a terminal of its own, and has it open.
        [entry for entry in prepared.staged if entry[1] != "dev/console"],
        [mount for mount in prepared.mounts if not _differs(mount, prepared.mounts)],
    )  # fmt: skip
    return _blake2.blake2b(repr(parts).encode(), digest_size=_KEY_BYTES).hexdigest()


def _differs(mount: Mount, others: list[Mount]) -> bool:
    """Return whether one may have it and others not: the current directory, shown in any case."""
    if mount.target == "/dev/console":
        return True
    if mount.tag != mounts.CWD:
        return False
    return any(
        other.kind == "bind"
        and other.tag != mounts.CWD
        and other.area == protocol.AREA_HOST
        and other.source == other.target
        and f"{mount.target}/".startswith(f"{other.target}/")
        for other in others
    )
