"""Best thresholds of a checkpoint: the scores above which detections have the highest F1, as `evaluate` found them.

    best = best_thresholds(Path("runs/shapes_demo/checkpoints/step_0000600.pt"))
    best.of_all, best.per_class["circle"]

They are in analysis.json of the run that the checkpoint belongs to. No weights and no torch are needed.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from components.runs.result import ResultError
from model.config import EvaluateConfig
from model.files import read_json, real

ANALYSIS_FILE = "analysis.json"  # in a run's folder


class Point(BaseModel):
    """Figures at a threshold; None where undefined."""

    threshold: float | None
    precision: float | None
    recall: float | None
    f1: float | None


class Best(BaseModel):
    """The best point of all classes together, and of each."""

    all: Point
    per_class: dict[str, Point]


class Curves(BaseModel):
    """Figures by confidence."""

    confidence: list[float]
    all: dict[str, list[float | None]]


class Confusion(BaseModel):
    """Confusion matrix: rows of the truth, columns of the predictions, the last of both background."""

    classes: list[str]
    matrix: list[list[int]]


class Bin(BaseModel):
    """A bin of confidence."""

    detections: int
    confidence: float | None
    hits: float | None


class Calibration(BaseModel):
    """Calibration of scores."""

    ece: float | None
    bins: list[Bin]


class LabelError(BaseModel):
    """A detection that contradicts the annotations."""

    kind: str
    image_id: int
    annotation_id: int | None
    found_class: str = Field(alias="class")
    annotated_class: str | None
    score: float


class LabelErrors(BaseModel):
    """The number of suspects, and the likeliest."""

    count: int
    likeliest: list[LabelError]


class Analysis(BaseModel):
    """Keys of analysis.json that readers use; all but the first two are absent if there is no analysis."""

    checkpoint: str
    data_hash: str
    test_time: dict[str, Any] = {}  # evaluate.scales, flip, soft_nms and soft_nms_sigma, as evaluated with
    iou_type: str | None = None
    best: Best | None = None
    curves: Curves | None = None
    confusion: Confusion | None = None
    calibration: Calibration | None = None
    slices: dict[str, list[dict[str, str | float | None]]] = {}
    label_errors: LabelErrors | None = None


@dataclass(frozen=True)
class Thresholds:
    """Thresholds with the highest F1 at IoU 0.5 on the evaluated split."""

    of_all: float  # one for all classes
    per_class: Mapping[str, float]  # class name → threshold; that of all for a class without a hit
    test_time: Mapping[str, Any] = field(default_factory=dict)  # `evaluate.*` that they were found with

    def caution(self, *, in_tiles: bool = False) -> str:
        """A sentence if the scores that the thresholds were found in were made otherwise than predicting makes them;
        else nothing.

        Args:
            in_tiles: the thresholds are used for objects found in tiles.
        """
        plain = EvaluateConfig().model_dump(mode="json")
        found = {name: value for name, value in self.test_time.items() if value != plain.get(name)}
        if found.keys() == {"soft_nms_sigma"}:  # without gaussian soft-NMS it does nothing
            found = {}
        words = [f"evaluate.{name}={json.dumps(value)}".replace('"', "") for name, value in found.items()]
        differences = [f"with {', '.join(words)}"] if words else []
        differences += ["on whole images, not in tiles"] if in_tiles else []
        if not differences:
            return ""
        return (
            f"the best thresholds were found {' and '.join(differences)}; predict makes other scores, for which others "
            "may be best"
        )


def read_analysis(run_dir: Path) -> dict[str, Any]:
    """The content of a run's analysis.json.

    Raises:
        ResultError: if it is missing or damaged.
    """
    path = run_dir / ANALYSIS_FILE
    if not path.is_file():
        raise ResultError(f"{path}: no such file; `maskrcnn evaluate` writes it")
    analysis: dict[str, Any] = read_json(path, Analysis, "`maskrcnn evaluate` writes it anew", ResultError)
    return analysis


def best_thresholds(checkpoint: Path, run_dir: Path | None = None) -> Thresholds:
    """The best thresholds of a checkpoint.

    Args:
        checkpoint: file of the checkpoint.
        run_dir: folder of the run that evaluated it; by default the one that the checkpoint lies in.

    Raises:
        ResultError: if it was not evaluated, or another checkpoint was after it, or there is no hit to choose by.
    """
    folder = real(checkpoint).parent.parent if run_dir is None else run_dir
    path = folder / ANALYSIS_FILE
    again = f"run `maskrcnn evaluate train.output_dir={folder} --checkpoint {checkpoint}`"
    if not path.is_file():
        raise ResultError(f"{path}: must have the best thresholds of {checkpoint}, but is not there; {again}")
    analysis = read_analysis(folder)
    if real(folder / analysis["checkpoint"]) != real(checkpoint):
        raise ResultError(f"{path}: must be of {checkpoint}, got the thresholds of {analysis['checkpoint']}; {again}")
    best = analysis.get("best")
    if best is None or best["all"]["threshold"] is None:
        raise ResultError(
            f"{path}: must have a best threshold, got none; it needs hotcoco, annotated images, model.task mask or "
            f"box, and a detection that hits. Give a threshold as a number, or {again}"
        )
    return _thresholds(analysis)


def find_thresholds(checkpoint: Path, run_dir: Path) -> Thresholds | None:
    """The best thresholds of a checkpoint, where the run's last evaluation was of it and found any.

    Raises:
        ResultError: if analysis.json is damaged.
    """
    analysis = read_analysis(run_dir) if (run_dir / ANALYSIS_FILE).is_file() else {}
    best = analysis.get("best")
    if best is None or best["all"]["threshold"] is None:
        return None
    return _thresholds(analysis) if real(run_dir / analysis["checkpoint"]) == real(checkpoint) else None


def _thresholds(analysis: dict[str, Any]) -> Thresholds:
    best = analysis["best"]
    of_all, per_class = best["all"]["threshold"], best["per_class"]
    found = {name: point["threshold"] for name, point in per_class.items()}
    filled = {name: of_all if one is None else one for name, one in found.items()}
    return Thresholds(of_all, filled, analysis.get("test_time", {}))
