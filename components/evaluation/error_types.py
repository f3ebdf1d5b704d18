"""Error analysis with hotcoco: TIDE's error types, and the images with the best and worst scores.

ΔAP of an error type is the gain in AP at IoU 0.50 if an oracle fixed all errors of that type, each type alone.
Source: TIDE (arXiv:2008.08115); an IoU of at least 0.5 is a hit, an IoU below 0.1 is background. Crowd regions count as
no error.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field

from model.files import read_json
from model.scoring.coco import load_ground_truth
from model.scoring.names import IouType

SURE_SCORE = 0.5  # detections below it do not count in an image's score
ERROR_TYPES = {
    "Cls": ("class", "right place, wrong class"),
    "Loc": ("localisation", "right class, IoU from 0.1 to 0.5"),
    "Both": ("both", "wrong class, IoU from 0.1 to 0.5"),
    "Dupe": ("duplicate", "the object already has a detection of higher score"),
    "Bkg": ("background", "no object has an IoU of 0.1 with the detection"),
    "Miss": ("missed", "no detection matches the object, not even a wrong one"),
}


@dataclass(frozen=True)
class ErrorType:
    """One error type over a whole split."""

    name: str
    meaning: str
    count: int
    delta_ap: float  # a fraction


@dataclass(frozen=True)
class ErrorTypes:
    """All error types, and the AP that ΔAP refers to."""

    ap50: float
    errors: list[ErrorType]


@dataclass(frozen=True)
class ImageScore:
    """Score of one image: F1 at IoU 0.5 over the detections of at least SURE_SCORE, per class."""

    image_id: int
    f1: float
    hits: int
    false_alarms: int
    missed: int


class ErrorAnalysis:
    """Ground truth of a split, for the analysis of results.

    Raises:
        ImportError: from the constructor, if hotcoco is not installed.
    """

    def __init__(self, ground_truth: Path) -> None:
        import hotcoco

        self._hotcoco = hotcoco
        self._ground_truth = hotcoco.COCO(load_ground_truth(ground_truth).dataset)

    def error_types(self, results: Path, iou_type: IouType) -> ErrorTypes:
        """Compute TIDE's error types of a file of COCO results."""
        found = self._evaluated(read_results(results), iou_type).tide_errors(pos_thr=0.5, bg_thr=0.1)
        counts, delta_ap = found["counts"], found["delta_ap"]
        errors = [ErrorType(name, meaning, counts[key], delta_ap[key]) for key, (name, meaning) in ERROR_TYPES.items()]
        return ErrorTypes(found["ap_base"], errors)

    def image_scores(self, results: Path, iou_type: IouType) -> list[ImageScore]:
        """Score every image that has an object or a detection, worst first."""
        sure = [result for result in read_results(results) if result["score"] >= SURE_SCORE]
        summary = self._evaluated(sure, iou_type).image_diagnostics(iou_thr=0.5)["img_summary"]
        scores = [
            ImageScore(image_id, counts["f1"], counts["tp"], counts["fp"], counts["fn"])
            for image_id, counts in summary.items()
            if counts["tp"] + counts["fp"] + counts["fn"]
        ]
        return sorted(scores, key=lambda x: (x.f1, -x.false_alarms - x.missed, x.hits, x.image_id))

    def _evaluated(self, results: list[dict[str, Any]], iou_type: str) -> Any:
        evaluator = self._hotcoco.COCOeval(self._ground_truth, self._ground_truth.load_res(results), iou_type)
        evaluator.evaluate()
        return evaluator


def extremes(scores: list[ImageScore], count: int) -> tuple[list[ImageScore], list[ImageScore]]:
    """Return the worst `count` images, and up to `count` of the best among the others, most hits first."""
    worst = scores[:count]
    rest = sorted(scores[count:], key=lambda x: (-x.f1, -x.hits, x.image_id))
    return worst, [score for score in rest if score.hits][:count]


class CocoResult(BaseModel):
    """One entry of COCO results."""

    image_id: int
    category_id: int
    score: float
    bbox: Annotated[list[float], Field(min_length=4, max_length=4)] | None = None
    segmentation: dict[str, Any] | list[list[float]] | None = None  # RLE, or polygons


def read_results(path: Path) -> list[dict[str, Any]]:
    """The COCO results that `maskrcnn evaluate` kept in inference/.

    Raises:
        UserError: if the file is damaged.
    """
    results: list[dict[str, Any]] = read_json(path, list[CocoResult], "`maskrcnn evaluate` writes it anew")
    return results
