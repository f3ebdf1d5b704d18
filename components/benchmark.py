"""Measure speed and memory: `maskrcnn benchmark train inference phases scaling loader evaluator`, or some of these.

train and inference: steps of the network, against torchvision's; phases: time of each phase of a training step;
scaling: several processes; loader: images to batches; evaluator: COCO scoring. Writes
<train.output_dir>/benchmark.json and speed.json.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from components.cli import parse, stage_parser, user_errors
from components.config import BenchmarkConfig, BenchmarkMode, Config
from components.params import ConfigError


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
    from components.benchmarks.measures import benchmark

    return BenchmarkResult(*benchmark(config))


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
    modes = f"what to measure (benchmark.modes): any of {', '.join(get_args(BenchmarkMode))}"
    parser = stage_parser("benchmark", __doc__, operands="MODE", operands_help=modes)
    with user_errors():
        args, config = parse(parser, argv)
        run(with_modes(config, args.operands))


if __name__ == "__main__":
    main()
