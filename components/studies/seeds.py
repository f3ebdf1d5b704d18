"""Seeds of a study: finds the finished ones and trains the others, several at a time if configured.

Each seed is a run in `<stability.output_dir>/seed_<seed>/`. On SIGTERM, SIGINT and SIGHUP, seeds in training save a
checkpoint.
"""

import signal
import time
from collections import deque
from collections.abc import Sequence

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TaskID

from components.config import Config
from components.launch import handled
from components.params import load_stored
from components.runs.identity import differences_beside_seed
from components.runs.journal import last_step
from components.runs.result import Result, ResultError, read_result, require_final
from components.studies.process import SeedProcess
from components.studies.result import StabilityError
from model.data.index import CocoIndex
from model.engine.checkpoint import read_checkpoint
from model.engine.pointers import last_checkpoint
from model.scoring.names import IOU_TYPES, TITLES

_POLL_S = 0.2
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def find_finished(config: Config) -> Result | None:
    """Result of a seed's completed run; None if it is not trained or was interrupted, or evaluated with other settings.

    Raises:
        StabilityError: if the folder has a run with another configuration or other data, which training would move
            aside.
    """
    run_dir = config.train.output_dir
    if not (run_dir / "config.yaml").is_file():
        return None
    differing = differences_beside_seed(load_stored(run_dir / "config.yaml"), config)
    result: Result | None = None
    try:
        result = read_result(run_dir)
        require_final(result)
    except ResultError:
        result = None
    if result is not None and result.data != _current_data(config):
        differing.append("the data")
    if differing:
        raise StabilityError(
            f"{run_dir}: must be a run of this study, but differs in {', '.join(differing)}; set another "
            "stability.output_dir, or "
            "move this folder away"
        )
    if result is None or differences_beside_seed(result.config, config):  # evaluated with other settings meanwhile
        return None
    return result if _is_complete(result) else None


def _current_data(config: Config) -> tuple[str, str]:
    """Hashes of the current data for evaluation and for training."""
    data = config.data.prepared_dir
    return CocoIndex.open(data, config.evaluate.split).data_hash, CocoIndex.open(data, "train").data_hash


def _is_complete(result: Result) -> bool:
    """True if the run is complete, as its last checkpoint says: with a target AP or patience it may end at any step."""
    checkpoint = last_checkpoint(result.run_dir)
    if checkpoint is None:  # the weights were deleted
        return True
    state = read_checkpoint(checkpoint)
    reached_end = state["step"] >= state.get("max_iters", result.config.train.max_iters)
    return bool(state.get("is_complete", reached_end or state["reached_target"]))


def train_seeds(configs: Sequence[Config], parallel: int, console: Console) -> None:
    """Train and evaluate runs, `parallel` at a time; a failed one does not stop the others.

    Raises:
        StabilityError: if any run failed, after the others have ended.
        SystemExit: with status 128 + the signal's number, if a signal ended the study; seeds in training have saved a
            checkpoint.
    """
    waiting, running, failures = deque(configs), dict[int, SeedProcess](), list[str]()  # slot → running seed
    parallel = min(parallel, len(configs))
    received = _Signal()
    with handled(_SIGNALS, received.note), _Display(configs, console) as display:
        try:
            while running or (waiting and not received.number):
                for slot in set(range(parallel)) - set(running):
                    if waiting and not received.number:
                        failures += _start(running, slot, waiting.popleft(), parallel)
                time.sleep(_POLL_S)
                for slot, seed in list(running.items()):
                    if received.number:
                        seed.end()
                    display.show(seed)
                    if seed.status() is not None:
                        del running[slot]
                        failures += [seed.failure()] if seed.status() else []
        finally:  # no seed may continue without its study
            for seed in running.values():
                seed.end()
            for seed in running.values():
                seed.wait()
    if received.number:
        raise SystemExit(128 + received.number)
    if failures:
        raise StabilityError(
            f"stability: every seed must train to its end, but {len(failures)} did not; finished ones are kept, and "
            "the same command "
            "continues with the others:\n" + "\n".join(failures)
        )


def _start(running: dict[int, SeedProcess], slot: int, config: Config, parallel: int) -> list[str]:
    try:
        running[slot] = SeedProcess(config, slot=slot, parallel=parallel)
    except StabilityError as error:
        return [f"seed {config.train.seed}: {error}"]
    return []


class _Signal:
    """Number of the received signal; 0 for none."""

    number = 0

    def note(self, number: int, _frame: object) -> None:
        """Record a signal."""
        self.number = number


class _Display:
    """Console output: a line when a seed starts and ends, and progress bars in a terminal."""

    def __init__(self, configs: Sequence[Config], console: Console) -> None:
        self._console = console
        columns = (*Progress.get_default_columns(), MofNCompleteColumn())
        self._bars = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._total = self._bars.add_task("seeds", total=len(configs)) if len(configs) > 1 else None
        self._tasks: dict[int, TaskID] = {}

    def __enter__(self) -> "_Display":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def show(self, seed: SeedProcess) -> None:
        """Show the progress of a seed."""
        train, status = seed.config.train, seed.status()
        if train.seed not in self._tasks:
            self._say(f"seed {train.seed}: training; log: {seed.log}")
            self._tasks[train.seed] = self._bars.add_task(f"seed {train.seed}", total=train.max_iters or None)
        task = self._tasks[train.seed]
        self._bars.update(task, completed=last_step(train.output_dir / "log.jsonl"))
        if status is not None:
            self._bars.remove_task(task)
            if self._total is not None:
                self._bars.advance(self._total)
            self._say(f"seed {train.seed}: {_outcome(seed)}")

    def _say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)


def _outcome(seed: SeedProcess) -> str:
    if seed.status():
        return f"ended with status {seed.status()} after {seed.minutes:.1f} min"
    evaluation = read_result(seed.config.train.output_dir).evaluation
    scores = [
        f"{TITLES[iou_type]} AP {evaluation[iou_type]['AP']:.4f}" for iou_type in IOU_TYPES if evaluation.get(iou_type)
    ]
    return f"{', '.join(scores)} in {seed.minutes:.1f} min"
