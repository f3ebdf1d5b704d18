"""System metrics during a run: MLflow's own (psutil, NVML), through our journal, so that an outage loses none.

The metrics are totals of processor, memory, disk and network, and values per GPU, of the machine of rank 0.
"""

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor

Log = Callable[[int, Mapping[str, float | None]], None]


class SystemMonitor:
    """Thread that takes a sample at the end of every period."""

    def __init__(self, log: Log, period_s: float, *, first_step: int) -> None:
        """Make a monitor.

        Args:
            log: called with the number of the sample, from first_step on, and its values.
            period_s: seconds between samples; 0 takes none.
        """
        self._log, self._period_s, self._step = log, period_s, first_step
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="system monitor", daemon=True)

    def start(self) -> None:
        """Start taking samples."""
        if self._period_s > 0:
            self._thread.start()

    def stop(self) -> None:
        """Stop taking samples."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def _sample(self) -> None:
        probes = _probes()
        while not self._stopping.wait(self._period_s):
            values: dict[str, float | None] = {}
            for probe in probes:
                probe.collect_metrics()
                values |= {f"system/{name}": value for name, value in probe.aggregate_metrics().items()}
                probe.clear_metrics()
            with suppress(OSError):  # a full disk costs this sample, not those after it
                self._log(self._step, values)
                self._step += 1


def _probes() -> "list[BaseMetricsMonitor]":
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    probes: list[BaseMetricsMonitor] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with suppress(ImportError, RuntimeError):  # no NVML, or no GPU
        probes.append(GPUMonitor())
    return probes
