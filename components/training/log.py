"""Training log: a line every log period, in the format of maskrcnn-benchmark.

    eta: 0:04:15  iter: 20  loss: 1.8236 (2.7274)  …  time: 0.2002 (0.3765)  data: 0.0099 (0.1242)  …  max mem: 3508

The first number is the median of the last window, the number in parentheses the mean over the run so far.
"""

import datetime
import resource
import statistics
import sys
from collections import deque
from collections.abc import Callable, Sequence

import torch

from model.engine.steps import Step


class SmoothedValue:
    """Value with its median over a window and its mean over all updates."""

    def __init__(self, window: int) -> None:
        self._recent: deque[float] = deque(maxlen=window)
        self._total = 0.0
        self._count = 0

    def update(self, value: float) -> None:
        """Add a value."""
        self._recent.append(value)
        self._total += value
        self._count += 1

    @property
    def median(self) -> float:
        """Median of the last `window` values."""
        return statistics.median(self._recent)

    @property
    def mean(self) -> float:
        """Mean of all values."""
        return self._total / self._count

    def __str__(self) -> str:
        return f"{self.median:.4f} ({self.mean:.4f})"


class TrainingLog:
    """Losses and times of a run: metrics of each step, and smoothed in log lines."""

    def __init__(self, window: int, max_iters: int, images_per_step: int) -> None:
        self._window, self._max_iters, self._images_per_step = window, max_iters, images_per_step
        self._values: dict[str, SmoothedValue] = {}

    def add(self, steps: Sequence[Step], log_metrics: Callable[[dict[str, float], int], None]) -> str:
        """Read steps from the device at once, log the metrics of each, and return the line of the last one."""
        names = list(steps[0].losses)
        table = torch.stack([torch.stack([*step.losses.values(), step.grad_norm, step.skipped]) for step in steps])
        for step, (*losses, grad_norm, skipped) in zip(steps, table.tolist(), strict=True):
            if not skipped:
                self._update(loss=sum(losses), **{f"loss_{n}": v for n, v in zip(names, losses, strict=True)})
            self._update(step_s=step.step_s, data_s=step.data_s)
            metrics = {f"loss/{name}": value for name, value in zip(names, losses, strict=True)}
            metrics |= {"loss/total": sum(losses), "grad_norm": grad_norm, "skipped": skipped}
            metrics |= {"learning_rate": step.learning_rate, "time/step_s": step.step_s, "time/data_s": step.data_s}
            speed = self._images_per_step / step.step_s
            log_metrics(metrics | {"throughput/images_per_s": speed, "memory/peak_mib": peak_memory_mib()}, step.number)
        return self._line(steps[-1].number, steps[-1].learning_rate)

    def _update(self, **values: float) -> None:
        """Add one step's values by name; `step_s` and `data_s` are seconds, the others losses."""
        for name, value in values.items():
            self._values.setdefault(name, SmoothedValue(self._window)).update(value)

    def _line(self, step: int, learning_rate: float) -> str:
        losses = [name for name in self._values if name not in ("step_s", "data_s")]
        parts = [f"eta: {datetime.timedelta(seconds=int(self.eta_s(step) or 0))}", f"iter: {step}"]
        parts += [f"{name}: {self._values[name]}" for name in losses]
        parts += [f"time: {self._values['step_s']}", f"data: {self._values['data_s']}"]
        parts += [f"lr: {learning_rate:.6f}", f"max mem: {peak_memory_mib():.0f}"]
        return "  ".join(parts)

    def eta_s(self, step: int) -> float | None:
        """Estimate the seconds until max_iters from the mean step time; None before the first step."""
        step_s = self._values.get("step_s")
        return None if step_s is None else step_s.mean * (self._max_iters - step)


def peak_memory_mib() -> float:
    """Peak memory so far in MiB: GPU memory if there is a GPU, else the resident set of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes on macOS, KiB elsewhere
