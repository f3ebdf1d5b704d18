"""Results of finished runs: configuration and scores, read from the runs' folders.

    result = read_result(Path("runs/shapes_demo"))
    result.config.train.seed, result.evaluation["bbox"]["AP"]

Reads `config.yaml` and `evaluation.json`; no weights are needed.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from components.config import Config
from components.params import ConfigError, load_stored
from components.runs.identity import FREE_TO_CHANGE
from model.config import EvaluateConfig, TrainConfig
from model.engine.pointers import POINTERS, has_best, require_checkpoint
from model.errors import UserError
from model.files import read_json
from model.scoring.names import IOU_TYPES, IouType

_STEP = re.compile(r"step_(\d+)\.pt$")
_ANEW = "`maskrcnn evaluate` writes it anew"

# Overrides of other keys in the sections that a checkpoint has are refused once it is trained.
_TRAINED = ("data.", "model.", "train.")
_FREE_AFTERWARDS = {
    *("data.prepared_dir", "data.raw_dir", "data.timeout_s", "data.workers"),
    *(f"train.{key}" for key in FREE_TO_CHANGE),
}


class ResultError(UserError):
    """A run's folder does not hold the result that is needed."""


Scores = dict[str, float | None]


class Evaluation(BaseModel):
    """Content of evaluation.json; files of earlier versions have fewer keys."""

    bbox: Scores | None = None
    segm: Scores | None = None
    proposals: Scores | None = None
    per_class: dict[str, dict[str, float | None]] | None = None
    max_detections: int | None = None  # per image and class; None: COCO's, or not scored
    test_time: dict[str, Any] = {}  # evaluate.scales, flip, soft_nms and soft_nms_sigma, as the scores were made with
    images: int = 0
    detections: int = 0
    checkpoint: str = ""
    max_iters: int = 0  # steps of the whole training; 0 in files of earlier versions
    data_hash: str = ""
    train_data_hash: str | None = None
    commit: str | None = None


@dataclass(frozen=True)
class Result:
    """Settings and scores of a run."""

    run_dir: Path
    config: Config  # values of training; of evaluate.*, those of the scores
    evaluation: dict[str, Any]  # evaluation.json

    @property
    def seed(self) -> int:
        """train.seed of the run."""
        return self.config.train.seed

    @property
    def data(self) -> tuple[str | None, str | None]:
        """The hashes of what it was scored on and of what it learned from; None in files of earlier versions."""
        return self.evaluation.get("data_hash"), self.evaluation.get("train_data_hash")


def read_result(run_dir: Path) -> Result:
    """The result in a run's folder.

    Raises:
        ResultError: if there is none, or one without AP.
        ConfigError: if its configuration cannot be read.
    """
    config = run_dir / "config.yaml"
    if not config.is_file():
        raise _no_file(config)
    evaluation = read_evaluation(run_dir, "checkpoint", "images", "data_hash")
    if ap_of(evaluation).get("bbox") is None:
        raise no_ap(run_dir)
    return Result(run_dir, _as_evaluated(load_stored(config), run_dir, evaluation), evaluation)


def _as_evaluated(config: Config, run_dir: Path, evaluation: dict[str, Any]) -> Config:
    """A run's configuration with the settings of its last evaluation, which may differ from those of its training."""
    limit = evaluation.get("max_detections")
    used = evaluation.get("test_time", {}) | ({} if limit is None else {"max_detections": limit})
    try:
        settings = EvaluateConfig.model_validate(config.evaluate.model_dump() | used)
    except ValidationError as error:
        fault = error.errors()[0]
        raise ResultError(f"{run_dir / 'evaluation.json'}: {fault['loc'][0]}: {fault['msg']}; {_ANEW}") from error
    return config.model_copy(update={"evaluate": settings})


def read_evaluation(run_dir: Path, *needed: str) -> dict[str, Any]:
    """The content of a run's evaluation.json: scores by result type, null or absent if there are none, and more.

    Args:
        run_dir: folder of the run.
        needed: keys that the content must have besides; files of earlier versions have fewer.

    Raises:
        ResultError: if the file is missing or damaged.
    """
    path = run_dir / "evaluation.json"
    if not path.is_file():
        raise _no_file(path)
    evaluation = read_json(path, Evaluation, _ANEW, ResultError)
    if missing := [key for key in needed if key not in evaluation]:
        raise ResultError(f"{path}: {missing[0]} is missing; {_ANEW}")
    return evaluation


def ap_of(evaluation: dict[str, Any]) -> dict[IouType, float]:
    """AP of boxes and masks, as far as an evaluation.json has it."""
    found = {iou_type: (evaluation.get(iou_type) or {}).get("AP") for iou_type in IOU_TYPES}
    return {iou_type: ap for iou_type, ap in found.items() if ap is not None}


def no_ap(run_dir: Path) -> ResultError:
    """Error of an evaluation without the AP that is needed."""
    return ResultError(
        f"{run_dir / 'evaluation.json'}: must have AP, got none; run `maskrcnn evaluate` on annotated images, without "
        "evaluate.skip_eval"
    )


