"""Extra methods of an engine that is not built in: bytes to bytes, over one channel."""

from __future__ import annotations

from apptainer_py.base.errors import LaunchError
from apptainer_py.kernel import _starter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from apptainer_py.runtime.engine import RpcMethod

_FRAME_BYTES = 65536 + 256


class MethodFailed(LaunchError):
    """A registered method raised, or is not there."""

    message = "the method {method} failed: {reason}"


def call_method(fd: int, method: str, data: bytes) -> bytes:
    """Call a method in the container's namespaces and return its answer.

    Raises:
        MethodFailed: it is not registered, or raised.
    """
    if fd < 0:
        raise MethodFailed(method=method, reason="this flow has built-in operations only")
    try:
        _starter.send_bytes(fd, method.encode() + b"\0" + data)
        answer, _ = _starter.receive_bytes(fd, _FRAME_BYTES)
    except OSError:
        answer = b""
    if answer[:1] != b"+":
        raise MethodFailed(
            method=method, reason=answer[1:].decode("utf-8", "replace") or "no answer"
        )
    return answer[1:]


def serve_rpc_requests(fd: int, methods: Mapping[str, RpcMethod]) -> int:
    """Answer calls until the other side closes; returns the exit status."""
    while True:
        try:
            frame, _ = _starter.receive_bytes(fd, _FRAME_BYTES)
        except OSError:
            frame = b""
        if not frame:
            return 0
        name, _, data = frame.partition(b"\0")
        method = methods.get(name.decode("utf-8", "replace"))
        try:
            if method is None:
                raise KeyError("no such method")
            answer = b"+" + method(data)
        except Exception as error:  # noqa: BLE001  whatever a method raises is its answer
            answer = b"-" + f"{type(error).__name__}: {error}".encode()
        try:
            _starter.send_bytes(fd, answer)
        except OSError:
            return 0  # nobody waits for it any more
