"""Analysis of a model's detections: best thresholds, confusions, calibration, slices, likely label errors.

Content of analysis.json. It is about masks, or about boxes if there are no masks. hotcoco matches detections with
objects: greedily by score within a class, at IoU 0.5. Crowd regions count neither as objects nor as false alarms.
Precision, recall and F1 at a confidence c are those of the detections that score at least c; a class's best threshold
has the highest F1. All classes together are pooled: their objects, hits and false alarms are added up.

Shapes: D detections, K classes by category id, C confidences.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO

from components.evaluation.detect import Results
from model.scoring.backends import COCO_LIMITS

IOU = 0.5  # a detection with at least this IoU is a hit
BINS = 10  # calibration's intervals of confidence, equally wide
SUSPECT_SCORE = 0.5  # a detection below it is no evidence of a label error
_CONFIDENCES = np.linspace(0, 1, 101)
_MAX_LABEL_ERRORS = 100
# Number of objects in an image, first and last of each slice.
_CROWDING = ((0, 0), (1, 2), (3, 5), (6, 10), (11, None))
_SIZES = {"small": ("s", 0, 32**2), "medium": ("m", 32**2, 96**2), "large": ("l", 96**2, 1e10)}

Floats = NDArray[np.float64]
Point = dict[str, float | None]


@dataclass(frozen=True)
class Matches:
    """Detections that count, and the objects to be found."""

    scores: Floats  # [D]
    classes: NDArray[np.int64]  # [D] index of the category id
    image_ids: NDArray[np.int64]  # [D]
    is_hit: NDArray[np.bool_]  # [D]
    objects: NDArray[np.int64]  # [K]

    def by_class(self) -> list[tuple[Floats, NDArray[np.bool_], int]]:
        """Scores and hits of each class, and the number of its objects."""
        order = np.argsort(self.classes, kind="stable")
        parts = np.split(order, np.searchsorted(self.classes[order], np.arange(1, len(self.objects))))
        return [(self.scores[part], self.is_hit[part], int(n)) for part, n in zip(parts, self.objects, strict=True)]


def analyse(ground_truth: COCO, results: Results, max_detections: int) -> dict[str, Any]:
    """Analyse the results of a split; None stands for what is undefined, such as the recall of an absent class.

    Returns:
        {"iou_type", "iou", "best": {"all": point, "per_class": name → point}, "curves": {"confidence": [C], "all" and
        "per_class" likewise: {"precision", "recall", "f1": [C]}}, "confusion": {"classes", "matrix": rows of the
        truth, columns of the predictions}, "calibration": {"ece", "mce", "per_class", "bins"}, "slices": {"size",
        "crowding"}, "label_errors": {"count", "likeliest"}}. A point is {"threshold", "precision", "recall", "f1"}.

    Raises:
        ImportError: if hotcoco cannot be imported.
    """
    import hotcoco

    iou_type = "segm" if results.task == "mask" else "bbox"
    found = results.segm if results.task == "mask" else results.bbox
    category_ids = sorted(ground_truth.getCatIds())
    names = [ground_truth.cats[one]["name"] for one in category_ids]
    truth = hotcoco.COCO(ground_truth.dataset)

    def evaluator_of(chosen: list[dict[str, Any]]) -> Any:
        evaluator = hotcoco.COCOeval(truth, truth.load_res(chosen), iou_type)
        evaluator.params.max_dets = sorted({*COCO_LIMITS, max_detections})
        return evaluator

    evaluator = evaluator_of(found)
    evaluator.evaluate()
    diagnostics = evaluator.image_diagnostics(iou_thr=IOU, score_thr=SUSPECT_SCORE)
    matches = _matches(diagnostics, ground_truth, found, category_ids)
    of_classes = matches.by_class()
    pooled = matches.scores, matches.is_hit, int(matches.objects.sum())
    best = {
        "all": best_point(*pooled),
        "per_class": dict(zip(names, (best_point(*one) for one in of_classes), strict=True)),
    }
    least = _thresholds(best, names)
    least_of = dict(zip(category_ids, least.tolist(), strict=True))
    counted = (found[number - 1] for number in diagnostics["dt_status"])  # neither in crowd regions nor past the limit
    kept = [one for one in counted if one["score"] >= least_of[one["category_id"]]]
    return {
        "iou_type": iou_type,
        "iou": IOU,
        "best": best,
        "curves": {
            "confidence": _CONFIDENCES.round(2).tolist(),
            "all": curves(*pooled),
            "per_class": dict(zip(names, (curves(*one) for one in of_classes), strict=True)),
        },
        "confusion": {
            "classes": names,
            "matrix": evaluator_of(kept).confusion_matrix(iou_thr=IOU, max_det=max(len(kept), 1))["matrix"].tolist(),
        },
        "calibration": _calibration(evaluator),
        "slices": _slices(evaluator, ground_truth, matches, least),
        "label_errors": _label_errors(diagnostics, ground_truth, found),
    }


def best_point(scores: Floats, is_hit: NDArray[np.bool_], objects: int) -> Point:
    """Find the threshold with the highest F1, the highest such one, and its figures.

    The threshold lies halfway between the last score that it keeps and the first that it drops. Without a hit it is
    None.
    """
    if not is_hit.any():
        return {
            "threshold": None,
            "precision": None,
            "recall": 0.0 if objects else None,
            "f1": 0.0 if objects else None,
        }
    order = np.argsort(-scores, kind="stable")
    descending, hits = scores[order], np.cumsum(is_hit[order])
    is_last = np.append(descending[1:] != descending[:-1], True)  # a threshold cannot divide equal scores
    kept = np.arange(1, len(descending) + 1)
    k = int(np.argmax(np.where(is_last, 2 * hits / (kept + objects), -1)))
    threshold = descending[k : k + 2].mean()
    return {
        "threshold": float(threshold),
        "precision": float(hits[k] / kept[k]),
        "recall": float(hits[k] / objects),
        "f1": float(2 * hits[k] / (kept[k] + objects)),
    }


def curves(scores: Floats, is_hit: NDArray[np.bool_], objects: int) -> dict[str, list[float | None]]:
    """Precision, recall and F1 at each confidence; precision is None where no detection is left."""
    kept, hits = (_at_least(values) for values in (scores, scores[is_hit]))
    return {
        "precision": _ratios(hits, kept),
        "recall": _ratios(hits, np.full(len(hits), objects)),
        "f1": _ratios(2 * hits, kept + objects) if objects else [None] * len(hits),
    }


def _at_least(scores: Floats) -> NDArray[np.int64]:
    """Number of scores at or above each confidence."""
    return len(scores) - np.searchsorted(np.sort(scores), _CONFIDENCES, side="left")


def _ratios(part: NDArray[np.int64], whole: NDArray[np.int64]) -> list[float | None]:
    return [round(a / b, 4) if b else None for a, b in zip(part.tolist(), whole.tolist(), strict=True)]


def _matches(
    diagnostics: Mapping[str, Any], ground_truth: COCO, found: list[dict[str, Any]], category_ids: list[int]
) -> Matches:
    status = diagnostics["dt_status"]  # detections are numbered from 1
    counted = [found[number - 1] for number in status]
    of_class = Counter(ground_truth.anns[number]["category_id"] for number in diagnostics["gt_status"])
    return Matches(
        scores=np.array([one["score"] for one in counted], dtype=np.float64),
        classes=np.searchsorted(category_ids, [one["category_id"] for one in counted]),
        image_ids=np.array([one["image_id"] for one in counted], dtype=np.int64),
        is_hit=np.array([one == "tp" for one in status.values()], dtype=bool),
        objects=np.array([of_class[one] for one in category_ids], dtype=np.int64),
    )


def _thresholds(best: Mapping[str, Any], names: list[str]) -> Floats:
    """The best threshold of each class; that of all classes for one without a hit, and 1 if there is none at all."""
    of_all = best["all"]["threshold"]
    fallback = 1.0 if of_all is None else of_all
    found = (best["per_class"][name]["threshold"] for name in names)
    return np.array([fallback if one is None else one for one in found])


def _calibration(evaluator: Any) -> dict[str, Any]:
    """Expected calibration error: mean over detections of |share of hits − mean score| in their bin of confidence.

    Source: Guo et al. (arXiv:1706.04599), with hits at IoU 0.5 as the correct ones.
    """
    found = evaluator.calibration(n_bins=BINS, iou_threshold=IOU)
    bins = [
        {"from": one["bin_lower"], "to": one["bin_upper"], "detections": one["count"]}
        | {
            name: round(one[key], 4) if one["count"] else None
            for name, key in (("confidence", "avg_confidence"), ("hits", "avg_accuracy"))
        }
        for one in found["bins"]
    ]
    is_defined = found["num_detections"] > 0
    return {
        "ece": found["ece"] if is_defined else None,
        "mce": found["mce"] if is_defined else None,
        "per_class": {name: round(value, 4) for name, value in sorted(found["per_category"].items())},
        "bins": bins,
    }


def _slices(evaluator: Any, ground_truth: COCO, matches: Matches, least: Floats) -> dict[str, Any]:
    """Scores by size of the objects (area in pixels, COCO's limits), and by the number of objects in the image."""
    counted = [one for one in ground_truth.anns.values() if not one["iscrowd"]]
    in_image = Counter(one["image_id"] for one in counted)
    slices = {
        _slice_name(first, last): [
            one for one in ground_truth.imgs if first <= in_image[one] and (last is None or in_image[one] <= last)
        ]
        for first, last in _CROWDING
    }
    slices = {name: image_ids for name, image_ids in slices.items() if image_ids}
    found = evaluator.slice_by(slices)
    is_kept = matches.scores >= least[matches.classes]
    overall = found["_overall"]
    return {
        "size": [
            {
                "slice": name,
                "objects": sum(low <= one["area"] < high for one in counted),
                "AP": _defined(overall[f"AP{letter}"]),
                "AR": _defined(overall[f"AR{letter}"]),
            }
            for name, (letter, low, high) in _SIZES.items()
        ],
        "crowding": [
            {"slice": name, "images": len(image_ids), "objects": sum(in_image[one] for one in image_ids)}
            | {score: _defined(found[name][score]) for score in ("AP", "AP50")}
            | _at_thresholds(matches, is_kept, image_ids, sum(in_image[one] for one in image_ids))
            for name, image_ids in slices.items()
        ],
    }


def _slice_name(first: int, last: int | None) -> str:
    if last is None:
        return f"{first} or more"
    return f"{first} to {last}" if last > first else str(first)


def _at_thresholds(matches: Matches, is_kept: NDArray[np.bool_], image_ids: list[int], objects: int) -> Point:
    """Precision and recall of some images, each class at its best threshold."""
    chosen = is_kept & np.isin(matches.image_ids, image_ids)
    hits, kept = int(matches.is_hit[chosen].sum()), int(chosen.sum())
    return {"precision": hits / kept if kept else None, "recall": hits / objects if objects else None}


def _label_errors(diagnostics: Mapping[str, Any], ground_truth: COCO, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Detections of at least SUSPECT_SCORE that contradict the annotations, the surest first.

    wrong_label: an object that no detection matches has, at a box IoU of at least 0.5, a detection of another class.
    missing_annotation: no object of any class has a box IoU of 0.1 with the detection.
    """
    suspects = sorted(diagnostics["label_errors"], key=lambda one: (-one["dt_score"], one["image_id"], one["dt_id"]))
    return {"count": len(suspects), "likeliest": [_suspect(one, ground_truth) for one in suspects[:_MAX_LABEL_ERRORS]]}


def _suspect(error: Mapping[str, Any], ground_truth: COCO) -> dict[str, Any]:
    annotation = ground_truth.anns[error["gt_id"]] if error["gt_id"] else None
    return {
        "kind": error["type"],
        "image_id": error["image_id"],
        "annotation_id": annotation and annotation["given_id"],
        "class": error["dt_category"],
        "annotated_class": error["gt_category"],
        "score": error["dt_score"],
        "iou": round(error["iou"], 4) if annotation else None,
        "detection": error["dt_id"] - 1,  # index in inference/<iou_type>.json
    }


def _defined(value: float) -> float | None:
    return None if value < 0 else value
