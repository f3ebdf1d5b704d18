"""Report chapter on speed: training times, and the measurements of `maskrcnn benchmark`."""

import statistics
from collections.abc import Sequence
from typing import Any

from components.reports.layout import Cell, Chapter, Table
from components.runs.figures import DASH, duration, number
from components.runs.files import RunData

_CASE_HEAD = ("", "network", "images/s", "median step", "90 %", "99 %", "peak memory", "time to torchvision's")


def speed(runs: Sequence[RunData]) -> Chapter:
    """Make the chapter of speed: training times and benchmarks."""
    tables = []
    if trained := [run for run in runs if run.training]:
        columns = [training_speed(run) for run in trained]
        rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
        tables.append(Table(["training", *(run.name for run in trained)], rows))
    for run in runs:
        benchmark = run.benchmark or {}
        if cases := (benchmark.get("steps") or {}).get("cases"):
            tables.append(Table(_CASE_HEAD, [_case_row(case) for case in cases], f"{run.name}: benchmark"))
        if scaling := benchmark.get("scaling"):
            tables.append(_scaling_table(run.name, scaling))
    absent = [f"{run.name} has no benchmark; run `maskrcnn benchmark`." for run in runs if run.benchmark is None]
    return Chapter("speed", "Speed", absent, tables)


def training_speed(run: RunData) -> dict[str, str]:
    """Figures of a run's training by name; pauses between interrupted parts do not count."""
    step_s, data_s = _median(run, "time/step_s"), _median(run, "time/data_s")
    memory = _values(run, "memory/peak_mib")
    return {
        "steps": str(run.training[-1].step),
        "images per step": str(run.config.get("train.batch_size", DASH)),
        "time in steps": duration(training_time_s(run)),
        "median step": number(step_s, unit="s"),
        "share waiting for data": number(data_s / step_s if step_s and data_s is not None else None, ".1%"),
        "median images/s": number(_median(run, "throughput/images_per_s"), ".3g"),
        "peak memory": number(max(memory, default=None), ".0f", "MiB"),
    }


def training_time_s(run: RunData) -> float | None:
    """Total time of all steps, without evaluation, checkpoints and pauses."""
    times = _values(run, "time/step_s")
    return sum(times) if times else None


def _values(run: RunData, name: str) -> list[float]:
    return [value for entry in run.training if (value := entry.metrics.get(name)) is not None]


def _median(run: RunData, name: str) -> float | None:
    values = _values(run, name)
    return statistics.median(values) if values else None


def _case_row(case: dict[str, Any]) -> list[Cell | str]:
    times = case["step_s"]
    return [
        f"{case['mode']}, {case['dtype']}, batch {case['batch']}, {case['height']} × {case['width']}",
        case["model"],
        number(case["images_per_s"], ".3g"),
        *(number(times[name], ".3g", "s") for name in ("median", "p90", "p99")),
        number(case["peak_memory_mib"], ".0f", "MiB"),
        number(case.get("ratio_to_torchvision"), ".2f"),
    ]


def _scaling_table(name: str, scaling: dict[str, Any]) -> Table:
    rows = [
        [
            f"{kind} scaling, {row['processes']} × batch {row['batch_per_process']}",
            number(row["images_per_s"], ".3g"),
            number(row["speedup"], ".2f"),
            number(row["efficiency"], ".2f"),
        ]
        for kind in ("weak", "strong")
        for row in scaling[kind]
    ]
    return Table(["processes", "images/s", "speed-up", "efficiency"], rows, f"{name}: processes, {scaling['dtype']}")
