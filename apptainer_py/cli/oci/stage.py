"""Where a launch of the `oci` engine enters Python: its parser, its messages, its engine."""

from __future__ import annotations

from apptainer_py.base.errors import ApptainerError, UsageError
from apptainer_py.cli.oci import report
from apptainer_py.cli.oci.parse import is_apptainer, parse_typed
from apptainer_py.runtime import interpreter, stages

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from apptainer_py.kernel._starter import StageInfo
    from apptainer_py.model.oci_call import OciCall
    from apptainer_py.runtime.stages import LoadBuiltin


# Before the modules that come after this one in a stage: one needs json, and that an extension.
interpreter.begin()
# As the launcher of images names itself where it asks for this engine (starter/launcher.c); what
# runc's commands are sent as begins with `oci` then.
_LAUNCHER = "apptainer-py"


def run(info: StageInfo, load_builtin: LoadBuiltin) -> int:
    """Run the launch; returns the exit status."""
    calls: list[OciCall] = []
    images: list[bool] = []
    surfaces: list[bool] = []

    def parse(words: list[str], environment: Mapping[str, str]) -> OciCall:
        if words[0] == _LAUNCHER and words[1:2] != ["oci"]:
            from apptainer_py.cli.oci import action

            if action.is_action(words):
                images.append(True)
                return action.parse_action(words, environment, uid=info["uid"])
        surfaces.append(is_apptainer(words))
        call = parse_typed(words, environment, uid=info["uid"])
        calls.append(call)
        report.begin(call)
        return call

    def tell(error: ApptainerError) -> int:
        if images:
            from apptainer_py.cli.oci import action

            return action.show(error)
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
