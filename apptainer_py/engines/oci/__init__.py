"""The engine for bundles of the OCI runtime specification: `create`, `run` and `exec`.

No Python enters a container here: what runs inside is data that starter-init carries out.
"""

from __future__ import annotations

from apptainer_py.base.errors import ApptainerError
from apptainer_py.runtime.engine import Operations, register_operations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from apptainer_py.engines.oci.create import Creation
    from apptainer_py.engines.oci.tenant import Tenancy
    from apptainer_py.runtime.contexts import (
        CleanupContext,
        CreateContext,
        InitContext,
        MonitorContext,
        PostStartContext,
        PrepareContext,
    )


class Oci(Operations):
    """Makes a container of a bundle, or one more process in a container."""

    process_is_data = True

    def __init__(self) -> None:
        super().__init__()
        self.work: Creation | Tenancy | None = None

    def _work(self) -> Creation | Tenancy:
        if self.work is None:
            raise ApptainerError(text="the engine has not been prepared")
        return self.work

    def init_config(self, context: InitContext) -> None:
        """Read nothing: this engine has no configuration of its own."""

    def prepare_config(self, context: PrepareContext) -> None:
        """Read the bundle or the container's record, and compile it to rows."""
        assert context.call is not None
        if context.call.action is not None:
            from apptainer_py.engines.oci.image import ImageRun

            self.work = ImageRun(context, context.call)
        elif context.call.command == "exec":
            from apptainer_py.engines.oci.tenant import Tenancy

            self.work = Tenancy(context, context.call)
        else:
            from apptainer_py.engines.oci.create import Creation

            self.work = Creation(context, context.call)
        self.stays = self.work.stays

    def create_container(self, context: CreateContext) -> None:
        """Make everything, up to the moment where the process can only become the payload."""
        self._work().build(context.nest)

    def let_go(self, context: CreateContext) -> int:
        """Have the first process become the payload, or wait for `start`; returns its pid."""
        return self._work().let_go(context.nest)

    def post_start_process(self, context: PostStartContext) -> None:
        """Write the pid file; run the poststart hooks if nobody else will."""
        self._work().started()

    def monitor_container(self, context: MonitorContext) -> int:
        """Pass signals and the terminal on until the payload has ended."""
        return self._work().watch(context)

    def cleanup_container(self, context: CleanupContext) -> None:
        """Undo what was made for a container that failed, or that ended in the foreground."""
        if self.work is not None:
            self.work.clean_up(context.status)


register_operations("oci", Oci)
