"""One training run with its MLflow run; SIGTERM or Ctrl-C ends it early, or what follows it, with a checkpoint."""

import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from rich.console import Console

from components.config import Config
from components.launch import handled
from components.runs.lock import writing
from components.runs.recipes import nearest_recipe
from components.runs.result import final_checkpoint
from components.tracking.tracker import NullTracker, Tracker, open_tracker
from components.training.loop import OF_EPOCH, Training
from components.training.progress import reported
from model.distributed import is_main
from model.engine.pointers import require_checkpoint


@contextmanager
def trained(config: Config, device: torch.device, console: Console) -> Iterator[tuple[Training, Path]]:
    """Train to the end; yield the state of the run and the checkpoint that is its result, with the run's lock held.

    Raises:
        Preempted: if a signal has come, within the context, too; the last step is saved.
        RunInUseError: if another stage writes into the run's folder.
    """
    with writing(config.train.output_dir, "train"), ExitStack() as stack:
        training = Training(config, device, console)
        began = time.perf_counter()
        by_signal = handled([signal.SIGTERM, signal.SIGINT], lambda number, _: training.ending.ask(number))
        with _tracker(training) as tracker:
            stack.enter_context(by_signal)
            tracker.rewind(training.step, OF_EPOCH if training.awaits_evaluation else None)
            training.run(tracker)
            stack.enter_context(training.all_is_saved())
            tracker.log_artifact(training.run_dir / "config.yaml")
            checkpoint = require_checkpoint(training.run_dir, final_checkpoint(training.run_dir, config.train))
            if config.tracking.log_checkpoints:
                tracker.log_artifact(checkpoint, "checkpoints")
        minutes = (time.perf_counter() - began) / 60
        console.print(f"trained to step {training.step} in {minutes:.1f} min: {checkpoint}")
        yield training, checkpoint


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
        if training.replaced is not None:
            tracker.log_replaced(training.replaced)
        with reported(tracker, training) as reporting:
            yield reporting
