"""Pictures of a report, small enough to be embedded.

Ground truth and predictions of the worst and best images, and what `evaluate` drew of its analysis.
"""

import base64
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from PIL import Image

from components.evaluation.error_types import SURE_SCORE, ErrorAnalysis, ImageScore, extremes, read_results
from components.evaluation.plots import draw_comparison
from components.reports.analysis import label_error_caption
from components.reports.layout import Picture
from model.data.index import CocoIndex
from model.inference.predictor import objects_of
from model.scoring.coco import load_ground_truth
from model.scoring.names import IouType

_PANEL_PX = 512  # longer side of each of the two images of a picture
_WIDTHS_PX = (1032, 800, 640, 480)  # tried in turn until a picture fits
_QUALITIES = (82, 70, 55)


def worst_and_best(
    index: CocoIndex, results: Mapping[IouType, Path], analysis: ErrorAnalysis, *, count: int, budget_bytes: int
) -> tuple[list[Picture], list[Picture]]:
    """Draw up to `count` worst and up to `count` best images.

    Args:
        results: files of COCO results, of boxes and, if any, of masks in the same order; the last one ranks the images.
        budget_bytes: limit for all pictures together, in base64.
    """
    iou_type, path = list(results.items())[-1]
    worst, best = extremes(analysis.image_scores(path, iou_type), count)
    ground_truth = load_ground_truth(index.ground_truth_path)
    of_images = {kind: _by_image(read_results(file)) for kind, file in results.items()}
    indices = {int(image_id): i for i, image_id in enumerate(index.image_ids)}
    share = budget_bytes // max(1, len(worst) + len(best))

    def picture(score: ImageScore) -> Picture:
        i = indices[score.image_id]
        masks = of_images["segm"][score.image_id] if "segm" in of_images else []
        found = objects_of(of_images["bbox"][score.image_id], masks, index.category_ids)
        drawing = draw_comparison(index, i, ground_truth, found, longer_side_px=_PANEL_PX)
        caption = _caption(index, i, score)
        alt = f"Left: ground truth; right: predictions with a score of at least {SURE_SCORE}. {caption}"
        return _embedded(drawing, caption, share, alt)

    return [picture(score) for score in worst], [picture(score) for score in best]


def label_errors(run_dir: Path, errors: Sequence[Mapping[str, Any]], *, count: int, budget_bytes: int) -> list[Picture]:
    """The drawings of the likeliest label errors that `evaluate` made, up to `count`.

    Args:
        errors: those of analysis.json, the likeliest first.
        budget_bytes: limit for all pictures together, in base64.
    """
    drawn = [
        (path, error)
        for rank, error in enumerate(errors[:count], 1)
        if (path := run_dir / "plots" / "label_errors" / f"{rank:03}_{error['image_id']}.jpg").is_file()
    ]
    share = budget_bytes // max(1, len(drawn))
    return [
        _read(path, label_error_caption(error), "Left: ground truth; right: the suspicious detection.", share)
        for path, error in drawn
    ]


def confusion_matrix(run_dir: Path, budget_bytes: int) -> list[Picture]:
    """The confusion matrix that `evaluate` drew, if it did."""
    path = run_dir / "plots" / "confusion_matrix.png"
    caption = "Confusion matrix at each class's best threshold"
    return [_read(path, caption, "Colours are shares of a row.", budget_bytes)] if path.is_file() else []


def _read(path: Path, caption: str, description: str, max_bytes: int) -> Picture:
    with Image.open(path) as drawing:
        return _embedded(drawing.convert("RGB"), caption, max_bytes, f"{description} {caption}")


def _caption(index: CocoIndex, i: int, score: ImageScore) -> str:
    counts = f"{score.hits} found, {score.missed} missed, {score.false_alarms} false"
    return f"{index.image_path(i).name}: F1 {score.f1:.2f} ({counts})"


def _by_image(results: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    grouped: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        grouped[result["image_id"]].append(result)
    return grouped


def _embedded(drawing: Image.Image, caption: str, max_bytes: int, alt: str) -> Picture:
    """Encode a drawing as WebP in a data URI, as large as max_bytes allows, or else in the smallest size."""
    for width, quality in product(_WIDTHS_PX, _QUALITIES):
        scaled = drawing.copy()
        scaled.thumbnail((width, drawing.height), Image.Resampling.LANCZOS)
        stream = io.BytesIO()
        scaled.save(stream, "WEBP", quality=quality)
        text = base64.b64encode(stream.getvalue()).decode()
        if len(text) <= max_bytes:
            break
    return Picture(f"data:image/webp;base64,{text}", scaled.width, scaled.height, caption, alt)
