"""`exec instance://NAME` and its like: a payload in a container that runs.

Nothing is mounted, and no Python enters the instance. The process that does is C (starter/join.c)
and becomes what is said here: the image's shell with the script that every launch has, or the
program itself where the image has no shell.
"""

from __future__ import annotations

import errno
import os

from apptainer_py.base import log
from apptainer_py.base.errors import LaunchError
from apptainer_py.engines.apptainer import environ, limits, mounts, process
from apptainer_py.engines.apptainer.instance import check_flow
from apptainer_py.engines.apptainer.message import refused_label
from apptainer_py.model import protocol
from apptainer_py.model.plan import ContainerPlan
from apptainer_py.model.request import limits_of
from apptainer_py.runtime import instances

TYPE_CHECKING = False
if TYPE_CHECKING:
    from apptainer_py.engines.apptainer.fakeroot import Degree
    from apptainer_py.model.plan import Capabilities
    from apptainer_py.model.request import ActionRequest
    from apptainer_py.runtime.bearer import Bearer
    from apptainer_py.runtime.contexts import CreateContext, PrepareContext

PREFIX = "instance://"
_SHELLS = (b"/bin/sh", b"/bin/bash")
_SYS_ADMIN = 1 << 21
_WHERE = "While setting image/instance: "
_KEPT = protocol.PLANFLAG_NO_NEW_PRIVS | protocol.PLANFLAG_FAKEROOT | protocol.PLANFLAG_LABEL
_RUNSCRIPT = b"/.singularity.d/runscript"
# What --security promises would not hold; other options are said to be without effect.
_REFUSED = ("security",)


class BadDirectory(LaunchError):
    """--cwd names a directory that the container has not."""

    message = "failed to set working directory: chdir {path}: {reason}"


class NotStarted(LaunchError):
    message = "{text}"


class OfTheInstance(LaunchError):
    """An option that would have to change what is there already."""

    message = "--{option} is for the start of an instance, and cannot be given to who joins it"
    hint = "give it to `instance start`"


class Joined:
    """What the payload in the instance will be."""

    def __init__(self, lists: dict[bytes, list[bytes]]) -> None:
        self.lists = lists
        # What binds each payload of this instance, as its record says.
        self.label: tuple[bytes, ...] = ()
        self.filter: tuple[bytes, ...] = ()
        # Of the instance's first process, where that is limited; and whom to ask for the way in.
        self.groups = ""
        self.bus = ""
        self.directory = b"/"

    def create(self, context: CreateContext) -> None:
        """Have the process that waits inside become it.

        Raises:
            LaunchError: directory or program cannot be used.
        """
        bearer = context.bearer
        try:
            if self.groups:
                limits.join(self.groups, context.first_pid, self.bus)
            self._bind(bearer)
            self._enter(bearer)
            self._become(bearer)
        except LaunchError:
            bearer.dismiss()
            raise

    def _bind(self, bearer: Bearer) -> None:
        if self.label:
            kind, text = int(self.label[0]), self.label[1]
            number = bearer.label(kind, text)
            if number:
                raise NotStarted(text=refused_label(kind, os.fsdecode(text), number))
        if self.filter:
            bearer.filter_calls(bytes.fromhex(self.filter[0].decode()), int(self.filter[1]))

    def _enter(self, bearer: Bearer) -> None:
        candidates = self.lists[b"cwd"]
        for path, instead in zip(candidates, [*candidates[1:], b"/"], strict=True):
            bearer.ask_place(path)
            number, place = bearer.place()
            if number == 0:
                self.directory = place or path
                return
            facts = {"path": os.fsdecode(path), "reason": os.strerror(number).lower()}
            if self.lists[b"cwd_required"]:
                raise BadDirectory(**facts)
            log.warning(
                "Error changing the container working directory. Using "
                f"'{os.fsdecode(instead)}' instead: chdir {facts['path']}: {facts['reason']}"
            )

    def _become(self, bearer: Bearer) -> None:
        lists = self.lists
        action = lists[b"action"][0]
        mask = int(lists[b"umask"][0])
        own = b"PWD=" + self.directory
        forwarded = lists[b"forwarded"]
        for shell in _SHELLS if action in (b"exec", b"run") else _SHELLS[:1]:
            words = [shell, b"-c", b'eval "$1"', b"apptainer-py", lists[b"script"][0]]
            words += [b"%d" % len(forwarded), *forwarded, *lists[b"arguments"]]
            number = bearer.execute(shell, words, [*lists[b"environment"], own], mask)
            if number == 0:
                return
            if number != errno.ENOENT:
                raise NotStarted(text=f"exec {os.fsdecode(shell)}: {os.strerror(number).lower()}")
        self._without_shell(bearer, action, mask, [*lists[b"plain"], own])

    def _without_shell(
        self, bearer: Bearer, action: bytes, mask: int, environment: list[bytes]
    ) -> None:
        arguments = self.lists[b"arguments"]
        if action == b"run":
            arguments = [_RUNSCRIPT, *arguments]
        elif action != b"exec":
            raise NotStarted(text="/bin/sh does not exist in container")
        name = arguments[0]
        search = next(entry[5:] for entry in environment if entry.startswith(b"PATH="))
        folders = [b""] if b"/" in name else [part or b"." for part in search.split(b":")]
        reason = errno.ENOENT
        for folder in folders:
            program = folder + b"/" + name if folder else name
            number = bearer.execute(program, [program, *arguments[1:]], environment, mask)
            if number == 0:
                return
            if number != errno.ENOENT:
                reason = number
        text = f'"{os.fsdecode(name)}": executable file not found in $PATH'
        if reason != errno.ENOENT or b"/" in name:
            text = f"{os.fsdecode(name)}: {os.strerror(reason).lower()}"
        raise NotStarted(text=text)


