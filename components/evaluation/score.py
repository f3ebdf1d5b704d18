"""Scores of detections, and their names in MLflow."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

from pycocotools.coco import COCO

from components.config import Config
from components.evaluation.detect import Results, detect
from model.config import EvaluateConfig
from model.data.index import CocoIndex
from model.data.values import distinct
from model.distributed import on_main
from model.network.mask_rcnn import MaskRCNN
from model.scoring.backends import AnyBackend
from model.scoring.coco import CocoEvaluation, evaluate_proposals, evaluate_results
from model.scoring.names import COCO_MAX_DETECTIONS

_NOT_IN_METRIC_NAMES = r"[^\w\-. ]"
_LONGEST_NAME = 200  # MLflow takes 250 characters of a whole name


def evaluate_model(model: MaskRCNN, config: Config) -> CocoEvaluation:
    """Score a model during training on `evaluate.split`, without test-time augmentation; writes nothing."""
    index = CocoIndex.open(config.data.prepared_dir, config.evaluate.split, config.loading().timeout_s)
    plain = EvaluateConfig(batch_size=config.evaluate.batch_size)
    results = detect(model, index, config.loading(), plain, dtype=config.train.dtype)

    def scored() -> CocoEvaluation:
        assert results is not None
        limit = config.evaluate.max_detections
        return score(index.ground_truth_path, results, config.evaluate.backend, max_detections=limit)

    return on_main(scored)


def score(
    ground_truth: Path | COCO,
    results: Results,
    backend: AnyBackend,
    *,
    max_detections: int = COCO_MAX_DETECTIONS,
) -> CocoEvaluation:
    """Score results: AP of boxes and masks, or the recall of proposals."""
    if results.task == "proposals":
        return evaluate_proposals(ground_truth, results.bbox, backend=backend)
    segm = results.segm if results.task == "mask" else None
    return evaluate_results(ground_truth, results.bbox, segm, backend=backend, max_detections=max_detections)


def limits_that_bind(ground_truth: COCO, results: Results, max_detections: int, detections_per_image: int) -> list[str]:
    """Sentences about limits of detections that keep a perfect model from AP 1, or detections from counting."""
    if results.task == "proposals":
        return []
    objects = [annotation for annotation in ground_truth.anns.values() if not annotation["iscrowd"]]
    of_image = max(Counter(one["image_id"] for one in objects).values(), default=0)
    of_class, found = (
        max(Counter((one["image_id"], one["category_id"]) for one in records).values(), default=0)
        for records in (objects, results.bbox)
    )
    sentences = []
    if of_image > detections_per_image:
        sentences.append(
            f"an image has {of_image} objects, but at most {detections_per_image} are detected; train with a "
            "larger model.detections_per_image"
        )
    if max(of_class, found) > max_detections:
        sentences.append(
            f"an image has {of_class} objects and {found} detections of one class, but only the surest "
            f"{max_detections} count in AP; raise evaluate.max_detections, or leave it at {COCO_MAX_DETECTIONS} to "
            "compare with published AP"
        )
    return sentences


def score_metrics(evaluation: CocoEvaluation) -> dict[str, float | None]:
    """Scores by MLflow name: `ap/bbox`, `ap50/segm`, `ar1000/proposals`, …"""
    return {
        f"{name.lower()}/{kind}": value for kind, scores in evaluation.scores.items() for name, value in scores.items()
    }


def class_metrics(evaluation: CocoEvaluation) -> dict[str, float | None]:
    """AP of each class by MLflow name: `class_ap/segm/traffic light`, …; what MLflow refuses becomes `_`, or is cut."""
    names = distinct([_metric_name(name) for name in evaluation.per_class], "{} {}")
    return {
        f"class_ap/{iou_type}/{name}": ap
        for name, scores in zip(names, evaluation.per_class.values(), strict=True)
        for iou_type, ap in scores.items()
    }


def _metric_name(name: str) -> str:
    """Name of a class as the last part of a metric's name, which MLflow takes for a path."""
    name = re.sub(_NOT_IN_METRIC_NAMES, "_", name)[:_LONGEST_NAME]
    return name.replace(".", "_") if name in (".", "..") else name


def analysis_metrics(analysis: dict[str, Any]) -> dict[str, float | None]:
    """Main figures of an analysis by MLflow name: F1, precision and recall at the best threshold for all classes."""
    if not analysis:
        return {}
    kind, figures = analysis["iou_type"], analysis["best"]["all"] | {"ece": analysis["calibration"]["ece"]}
    return {f"{name}/{kind}": value for name, value in figures.items()}
