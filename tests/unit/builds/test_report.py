"""How far a build is, where the output is a log, and who may tell it."""

from __future__ import annotations

import threading

from apptainer_py.base import log
from apptainer_py.builds import report


def test_a_log_has_a_line_now_and_then(monkeypatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(report.time, "monotonic", lambda: clock[0])
    lines: list[str] = []
    with (
        log.TellingThisThread(lambda _level, text: lines.append(text)),
        report.counting("Fetching", 3_000_000) as told,
    ):
        told(1_000_000)
        clock[0] += report._LINE_EACH_S
        told(500_000)
        told(500_000)
    assert lines == ["Fetching: 1.5 of 3.0 MB"]


def test_parts_of_many_threads_are_counted_whole() -> None:
    sizes: list[int] = []
    gathered = report._Gathered(sizes.append)

    def work() -> None:
        for _ in range(1000):
            gathered.told(report._PART_BYTES // 8)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(sizes) == 4000 * (report._PART_BYTES // 8)
    assert min(sizes) >= report._PART_BYTES
