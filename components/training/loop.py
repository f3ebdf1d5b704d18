"""One training run: its state, checkpoints, log and stop conditions. `components/train.py` is the stage around it."""

import json
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from components import drop_output
from components.config import Config
from components.evaluation.before_after import FILE_NAME, detect_before
from components.evaluation.score import evaluate_model
from components.params import save_config
from components.runs.environment import environment
from components.runs.identity import changes_since_checkpoint
from components.runs.lock import move_aside, require_folder
from components.tracking.tracker import Tracker
from components.training.checks import check_annotations, check_divisible, check_learnable, with_checkpoint
from components.training.ending import Ending, reason_of
from components.training.goals import Goals
from components.training.log import TrainingLog
from components.training.skips import SkippedSteps
from model.data.index import CocoIndex
from model.data.loader import batches_per_epoch, train_loader
from model.distributed import (
    EndedByPeer,
    average_over_ranks_,
    data_parallel,
    is_main,
    on_main,
    raise_together,
    rank,
    world_size,
)
from model.engine.average import WeightAverage
from model.engine.checkpoint import mark_best, read_checkpoint, save_checkpoint
from model.engine.compilation import compile_parts
from model.engine.graphs import GraphCaptureError, graph_obstacle
from model.engine.optim import make_optimizer
from model.engine.pointers import BEST, NO_BEST, last_checkpoint
from model.engine.precision import LossScaler, set_float32_products
from model.engine.schedule import in_iterations
from model.engine.steps import Step, set_determinism, train_steps
from model.errors import UserError
from model.files import make_folder, write_atomically
from model.inference.predictor import Predictor
from model.network.batch_norm import learned_statistics
from model.network.mask_rcnn import MaskRCNN
from model.weights.load import load_weights

OF_EPOCH = "epoch/"  # prefix of the metrics of an evaluation at the end of an epoch


