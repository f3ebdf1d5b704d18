"""Benchmark of training in 1, 2, … processes: `maskrcnn benchmark scaling`.

Weak scaling keeps the batch per process constant, strong scaling the total batch. A process uses one GPU; on a CPU,
each has an equal share of the cores, the same in every row, so that the efficiency shows the cost of communication.
"""

from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from components.benchmarks.process import in_fresh_process
from components.benchmarks.steps import first_case
from components.config import Config
from components.params import ConfigError
from model.distributed import available_cores


def measure(config: Config) -> dict[str, Any]:
    """Measure weak and strong scaling for `benchmark.processes` and for 1, the baseline, in ascending order.

    The first of `batch_sizes` is the batch per process; in strong scaling, per process of the largest number, whose row
    is thus the same in both and measured once.

    Raises:
        ConfigError: if a number of processes does not divide the largest.
    """
    case, counts = first_case(config), sorted({1, *config.benchmark.processes})
    largest = max(counts)
    if uneven := [count for count in counts if largest % count]:
        raise ConfigError(f"benchmark.processes: each must divide the largest, {largest}, got {uneven[0]}")
    threads = max(1, available_cores() // largest)
    report: dict[str, Any] = {"dtype": case.dtype, "threads_per_process": threads}
    measured: dict[tuple[int, int], float] = {}  # processes and batch of each → seconds per step
    for kind in ("weak", "strong"):
        rows: list[dict[str, float]] = []
        for count in counts:
            batch = case.batch if kind == "weak" else case.batch * largest // count
            if (count, batch) not in measured:
                part = case.model_copy(update={"batch": batch, "networks": ("ours",), "processes": count})
                timed = in_fresh_process(part, threads=threads)
                measured[count, batch] = float(np.median(timed.step_s["ours"]))
            step_s = measured[count, batch]
            rows.append(
                {
                    "processes": count,
                    "batch_per_process": batch,
                    "step_s": step_s,
                    "images_per_s": batch * count / step_s,
                }
            )
            rows[-1]["speedup"] = rows[-1]["images_per_s"] / rows[0]["images_per_s"]
            rows[-1]["efficiency"] = rows[-1]["speedup"] / count
        report[kind] = rows
    return report


def metrics(report: dict[str, Any]) -> dict[str, float | None]:
    """Figures by MLflow name, such as `throughput/weak_scaling_8_images_per_s`."""
    named: dict[str, float | None] = {}
    for kind in ("weak", "strong"):
        for row in report[kind]:
            named[f"throughput/{kind}_scaling_{row['processes']}_images_per_s"] = row["images_per_s"]
            named[f"ratio/{kind}_scaling_{row['processes']}_efficiency"] = row["efficiency"]
    return named


def table(report: dict[str, Any]) -> Table:
    """Format the report."""
    result = Table(box=box.SIMPLE, pad_edge=False)
    for column in (
        f"train {report['dtype']}",
        "processes",
        "batch each",
        "step s",
        "images/s",
        "speed-up",
        "efficiency",
    ):
        result.add_column(column, justify="left" if column.startswith("train") else "right")
    for kind in ("weak", "strong"):
        for row in report[kind]:
            result.add_row(
                f"{kind} scaling", str(row["processes"]), str(row["batch_per_process"]), f"{row['step_s']:.3g}",
                f"{row['images_per_s']:.3g}", f"{row['speedup']:.2f}", f"{row['efficiency']:.2f}",
            )  # fmt: skip
    return result
