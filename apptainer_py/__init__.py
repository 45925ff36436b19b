"""apptainer-py: containers for shared Linux machines.

    import apptainer_py

    done = apptainer_py.exec("image.sif", ["cat", "/etc/os-release"], bind=["/data"])
    print(done.returncode, done.text)

What is offered to Python programs is listed here, and loaded when it is asked for: the processes
of a launch load this module too. `docs/python.md` shows all of it.
"""

from __future__ import annotations

__version__ = "0.1.0"

TYPE_CHECKING = False
if TYPE_CHECKING:
    from apptainer_py.api.errors import ApptainerError as ApptainerError
    from apptainer_py.api.errors import Cancelled as Cancelled
    from apptainer_py.api.errors import CommandFailed as CommandFailed
    from apptainer_py.api.errors import ImageError as ImageError
    from apptainer_py.api.errors import LaunchError as LaunchError
    from apptainer_py.api.errors import NotSupported as NotSupported
    from apptainer_py.api.errors import TimedOut as TimedOut
    from apptainer_py.api.errors import UsageError as UsageError
    from apptainer_py.api.images import Image as Image
    from apptainer_py.api.images import Metadata as Metadata
    from apptainer_py.api.images import build as build
    from apptainer_py.api.images import pull as pull
    from apptainer_py.api.images import push as push
    from apptainer_py.api.instances import Instance as Instance
    from apptainer_py.api.launching import Completed as Completed
    from apptainer_py.api.launching import Running as Running
    from apptainer_py.api.launching import exec as exec  # noqa: A004 the command's name
    from apptainer_py.api.launching import run as run
    from apptainer_py.api.launching import stream as stream
    from apptainer_py.api.launching import test as test
    from apptainer_py.runtime.library import Container as Container
    from apptainer_py.runtime.process import Process as Process
    from apptainer_py.runtime.process import ProcessError as ProcessError
    from apptainer_py.runtime.process import ProcessSettings as ProcessSettings

# Where each name is defined.
_PLACES = {
    "api.errors": (
        "ApptainerError", "Cancelled", "CommandFailed", "ImageError", "LaunchError",
        "NotSupported", "TimedOut", "UsageError",
    ),
    "api.images": ("Image", "Metadata", "build", "pull", "push"),
    "api.instances": ("Instance",),
    "api.launching": ("Completed", "Running", "exec", "run", "stream", "test"),
    "runtime.library": ("Container",),
    "runtime.process": ("Process", "ProcessError", "ProcessSettings"),
}  # fmt: skip


def __getattr__(name: str) -> object:
    from importlib import import_module

    for place, names in _PLACES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{place}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *(name for names in _PLACES.values() for name in names)})
