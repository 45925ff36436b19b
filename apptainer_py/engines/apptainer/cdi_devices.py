"""Devices by CDI (`--device`): from what a specification asks for to binds, links and variables.

Hooks are programs that expect to be root's and to be run in the middle of a launch. None is run:
what NVIDIA's own ones do is done here, as data of the plan; another one refuses the launch.
"""

from __future__ import annotations

import os

from apptainer_py.base import log
from apptainer_py.engines.apptainer.drivers import LIBS
from apptainer_py.host import cdi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from apptainer_py.engines.apptainer.drivers import Drivers
    from apptainer_py.model.request import ActionRequest
    from apptainer_py.runtime.contexts import Facts

_NVIDIA = ("nvidia-cdi-hook", "nvidia-ctk")
_COMPAT = "/usr/local/cuda/compat"
# The image's own libcuda is taken if there is one, and it is of a later version than the host's:
# its folder comes before the host's libraries, and behind what the caller says.
_TAKE_COMPAT = r"""__found=
for __file in COMPAT/libcuda.so.*.*; do
    __found="$__found:${__file#COMPAT/libcuda.so.}"
done
__found="${__found#:}"
case "$__found" in
    ""|.*|*[!0-9.]*) ;;
    *) if [ "${__found%%.*}" -gt MAJOR ]; then
           case ":${LD_LIBRARY_PATH-}:" in
           *:LIBS:*)
               __found=${LD_LIBRARY_PATH%%LIBS*}COMPAT:LIBS
               LD_LIBRARY_PATH=$__found${LD_LIBRARY_PATH#*LIBS} ;;
           *) LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}COMPAT ;;
           esac
           export LD_LIBRARY_PATH
       fi ;;
esac
unset __found __file"""
_PROFILE = "/etc/nvidia/nvidia-application-profiles-rc.d/10-container.conf"
_CARDS = (
    '{"profiles":[{"name":"_container_","settings":["EGLVisibleDGPUDevices",MASK]}],'
    '"rules":[{"pattern":[],"profile":"_container_"}]}'
)


def add(drivers: Drivers, action: ActionRequest, facts: Facts) -> None:
    """Add what the devices of the request ask for.

    Raises:
        CdiError: there is no such device, or it asks for what cannot be given.
    """
    folders = tuple(os.path.abspath(path) for path in action.cdi_dirs if path) or cdi.FOLDERS
    edits = cdi.find([name for name in action.device if name], folders)
    drivers.fixed.update(edits.environment)
    for node in edits.nodes:
        _check_there(node.host)
        if not node.host.startswith("/dev/"):
            raise cdi.CdiError(text=f"CDI: {node.host} does not lie below /dev")
        drivers.nodes.append((node.host, node.path))
    for mount in edits.mounts:
        _check_there(mount.source)
        drivers.mounts.append((mount.source, mount.target, mount.read_only))
    for hook in edits.hooks:
        _apply(drivers, hook)
    for source, target, _ in drivers.mounts:
        if ".so" in os.path.basename(target) and os.path.isfile(source):
            drivers.alias(source, target)
    missing = sorted(set(edits.groups) - {facts.gid, *os.getgroups()})
    if missing:
        log.warning(f"the devices are for members of other groups too: {missing}")


def _check_there(path: str) -> None:
    if not os.path.exists(path):
        raise cdi.CdiError(text=f"CDI: {path} does not exist on this host")


def _apply(drivers: Drivers, hook: cdi.Hook) -> None:
    words = list(hook.arguments[1:])
    if words[:1] == ["hook"]:
        words = words[1:]
    known = os.path.basename(hook.path) in _NVIDIA and words
    if not known or words[0] not in _HOOKS:
        shown = " ".join([hook.path, *hook.arguments[1:2]])
        raise cdi.CdiError(text=f"CDI: the {hook.name} hook `{shown}` is not supported")
    _HOOKS[words[0]](drivers, words[1:])


def _values(words: list[str], flag: str) -> list[str]:
    """Return the values of a flag, written `--flag value` or `--flag=value`."""
    found = [word.partition("=")[2] for word in words if word.startswith(f"{flag}=")]
    found += [words[at + 1] for at, word in enumerate(words[:-1]) if word == flag]
    return found


def _create_symlinks(drivers: Drivers, words: list[str]) -> None:
    for value in _values(words, "--link"):
        text, separator, path = value.partition("::")
        if not separator or not path.startswith("/"):
            raise cdi.CdiError(text=f"CDI: {value!r} is no link of a create-symlinks hook")
        drivers.links.append((text, os.path.normpath(path)))


def _update_ldcache(drivers: Drivers, words: list[str]) -> None:
    # A read-only image keeps its cache: the loader is told by LD_LIBRARY_PATH.
    drivers.folders += [path for path in _values(words, "--folder") if path.startswith("/")]


def _enable_cuda_compat(drivers: Drivers, words: list[str]) -> None:
    for version in _values(words, "--host-driver-version")[:1]:
        major = version.partition(".")[0]
        if major.isascii() and major.isdigit():
            lines = _TAKE_COMPAT.replace("LIBS", LIBS).replace("COMPAT", _COMPAT)
            drivers.shell.append(lines.replace("MAJOR", major))


def _update_application_profile(drivers: Drivers, _words: list[str]) -> None:
    """Tell EGL and Vulkan which cards are there; what others are in /dev, they leave alone."""
    names = {path.removeprefix("/dev/nvidia"): host for host, path in drivers.nodes}
    cards = [host for number, host in names.items() if number.isascii() and number.isdigit()]
    mask = sum({1 << minor for minor in map(_minor, cards) if minor < 64})
    if mask:
        drivers.written.append((_PROFILE, _CARDS.replace("MASK", f"{mask:#x}").encode()))


def _minor(path: str) -> int:
    return os.minor(os.stat(path).st_rdev)


def _nothing(_drivers: Drivers, _words: list[str]) -> None:
    """Nothing: these protect files that no user of a container here could change."""


_HOOKS: dict[str, Callable[[Drivers, list[str]], None]] = {
    "chmod": _nothing,
    # Names as ldconfig gives them: every library that is mounted gets one, by any hook or none.
    "create-soname-symlinks": _nothing,
    "create-symlinks": _create_symlinks,
    "disable-device-node-modification": _nothing,
    "enable-cuda-compat": _enable_cuda_compat,
    "update-application-profile": _update_application_profile,
    "update-ldcache": _update_ldcache,
    "update-nvidia-params": _nothing,
}
