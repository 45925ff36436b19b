"""The good engine, and bad ones: each reaches, in one hook, for what that stage may not do."""

from __future__ import annotations

from pathlib import Path

GOOD = Path(__file__).resolve().parent / "good_engine.py"
REACHES = {
    "init_config": 'context.tell_start(b"")',
    "prepare_config": "context.mounting.pivot()",
    "create_container": 'context.execve(b"/bin/true", [], [])',
    "start_process": 'context.call("where", b"")',
    "post_start_process": "context.mounting.pivot()",
    "monitor_container": 'context.execve(b"/bin/true", [], [])',
    "cleanup_container": "context.wait()",
    "prepare_host": "context.wait()",
    "post_start_host": "context.wait()",
    "cleanup_host": "context.want_host_helpers()",
}


def bad_engine(hook: str) -> tuple[str, int]:
    """Return the good engine with one bad statement in a hook, and the number of its line."""
    lines = GOOD.read_text().splitlines()
    starts = [number for number, line in enumerate(lines) if f"def {hook}(self, " in line]
    assert len(starts) == 1
    at = starts[0] + (2 if "super()" in lines[starts[0] + 1] else 1)
    lines.insert(at, f"        {REACHES[hook]}")
    return "\n".join(lines) + "\n", at + 1
