"""The seeds of a study: which are finished, and training those that are not, several at a time if wished.

Each is a run of its own in `<stability.output_dir>/seed_<seed>/`. SIGTERM, SIGINT and SIGHUP let seeds in training save a checkpoint.
"""

import json
import signal
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TaskID

from components.config import Config
from components.launch import handled
from components.params import load_stored
from components.runs.identity import differences_beside_seed
from components.runs.result import Result, ResultError, read_result, require_final
from components.studies.process import SeedProcess
from components.studies.summary import StabilityError
from model.data.index import CocoIndex
from model.engine.checkpoint import last_checkpoint, read_checkpoint

_POLL_S = 0.2
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_TAIL_BYTES = 16384  # of a journal, more than its last line


def seed_config(config: Config, seed: int) -> Config:
    """The run of one seed of a study."""
    told = {"seed": seed, "output_dir": config.stability.output_dir / f"seed_{seed}"}
    return config.model_copy(update={"train": config.train.model_copy(update=told)})


def find_finished(config: Config) -> Result | None:
    """The result of a seed's run that came to its end; None where it is yet to be trained or was interrupted.

    Raises:
        StabilityError: if the folder holds a run of another configuration or of other data, which training would move aside.
    """
    run_dir = config.train.output_dir
    if not (run_dir / "config.yaml").is_file():
        return None
    told = differences_beside_seed(load_stored(run_dir / "config.yaml"), config)
    try:
        result = read_result(run_dir)
        require_final(result)
    except ResultError:
        result = None
    if result is not None and result.data != _present_data(config):
        told.append("the data")
    if told:
        raise StabilityError(
            f"{run_dir}: must be a run of this study, but differs in {', '.join(told)}; set another stability.output_dir, or "
            "move that folder away"
        )
    return result if result is not None and _came_to_its_end(result) else None


def _present_data(config: Config) -> tuple[str, str]:
    """The hashes of what would be scored on and learned from now."""
    data = config.data.prepared_dir
    return CocoIndex.open(data, config.evaluate.split).data_hash, CocoIndex.open(data, "train").data_hash


def _came_to_its_end(result: Result) -> bool:
    """A run with a target AP may end at any step; its last checkpoint says whether it did."""
    checkpoint = last_checkpoint(result.run_dir)
    if checkpoint is None:  # the weights were cleared away
        return True
    state = read_checkpoint(checkpoint)
    return bool(state["step"] >= result.config.train.max_iters or state["reached_target"])


def train_seeds(configs: Sequence[Config], parallel: int, console: Console) -> None:
    """Train and evaluate runs, `parallel` at a time. One that fails does not hold up the others.

    Raises:
        StabilityError: if any has failed, once the others have ended.
        SystemExit: with status 128 + its number, when a signal ended the study; seeds in training have saved a checkpoint.
    """
    waiting, running, troubles = deque(configs), dict[int, SeedProcess](), list[str]()  # running: by slot
    parallel = min(parallel, len(configs))
    told = _Told()
    with handled(_SIGNALS, told.note), _Display(configs, console) as display:
        try:
            while running or (waiting and not told.number):
                for slot in set(range(parallel)) - set(running):
                    if waiting and not told.number:
                        troubles += _start(running, slot, waiting.popleft(), parallel)
                time.sleep(_POLL_S)
                for slot, seed in list(running.items()):
                    if told.number:
                        seed.end()
                    display.show(seed)
                    if seed.status() is not None:
                        del running[slot]
                        troubles += [seed.trouble()] if seed.status() else []
        finally:  # whatever happened here: no seed goes on without its study
            for seed in running.values():
                seed.end()
            for seed in running.values():
                seed.wait()
    if told.number:
        raise SystemExit(128 + told.number)
    if troubles:
        raise StabilityError(
            f"stability: every seed must train to its end, {len(troubles)} did not; finished ones are kept, and the same command "
            "goes on with the others:\n" + "\n".join(troubles)
        )


def _start(running: dict[int, SeedProcess], slot: int, config: Config, parallel: int) -> list[str]:
    try:
        running[slot] = SeedProcess(config, slot=slot, parallel=parallel)
    except StabilityError as error:
        return [f"seed {config.train.seed}: {error}"]
    return []


class _Told:
    """Whether a signal has come, and which."""

    number = 0

    def note(self, number: int, _frame: object) -> None:
        """Handle a signal."""
        self.number = number


class _Display:
    """A line when a seed begins and ends; bars of their steps where someone may be watching."""

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
        """How far a seed has come."""
        train, status = seed.config.train, seed.status()
        if train.seed not in self._tasks:
            self._say(f"seed {train.seed}: training; what it says goes to {seed.log}")
            self._tasks[train.seed] = self._bars.add_task(f"seed {train.seed}", total=train.max_iters)
        task = self._tasks[train.seed]
        self._bars.update(task, completed=last_step(train.output_dir / "log.jsonl"))
        if status is not None:
            self._bars.remove_task(task)
            if self._total is not None:
                self._bars.advance(self._total)
            self._say(f"seed {train.seed}: {_outcome(seed)}")

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)


def _outcome(seed: SeedProcess) -> str:
    if seed.status():
        return f"ended with status {seed.status()} after {seed.minutes:.1f} min"
    evaluation = read_result(seed.config.train.output_dir).evaluation
    scores = [
        f"{title} AP {evaluation[task]['AP']:.4f}"
        for task, title in (("bbox", "box"), ("segm", "mask"))
        if evaluation.get(task)
    ]
    return f"{', '.join(scores)} in {seed.minutes:.1f} min"


def last_step(journal: Path) -> int:
    """The step of a journal's last whole line; 0 where there is none. A long journal is not read for it."""
    if not journal.is_file():
        return 0
    with journal.open("rb") as file:
        file.seek(max(0, journal.stat().st_size - _TAIL_BYTES))
        lines = file.read().split(b"\n")[:-1]
    return int(json.loads(lines[-1])["step"]) if lines else 0
