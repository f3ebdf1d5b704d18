"""COCO evaluation: from results to average precision, by pycocotools.

Shapes: T IoU thresholds (0.50, 0.55, … 0.95), R recall thresholds (0, 0.01, … 1), K classes. Every score is a fraction, 0 to 1,
or None where the ground truth holds nothing to find (pycocotools says -1 there). At most 100 detections an image count.
"""

import contextlib
import copy
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

# pycocotools' own order of its twelve numbers.
SCORE_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
IOU_THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
RECALL_THRESHOLDS = tuple(step / 100 for step in range(101))

Result = dict[str, Any]


Scores = dict[str, float | None]


@dataclass(frozen=True)
class CocoEvaluation:
    """How well a model's results fit the ground truth, in boxes and in masks."""

    bbox: Scores  # by SCORE_NAMES
    segm: Scores
    per_class: dict[str, Scores]  # class name → {"bbox": AP, "segm": AP}
    precision: dict[str, np.ndarray]  # "bbox" and "segm" → [T, R] float64, mean over the classes with ground truth
    num_images: int
    num_detections: int


def evaluate_results(
    ground_truth: Path | COCO, bbox_results: list[Result], segm_results: list[Result]
) -> CocoEvaluation:
    """Score results over every image of the ground truth; no results at all score 0.

    Args:
        ground_truth: a COCO JSON file, or one already loaded.
        bbox_results: {"image_id", "category_id", "bbox": [x, y, width, height] in pixels, "score"} each.
        segm_results: {"image_id", "category_id", "segmentation": COCO RLE, "score"} each.

    Raises:
        ValueError: if a result is of an image that the ground truth does not have.

    Source: the twelve metrics of cocodataset.org/#detection-eval.
    """
    coco = ground_truth if isinstance(ground_truth, COCO) else load_ground_truth(ground_truth)
    bbox, bbox_precision = _evaluate_task(coco, bbox_results, "bbox")
    segm, segm_precision = _evaluate_task(coco, segm_results, "segm")
    names = [coco.cats[category_id]["name"] for category_id in sorted(coco.getCatIds())]
    return CocoEvaluation(
        bbox=bbox,
        segm=segm,
        per_class={
            name: {"bbox": _fraction(bbox_precision[:, :, k].mean()), "segm": _fraction(segm_precision[:, :, k].mean())}
            for k, name in enumerate(names)
        },
        precision={"bbox": _mean_over_classes(bbox_precision), "segm": _mean_over_classes(segm_precision)},
        num_images=len(coco.getImgIds()),
        num_detections=len(bbox_results),
    )


def load_ground_truth(path: Path) -> COCO:
    """A COCO JSON file as pycocotools holds it, without its chatter."""
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


def _evaluate_task(coco: COCO, results: list[Result], task: Literal["bbox", "segm"]) -> tuple[Scores, np.ndarray]:
    """The twelve scores, and precision [T, R, K] over all areas with 100 detections, -1 for classes without ground truth."""
    unknown = {result["image_id"] for result in results} - set(coco.getImgIds())
    if unknown:
        raise ValueError(f"results of images that the ground truth does not have: {sorted(unknown)[:10]}")
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = COCOeval(coco, _load_results(coco, results), task)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    scores = {name: _fraction(value) for name, value in zip(SCORE_NAMES, evaluator.stats, strict=True)}
    return scores, evaluator.eval["precision"][:, :, :, 0, -1]


def _mean_over_classes(precision: np.ndarray) -> np.ndarray:
    present = precision[:, :, (precision > -1).all(axis=(0, 1))]
    return present.mean(axis=2) if present.shape[2] else np.zeros(precision.shape[:2])


def _load_results(coco: COCO, results: list[Result]) -> COCO:
    if results:
        return coco.loadRes(copy.deepcopy(results))  # a copy: pycocotools writes areas and ids into what it is given
    empty = COCO()  # loadRes fails on no results
    empty.dataset = {"images": coco.dataset["images"], "categories": coco.dataset["categories"], "annotations": []}
    empty.createIndex()
    return empty


def _fraction(value: float) -> float | None:
    return None if value < 0 else float(value)
