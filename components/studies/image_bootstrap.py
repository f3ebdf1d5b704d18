"""Intervals of the differences between two single runs, by paired bootstrap over the images that both were scored on.

They tell how much a difference depends on the images of the split. How much AP varies from seed to seed they do not
tell: for that, studies of several seeds are compared.
Source: Efron (1979), Annals of Statistics 7(1); percentile intervals.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from rich.progress import track

from components.runs.files import prepared_splits
from components.runs.result import Result, ap_of
from components.studies.intervals import CONFIDENCE
from model.data.index import CocoIndex
from model.errors import UserError
from model.files import read_json
from model.scoring.bootstrap import match_images, resampled_ap
from model.scoring.coco import IOU_THRESHOLDS, load_ground_truth
from model.scoring.names import COCO_MAX_DETECTIONS, IOU_TYPES, IouType

RESAMPLES = 1000
_SEED = 0
_TOLERANCE = 1e-6  # AP of the kept results may differ so much from evaluation.json

Interval = tuple[float, float]
Floats = NDArray[np.float64]


def image_intervals(before: Result, after: Result) -> tuple[dict[IouType, dict[str, Interval]], str]:
    """95 % intervals of the differences in AP, AP50 and AP75, `after` minus `before`.

    Args:
        before, after: results on the same data, with the same limit of detections.

    Returns:
        IoU type → score → interval, and the reason if there are none.

    Raises:
        UserError: if a run's results are not those of its evaluation.json.
    """
    runs = before, after
    iou_types = [one for one in IOU_TYPES if all(one in ap_of(run.evaluation) for run in runs)]
    for path in (_results_path(run, iou_type) for run in runs for iou_type in iou_types):
        if not path.is_file():
            return {}, f"{path} is not there; `maskrcnn evaluate` writes it"
    index = next((index for run in runs if (index := _evaluated(run))), None)
    if index is None:
        places = " and ".join(dict.fromkeys(str(run.config.data.prepared_dir) for run in runs))
        return {}, f"the evaluated images are not those in {places}; compare where the data are"
    ground_truth = load_ground_truth(index.ground_truth_path)
    images = len(ground_truth.imgs)
    counts = np.random.default_rng(_SEED).multinomial(images, np.full(images, 1 / images), size=RESAMPLES)
    steps = [(iou_type, run) for iou_type in iou_types for run in runs]
    try:
        found = [
            _resampled(run, iou_type, ground_truth, counts)
            for iou_type, run in track(steps, description="resampling images", transient=True)
        ]
    except ImportError as error:
        return {}, f"hotcoco, which matches the results, cannot be imported ({error})"
    pairs = dict(zip(iou_types, zip(found[::2], found[1::2], strict=True), strict=True))
    return {iou_type: _intervals(two - one) for iou_type, (one, two) in pairs.items()}, ""


def _results_path(run: Result, iou_type: IouType) -> Path:
    return run.run_dir / "inference" / f"{iou_type}.json"


def _evaluated(run: Result) -> CocoIndex | None:
    """The prepared split that a run was evaluated on, if it is there."""
    splits = prepared_splits(run.config.data.prepared_dir, run.config.evaluate.split)
    return next((one for one in splits.values() if one.data_hash == run.evaluation["data_hash"]), None)


def _resampled(run: Result, iou_type: IouType, ground_truth: COCO, counts: NDArray[np.int64]) -> Floats:
    """AP of a run in each resample, at each IoU threshold."""
    path, evaluation = _results_path(run, iou_type), run.evaluation
    results: list[dict[str, Any]] = read_json(path, list[dict[str, Any]], "`maskrcnn evaluate` writes it anew")
    limit = evaluation.get("max_detections") or COCO_MAX_DETECTIONS
    again = f"run `maskrcnn evaluate train.output_dir={run.run_dir}` again"
    try:
        matches = match_images(ground_truth, results, iou_type, limit)
    except ValueError as error:
        raise UserError(f"{path}: must be COCO results, but cannot be read as such ({error}); {again}") from error
    ap = float(resampled_ap(matches, np.ones((1, counts.shape[1]), dtype=np.int64)).mean())
    expected = evaluation[iou_type]["AP"]
    if abs(ap - expected) > _TOLERANCE:
        raise UserError(
            f"{path}: must be the results that evaluation.json scores, with AP {expected}, got AP {ap}; {again}"
        )
    return resampled_ap(matches, counts)


def _intervals(differences: Floats) -> dict[str, Interval]:
    """Intervals of differences [B, T]; a resample without any object has none."""
    known = differences[np.isfinite(differences).all(axis=1)]
    at_50, at_75 = IOU_THRESHOLDS.index(0.5), IOU_THRESHOLDS.index(0.75)
    scores = {"AP": known.mean(axis=1), "AP50": known[:, at_50], "AP75": known[:, at_75]}
    ends = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
    found = {name: np.quantile(values, ends) for name, values in scores.items()}
    return {name: (float(low), float(high)) for name, (low, high) in found.items()}
