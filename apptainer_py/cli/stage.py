"""Where the stage host enters Python: puts parser, engines and stage drivers together."""

from __future__ import annotations

from apptainer_py.base import log
from apptainer_py.base.errors import UsageError
from apptainer_py.kernel import _starter
from apptainer_py.model import protocol
from apptainer_py.runtime import interpreter, stages

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from apptainer_py.model.request import ActionRequest


class Shown(UsageError):
    """A wrong command line, which the user has been told about."""

    message = ""


def _load_builtin(name: str) -> None:
    # Each registers itself; where a bundle has brought it, it is there already.
    if name == "apptainer":
        import apptainer_py.engines.apptainer
    elif name == "oci":
        import apptainer_py.engines.oci
    elif name == "fakeroot":
        import apptainer_py.engines.fakeroot  # noqa: F401


def _parse(
    arguments: list[str], environment: Mapping[str, str], engine: str, *, told: bool
) -> ActionRequest | None:
    if engine == "fakeroot":
        return None  # it has words of its own
    from apptainer_py.cli import report
    from apptainer_py.cli.parse import parse
    from apptainer_py.model.request import ActionRequest

    try:
        request = parse(arguments, environment)
    except UsageError as error:
        report.show(error)
        raise Shown from None
    report.begin(request, told=told)
    return request if isinstance(request, ActionRequest) else None


def main() -> int:
    """Run this process's stage; returns its exit status."""
    info = _starter.stage()
    interpreter.begin()
    try:
        if info["flow"] == protocol.FLOW_CALLER:
            from apptainer_py.cli.oci import stage

            return stage.run(info, _load_builtin)
        # The starter with the bit has read the same words, and told what there is to say of them.
        told = info["reason"] == protocol.REASON_ENGINE
        return stages.run(info, lambda *read: _parse(*read, told=told), _load_builtin)
    except Exception as error:  # noqa: BLE001  the last resort: a traceback is no message
        if info["stage"] == protocol.STAGE_MASTER:  # stage 2 has sealed itself
            from apptainer_py.cli import report

            if report.no_directory(error):
                log.fatal(report.NO_DIRECTORY)
                return 255
        log.fatal(f"internal error: {type(error).__name__}: {error}; run with -d for details")
        if log.level >= log.DEBUG and info["stage"] != protocol.STAGE_START:
            import traceback

            traceback.print_exc()
        return 255