def _no_file(path: Path) -> ResultError:
    return ResultError(
        f"{path}: no such file; a finished run has it. `maskrcnn train` trains and evaluates a run, `maskrcnn "
        "stability` one for each seed, `maskrcnn evaluate` evaluates a trained one"
    )


def final_checkpoint(run_dir: Path, train: TrainConfig) -> Literal["last", "best"]:
    """The checkpoint that is a run's result: with train.patience the best, unless none is marked, else the last.

    Args:
        train: settings of a run without config.yaml. One that has it was trained with those, whatever is set now.

    Raises:
        ConfigError: if config.yaml cannot be read.
    """
    stored = run_dir / "config.yaml"
    patience = (load_stored(stored).train if stored.is_file() else train).patience
    return "best" if patience and has_best(run_dir) else "last"


def checkpoint_at(path: Path) -> Path:
    """The checkpoint that a path stands for: a run's folder for its result, last_checkpoint and best_checkpoint there
    for the one that they name; any other path for itself.

    Raises:
        CheckpointError: if the folder has no checkpoint, or its checkpoint cannot be read.
        ConfigError: if its config.yaml cannot be read.
    """
    if path.is_dir():
        return require_checkpoint(path, final_checkpoint(path, TrainConfig()))
    names = [name for name, pointer in POINTERS.items() if pointer == path.name and path.is_file()]
    return require_checkpoint(path.parent, names[0]) if names else path


def named_checkpoint(run_dir: Path, word: str) -> Path:
    """The path of the checkpoint that `--checkpoint` names, which must exist.

    Args:
        run_dir: folder of the run.
        word: `last` or `best` of the run, or a path as `checkpoint_at` takes it.

    Raises:
        CheckpointError: if there is none, or it is no zip archive.
        ConfigError: if the config.yaml of another run's folder cannot be read.
    """
    return require_checkpoint(run_dir, word if word in POINTERS else str(checkpoint_at(Path(word))))


def require_as_trained(config: Config, checkpoint: str | None, overrides: Sequence[str]) -> None:
    """Refuse overrides of the network, its images and its training that differ from a checkpoint's, which count.

    Args:
        config: configuration with the overrides.
        checkpoint: `last`, `best` or a path; by default training's result. Without config.yaml of its run, nothing is
            refused.
        overrides: `section.key=value`.

    Raises:
        CheckpointError: if there is no such checkpoint.
        ConfigError: if a value differs; or if config.yaml cannot be read.
    """
    run_dir = config.train.output_dir
    path = named_checkpoint(run_dir, checkpoint or final_checkpoint(run_dir, config.train))
    stored = path.parent.parent / "config.yaml"
    decided = overrides_of_training(overrides)
    if not decided or path.parent.name != "checkpoints" or not stored.is_file():
        return
    then, now = load_stored(stored).flat(), config.flat()
    for override in decided:
        name = override.split("=")[0]
        for key in (key for key in now if f"{key}.".startswith(f"{name}.") and then.get(key) != now[key]):
            raise ConfigError(
                f"override {override!r}: must be as {path} was trained, with {key} {json.dumps(then.get(key))}; leave "
                f"it out{', and choose other data by data.prepared_dir' * key.startswith('data.')}"
            )


def overrides_of_training(overrides: Sequence[str]) -> list[str]:
    """The overrides of the network, its images and its training, which a checkpoint has decided."""
    names = {override: override.split("=")[0] for override in overrides}
    return [one for one, name in names.items() if name.startswith(_TRAINED) and name not in _FREE_AFTERWARDS]


def require_final(result: Result) -> None:
    """Refuse a score that is not that of the run's end.

    Raises:
        ResultError: if an earlier checkpoint was scored, or training was not yet at its end.
    """
    train, evaluate, scored = result.config.train, result.config.evaluate, result.evaluation["checkpoint"]
    name = final_checkpoint(result.run_dir, train)
    pointer = result.run_dir / POINTERS[name]
    again = f"run `maskrcnn evaluate train.output_dir={result.run_dir}`"
    if pointer.is_file() and (last := pointer.read_text(encoding="utf-8").strip()) != scored:
        raise ResultError(
            f"{result.run_dir}: evaluation.json must be of the {name} checkpoint, {last}, got {scored}; {again}"
        )
    step = _STEP.search(scored)
    may_end_early = evaluate.target_bbox_ap > 0 or evaluate.target_segm_ap > 0 or train.patience > 0
    max_iters = result.evaluation.get("max_iters") or train.max_iters
    if step and max_iters and int(step[1]) != max_iters and not may_end_early:
        raise ResultError(
            f"{result.run_dir}: evaluation.json must be of step {max_iters} (train.max_iters), got step "
            f"{int(step[1])}; "
            f"let `maskrcnn train` finish, then {again}"
        )
