"""Samples of the machine's load."""

import threading
from collections.abc import Mapping

from components.tracking.monitor import SystemMonitor


def test_a_sample_that_cannot_be_written_does_not_end_the_others():
    steps: list[int] = []
    is_written = threading.Event()

    def log(step: int, values: Mapping[str, float | None]) -> None:
        steps.append(step)
        if len(steps) == 1:
            raise OSError("No space left on device")
        assert "system/cpu_utilization_percentage" in values
        is_written.set()

    monitor = SystemMonitor(log, 0.01, first_step=7)
    monitor.start()
    assert is_written.wait(30)
    monitor.stop()
    assert steps[:2] == [7, 7]
