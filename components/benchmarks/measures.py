"""Measurements of `maskrcnn benchmark`: those of the chosen modes, the figures for MLflow, and the files."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

from components.benchmarks import evaluator, loader, phases, scaling, steps
from components.cli import terminal
from components.config import BenchmarkMode, Config
from components.runs.environment import environment
from components.runs.lock import writing
from components.tracking.tracker import open_tracker
from model.files import write_atomically

# Name in benchmark.json → modes, and the module with measure(config), metrics(report) and table(report).
MEASURES: dict[str, tuple[tuple[BenchmarkMode, ...], ModuleType]] = {
    "steps": (("train", "inference"), steps),
    "phases": (("phases",), phases),
    "scaling": (("scaling",), scaling),
    "loader": (("loader",), loader),
    "evaluator": (("evaluator",), evaluator),
}


def benchmark(config: Config) -> tuple[Path, dict[str, Any]]:
    """Measure the modes in `benchmark.modes`; return the path of benchmark.json, and its content.

    Raises:
        BenchmarkError: if a case cannot be run, for example for lack of memory.
        RunInUseError: if another stage writes into the run's folder.
    """
    with writing(config.train.output_dir, "benchmark"):
        return _benchmark(config)


def _benchmark(config: Config) -> tuple[Path, dict[str, Any]]:
    console = terminal()
    report: dict[str, Any] = {"device": config.train.device, "backbone": config.model.backbone, **environment()}
    figures: dict[str, float | None] = {}
    chosen = {name: module for name, (modes, module) in MEASURES.items() if set(modes) & set(config.benchmark.modes)}
    for name, module in chosen.items():
        with console.status(f"measuring {name}"):
            report[name] = module.measure(config)
        figures |= module.metrics(report[name])
    path = _write(config, report, figures)
    machine = report["hardware"]
    console.print(f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores")
    for name, module in chosen.items():
        console.print(module.table(report[name]))
    return path, report


def _write(config: Config, report: dict[str, Any], figures: dict[str, float | None]) -> Path:
    run_dir = config.train.output_dir
    path = run_dir / "benchmark.json"
    write_atomically(path, json.dumps(report, indent=2) + "\n")
    write_atomically(run_dir / "speed.json", json.dumps(_shown(report), indent=2) + "\n")
    with open_tracker(config, run_dir=run_dir, metrics_csv=False) as tracker:
        tracker.log_metrics(figures, step=0)
        tracker.log_artifact(path)
    return path


def _shown(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Content of speed.json, for DVC: our network's speed and memory, in the first case of each mode."""
    shown: dict[str, dict[str, float]] = {}
    for row in report.get("steps", {}).get("cases", []):
        if row["model"] == "ours" and row["mode"] not in shown:
            figures = {name: row[name] for name in ("images_per_s", "peak_memory_mib")}
            shown[row["mode"]] = {name: value for name, value in figures.items() if value is not None}
    return shown
