"""Finished runs as their folders tell of them, and what sets their configurations apart.

    result = read_result(Path("runs/shapes_demo"))
    result.config.train.seed, result.evaluation["bbox"]["AP"]

Reads `config.yaml` and `evaluation.json`; no weights are needed.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.config import Config, load_config, read_flat
from components.recipe import RECIPES
from components.training.loop import FREE_TO_CHANGE
from model.engine.checkpoint import LAST
from model.errors import UserError
from model.scoring.backends import Task

TASKS: tuple[Task, ...] = ("bbox", "segm")
# The sections that decide what is learned and how it is scored, and the keys in them that do not: where things lie, what is said
# meanwhile. What training may be continued with is what training itself says; a data set is known by its hash.
_DECIDING = ("data.", "model.", "train.", "evaluate.")
_NOT_DECIDING = {f"train.{key}" for key in FREE_TO_CHANGE if key != "max_iters"} | {
    "data.base_url",
    "data.prepared_dir",
    "data.raw_dir",
    "data.workers",
    "evaluate.backend",
    "evaluate.drawn_images",
}
# Keys that decide nothing but a result's last bits: no part of its identity, yet worth telling where two results differ.
_LAST_BITS = ("train.compile", "train.cuda_graph", "train.device", "train.processes")
_STEP = re.compile(r"step_(\d+)\.pt$")


class ResultError(UserError):
    """A run's folder does not hold the result that is asked of it."""


@dataclass(frozen=True)
class Result:
    """How a run was made, and how well it did."""

    run_dir: Path
    config: Config
    evaluation: dict[str, Any]  # evaluation.json

    @property
    def seed(self) -> int:
        """Of everything that is drawn in training."""
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
    path = run_dir / "evaluation.json"
    for needed in (run_dir / "config.yaml", path):
        if not needed.is_file():
            raise ResultError(
                f"{needed}: no such file; a finished run has it. `maskrcnn train` trains and evaluates one, `maskrcnn stability` one a seed"
            )
    try:
        evaluation = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ResultError(f"{path}: not JSON ({error}); `maskrcnn evaluate` writes it anew") from error
    if not isinstance(evaluation, dict) or (evaluation.get("bbox") or {}).get("AP") is None:
        raise ResultError(f"{path}: must hold AP, got none; run `maskrcnn evaluate` without evaluate.skip_eval")
    return Result(run_dir, load_config(run_dir / "config.yaml"), evaluation)


def require_final(result: Result) -> None:
    """Refuse a score that is not that of the run's end.

    Raises:
        ResultError: if an earlier checkpoint was scored, or training was not yet at its end.
    """
    scored, pointer = result.evaluation["checkpoint"], result.run_dir / LAST
    again = f"run `maskrcnn evaluate train.output_dir={result.run_dir}`"
    if pointer.is_file() and (last := pointer.read_text(encoding="utf-8").strip()) != scored:
        raise ResultError(
            f"{result.run_dir}: evaluation.json must be of the last checkpoint, {last}, got {scored}; {again}"
        )
    train, evaluate = result.config.train, result.config.evaluate
    step = _STEP.search(scored)
    may_end_early = evaluate.min_bbox_ap > 0 or evaluate.min_segm_ap > 0
    if step and int(step[1]) != train.max_iters and not may_end_early:
        raise ResultError(
            f"{result.run_dir}: evaluation.json must be of step {train.max_iters} (train.max_iters), got step {int(step[1])}; "
            f"let `maskrcnn train` come to its end, then {again}"
        )


def identity(config: Config) -> dict[str, Any]:
    """What a result depends on, under dotted names; the seed is one of them."""
    return deciding(config.flat())


def deciding(flat: dict[str, Any]) -> dict[str, Any]:
    """Those of a configuration's values, by dotted names, on which a result depends."""
    return {key: value for key, value in flat.items() if key.startswith(_DECIDING) and key not in _NOT_DECIDING}


def description(config: Config) -> dict[str, Any]:
    """What is worth telling of how a result was made: its identity less the seed, and what decides its last bits."""
    flat, decides = config.flat(), identity(config)
    return {key: value for key, value in flat.items() if (key in decides or key in _LAST_BITS) and key != "train.seed"}


@dataclass(frozen=True)
class Nearest:
    """The recipe that a configuration is most like, and what it changes there: name → (recipe's value, its own value)."""

    recipe: str
    changes: dict[str, tuple[Any, Any]]


def nearest_recipe(flat: dict[str, Any]) -> Nearest:
    """The recipe of whose deciding values the fewest are others, in a configuration by dotted names (of an older version, maybe)."""
    ours, found = deciding(flat), []
    for path in sorted(RECIPES.glob("*.yaml")):
        theirs = {key: value for key, value in deciding(read_flat(path)).items() if key in ours}
        changes = differences([theirs, {key: ours[key] for key in theirs}])
        found.append(Nearest(path.stem, {key: (recipe, own) for key, (recipe, own) in changes.items()}))
    return min(found, key=lambda near: len(near.changes))


def differences(identities: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """The keys whose values are not the same in all, each with its values in order; None where a key is absent."""
    keys = sorted({key for one in identities for key in one})
    values = {key: [one.get(key) for one in identities] for key in keys}
    return {key: listed for key, listed in values.items() if any(value != listed[0] for value in listed)}
