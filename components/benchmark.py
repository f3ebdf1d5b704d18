"""How fast a step is, and how much memory it takes: `maskrcnn benchmark [train] [inference] [loader]`, beside torchvision's model.

Times are taken with both networks in one process, stepped in turn; memory with each network alone in a fresh process. Images and
weights are synthetic (see benchmark_case.py), so neither data nor a checkpoint is needed; `loader` times the loading of images
instead (see benchmark_loader.py). Writes <train.output_dir>/benchmark.json.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from components import benchmark_loader
from components.benchmark_case import NUM_CLASSES, Case, Measurement, Name
from components.cli import parse, stage_parser, user_errors
from components.config import BenchmarkConfig, BenchmarkMode, Config, ConfigError
from components.environment import git_commit, hardware, versions
from components.journal import write_atomically
from components.tracking import open_tracker
from model.errors import UserError

_MEMORY_STEPS = 2  # the second holds what the first left behind, gradients and momentum too


class BenchmarkError(UserError):
    """A case could not be measured."""


@dataclass(frozen=True)
class BenchmarkResult:
    """The content of benchmark.json."""

    path: Path
    report: dict[str, Any]


def run(config: Config) -> BenchmarkResult:
    """Measure every combination of `benchmark.modes`, `dtypes` and `batch_sizes`.

    Raises:
        BenchmarkError: if a case cannot be run, for want of memory say.
    """
    console = Console()
    cases: list[dict[str, Any]] = []
    for case in plan(config):
        with console.status(f"measuring {case.mode}, {case.dtype}, batch {case.batch}"):
            cases += measure_case(case)
    machine = hardware()
    report: dict[str, Any] = {
        "cases": cases,
        "classes": NUM_CLASSES,
        "device": config.train.device,
        "hardware": machine,
        "versions": versions(),
        "commit": git_commit(),
    }
    figures = case_metrics(cases)
    if "loader" in config.benchmark.modes:
        with console.status("measuring the loader"):
            report["loader"] = benchmark_loader.measure(config)
        figures |= benchmark_loader.metrics(report["loader"])
    run_dir = config.train.output_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "benchmark.json"
    write_atomically(path, json.dumps(report, indent=2) + "\n")
    with open_tracker(config, run_dir=run_dir, metrics_csv=False) as tracker:
        tracker.log_metrics(figures, step=0)
        tracker.log_artifact(path)
    if cases:
        size = f"{cases[0]['height']} × {cases[0]['width']}"
        console.print(f"{size}, {machine['gpu'] or machine['cpu']}", highlight=False)
        console.print(table(cases))
    if "loader" in report:
        console.print(machine["cpu"], highlight=False)
        console.print(benchmark_loader.table(report["loader"]))
    return BenchmarkResult(path, report)


def plan(config: Config) -> list[Case]:
    """The cases to measure, each with all networks."""
    benchmark, (height, width) = config.benchmark, config.data.buckets[0]
    networks: tuple[Name, ...] = ("ours", "torchvision") if benchmark.torchvision else ("ours",)
    return [
        Case(
            mode=mode,
            networks=networks,
            dtype=dtype,
            batch=batch,
            height=benchmark.height_px or height,
            width=benchmark.width_px or width,
            warmup=benchmark.warmup,
            steps=benchmark.steps,
            device=config.train.device,
            model=config.model,
        )
        for mode, dtype, batch in product(benchmark.modes, benchmark.dtypes, benchmark.batch_sizes)
        if mode in ("train", "inference")  # the others time no network
    ]


def measure_case(case: Case) -> list[dict[str, Any]]:
    """One row for each network: times from a common process, memory from one of its own."""
    timed = in_fresh_process(case)
    rows = []
    for name in case.networks:
        alone = case.model_copy(update={"networks": (name,), "warmup": 0, "steps": _MEMORY_STEPS})
        memory = in_fresh_process(alone) if len(case.networks) > 1 else timed
        median, p90, p99 = np.percentile(timed.step_s[name], (50, 90, 99)).tolist()
        rows.append(
            {
                "mode": case.mode,
                "model": name,
                "dtype": case.dtype,
                "batch": case.batch,
                "height": case.height,
                "width": case.width,
                "images_per_s": case.batch / median,
                "step_s": {"median": median, "p90": p90, "p99": p99},
                "peak_memory_mib": memory.peak_memory_mib,
            }
        )
    ours, theirs = rows[0], rows[-1]
    memories = (ours["peak_memory_mib"], theirs["peak_memory_mib"])
    compared = theirs is not ours
    ours["ratio_to_torchvision"] = ours["step_s"]["median"] / theirs["step_s"]["median"] if compared else None
    ours["memory_ratio_to_torchvision"] = memories[0] / memories[1] if compared and all(memories) else None
    return rows


def in_fresh_process(case: Case) -> Measurement:
    """Measure where nothing else has used memory before.

    Raises:
        BenchmarkError: if that process fails; its last words are in the message.
    """
    command = [sys.executable, "-m", "components.benchmark_case", case.model_dump_json()]
    root = str(Path(__file__).resolve().parents[1])  # the caller may stand elsewhere, without the package installed
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
    if done.returncode:
        last_words = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}, nothing said"]
        raise BenchmarkError(
            f"benchmark of {case.mode}, {case.dtype}, batch {case.batch}, {case.height} × {case.width} failed: {last_words[0]}; "
            "try a smaller benchmark.batch_sizes or benchmark.height_px and width_px"
        )
    return Measurement.model_validate_json(done.stdout.splitlines()[-1])


def case_metrics(cases: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Our figures under their MLflow names, such as `throughput/train_float32_batch2_images_per_s`."""
    metrics: dict[str, float | None] = {}
    for row in cases:
        if row["model"] != "ours":
            continue
        name = f"{row['mode']}_{row['dtype']}_batch{row['batch']}"
        metrics[f"throughput/{name}_images_per_s"] = row["images_per_s"]
        metrics[f"throughput/{name}_step_s"] = row["step_s"]["median"]
        metrics[f"throughput/{name}_peak_memory_mib"] = row["peak_memory_mib"]
        metrics[f"throughput/{name}_ratio_to_torchvision"] = row["ratio_to_torchvision"]
    return metrics


