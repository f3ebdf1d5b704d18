"""Measure speed and memory: `maskrcnn benchmark train inference phases scaling loader evaluator`, or some of these.

train and inference: steps of the network, against torchvision's; phases: time of each phase of a training step;
scaling: several processes; loader: images to batches; evaluator: COCO scoring. Writes
<train.output_dir>/benchmark.json.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

from rich.console import Console

from components.benchmarks import evaluator, loader, phases, scaling, steps
from components.cli import parse, stage_parser, user_errors
from components.config import BenchmarkConfig, BenchmarkMode, Config
from components.params import ConfigError
from components.runs.environment import environment
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


@dataclass(frozen=True)
class BenchmarkResult:
    """Result of a benchmark: the content of benchmark.json."""

    path: Path
    report: dict[str, Any]


def run(config: Config) -> BenchmarkResult:
    """Run the modes in `benchmark.modes`.

    Raises:
        BenchmarkError: if a case cannot be run, for example for lack of memory.
    """
    console = Console()
    report: dict[str, Any] = {"device": config.train.device, "backbone": config.model.backbone, **environment()}
    figures: dict[str, float | None] = {}
    chosen = {name: module for name, (modes, module) in MEASURES.items() if set(modes) & set(config.benchmark.modes)}
    for name, module in chosen.items():
        with console.status(f"measuring {name}"):
            report[name] = module.measure(config)
        figures |= module.metrics(report[name])
    path = _write(config, report, figures)
    machine = report["hardware"]
    console.print(f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores", highlight=False)
    for name, module in chosen.items():
        console.print(module.table(report[name]))
    return BenchmarkResult(path, report)


def _write(config: Config, report: dict[str, Any], figures: dict[str, float | None]) -> Path:
    run_dir = config.train.output_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "benchmark.json"
    write_atomically(path, json.dumps(report, indent=2) + "\n")
    with open_tracker(config, run_dir=run_dir, metrics_csv=False) as tracker:
        tracker.log_metrics(figures, step=0)
        tracker.log_artifact(path)
    return path


def with_modes(config: Config, words: Sequence[str]) -> Config:
    """Replace `benchmark.modes` by the modes on the command line, if any.

    Raises:
        ConfigError: if a word is not a mode.
    """
    if not words:
        return config
    unknown = [word for word in words if word not in get_args(BenchmarkMode)]
    if unknown:
        raise ConfigError(f"benchmark: must be any of {', '.join(get_args(BenchmarkMode))}, got {' '.join(unknown)}")
    benchmark = BenchmarkConfig.model_validate({**config.benchmark.model_dump(), "modes": tuple(words)})
    return config.model_copy(update={"benchmark": benchmark})


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of `maskrcnn benchmark`."""
    parser = stage_parser(
        "benchmark", __doc__, operands=" | ".join(get_args(BenchmarkMode)), operands_help="modes to run"
    )
    with user_errors():
        args, config = parse(parser, argv)
        run(with_modes(config, args.operands))


if __name__ == "__main__":
    main()
