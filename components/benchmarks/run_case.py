"""One measurement in a separate process: `python -m components.benchmarks.run_case CASE` prints its result as JSON.

Both networks have the same weights and the same images: noise with seven polygons each, as outlines for ours and as
dense masks for torchvision's. Weights are random, but cause the work of trained ones: see `workload.calibrate`. A
training step is forward, backward and the optimizer's step; inference goes from images to boxes and 28 × 28 masks.
Neither includes loading images or writing results.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from components.benchmarks.case import Case, Measurement, Name
from components.benchmarks.memory import PeakMemory
from components.benchmarks.network_steps import build_steps
from model.distributed import is_main, pick_device, process_group


def measure(case: Case) -> Measurement:
    """Build the networks and time their steps."""
    device = pick_device(case.device)
    memory = PeakMemory(device)
    return take_turns(build_steps(case, device), case, device, memory)


def take_turns(
    steps: Mapping[Name, Callable[[], object]], case: Case, device: torch.device, memory: PeakMemory
) -> Measurement:
    """Warm up, then step the networks in turn, so that disturbances affect all. Peak memory excludes the warm-up."""
    step_s: dict[str, list[float]] = {name: [] for name in case.networks}
    for number in range(case.warmup + case.steps):
        if number == case.warmup:
            memory.forget_peak()
        for name in case.networks:
            duration_s = _timed(steps[name], device, 1 if number < case.warmup else case.steps_per_wait)
            if number >= case.warmup:
                step_s[name].append(duration_s)
    return Measurement(step_s=step_s, peak_memory_mib=memory.peak_mib())


def _timed(step: Callable[[], object], device: torch.device, steps: int) -> float:
    """Mean seconds of some steps; waits for the device before and after them."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / steps


def main(argv: Sequence[str] | None = None) -> None:
    """Read a Case as JSON from the command line, print its Measurement as JSON."""
    (text,) = sys.argv[1:] if argv is None else argv
    case = Case.model_validate_json(text)
    with process_group(pick_device(case.device), timeout_s=600):
        measurement = measure(case)
        if is_main():
            print(measurement.model_dump_json())


if __name__ == "__main__":
    main()
