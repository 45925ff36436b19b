"""Types of _starter.pyx and _config.pxi, for type checkers alone."""

from collections.abc import Callable
from typing import TypedDict, TypeVar, TypeVarTuple

_Arguments = TypeVarTuple("_Arguments")
_Result = TypeVar("_Result")

ConfigValue = bool | int | str | tuple[str, ...]
ConfigProblem = tuple[int, str, str, str]
ConfigReading = tuple[dict[str, ConfigValue], dict[str, int], list[ConfigProblem]]

class StageInfo(TypedDict):
    stage: int
    flow: int
    reason: int
    uid: int
    gid: int
    umask: int
    request_fd: int
    config_fd: int
    keeper_fd: int
    rpc_fd: int
    start_fd: int
    methods_fd: int
    trigger_fd: int
    helper_fds: tuple[int, int]
    permitted: int
    init_fd: int
    init_pid: int

def is_complete() -> bool: ...
def complete_interpreter() -> None: ...
def in_stage() -> bool: ...
def stage() -> StageInfo: ...
def run_hook(
    hook: int, function: Callable[[*_Arguments], _Result], *arguments: *_Arguments
) -> _Result: ...
def wait_for_go() -> bool: ...
def exec_payload(path: bytes, argv: list[bytes], env: list[bytes]) -> int: ...
def read_request(data: bytes) -> tuple[list[bytes], list[bytes], bytes, bytes, bytes]: ...
def send_operation(
    fd: int,
    op: int,
    flags: int,
    numbers: tuple[int, ...],
    first: bytes | None,
    second: bytes | None,
    passed: int = -1,
) -> None: ...
def receive_reply(fd: int) -> tuple[int, int, int, int]: ...
def receive_answer(fd: int) -> tuple[int, int, int, int]: ...
def send_container(
    fd: int,
    op: int,
    image: bytes,
    spaces: int,
    flags: int,
    fuse_count: int,
    uid: int,
    gid: int,
    groups: tuple[int, ...],
    caps: tuple[int, int, int, int, int],
) -> None: ...
def receive_event(fd: int) -> tuple[int, int, int] | None: ...
def send_bytes(fd: int, data: bytes, passed: int = -1) -> None: ...
def receive_bytes(fd: int, size: int) -> tuple[bytes, int]: ...
def openat2(directory: int, path: bytes, flags: int, resolve: int) -> int: ...
def bounding_set() -> int: ...
def parse_config(path: str, *, require_root_owned: bool) -> ConfigReading: ...
def parse_config_fd(fd: int) -> ConfigReading: ...
def default_config() -> ConfigReading: ...
def release_code() -> None: ...