class Training:
    """State of one run. Every process has one; only rank 0 writes and prints."""

    def __init__(self, config: Config, device: torch.device, console: Console) -> None:
        self.config, self.device, self.console = config, device, console
        self.run_dir = config.train.output_dir
        self.index = CocoIndex.open(config.data.prepared_dir, "train", config.loading().timeout_s)
        check_learnable(config, self.index)
        check_divisible(config)
        self.epoch = batches_per_epoch(self.index, config.data, config.train.batch_size)  # in steps
        self.train = in_iterations(config.train, self.epoch)
        set_float32_products(device, config.train.dtype)
        set_determinism(config.train.deterministic)
        torch.manual_seed(config.train.seed)
        self.model = MaskRCNN(config.model, len(self.index.class_names))
        self.replaced: Path | None = None  # the place that an earlier run in this folder was moved to
        self._why_anew: str | None = None  # reason to move it there, once nothing speaks against this run
        path = on_main(self._resumable_checkpoint)
        if path is None:
            on_main(lambda: check_annotations(config))
            named = with_checkpoint(config.model)
            report = load_weights(self.model, named, self.index.class_names, self.index.category_ids)
            console.print(str(report))
        self._print_length()
        self.model.to_device(device)
        if config.train.compile:
            compile_parts(self.model, device)
        if config.train.cuda_graph and (reason := graph_obstacle(config.train, device)):
            console.print(f"train.cuda_graph: steps run without graphs, since {reason}")
        self.optimizer = make_optimizer(self.model, self.train)
        self.average = WeightAverage(self.model, config.train.ema_decay) if config.train.ema_decay else None
        self.scaler = LossScaler(device, config.train.dtype)
        self.goals = Goals(config.evaluate, self.train.patience)
        self.skips = SkippedSteps(config.train.max_nonfinite_steps, console)
        self.step = 0
        self.awaits_evaluation = False  # True from the checkpoint of an epoch's end to its evaluation
        self._saved_step = 0
        self.is_reconfigured = False
        if path is not None:
            self._restore(read_checkpoint(path))
        if is_main():
            self._take_folder(is_new=path is None)
        self.ending = Ending(device, config.train.accumulation_steps, reads_late=device.type == "cuda")
        console.on_broken_pipe = self._end_unread  # type: ignore[method-assign]
        self.log = TrainingLog(config.train.log_period, self.train.max_iters, config.train.batch_size)

    def _take_folder(self, *, is_new: bool) -> None:
        """Write what belongs to the run from its start, after an earlier run in its folder was moved aside."""
        before = self._detect_before() if is_new else ""  # reads images, which may fail
        self._move_earlier_run()
        make_folder(self.run_dir)
        save_config(self.config, self.run_dir / "config.yaml")
        if not (self.run_dir / BEST).is_file():  # DVC requires every output of a stage
            write_atomically(self.run_dir / BEST, NO_BEST)
        here = {**environment(), "processes": world_size()}
        write_atomically(self.run_dir / "environment.json", json.dumps(here, indent=2) + "\n")
        if before:
            write_atomically(self.run_dir / FILE_NAME, before)

    def run(self, tracker: Tracker) -> None:
        """Train to max_iters, to the target AP or to the end of patience, whichever comes first."""
        if self.is_reconfigured:
            self.save()  # evaluation reads the configuration from the checkpoint, which must have the new one
        if self.awaits_evaluation:
            self._evaluate(tracker)
        if self.goals.end_training:
            return
        config, train = self.config, self.train
        loader = train_loader(
            self.index,
            config.loading(),
            batch_size=train.micro_batch_size,
            seed=train.seed,
            start_batch=self.step * train.accumulation_steps,
            shard=(rank(), world_size()),
        )
        with closing(iter(loader)) as batches:
            model, fetched = data_parallel(self.model), self.ending.batches(batches)
            self._run(train_steps(model, fetched, self.optimizer, train, self.scaler, self.step), tracker)

    def _run(self, steps: Iterator[Step], tracker: Tracker) -> None:
        train = self.train
        window: list[Step] = []
        began_s = time.perf_counter()
        try:
            for step in self._with_progress(steps):
                self.step = step.number
                if self.average is not None:
                    self.average.update(step.number)
                window.append(step)
                evaluates = self._evaluates_at(step.number)
                saves = evaluates or step.number % train.checkpoint_period == 0 or step.number == train.max_iters
                reports = saves or step.number % train.log_period == 0
                self.skips.add(step)
                if reports:
                    self.skips.settle()
                is_ending = self.ending.is_agreed()
                window[-1] = replace(step, step_s=time.perf_counter() - began_s)
                if reports:
                    self._report(window, tracker)  # also before a checkpoint, so that the journal is never behind it
                    window.clear()
                if saves:
                    self.awaits_evaluation = evaluates
                    self.save()
                if evaluates:
                    self._evaluate(tracker)
                if self.goals.end_training or is_ending:
                    break
                began_s = time.perf_counter()
            if not self.is_complete:
                self._end_early(window, tracker)
        except GraphCaptureError:
            window.clear()  # the device may no longer respond
            raise
        finally:
            if window:  # training diverged or was interrupted: write the last steps to the journal
                self._report(window, tracker)

    def _end_unread(self) -> None:
        """Nobody reads the output any more: end as after a signal, once this step is saved."""
        self.console.quiet = True
        drop_output()
        self.ending.ask(signal.SIGPIPE)

    def _end_early(self, window: list[Step], tracker: Tracker) -> NoReturn:
        """Save the last step unless it is saved, in all ranks, say so, and raise the reason for the end.

        That counts more than an error of saving.
        """
        try:
            if window:
                on_main(lambda: self._report(window, tracker))
            if self.step != self._saved_step:
                self.save()
        except (UserError, OSError, EndedByPeer) as error:
            self.console.print(f"step {self.step} could not be saved: {error}")
        finally:
            window.clear()
        with self._explained():
            raise_together(self.ending.failure or self.ending.preempted)
        raise AssertionError("all ranks have agreed to end, but none has a reason")

    @contextmanager
    def all_is_saved(self) -> Iterator[None]:
        """Within the context a signal, also one that came before, ends training at once: nothing is lost."""
        with self._explained():
            raise_together(self.ending.preempted)
            with self.ending.at_once():
                yield

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Say what ends training within the context, and which step is saved."""
        try:
            yield
        except (Exception, SystemExit) as end:
            saved = f"saved step {self._saved_step}; run the same command to continue from there"
            text = f"{reason_of(end)}: {saved if self._saved_step else 'before the first step'}"
            self.console.print(text, soft_wrap=True)
            raise

    def save(self, *, is_best: bool = False) -> None:
        """Write a checkpoint of the current step; if `is_best`, the one that it replaces is marked as the best so far.

        A run that goes on from the one that is replaced evaluates it, and marks it again.
        """
        self.skips.settle()
        self._share_statistics()

        def write() -> None:
            require_folder(self.run_dir)
            if is_best:
                mark_best(self.run_dir)
            save_checkpoint(self.run_dir, self.step, self._state(), keep_last=self.config.train.keep_last)

        on_main(write)
        self._saved_step = self.step

    def _share_statistics(self) -> None:
        """Give all processes the same statistics of batch norms; rank 0 writes its own, and each evaluates a part."""
        averages = [] if self.average is None else self.average.statistics
        average_over_ranks_([*learned_statistics(self.model).values(), *averages])

    def _detect_before(self) -> str:
        config, index = self.config, self.index
        split = CocoIndex.open(config.data.prepared_dir, config.evaluate.split, config.loading().timeout_s)
        untrained = Predictor(self.model, config.data, config.train.dtype, index.class_names, index.category_ids)
        return detect_before(untrained, split)

    def _state(self) -> dict[str, Any]:
        return {
            **({} if self.average is None else {"average": self.average.state_dict()}),
            **self.goals.state_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "config": self.config.model_dump(mode="json"),
            "class_names": list(self.index.class_names),
            "category_ids": list(self.index.category_ids),
            "data_hash": self.index.data_hash,
            "nonfinite_in_row": self.skips.in_row,
            "awaits_evaluation": self.awaits_evaluation,
            "is_complete": self.is_complete,
            "max_iters": self.train.max_iters,
        }

    def _resumable_checkpoint(self) -> Path | None:
        """Return the last checkpoint if this run continues it; a different run will be moved aside."""
        path = last_checkpoint(self.run_dir)
        if path is None:
            return None
        state = read_checkpoint(path)
        changes = changes_since_checkpoint(state, self.config, self.index.data_hash)
        if state["step"] > self.train.max_iters:
            changes.append(f"{state['step']} iterations, more than {self.train.max_iters}")
        if self.config.train.resume and not changes:
            self.console.print(f"continuing from {path}, step {state['step']}")
            return path
        self._why_anew = f"it was made with {', '.join(changes[:3])}" if changes else "train.resume is false"
        return None

    def _move_earlier_run(self) -> None:
        """Move a different run in the same folder aside."""
        if self._why_anew is not None:
            self.replaced = aside = move_aside(self.run_dir)
            self.console.print(f"starting anew: the run in {self.run_dir} was moved to {aside} ({self._why_anew})")

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        # Groups belong to this configuration and optimizer (torch's or apex's); only its state is restored.
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.goals.load_state_dict(state)
        self.step = self._saved_step = state["step"]
        self.skips.in_row = state["nonfinite_in_row"]
        self.awaits_evaluation = state.get("awaits_evaluation", False) and self._evaluates_at(self.step)
        self.is_reconfigured = state["config"] != self.config.model_dump(mode="json")

    def _with_progress(self, steps: Iterator[Step]) -> Iterator[Step]:
        """Yield the steps with a progress bar, if in a terminal."""
        columns = (*Progress.get_default_columns(), MofNCompleteColumn())
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bar:
            task = bar.add_task("training", total=self.train.max_iters, completed=self.step)
            for step in steps:
                yield step
                bar.update(task, completed=step.number)

    def _report(self, window: list[Step], tracker: Tracker) -> None:
        self.console.print(self.log.add(window, tracker.log_metrics), soft_wrap=True)

    @property
    def is_complete(self) -> bool:
        """True if nothing is left to train, nor to evaluate at the end of an epoch."""
        has_ended = self.step >= self.train.max_iters or self.goals.end_training
        return has_ended and not self.awaits_evaluation

    def _evaluates_at(self, step: int) -> bool:
        """True if the step ends an epoch that is evaluated; with patience the last step is, too."""
        evaluate, train = self.config.evaluate, self.train
        ends = step % (self.epoch * evaluate.epoch_period) == 0 or (train.patience > 0 and step == train.max_iters)
        return evaluate.every_epoch and ends

    def _print_length(self) -> None:
        """Print the iterations that train.epochs amounts to, and a warning if warm-up takes all of them."""
        epochs, train = self.config.train.epochs, self.train
        if epochs:
            steps = f", learning rate lowered after {', '.join(map(str, train.lr_steps))}" if train.lr_steps else ""
            text = f"{epochs:g} epochs of {self.epoch} iterations: {train.max_iters} iterations{steps}"
            self.console.print(text)
        if train.warmup_warning:
            self.console.print(f"warning: {train.warmup_warning}", soft_wrap=True)

    def _evaluate(self, tracker: Tracker) -> None:
        """Score the step that was saved last, and save it again, with its scores.

        It is marked as the best so far if it is that by CocoEvaluation.main_score.
        """
        with self.all_is_saved(), nullcontext() if self.average is None else self.average.applied():
            evaluation = evaluate_model(self.model, self.config)
        names = {"bbox": "AP", "segm": "AP", "proposals": "AR1000"}
        found = {result_type: scores[names[result_type]] or 0.0 for result_type, scores in evaluation.scores.items()}
        tracker.log_metrics({f"{OF_EPOCH}{names[k].lower()}_{k}": value for k, value in found.items()}, self.step)
        scores = ", ".join(f"{result_type} {names[result_type]} {value:.4f}" for result_type, value in found.items())
        self.console.print(f"step {self.step}: {scores}")
        is_best = self.goals.judge(found, evaluation.main_score)
        if self.goals.is_out_of_patience:
            count, best = self.goals.evaluations_since_best, self.goals.best_ap
            self.console.print(f"{count} evaluations without an AP above {best:.4f}: training ends")
        self.awaits_evaluation = False
        self.save(is_best=is_best)
