"""The engine for SIF files, bare squashfs and sandbox directories."""

from __future__ import annotations

from apptainer_py.runtime.engine import Operations, register_operations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from apptainer_py.engines.apptainer.joining import Joined
    from apptainer_py.engines.apptainer.prepare import Prepared
    from apptainer_py.runtime.contexts import (
        CleanupContext,
        CleanupHostContext,
        CreateContext,
        InitContext,
        MonitorContext,
        PostStartContext,
        PostStartHostContext,
        PrepareContext,
        PrepareHostContext,
        StartContext,
    )


class Apptainer(Operations):
    """Runs an image the way Apptainer's users know it."""

    prepared: Prepared | None = None
    joined: Joined | None = None
    patience: float = 0.0

    def init_config(self, context: InitContext) -> None:
        """Load what the later hooks of this stage need, while the host's files are there."""
        super().init_config(context)
        if context.stage == "stage2":
            import apptainer_py.engines.apptainer.start  # noqa: F401  before the seal

    def prepare_config(self, context: PrepareContext) -> None:
        """Judge image, options and policy; plan mounts, identity and process."""
        from apptainer_py.engines.apptainer.prepare import prepare, prepare_join

        if context.action is not None and context.action.runscript_timeout:
            from apptainer_py.engines.apptainer import patience

            self.patience = patience.read(context.action.runscript_timeout)
        if context.action is not None and context.action.image.startswith("instance://"):
            self.joined = prepare_join(context)
        else:
            self.prepared = prepare(context)
            self.joined = self.prepared.joined

    def create_container(self, context: CreateContext) -> None:
        """Put the container together from the plan."""
        from apptainer_py.engines.apptainer.create import create

        if self.joined is not None:
            self.joined.create(context)
            return
        assert self.prepared is not None
        create(context, self.prepared)

    def rehearse(self, message: bytes) -> None:
        """Read a script as the image's will be read."""
        from apptainer_py.engines.apptainer import start

        start.rehearse(message)

    def start_process(self, context: StartContext) -> None:
        """Find directory and program inside the container, and become it."""
        from apptainer_py.engines.apptainer import start

        start.start(context)

    def post_start_process(self, context: PostStartContext) -> None:
        """Tell of an instance that it stands."""
        if self.prepared is not None and self.prepared.service is not None:
            self.prepared.service.stands(context.pid)

    def monitor_container(self, context: MonitorContext) -> int:
        """Wait for the payload's end, and with --runscript-timeout for its start.

        Meanwhile other ranks may come into the container.
        """
        meeting = self.prepared.meeting if self.prepared is not None else None
        if self.patience:
            from apptainer_py.engines.apptainer import patience

            patience.watch(context, self.patience, meeting)
        return context.wait(meeting)

    def cleanup_container(self, context: CleanupContext) -> None:
        """Mounts die with their namespace; what else there is goes with the launch's last."""
        if self.prepared is not None and self.prepared.networks is not None:
            self.prepared.networks.close()
        if self.prepared is not None and self.prepared.fuses is not None:
            self.prepared.fuses.close()
        janitor = self.prepared.janitor if self.prepared is not None else None
        if janitor is not None:
            janitor.end(wait=context.status is not None)
        if self.prepared is not None and self.prepared.service is not None:
            self.prepared.service.ended()

    def prepare_host(self, context: PrepareHostContext) -> None:
        """Mount the image as a user may, where the container cannot."""
        from apptainer_py.engines.apptainer import host_image

        host_image.mount(context)

    def post_start_host(self, context: PostStartHostContext) -> None:
        """Detach that mount: the container holds it, or there will be none."""
        from apptainer_py.engines.apptainer import host_image

        host_image.detach(context.message)

    def cleanup_host(self, context: CleanupHostContext) -> None:
        """Make sure of it at the end, whoever was killed."""
        from apptainer_py.engines.apptainer import host_image

        host_image.detach(context.message)


register_operations("apptainer", Apptainer)
