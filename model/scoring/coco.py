"""COCO evaluation: from results to average precision, as pycocotools defines it; backends.py computes the curves.

Shapes: T IoU thresholds (0.50, 0.55, … 0.95), R recall thresholds (0, 0.01, … 1), K classes, A area ranges, M limits of
detections. Every score is a fraction, 0 to 1, or None without ground truth (pycocotools' -1). As many detections per
image and class count as evaluate.max_detections says, COCO's 100 by default; AR1, AR10 and AR100 have their own limits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pydantic import BaseModel

from model.files import read_json
from model.scoring.backends import (
    COCO_LIMITS,
    AnyBackend,
    Curves,
    Result,
    choose_backend,
    index_dataset,
    open_evaluator,
)
from model.scoring.names import COCO_MAX_DETECTIONS, RECALL_NAMES, SCORE_NAMES, IouType, ResultType

IOU_THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
RECALL_THRESHOLDS = tuple(step / 100 for step in range(101))

Scores = dict[str, float | None]


class _Image(BaseModel):
    id: int


class _Annotation(BaseModel):
    image_id: int
    category_id: int


class _Category(BaseModel):
    id: int
    name: str


class GroundTruth(BaseModel):
    """Keys of COCO JSON that scoring needs, besides boxes and masks."""

    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category]


@dataclass(frozen=True)
class CocoEvaluation:
    """Scores of a model's results: of boxes and masks, of boxes only, or of proposals."""

    scores: dict[ResultType, Scores]  # "bbox" and "segm" by SCORE_NAMES, or "proposals" by RECALL_NAMES
    per_class: dict[str, Scores]  # class name → {"bbox": AP, "segm": AP}; empty for proposals
    precision: dict[ResultType, NDArray[np.float64]]  # [T, R], mean over classes with ground truth; empty for proposals
    num_images: int
    num_detections: int
    max_detections: int = COCO_MAX_DETECTIONS  # per image and class; not of proposals

    @property
    def bbox(self) -> Scores:
        """Box scores."""
        return self.scores["bbox"]

    @property
    def segm(self) -> Scores:
        """Mask scores."""
        return self.scores["segm"]

    @property
    def main_score(self) -> float:
        """Score that ranks checkpoints: mask AP, else box AP, else recall of 1000 proposals."""
        kind = list(self.scores)[-1]
        return self.scores[kind]["AR1000" if kind == "proposals" else "AP"] or 0.0


def evaluate_results(
    ground_truth: Path | COCO,
    bbox_results: list[Result],
    segm_results: list[Result] | None,
    *,
    backend: AnyBackend = "auto",
    max_detections: int = COCO_MAX_DETECTIONS,
) -> CocoEvaluation:
    """Score results over every image of the ground truth; an empty list scores 0.

    Args:
        ground_truth: a COCO JSON file, or the return value of `load_ground_truth`.
        bbox_results: {"image_id", "category_id", "bbox": [x, y, width, height] in pixels, "score"} each.
        segm_results: {"image_id", "category_id", "segmentation": COCO RLE, "score"} each; None scores boxes alone.
        backend: see `choose_backend`; the numbers do not depend on it.
        max_detections: detections per image and class that count in AP, and in AR of small, medium and large objects.

    Raises:
        ValueError: if the ground truth lacks the image of a result.
        UserError: if the backend cannot be imported.

    Source: the twelve metrics of cocodataset.org/#detection-eval.
    """
    coco = ground_truth if isinstance(ground_truth, COCO) else load_ground_truth(ground_truth)
    results: dict[IouType, list[Result]] = {"bbox": bbox_results}
    if segm_results is not None:
        results["segm"] = segm_results
    evaluator = open_evaluator(choose_backend(backend), coco)
    limits = tuple(sorted({*COCO_LIMITS, max_detections}))
    main = limits.index(max_detections)
    curves: dict[IouType, Curves] = {}
    for iou_type, found in results.items():
        _require_known_images(coco, found)
        curves[iou_type] = evaluator.score(evaluator.load(found), iou_type, limits)
    names = [coco.cats[category_id]["name"] for category_id in sorted(coco.getCatIds())]
    return CocoEvaluation(
        scores={iou_type: summarize(of_iou_type, limits, main) for iou_type, of_iou_type in curves.items()},
        per_class={
            name: {
                iou_type: _fraction(of_iou_type.precision[:, :, k, 0, main]) for iou_type, of_iou_type in curves.items()
            }
            for k, name in enumerate(names)
        },
        precision={
            iou_type: _mean_over_classes(of_iou_type.precision[..., 0, main])
            for iou_type, of_iou_type in curves.items()
        },
        num_images=len(coco.getImgIds()),
        num_detections=len(bbox_results),
        max_detections=max_detections,
    )