def prepare(context: PrepareContext, flags: int, caps: Capabilities) -> Joined:
    """Find the instance, and say which process of /proc it is; the starter looks for itself.

    Raises:
        ApptainerError: there is no such instance, or this flow cannot join it.
    """
    action, facts = context.action, context.facts
    assert action is not None
    told = facts.reason == protocol.REASON_ENGINE  # by the launch that has come here
    _check_options(action, told=told)
    name = instances.check_name(action.image.removeprefix(PREFIX), _WHERE)
    owner = instances.owner(facts.uid, context.environment)
    found = instances.find(owner, name)
    context.process_fd = -1 if found is None else instances.open_running(found, owner)
    if found is None or context.process_fd < 0:
        raise instances.NoInstance(name=name)
    if check_flow(facts, found):
        context.use_plain_starter()
    degree = find_degree(action, found)
    inside = degree is not None and degree.namespace
    # Which home the instance has was settled at its start.
    homed = action.replace(home="") if action.home else action
    user = mounts.find_user(facts, homed, context.environment, as_root=inside)
    environment = environ.collect(action, context.environment)
    if degree and degree.command:
        from apptainer_py.engines.apptainer.fakeroot import VARIABLES

        environment.forwarded.update(VARIABLES)
    lists = process.lists(
        joined_action(action, name), context, found.image, user.home, environment, "",
        degree.prefix if degree else None,
    )  # fmt: skip
    if degree and inside:
        caps = degree.capabilities(action)
        flags = degree.flags & ~protocol.PLANFLAG_SUBIDS
    booted = found.booted and facts.uid == 0
    flags |= bound(found, caps)
    joining = protocol.PLANFLAG_JOIN | (protocol.PLANFLAG_BOOTED if booted else 0)
    context.plan(
        ContainerPlan(
            image=found.image, uid=0 if inside else facts.uid, gid=0 if inside else facts.gid,
            caps=caps, flags=joining | flags & _KEPT,
        )
    )  # fmt: skip
    joined = Joined(lists)
    joined.label, joined.filter = found.label, found.filter
    if found.cgroup:
        joined.groups = instances.read_at(context.process_fd, "cgroup")
        joined.bus = context.environment.get("DBUS_SESSION_BUS_ADDRESS", "") if facts.uid else ""
    return joined


def _check_options(action: ActionRequest, *, told: bool) -> None:
    """Refuse what was settled when the instance was started; limits are ignored with a warning."""
    if action.oci:
        raise LaunchError(text="instances cannot be joined with --oci: leave it out")
    for option in _REFUSED:
        if getattr(action, option) != action._defaults[option]:
            raise OfTheInstance(option=option.replace("_", "-"))
    if not told and (action.apply_cgroups or limits_of(action)):
        limits.resources_of(action, limits_of(action))
        log.warning(
            "Resource limits & cgroups configuration are only applied to instances at instance "
            "start."
        )


def bound(found: instances.Instance, caps: Capabilities) -> int:
    """Return what the plan says of the instance's label and filter, if it has any.

    Raises:
        LaunchError: the record says what is neither.
    """
    numbers = [*found.label[:1], *found.filter[1:]]
    try:
        code = bytes.fromhex("".join(item.decode("ascii") for item in found.filter[:1]))
    except ValueError:
        code = b""
    if not all(number.isdigit() and len(number) < 10 for number in numbers) or (
        found.filter and not code
    ):
        raise LaunchError(text="the record of the instance is damaged: stop the instance")
    flags = protocol.PLANFLAG_LABEL if found.label else 0
    # Else the kernel would take no filter from this payload (seccomp(2)).
    if found.filter and not caps[0] & _SYS_ADMIN:
        flags |= protocol.PLANFLAG_NO_NEW_PRIVS
    return flags


def find_degree(action: ActionRequest, found: instances.Instance) -> Degree | None:
    """Return what the instance has of --fakeroot; who joins cannot ask for another."""
    if action.fakeroot:
        log.info("--fakeroot ignored when joining instance")
    if not found.fakeroot:
        return None
    from apptainer_py.engines.apptainer.fakeroot import of_instance

    return of_instance(found.fakeroot)


def joined_action(action: ActionRequest, name: str) -> ActionRequest:
    """Return the action with the instance's name, which its environment tells."""
    return action.replace(instance=name)
