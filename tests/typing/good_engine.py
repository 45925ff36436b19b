"""An engine of a few lines: shows a directory as the root, and logs each hook that runs."""

from __future__ import annotations

import os

from apptainer_py.kernel import _starter
from apptainer_py.model import protocol
from apptainer_py.model.plan import ContainerPlan
from apptainer_py.runtime.engine import Operations, register_operations, register_rpc_methods

TYPE_CHECKING = False
if TYPE_CHECKING:
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

# Opened before the root changes; the log outlives every process.
LOG = os.open(
    os.path.join(os.path.dirname(__file__), "log"),
    os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC,
    0o666,
)


def note(*words: object) -> None:
    text = " ".join(str(word) for word in (*words, _starter.stage()["stage"], os.getpid()))
    os.write(LOG, text.encode() + b"\n")


def where(data: bytes) -> bytes:
    note("method")
    return data + b" " + str(os.stat("/proc/self/ns/mnt").st_ino).encode()


class Probe(Operations):
    def init_config(self, context: InitContext) -> None:
        super().init_config(context)
        note("init_config")

    def prepare_config(self, context: PrepareContext) -> None:
        note("prepare_config")
        assert isinstance(self.config(), dict)
        self.root = context.arguments[1]
        facts = context.facts
        flags = protocol.PLANFLAG_NO_NEW_PRIVS
        context.plan(ContainerPlan(image=self.root, uid=facts.uid, gid=facts.gid, flags=flags))
        context.tell_start("\0".join(context.arguments[2:]).encode())
        context.want_host_helpers()
        context.tell_host(b"for the host pair")

    def create_container(self, context: CreateContext) -> None:
        note("create_container")
        mounting = context.mounting
        os.close(mounting.session(1))
        facts = os.stat(self.root)
        os.close(mounting.root_directory(self.root, facts.st_dev, facts.st_ino, 0, "the root"))
        os.close(mounting.layer(protocol.LAYERKIND_NONE, "no layer"))
        note("answer", context.call("where", b"called").decode().replace(" ", "-"))
        mounting.pivot()

    def start_process(self, context: StartContext) -> None:
        note("start_process", os.listdir("/").count("test-root"))
        words = context.message.split(b"\0")
        raise context.execve(words[0], words, [b"PATH=/bin"])

    def post_start_process(self, context: PostStartContext) -> None:
        note("post_start_process", context.pid)

    def monitor_container(self, context: MonitorContext) -> int:
        note("monitor_container", context.pid)
        return context.wait()

    def cleanup_container(self, context: CleanupContext) -> None:
        note("cleanup_container", context.status)

    def prepare_host(self, context: PrepareHostContext) -> None:
        note("prepare_host", context.message == b"for the host pair")

    def post_start_host(self, context: PostStartHostContext) -> None:
        note("post_start_host", context.cwd, os.stat("/proc/self/ns/mnt").st_ino, os.getuid())

    def cleanup_host(self, context: CleanupHostContext) -> None:
        note("cleanup_host", context.orderly, os.stat("/proc/self/ns/mnt").st_ino, os.getuid())


register_operations("probe", Probe)
register_rpc_methods("probe", {"where": where})
