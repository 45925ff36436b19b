"""`--fakeroot`: in which of its four degrees, and what that means for mounts and process.

With ranges of subordinate ids the caller is root of a user namespace that has them; without, of
one that has a single id, with the `fakeroot` command in it where the host has that; and where
there are no user namespaces, the command alone.
"""

from __future__ import annotations

import os

from apptainer_py.base import log
from apptainer_py.base.errors import LaunchError
from apptainer_py.model import protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from apptainer_py.engines.apptainer.prepare import Prepared
    from apptainer_py.model.plan import Capabilities
    from apptainer_py.model.request import ActionRequest
    from apptainer_py.runtime.contexts import Facts

LIBS: Final = "/.singularity.d/libs"
_FOLDERS: Final = ("/usr/bin", "/bin", "/usr/sbin", "/sbin", "/usr/local/bin")
_LIBRARIES: Final = (
    "/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib",
    "/usr/local/lib",
)  # fmt: skip
_PREFIX: Final = (f"{LIBS}/fakeroot", "-f", f"{LIBS}/faked", "-l", f"{LIBS}/libfakeroot.so")
# What a file's owner shall be is remembered; the kernel is not even asked.
VARIABLES: Final = {"FAKEROOTDONTTRYCHOWN": "1"}


class NotPossible(LaunchError):
    message = (
        "--fakeroot requires either being in /etc/subuid, unprivileged user namespaces, or the "
        "fakeroot command"
    )
    hint = "the administrator adds you with `apptainer-py config fakeroot --add {user}`"


class NotSandbox(LaunchError):
    message = "--fakeroot used without sandbox image or user namespaces"


class NoMapper(LaunchError):
    """shadow's program, which alone may map a range for who has no right to."""

    message = (
        "{tool} was not found in {folders}, required with fakeroot and unprivileged installation "
        "when user is in /etc/subuid"
    )
    hint = "install the package uidmap (shadow-utils), or add `--ignore-subuid`"


class Degree:
    """What was chosen: a namespace, ranges in it, the command."""

    __slots__ = ("command", "namespace", "subids")

    def __init__(self, *, namespace: bool, subids: bool, command: tuple[str, str, str] | None):
        self.namespace = namespace
        self.subids = subids
        self.command = command

    @property
    def parts(self) -> tuple[str, ...]:
        """What there is of it, for the record of an instance (`instances.FAKEROOT_PARTS`)."""
        there = {
            "namespace": self.namespace,
            "subids": self.subids,
            "command": self.command is not None,
        }
        return tuple(name for name, is_there in there.items() if is_there)

    @property
    def flags(self) -> int:
        """The plan's flags; one id is worth nothing to who could become another user."""
        if not self.namespace:
            return 0
        if not self.subids:
            return protocol.PLANFLAG_FAKEROOT
        return (
            protocol.PLANFLAG_FAKEROOT | protocol.PLANFLAG_SUBIDS | protocol.PLANFLAG_NO_NEW_PRIVS
        )

    def capabilities(self, action: ActionRequest) -> Capabilities:
        """Return the payload's sets in its own namespace: all there are, but what is dropped."""
        from apptainer_py.engines.apptainer import capabilities as names

        held = 0 if action.no_privs else names.of_a_namespace()
        held &= ~names.parse_names(action.drop_caps, "drop")
        return (held, held, held, held, held)

    @property
    def prefix(self) -> list[str]:
        """The words that stand before the program's name."""
        return [] if self.command is None else list(_PREFIX)


def of_instance(parts: tuple[str, ...]) -> Degree:
    """Return the degree that an instance was started with."""
    inside = (_PREFIX[0], _PREFIX[2], _PREFIX[4])
    return Degree(
        namespace="namespace" in parts,
        subids="subids" in parts,
        command=inside if "command" in parts else None,
    )


def account(facts: Facts) -> str:
    """Return the caller's name, or number."""
    import pwd

    try:
        return pwd.getpwuid(facts.uid).pw_name
    except KeyError:
        return str(facts.uid)


def choose(action: ActionRequest, facts: Facts, kind: str) -> Degree:
    """Return the degree of --fakeroot for an image of this kind, and say so.

    Raises:
        LaunchError: there is no way, or the ranges are not what they should be.
    """
    from apptainer_py.host import subid_file

    name = account(facts)
    if not facts.configuration["allow user ns"] and facts.flow != protocol.FLOW_ROOT:
        from apptainer_py.engines.apptainer.prepare import UsernsForbidden

        raise UsernsForbidden
    entry = subid_file.find(subid_file.read(subid_file.SUBUID), name, facts.uid)
    if facts.uid == 0 or (subid_file.is_listed(entry) and not action.ignore_subuid):
        subid_file.check(subid_file.SUBUID, name, facts.uid)
        subid_file.check(subid_file.SUBGID, name, facts.uid)
        if facts.flow == protocol.FLOW_USERNS:
            _check_mappers()
        return Degree(namespace=True, subids=True, command=None)
    log.info("User not listed in /etc/subuid, trying root-mapped namespace")
    command = None if action.ignore_fakeroot_command else find_command()
    if facts.flow == protocol.FLOW_USERNS and not action.ignore_userns:
        if command is None:
            log.info("fakeroot command not found, using only root-mapped namespace")
        else:
            log.info("Using fakeroot command combined with root-mapped namespace")
        return Degree(namespace=True, subids=False, command=command)
    if command is None or facts.flow == protocol.FLOW_USERNS:
        raise NotPossible(user=name)
    if kind != "sandbox":
        log.info("No user namespaces available")
        log.info("The fakeroot command by itself is only useful with sandbox images")
        log.info(" which can be built with 'apptainer build --sandbox'")
        raise NotSandbox
    log.info("No user namespaces available, using only the fakeroot command")
    return Degree(namespace=False, subids=False, command=command)


def _check_mappers() -> None:
    from apptainer_py.host.subid import find_program

    for tool in ("newuidmap", "newgidmap"):
        if find_program(tool, _FOLDERS) is None:
            raise NoMapper(tool=tool, folders=":".join(_FOLDERS))


def find_command() -> tuple[str, str, str] | None:
    """Return the host's fakeroot, its faked and its library; None where one is missing.

    The System V kind is taken first: the one that talks by TCP needs a network.
    """
    for kind in ("-sysv", ""):
        script = _first(f"fakeroot{kind}", _FOLDERS)
        daemon = _first(f"faked{kind}", _FOLDERS)
        names = (f"libfakeroot{kind}.so", "libfakeroot-0.so")
        library = next((path for name in names if (path := _library(name))), "")
        if script and daemon and library:
            return script, daemon, library
    return None


def _library(name: str) -> str:
    folders = [f"{top}/libfakeroot" for top in _LIBRARIES]
    return _first(name, (*folders, *_LIBRARIES))


def _first(name: str, folders: tuple[str, ...]) -> str:
    for folder in folders:
        path = os.path.realpath(f"{folder}/{name}")
        if os.path.isfile(path):
            return path
    return ""


def binds(prepared: Prepared) -> list[tuple[str, str]]:
    """Return source and target of what the command needs inside."""
    degree = prepared.fakeroot
    if degree is None or degree.command is None:
        return []
    names = ("fakeroot", "faked", "libfakeroot.so")
    return [(source, f"{LIBS}/{name}") for source, name in zip(degree.command, names, strict=True)]
