"""Train Mask R-CNN: from a prepared data set to checkpoints, a journal of losses and a tracked run.

Continues from `<train.output_dir>/last_checkpoint` where there is one of the same configuration and data; a run of another
configuration in that place is moved aside, never overwritten. After training, the last checkpoint is evaluated unless told otherwise.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from components.cli import parse, stage_parser, user_errors
from components.config import Config, ConfigError, save_config
from components.tracking import Tracker, open_tracker
from components.training_log import TrainingLog, peak_memory_mib
from model.checkpoint import last_checkpoint, mark_best, read_checkpoint, save_checkpoint
from model.coco_backends import choose_backend
from model.data.index import CocoIndex
from model.data.loader import batches_per_epoch, train_loader
from model.engine import Step, pick_device, train_steps
from model.errors import UserError
from model.mask_rcnn import MaskRCNN
from model.optim import make_optimizer
from model.weights import load_weights

# What may differ between a run and its continuation: where and how long it goes on, and what it says meanwhile.
FREE_TO_CHANGE = ("device", "keep_last", "log_period", "checkpoint_period", "max_iters", "output_dir", "resume")


class DivergedError(UserError):
    """Losses stopped being finite."""


@dataclass(frozen=True)
class TrainResult:
    """How a training ended."""

    run_dir: Path
    checkpoint: Path
    step: int
    reached_target: bool  # stopped early at evaluate.min_bbox_ap and min_segm_ap


class Training:
    """One run: what the steps share."""

    def __init__(self, config: Config, console: Console) -> None:
        self.config, self.console = config, console
        self.run_dir = config.train.output_dir
        self.index = CocoIndex.open(config.data.prepared_dir, "train")
        check_learnable(config, self.index)
        self.device = pick_device(config.train.device)
        torch.manual_seed(config.train.seed)
        self.model = MaskRCNN(config.model, len(self.index.class_names))
        state = self._resumable_state()
        if state is None:
            report = load_weights(self.model, config.model, self.index.class_names, self.index.category_ids)
            console.print(str(report), highlight=False)
        self.model.to_device(self.device)
        self.optimizer = make_optimizer(self.model, config.train)
        self.step, self.best_ap, self.reached_target, self.nonfinite_in_row = 0, -1.0, False, 0
        self.is_reconfigured = False
        if state is not None:
            self._restore(state)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        save_config(config, self.run_dir / "config.yaml")
        self._unread: Step | None = None
        self.log = TrainingLog(config.train.log_period, config.train.max_iters)

    def run(self, tracker: Tracker) -> None:
        """Train to max_iters or to the target AP, whichever comes first."""
        if self.is_reconfigured:
            self.save()  # evaluation reads its configuration from the checkpoint, so the new one must be there
        if self.reached_target:
            return
        config, train = self.config, self.config.train
        epoch = batches_per_epoch(self.index, train.batch_size)
        batches = iter(
            train_loader(
                self.index,
                config.data,
                batch_size=train.micro_batch_size,
                seed=train.seed,
                start_batch=self.step * train.accumulation_steps,
            )
        )
        window: list[Step] = []
        steps = train_steps(self.model, batches, self.optimizer, train, self.device, self.step)
        try:
            for step in self._with_progress(steps):
                self.step = step.number
                window.append(step)
                self._watch(step)
                ends_epoch = config.evaluate.every_epoch and step.number % epoch == 0
                saves = ends_epoch or step.number % train.checkpoint_period == 0 or step.number == train.max_iters
                if saves or step.number % train.log_period == 0:
                    self._report(window, tracker)  # also before a checkpoint: the journal must reach as far as it does
                    window.clear()
                is_best = ends_epoch and self._evaluate(tracker)
                if saves:
                    checkpoint = self.save()
                    if is_best:
                        mark_best(self.run_dir, checkpoint)
                if self.reached_target:
                    break
        finally:
            if window:  # training diverged or was interrupted: the journal tells how it came to that
                self._report(window, tracker)

    def save(self) -> Path:
        """Write a checkpoint of the present step."""
        self._watch(None)
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "config": self.config.model_dump(mode="json"),
            "class_names": list(self.index.class_names),
            "category_ids": list(self.index.category_ids),
            "data_hash": self.index.data_hash,
            "best_ap": self.best_ap,
            "reached_target": self.reached_target,
            "nonfinite_in_row": self.nonfinite_in_row,
        }
        return save_checkpoint(self.run_dir, self.step, state, keep_last=self.config.train.keep_last)

    def _resumable_state(self) -> dict[str, Any] | None:
        """The last checkpoint, if this run continues it. A run of another kind in the same place is moved aside."""
        path = last_checkpoint(self.run_dir)
        if path is None:
            return None
        state = read_checkpoint(path)
        changes = differences(state, self.config, self.index.data_hash)
        if self.config.train.resume and not changes:
            self.console.print(f"continuing from {path}, step {state['step']}", highlight=False)
            return state
        aside = _free_name(self.run_dir)
        self.run_dir.rename(aside)
        reason = f"it was made with {', '.join(changes[:3])}" if changes else "train.resume is false"
        self.console.print(f"starting anew: the run in {self.run_dir} is now {aside} ({reason})", highlight=False)
        return None

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.best_ap = state["step"], state["best_ap"]
        self.reached_target, self.nonfinite_in_row = state["reached_target"], state["nonfinite_in_row"]
        self.is_reconfigured = state["config"] != self.config.model_dump(mode="json")

    def _with_progress(self, steps: Iterator[Step]) -> Iterator[Step]:
        """The steps, behind a bar with the time left where someone may be watching."""
        columns = (*Progress.get_default_columns(), MofNCompleteColumn())
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bar:
            task = bar.add_task("training", total=self.config.train.max_iters, completed=self.step)
            for step in steps:
                yield step
                bar.update(task, completed=step.number)

    def _watch(self, step: Step | None) -> None:
        """Count skipped steps in a row; too many end the run. Each step is read when the next one is under way, so that the device never idles."""
        done, self._unread = self._unread, step
        if done is not None:
            self._count_skips(done)

    def _count_skips(self, step: Step) -> None:
        if not step.skipped.item():
            self.nonfinite_in_row = 0
            return
        self.nonfinite_in_row += 1
        values = {name: loss.item() for name, loss in step.losses.items()}
        told = f"step {step.number}: losses {values}, gradient norm {step.grad_norm.item()}, images {step.image_ids}"
        self.console.print(f"skipped, not finite: {told}", highlight=False)
        if self.nonfinite_in_row >= self.config.train.max_nonfinite_steps:
            raise DivergedError(
                f"training diverged: losses and gradients must be finite, got {self.nonfinite_in_row} steps in a row that are not; "
                f"last {told}. Lower train.base_lr, lengthen train.warmup_iters or set train.clip_grad_norm; "
                f"the weights are those of step {step.number - self.nonfinite_in_row}"
            )

    def _report(self, window: list[Step], tracker: Tracker) -> None:
        """Read a window of steps from the device at once; log each step, print one line."""
        names = list(window[0].losses)
        table = torch.stack([torch.stack([*step.losses.values(), step.grad_norm, step.skipped]) for step in window])
        images_per_step = self.config.train.batch_size
        for step, (*losses, grad_norm, skipped) in zip(window, table.tolist(), strict=True):
            if not skipped:
                self.log.update(loss=sum(losses), **{f"loss_{n}": v for n, v in zip(names, losses, strict=True)})
            self.log.update(step_s=step.step_s, data_s=step.data_s)
            metrics = {f"loss/{name}": value for name, value in zip(names, losses, strict=True)}
            metrics |= {"loss/total": sum(losses), "grad_norm": grad_norm, "skipped": skipped}
            metrics |= {"learning_rate": step.learning_rate, "time/step_s": step.step_s, "time/data_s": step.data_s}
            metrics |= {"throughput/images_per_s": images_per_step / step.step_s, "memory/peak_mib": peak_memory_mib()}
            tracker.log_metrics(metrics, step.number)
        self.console.print(self.log.line(window[-1].number, window[-1].learning_rate), highlight=False, soft_wrap=True)

    def _evaluate(self, tracker: Tracker) -> bool:
        """Score the present weights: True when they are the best so far by mask AP."""
        from components.evaluate import evaluate_model

        evaluate = self.config.evaluate
        evaluation = evaluate_model(self.model, self.config)
        bbox, segm = evaluation.bbox["AP"] or 0.0, evaluation.segm["AP"] or 0.0
        tracker.log_metrics({"epoch/ap_bbox": bbox, "epoch/ap_segm": segm}, self.step)
        self.console.print(f"step {self.step}: box AP {bbox:.4f}, mask AP {segm:.4f}", highlight=False)
        has_target = evaluate.min_bbox_ap > 0 or evaluate.min_segm_ap > 0
        self.reached_target = has_target and bbox >= evaluate.min_bbox_ap and segm >= evaluate.min_segm_ap
        is_best, self.best_ap = segm > self.best_ap, max(segm, self.best_ap)
        return is_best


def check_learnable(config: Config, index: CocoIndex) -> None:
    """Refuse what cannot train.

    Raises:
        ConfigError: if frozen norms would stay at random, or frozen stages would.
        UserError: if no image has an instance to learn from.
    """
    model = config.model
    if model.weights == "none" and model.norm == "frozen_batch_norm":
        raise ConfigError(
            "model.norm: frozen_batch_norm has no statistics without pre-trained weights, got model.weights=none; "
            "set model.norm to batch_norm or group_norm, or model.weights to imagenet, coco or a path"
        )
    if model.weights == "none" and model.frozen_stages:
        raise ConfigError(
            f"model.freeze_stages: must be 0 with model.weights=none, got {model.frozen_stages}; random filters would never learn"
        )
    if not index.has_instances.any():
        raise UserError(
            f"{config.data.prepared_dir}: no training image has an instance that is not a crowd; add annotations"
        )


def differences(state: dict[str, Any], config: Config, data_hash: str) -> list[str]:
    """What sets a checkpoint's run apart from this one, as `key: then → now`; empty where it may be continued."""
    then, now = state["config"], config.model_dump(mode="json")
    keys = [("data", key) for key in ("buckets", "min_sizes_px", "max_size_px", "horizontal_flip")]
    keys += [("model", key) for key in now["model"]]
    keys += [("train", key) for key in now["train"] if key not in FREE_TO_CHANGE]
    changes = [
        f"{section}.{key}: {json.dumps(then.get(section, {}).get(key))} → {json.dumps(now[section][key])}"
        for section, key in keys
        if then.get(section, {}).get(key) != now[section][key]
    ]
    return changes + ([] if state["data_hash"] == data_hash else ["other training data"])


