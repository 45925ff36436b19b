"""`checkpoint`: a running container as files, by CRIU."""

from __future__ import annotations

import fcntl
import os

from apptainer_py.base import log
from apptainer_py.base.errors import ApptainerError
from apptainer_py.base.files import write_all
from apptainer_py.engines.oci import snapshot
from apptainer_py.host import criu
from apptainer_py.kernel import _starter
from apptainer_py.model.json_out import dumps
from apptainer_py.model.json_text import loads
from apptainer_py.runtime.containers import CONFIG, STATE, ContainerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from apptainer_py.engines.oci.snapshot import Snapshot
    from apptainer_py.model.oci_call import OciCall
    from apptainer_py.model.record_frame import RecordData
    from apptainer_py.runtime.containers import StateDir

_LOG = "dump.log"
_LOG_LEVEL = 4
_RESOLVE_IN_ROOT = 0x10


class Dump:
    """One checkpoint on its way."""

    def __init__(
        self,
        call: OciCall,
        environment: Mapping[str, str],
        wish: Snapshot,
        state: StateDir,
        record: RecordData,
    ) -> None:
        self.call = call
        self.environment = environment
        self.wish = wish
        self.record = record
        self.config: dict[str, Any] = loads(state.read(CONFIG) or b"{}")
        self.known: dict[str, Any] = loads(state.read(STATE) or b"{}")
        self.pre_dump = call.flag("pre-dump")
        self.status_fd = call.number("status-fd") if "status-fd" in call.options else -1
        self.logs = wish.images

    def run(self) -> None:
        """Write the images.

        Raises:
            ApptainerError: CRIU is not there, or fails; its log is quoted.
        """
        self.version = criu.version(self.call.criu, self.environment)
        if self.version < snapshot.VERSION_LEAST:
            text = f"CRIU version {self.version} must be {snapshot.VERSION_LEAST} or higher"
            raise ContainerError(text=text)
        os.makedirs(os.path.dirname(self.wish.images), 0o700, exist_ok=True)
        snapshot.make_directory(self.wish.images)
        options = self._options()
        if self.pre_dump:
            criu.check_feature(self.call.criu, self.environment, "MemTrack")
        if self.call.flag("lazy-pages"):
            criu.check_feature(self.call.criu, self.environment, "LazyPages")
            self._check_status_fd()
        if not self.pre_dump:
            options["ext_mnt"] = self._external_mounts()
            self._write_descriptors()
        try:
            self._ask(options)
        except ApptainerError:
            snapshot.quote_log(self.logs, _LOG)
            raise

    def _ask(self, options: dict[str, Any]) -> None:
        kind = criu.PRE_DUMP if self.pre_dump else criu.DUMP
        one = criu.Criu(self.call.criu, self.environment)
        try:
            one.ask(kind, criu.options(options), notified=self._notified)
            status = one.finish()
        finally:
            one.close()
        # After a memory dump CRIU waits for the next one, and is sent away instead.
        if status and not self.pre_dump:
            code = os.waitstatus_to_exitcode(status)
            text = f"exit status {code}" if code > 0 else f"signal: {-code}"
            raise ContainerError(text=f"criu failed: {text}")

    def _notified(self, step: str, pid: int, fd: int) -> None:
        if step == "status-ready" and self.status_fd >= 0:
            try:
                os.write(self.status_fd, b"\0")
                os.close(self.status_fd)
            except OSError as error:
                log.warning(f"can't write \\0 to status fd: {(error.strerror or '').lower()}")
            self.status_fd = -1

    def _options(self) -> dict[str, Any]:
        wish, call = self.wish, self.call
        options: dict[str, Any] = {
            "images_dir_fd": snapshot.open_directory(wish.images),
            "log_level": _LOG_LEVEL,
            "log_file": _LOG,
            "root": (self.known.get("config") or {}).get("rootfs", ""),
            "manage_cgroups": 1,
            "manage_cgroups_mode": wish.cgroup_mode,
            "notify_scripts": 1,
            "pid": self.record.init_pid,
            "leave_running": int(call.flag("leave-running")),
            "tcp_skip_in_flight": int(call.flag("tcp-skip-in-flight")),
            "link_remap": int(call.flag("link-remap")),
            "empty_ns": wish.empty_spaces,
            "orphan_pts_master": 1,
            **snapshot.flags_of(call),
            **snapshot.settings_file(self.config.get("annotations") or {}),
        }
        if wish.work:
            snapshot.make_directory(wish.work)
            options["work_dir_fd"] = snapshot.open_directory(wish.work)
            self.logs = wish.work
        external = self._external_spaces()
        if external:
            options["external"] = external
        if self.record.freezer:
            options["freeze_cgroup"] = os.path.dirname(self.record.freezer)
        if wish.page_server is not None:
            options["ps"] = criu.pair(*wish.page_server)
        if wish.parent:
            options.update(parent_img=wish.parent, track_mem=1)
        return options

    def _external_spaces(self) -> list[str]:
        found = []
        names = {"network": "net", "pid": "pid"}
        for kind, path in snapshot.namespace_paths(self.config):
            if kind not in names or not path:
                continue
            name = names[kind]
            if self.version < snapshot.VERSION_EXTERNAL[name]:
                text = f"criu lacks support for external {name} namespace during checkpointing"
                raise ContainerError(text=f"{text} process (old criu version?)")
            try:
                inode = os.stat(path).st_ino
            except OSError as error:
                raise snapshot.reason("stat", path, error) from None
            found.append(f"{name}[{inode}]:extRoot{name.title()}NS")
        return found

    def _external_mounts(self) -> list[bytes]:
        """Return what is not to be dumped: each mount point is its own name."""
        paths = self.known.get("cgroup_paths") or {}
        targets = [target for target, _ in snapshot.binds_of(self.config, "/")]
        targets += [target for target, _ in snapshot.cgroup_binds(self.config, paths)]
        targets += snapshot.device_nodes(self.config)
        inside = snapshot.Inside((self.known.get("config") or {}).get("rootfs", "/"))
        found = [(real, real) for real in map(inside.real, targets)]
        inside.close()
        return snapshot.external_mounts([*found, *self._masked_files()])

    def _masked_files(self) -> list[tuple[str, str]]:
        import stat

        root = os.open(
            f"/proc/{self.record.init_pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
        )
        found = []
        for path in (self.config.get("linux") or {}).get("maskedPaths") or ():
            try:
                flags = os.O_PATH | os.O_CLOEXEC
                fd = _starter.openat2(root, os.fsencode(path), flags, _RESOLVE_IN_ROOT)
            except OSError:
                continue
            if not stat.S_ISDIR(os.fstat(fd).st_mode):
                found.append((path, "/dev/null"))
            os.close(fd)
        os.close(root)
        return found

    def _write_descriptors(self) -> None:
        """Note what the standard streams were: the pipes among them are others' when it goes on."""
        links = self.known.get("external_descriptors") or []
        path = f"{self.wish.images}/{snapshot.DESCRIPTORS}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            write_all(os.open(path, flags, 0o600), dumps(links).encode())
        except OSError as error:
            raise snapshot.reason("open", path, error) from None

    def _check_status_fd(self) -> None:
        fd = self.status_fd
        if fd == -1:
            return
        try:
            flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        except OSError as error:
            text = f"invalid --status-fd argument {fd}: {(error.strerror or '').lower()}"
            raise ContainerError(text=text) from None
        if flags & os.O_ACCMODE == os.O_RDONLY:
            raise ContainerError(text=f"invalid --status-fd argument {fd}: not writable")
        if self.version < snapshot.VERSION_STATUS:
            text = f"--status-fd needs CRIU {snapshot.VERSION_STATUS} or higher"
            raise ContainerError(text=text)
