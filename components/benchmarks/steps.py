"""Benchmark of time and memory per step, `maskrcnn benchmark train inference`, against torchvision's model.

Times are measured with all networks in one process, which step in turn; memory is measured with each network in a fresh
process. torchvision's network runs in both memory formats, NCHW and NHWC (channels-last), and ratios are to the faster
one. Images and weights are synthetic (see workload.py), so neither data nor a checkpoint is needed.
"""

import logging
from itertools import product
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from components.benchmarks.case import MEMORY_FORMATS, NUM_CLASSES, Case, Name
from components.benchmarks.process import in_fresh_process
from components.benchmarks.twin import has_twin
from components.config import Config
from model.engine.graphs import WARMUP_STEPS

_log = logging.getLogger(__name__)
_MEMORY_STEPS = 2  # the second holds what the first left behind, gradients and momentum too
_STEPS_TO_GRAPH = WARMUP_STEPS + 1  # the last is captured


def measure(config: Config) -> dict[str, Any]:
    """Measure every combination of `benchmark.modes`, `dtypes` and `batch_sizes`, one row per network.

    Raises:
        BenchmarkError: if a case cannot be run, for example for lack of memory.
    """
    return {
        "classes": NUM_CLASSES,
        "cases": [row for case in plan(config) for row in measure_case(case, config.benchmark.memory)],
    }


def plan(config: Config) -> list[Case]:
    """List the cases to measure, each with all networks."""
    benchmark = config.benchmark
    networks: tuple[Name, ...] = ("ours",)
    if benchmark.torchvision and has_twin(config.model):
        networks = ("ours", *MEMORY_FORMATS)
    elif benchmark.torchvision:
        _log.warning("benchmark.torchvision: torchvision has no equivalent network; only ours is measured")
    return [
        case(config, mode=mode, networks=networks, dtype=dtype, batch=batch)
        for mode, dtype, batch in product(benchmark.modes, benchmark.dtypes, benchmark.batch_sizes)
        if mode in ("train", "inference")
    ]


def first_case(config: Config) -> Case:
    """Training case with the first of `dtypes` and `batch_sizes`, for the modes phases and scaling."""
    benchmark = config.benchmark
    return case(config, mode="train", networks=("ours",), dtype=benchmark.dtypes[0], batch=benchmark.batch_sizes[0])


def case(config: Config, **choices: Any) -> Case:
    """Make a case with the configured network, image size and number of steps."""
    benchmark, (height, width) = config.benchmark, config.data.buckets[0]
    least_warmup = _STEPS_TO_GRAPH if config.train.cuda_graph else 0
    return Case(
        height=benchmark.height_px or height,
        width=benchmark.width_px or width,
        warmup=max(benchmark.warmup, least_warmup),
        steps=benchmark.steps,
        steps_per_wait=benchmark.steps_per_wait,
        device=config.train.device,
        model=config.model,
        compile=config.train.compile,
        cuda_graph=config.train.cuda_graph,
        deterministic=config.train.deterministic,
        **choices,
    )


def measure_case(case: Case, has_memory: bool = True) -> list[dict[str, Any]]:
    """Measure one row per network: times in a common process, memory in a separate one."""
    timed = in_fresh_process(case)
    rows = []
    for name in case.networks:
        memory_mib = timed.peak_memory_mib if len(case.networks) == 1 else None
        if has_memory and len(case.networks) > 1:
            memory_mib = in_fresh_process(alone(case, name)).peak_memory_mib
        median, p90, p99 = np.percentile(timed.step_s[name], (50, 90, 99)).tolist()
        rows.append(
            {
                "mode": case.mode,
                "model": name,
                "dtype": case.dtype,
                "batch": case.batch,
                "height": case.height,
                "width": case.width,
                "compile": case.compile and name == "ours",
                "cuda_graph": case.cuda_graph and name == "ours",
                "deterministic": case.deterministic and name == "ours" and case.mode == "train",
                "images_per_s": case.batch / median,
                "step_s": {"median": median, "p90": p90, "p99": p99},
                "peak_memory_mib": memory_mib,
            }
        )
    return with_ratios(rows)


def alone(case: Case, name: Name) -> Case:
    """Case that measures the memory of one network: its first steps, or the first replay of its graph."""
    is_graphed = case.cuda_graph and case.mode == "train" and name == "ours"
    return case.model_copy(
        update={
            "networks": (name,),
            "warmup": _STEPS_TO_GRAPH if is_graphed else 0,
            "steps_per_wait": 1,
            "steps": 1 if is_graphed else _MEMORY_STEPS,
        }
    )


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to our row, the first, the ratios to the fastest of torchvision's, if there are any."""
    nothing = {"ratio_to_torchvision": None, "memory_ratio_to_torchvision": None}
    fastest = min(rows[1:], key=lambda row: row["step_s"]["median"], default=None)
    return [rows[0] | (ratios(rows[0], fastest) if fastest else nothing), *rows[1:]]


def ratios(ours: dict[str, Any], fastest: dict[str, Any]) -> dict[str, float | None]:
    """Ratios of our time and memory to those of torchvision's network in its fastest memory format."""
    memories = (ours["peak_memory_mib"], fastest["peak_memory_mib"])
    return {
        "ratio_to_torchvision": ours["step_s"]["median"] / fastest["step_s"]["median"],
        "memory_ratio_to_torchvision": memories[0] / memories[1] if all(memories) else None,
    }


def metrics(report: dict[str, Any]) -> dict[str, float | None]:
    """Our figures by MLflow name, such as `throughput/train_float32_batch2_images_per_s`."""
    figures: dict[str, float | None] = {}
    for row in report["cases"]:
        if row["model"] != "ours":
            continue
        name = "_".join((row["mode"], row["dtype"], f"batch{row['batch']}", *_extras(row)))
        figures[f"throughput/{name}_images_per_s"] = row["images_per_s"]
        figures[f"time/{name}_step_s"] = row["step_s"]["median"]
        figures[f"memory/{name}_peak_mib"] = row["peak_memory_mib"]
        figures[f"ratio/{name}_time_to_torchvision"] = row["ratio_to_torchvision"]
        figures[f"ratio/{name}_memory_to_torchvision"] = row["memory_ratio_to_torchvision"]
    return figures


def table(report: dict[str, Any]) -> Table:
    """Format the report in 80 columns; × is our time or memory over torchvision's faster network."""
    size = f"{report['cases'][0]['height']} × {report['cases'][0]['width']}"
    result = Table(title=size, title_justify="left", box=box.SIMPLE, pad_edge=False, padding=(0, 0, 0, 1))
    for column in ("", "images/s", "median s", "p90", "p99", "MiB", "× time", "× MiB"):
        result.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in report["cases"]:
        if row["model"] == "ours":
            result.add_row(" ".join((row["mode"], row["dtype"], f"×{row['batch']}", *_extras(row))), style="bold")
        result.add_row(
            f"  {row['model']}",
            f"{row['images_per_s']:.3g}",
            *(f"{row['step_s'][name]:.3g}" for name in ("median", "p90", "p99")),
            _number(row["peak_memory_mib"], ".0f"),
            _number(row.get("ratio_to_torchvision"), ".2f"),
            _number(row.get("memory_ratio_to_torchvision"), ".2f"),
        )
    return result


def _extras(row: dict[str, Any]) -> list[str]:
    """Enabled accelerators (compile, cuda_graph)."""
    return [name for name in ("compile", "cuda_graph") if row[name]]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