def table(cases: Sequence[dict[str, Any]]) -> Table:
    """The cases as people read them, in 80 columns; × compares ours with torchvision's."""
    result = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 0, 0, 1))
    for column in ("", "images/s", "median s", "p90", "p99", "MiB", "× time", "× MiB"):
        result.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in cases:
        if row["model"] == "ours":
            result.add_row(f"{row['mode']} {row['dtype']} ×{row['batch']}", style="bold")
        result.add_row(
            f"  {row['model']}",
            f"{row['images_per_s']:.3g}",
            *(f"{row['step_s'][name]:.3g}" for name in ("median", "p90", "p99")),
            _number(row["peak_memory_mib"], ".0f"),
            _number(row.get("ratio_to_torchvision"), ".2f"),
            _number(row.get("memory_ratio_to_torchvision"), ".2f"),
        )
    return result


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def with_modes(config: Config, words: Sequence[str]) -> Config:
    """The configuration with the modes that the command line names, if any.

    Raises:
        ConfigError: if a word is no mode.
    """
    if not words:
        return config
    unknown = [word for word in words if word not in get_args(BenchmarkMode)]
    if unknown:
        raise ConfigError(f"benchmark: must be some of {', '.join(get_args(BenchmarkMode))}, got {' '.join(unknown)}")
    benchmark = BenchmarkConfig.model_validate({**config.benchmark.model_dump(), "modes": tuple(words)})
    return config.model_copy(update={"benchmark": benchmark})


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of `maskrcnn benchmark`."""
    parser = stage_parser("benchmark", __doc__, operands=" | ".join(get_args(BenchmarkMode)))
    with user_errors():
        args, config = parse(parser, argv)
        run(with_modes(config, args.operands))


if __name__ == "__main__":
    main()
