"""Where a launch of the `oci` engine enters Python: its parser, its messages, its engine."""

from __future__ import annotations

import _imp
import sys

from apptainer_py.base import build
from apptainer_py.base.errors import ApptainerError, UsageError
from apptainer_py.cli.oci import report
from apptainer_py.cli.oci.parse import is_apptainer, parse_typed
from apptainer_py.kernel import _starter
from apptainer_py.runtime import stages

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from apptainer_py.kernel._starter import StageInfo
    from apptainer_py.model.oci_call import OciCall
    from apptainer_py.runtime.stages import LoadBuiltin


class _Place:
    """Stands for the spec of an extension module, as far as the interpreter's core reads it."""

    def __init__(self, name: str) -> None:
        # As stagehost.c sets it: the core of the interpreter knows no paths.
        version = f"{build.PYTHON_HEX >> 24}.{build.PYTHON_HEX >> 16 & 255}"
        folder = f"/usr/lib/python{version}/lib-dynload"
        self.name = name
        self.origin = f"{folder}/{name}.{build.SOABI}.so"


def place_json() -> None:
    """Load the one module of a file that a launch needs: finding it would complete the interpreter.

    Where Python has it built in, or keeps it elsewhere, the import that follows finds it.
    """
    if "_json" in sys.builtin_module_names or "_json" in sys.modules:
        return
    try:
        module = _imp.create_dynamic(_Place("_json"))  # type: ignore[arg-type]
        _imp.exec_dynamic(module)
    except ImportError:
        _starter.complete_interpreter()
        return
    sys.modules["_json"] = module


# Before the modules that come after this one, which import it.
place_json()


def run(info: StageInfo, load_builtin: LoadBuiltin) -> int:
    """Run the launch; returns the exit status."""
    calls: list[OciCall] = []
    surfaces: list[bool] = []

    def parse(words: list[str], environment: Mapping[str, str]) -> OciCall:
        surfaces.append(is_apptainer(words))
        call = parse_typed(words, environment, uid=info["uid"])
        calls.append(call)
        report.begin(call)
        return call

    def tell(error: ApptainerError) -> int:
        if isinstance(error, UsageError):
            from apptainer_py.cli.oci import help as texts

            return texts.show(error)
        return report.show(error, calls[0] if calls else None, apptainer=True in surfaces)

    try:
        return stages.run_caller(info, parse, load_builtin, tell)
    except OSError as error:
        # What no step has foreseen is still one line, in the form that clients read.
        return tell(
            ApptainerError(text=f"{(error.strerror or '').lower()}: {error.filename or ''}")
        )
