"""Peak memory of a measurement."""

from pathlib import Path

import torch


class PeakMemory:
    """Peak memory: on CUDA, the memory that torch reserved on the device, graphs included; else the resident memory of
    the process in excess of that when this object was made.
    """

    _STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before_mib = self._resident_mib("VmRSS") or 0.0

    def forget_peak(self) -> None:
        """Reset the peak to the current use."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
        elif self._CLEAR.exists():
            self._CLEAR.write_text("5")  # Linux: resets the peak to the resident memory

    def peak_mib(self) -> float | None:
        """Peak in MiB; None if the system does not report it."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_reserved(self._device) / 2**20
        peak_mib = self._resident_mib("VmHWM")
        return None if peak_mib is None else peak_mib - self._before_mib

    def _resident_mib(self, name: str) -> float | None:
        lines = self._STATUS.read_text().splitlines() if self._STATUS.is_file() else []
        values = [float(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:")]
        return values[0] if values else None