def evaluate_proposals(
    ground_truth: Path | COCO, results: list[Result], *, backend: AnyBackend = "auto"
) -> CocoEvaluation:
    """Score proposals by recall over every image of the ground truth, regardless of class.

    Args:
        ground_truth: a COCO JSON file, or the return value of `load_ground_truth`.
        results: {"image_id", "category_id" (any), "bbox": [x, y, width, height] in pixels, "score"} each.
        backend: see `choose_backend`; the numbers do not depend on it.

    Raises:
        ValueError: if the ground truth lacks the image of a result.
        UserError: if the backend cannot be imported.

    Source: average recall (arXiv:1502.05082), as pycocotools computes it with useCats = 0: over IoU 0.50, 0.55, … 0.95.
    """
    coco = ground_truth if isinstance(ground_truth, COCO) else load_ground_truth(ground_truth)
    _require_known_images(coco, results)
    evaluator = open_evaluator(choose_backend(backend), coco)
    recall = evaluator.score_proposals(evaluator.load(results)).recall  # [T, 1, A, M]
    parts = [recall[:, :, area, limit] for limit in (0, 1) for area in range(4)]
    scores = {name: _fraction(part) for name, part in zip(RECALL_NAMES, parts, strict=True)}
    return CocoEvaluation({"proposals": scores}, {}, {}, len(coco.getImgIds()), len(results))


def load_ground_truth(path: Path) -> COCO:
    """Load a COCO JSON file with pycocotools, its annotations numbered from 1; `given_id` is the id in the file.

    Raises:
        UserError: if the file is damaged.
    """
    dataset = read_json(path, GroundTruth, "`maskrcnn prepare` writes it anew")
    for number, annotation in enumerate(dataset["annotations"], 1):
        # pycocotools ignores matches with id 0.
        annotation["given_id"], annotation["id"] = annotation.get("id"), number
    return index_dataset(dataset)


def summarize(curves: Curves, limits: Sequence[int] = COCO_LIMITS, main: int = -1) -> Scores:
    """Compute the twelve scores from curves, like COCOeval.summarize.

    Args:
        limits: limits of detections of the curves.
        main: index of the limit that AP, and AR of small, medium and large objects, are computed with.
    """
    precision, recall = curves.precision, curves.recall
    at_50, at_75 = IOU_THRESHOLDS.index(0.5), IOU_THRESHOLDS.index(0.75)
    parts = [
        precision[:, :, :, 0, main],
        precision[at_50, :, :, 0, main],
        precision[at_75, :, :, 0, main],
        *(precision[:, :, :, area, main] for area in (1, 2, 3)),
        *(recall[:, :, 0, limits.index(limit)] for limit in COCO_LIMITS),
        *(recall[:, :, area, main] for area in (1, 2, 3)),
    ]
    return {name: _fraction(part) for name, part in zip(SCORE_NAMES, parts, strict=True)}


def _require_known_images(coco: COCO, results: list[Result]) -> None:
    unknown = {result["image_id"] for result in results} - set(coco.getImgIds())
    if unknown:
        raise ValueError(f"results must be of images of the ground truth, got others: {sorted(unknown)[:10]}")


def _mean_over_classes(precision: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean [T, R] of precision [T, R, K] over classes with ground truth."""
    present = precision[:, :, (precision > -1).all(axis=(0, 1))]
    return present.mean(axis=2) if present.shape[2] else np.zeros(precision.shape[:2])


def _fraction(values: NDArray[np.float64]) -> float | None:
    """Mean over classes with ground truth; None if there are none."""
    present = values[values > -1]
    return float(present.mean()) if present.size else None
