"""Train Mask R-CNN: from a prepared data set to checkpoints, a journal of losses and a tracked run.

Continues from `<train.output_dir>/last_checkpoint` if its configuration and data are the same; a run with another
configuration is moved aside, never overwritten. After training, the last checkpoint is evaluated (see --skip-test).
Several processes (`train.processes`, or torchrun) share each batch, so any number of them learns the same; all need
access to the same files. SIGTERM saves a checkpoint and exits with status 143.
"""

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch.distributed.elastic.multiprocessing.errors import record

from components.cli import parse, stage_parser, user_errors
from components.config import Config
from components.launch import handled, relaunch
from components.runs.recipes import nearest_recipe
from components.tracking.tracker import NullTracker, Tracker, open_tracker
from components.training.loop import Training
from model.distributed import is_main, pick_device, process_group
from model.engine.checkpoint import last_checkpoint
from model.scoring.backends import choose_backend


@dataclass(frozen=True)
class TrainResult:
    """Result of a training."""

    run_dir: Path
    checkpoint: Path
    step: int
    reached_target: bool  # True if training stopped early at evaluate.target_bbox_ap and target_segm_ap


def run(config: Config, *, skip_test: bool = False) -> TrainResult:
    """Train, then evaluate the last checkpoint unless `skip_test`.

    Raises:
        Preempted: if SIGTERM ended training early; a checkpoint was saved.
    """
    choose_backend(config.evaluate.backend)  # fail before hours of training
    device = pick_device(config.train.device)
    with process_group(device, config.train.timeout_s):
        result = _train(config, device, Console(quiet=not is_main()))
        if not skip_test:
            from components import evaluate

            evaluate.run(config)
    return result


def _train(config: Config, device: torch.device, console: Console) -> TrainResult:
    training = Training(config, device, console)
    began = time.perf_counter()
    with _tracker(training) as tracker, handled([signal.SIGTERM], lambda *_: training.sigterm.set()):
        tracker.rewind(training.step)
        training.run(tracker)
        tracker.log_artifact(training.run_dir / "config.yaml")
        checkpoint = last_checkpoint(training.run_dir)
        assert checkpoint is not None
        if config.tracking.log_checkpoints:
            tracker.log_artifact(checkpoint, "checkpoints")
    minutes = (time.perf_counter() - began) / 60
    console.print(f"trained to step {training.step} in {minutes:.1f} min: {checkpoint}", highlight=False)
    return TrainResult(training.run_dir, checkpoint, training.step, training.reached_target)


@contextmanager
def _tracker(training: Training) -> Iterator[Tracker]:
    if not is_main():
        yield NullTracker()
        return
    near = nearest_recipe(training.config.flat())
    tags = {"recipe": near.recipe}
    if near.changes:
        tags["recipe.changes"] = " ".join(f"{name}={own}" for name, (_, own) in near.changes.items())
    with open_tracker(
        training.config, run_dir=training.run_dir, data_hash=training.index.data_hash, tags=tags
    ) as tracker:
        yield tracker


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of `maskrcnn train`."""
    parser = stage_parser("train", __doc__)
    parser.add_argument("--skip-test", action="store_true", help="do not evaluate after training")
    with user_errors():
        args, config = parse(parser, argv)
        if not relaunch("train", config.train.processes, argv):
            record(run)(config, skip_test=args.skip_test)  # torchrun then reports why a process failed


if __name__ == "__main__":
    main()
