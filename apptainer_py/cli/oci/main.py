"""The commands of the `oci` engine that start no process: what the plain interpreter does."""

from __future__ import annotations

import os
import sys

from apptainer_py.base.errors import ApptainerError, UsageError
from apptainer_py.cli.oci import help as texts
from apptainer_py.cli.oci import report
from apptainer_py.cli.oci.parse import is_apptainer, parse_typed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from apptainer_py.model.oci_call import OciCall

    # What is printed, or the exit status where there may be another than 0.
    Verb = Callable[[OciCall, Mapping[str, str]], str | int]


def main(words: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command line, the program's name first; returns the exit status."""
    call: OciCall | None = None
    try:
        call = parse_typed(words, environment, uid=os.geteuid())
        report.begin(call)
        said = _verb(call)(call, environment)
        if isinstance(said, int):
            return said
        sys.stdout.write(said)
        sys.stdout.flush()
    except UsageError as error:
        return texts.show(error)
    except ApptainerError as error:
        sys.stdout.flush()
        return report.show(error, call, apptainer=is_apptainer(words))
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        text = f"{place}{(error.strerror or str(error)).lower()}"
        wrong = ApptainerError(text=text)
        return report.show(wrong, call, apptainer=is_apptainer(words))
    return 0


def _verb(call: OciCall) -> Verb:
    """Return what a command does; each lies in a module that is only loaded for it."""
    name = call.command
    if name in ("state", "list", "ps"):
        from apptainer_py.verbs import oci_show

        return {"state": oci_show.state, "list": oci_show.listing, "ps": oci_show.ps}[name]
    if name in ("start", "kill", "delete", "pause", "resume"):
        from apptainer_py.verbs import oci_life

        return {
            "start": oci_life.start,
            "kill": oci_life.kill,
            "delete": oci_life.delete,
            "pause": oci_life.pause,
            "resume": oci_life.resume,
        }[name]
    if name == "update":
        from apptainer_py.verbs.oci_update import update

        return update
    if name == "events":
        from apptainer_py.verbs.oci_events import events

        return events
    if name == "features":
        from apptainer_py.verbs.oci_features import features

        return features
    if name == "spec":
        from apptainer_py.verbs.oci_spec import spec

        return spec
    if name in ("mount", "umount"):
        from apptainer_py.verbs import oci_bundle

        return {"mount": oci_bundle.mount, "umount": oci_bundle.umount}[name]
    if name in ("checkpoint", "restore"):
        from apptainer_py.verbs import oci_checkpoint

        return oci_checkpoint.checkpoint if name == "checkpoint" else oci_checkpoint.restore
    raise ApptainerError(text=f"the command {name} is not supported yet")