def run(config: Config, *, skip_test: bool = False) -> TrainResult:
    """Train, then evaluate the last checkpoint unless `skip_test`."""
    choose_backend(config.evaluate.backend)  # an absent one is told before hours of training
    console = Console()
    training = Training(config, console)
    began = time.perf_counter()
    with open_tracker(config, run_dir=training.run_dir, data_hash=training.index.data_hash) as tracker:
        tracker.rewind(training.step)
        training.run(tracker)
        tracker.log_artifact(training.run_dir / "config.yaml")
        checkpoint = last_checkpoint(training.run_dir)
        assert checkpoint is not None
        if config.tracking.log_checkpoints:
            tracker.log_artifact(checkpoint, "checkpoints")
    minutes = (time.perf_counter() - began) / 60
    console.print(f"trained to step {training.step} in {minutes:.1f} min: {checkpoint}", highlight=False)
    if not skip_test:
        from components import evaluate

        evaluate.run(config)
    return TrainResult(training.run_dir, checkpoint, training.step, training.reached_target)


def _free_name(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    return aside


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of `maskrcnn train`."""
    parser = stage_parser("train", __doc__)
    parser.add_argument("--skip-test", action="store_true", help="do not evaluate when training has ended")
    with user_errors():
        args, config = parse(parser, argv)
        run(config, skip_test=args.skip_test)


if __name__ == "__main__":
    main()
