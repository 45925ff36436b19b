"""The interpreter of a stage: begun with its core alone, completed if something asks for more.

The core of CPython imports what is built in or frozen (tools/gen_frozen.py), which is all that a
launch needs. What it leaves out, which is file imports, text streams and `open`, costs as much
again as the core itself; stand-ins are put in their places, and the first use of one completes the
interpreter (PEP 587, multi-phase initialisation).
"""

from __future__ import annotations

import _imp
import os
import sys
from _frozen_importlib import ModuleSpec

from apptainer_py.base import build
from apptainer_py.kernel import _starter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any

# As stagehost.c sets it: the core of the interpreter knows no paths.
_VERSION = f"{build.PYTHON_HEX >> 24}.{build.PYTHON_HEX >> 16 & 255}"
_EXTENSIONS = f"/usr/lib/python{_VERSION}/lib-dynload"


def complete() -> None:
    """Have everything that a usual interpreter has; nothing happens after a call or the seal."""
    if _Rest in sys.meta_path:
        sys.meta_path.remove(_Rest)
        _starter.complete_interpreter()


def load_container_module() -> None:
    """Have `apptainer_py.kernel._container`, which only one flow has from the start."""
    name = "apptainer_py.kernel._container"
    if name not in sys.modules and _starter.in_stage():
        sys.modules[name] = __import__("_container")


class _Extension:
    """Loads a module of Python's own that is a shared object, which the core can do alone."""

    @staticmethod
    def create_module(spec: ModuleSpec) -> ModuleType:
        return _imp.create_dynamic(spec)

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        _imp.exec_dynamic(module)


class _Rest:
    """Stands for the finder of modules in files."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
        file = f"{_EXTENSIONS}/{name}.{build.SOABI}.so"
        if path is None and os.access(file, os.R_OK):
            loader: Any = _Extension
            return ModuleSpec(name, loader, origin=file)
        complete()
        for finder in sys.meta_path[2:]:
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                return spec
        return None


class _Stream:
    """Stands for a standard stream: each write goes out at once."""

    def __init__(self, name: str, fd: int) -> None:
        self._name = name
        self._fd = fd

    def write(self, text: str) -> None:
        data = memoryview(text.encode("utf-8", "surrogateescape"))
        while data:
            data = data[os.write(self._fd, data) :]

    def flush(self) -> None:
        """Nothing waits."""

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def __getattr__(self, wanted: str) -> Any:
        complete()
        return getattr(getattr(sys, self._name), wanted)


def _open(*arguments: Any, **options: Any) -> Any:
    complete()
    return vars(sys.modules["builtins"])["open"](*arguments, **options)


def begin() -> None:
    """Put the stand-ins in place, in an interpreter that has its core only, once."""
    if _Rest in sys.meta_path or _starter.is_complete():
        return
    sys.meta_path.append(_Rest)
    sys.stdout = _Stream("stdout", 1)
    sys.stderr = _Stream("stderr", 2)
    vars(sys.modules["builtins"])["open"] = _open
