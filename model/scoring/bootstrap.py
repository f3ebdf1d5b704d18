"""AP of resamples of a split's images: each image counts as often as it was drawn.

AP is computed anew for each resample, over all its detections and objects; it is no mean of AP per image. An image
that was drawn twice counts as two images. (hotcoco.compare, as of 1.3, counts it once: too narrow intervals.)

Shapes: B resamples, I images by id, D detections of a class by descending score, H hits among them, T IoU thresholds.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO

from model.scoring.backends import Result
from model.scoring.names import IouType

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_RECALLS = np.linspace(0.0, 1.0, 101)  # to the last bit those of pycocotools
_CHUNK = 4_000_000  # values [B, D] that are computed at once


@dataclass(frozen=True)
class ClassMatches:
    """Matches of a class's detections with its objects, over all images."""

    images: Ints  # [D] index of the image
    hits: tuple[Ints, ...]  # T times [H], ascending indices into D
    ignored: tuple[Ints, ...]  # T times: detections in crowd regions, which do not count
    objects: Ints  # [I] number of objects in each image


def match_images(
    ground_truth: COCO, results: list[Result], iou_type: IouType, max_detections: int
) -> list[ClassMatches]:
    """Match results of a split with hotcoco; one entry for each class that has objects.

    Args:
        ground_truth: return value of `load_ground_truth`.
        max_detections: detections per image and class that count.

    Raises:
        ImportError: if hotcoco cannot be imported.
        ValueError: if it cannot use a result, such as one without a numeric image_id, or with the score NaN.
    """
    import hotcoco

    truth = hotcoco.COCO(ground_truth.dataset)
    evaluator = hotcoco.COCOeval(truth, truth.load_res(results), iou_type)
    evaluator.params.max_dets = [max_detections]
    evaluator.params.area_rng, evaluator.params.area_rng_lbl = [[0, 1e10]], ["all"]
    evaluator.evaluate()
    index = {image_id: i for i, image_id in enumerate(sorted(ground_truth.getImgIds()))}
    of_class: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for cell in evaluator.eval_imgs:
        if cell is not None:
            of_class[cell["category_id"]].append(cell)
    matches = [_class_matches(of_class[category_id], index) for category_id in sorted(of_class)]
    return [one for one in matches if one.objects.any()]


def _class_matches(cells: list[dict[str, Any]], index: dict[int, int]) -> ClassMatches:
    """Join the matches of one class in all images."""
    cells.sort(key=lambda cell: index[cell["image_id"]])  # pycocotools' order, in which equal scores stay
    order = np.argsort(-np.concatenate([cell["dtScores"] for cell in cells]), kind="stable")
    is_ignored, is_matched = (
        np.concatenate([np.array(cell[key]).reshape(len(cell[key]), -1) for cell in cells], axis=1)[:, order] > 0
        for key in ("dtIgnore", "dtMatches")
    )  # [T, D]
    objects = np.zeros(len(index), dtype=np.int64)
    for cell in cells:
        objects[index[cell["image_id"]]] = len(cell["gtIgnore"]) - sum(cell["gtIgnore"])
    of_image = np.repeat([index[cell["image_id"]] for cell in cells], [len(cell["dtScores"]) for cell in cells])
    return ClassMatches(
        images=of_image[order],
        hits=tuple(np.flatnonzero(row) for row in is_matched & ~is_ignored),
        ignored=tuple(np.flatnonzero(row) for row in is_ignored),
        objects=objects,
    )


def resampled_ap(matches: Sequence[ClassMatches], counts: Ints) -> Floats:
    """AP of each resample at each IoU threshold, the mean over the classes that have objects in it.

    Args:
        counts: [B, I] how often each image was drawn.

    Returns:
        [B, T]; nan for a resample without any object.

    Source: pycocotools, COCOeval.accumulate, with area "all".
    """
    chunk = max(1, _CHUNK // max((len(one.images) for one in matches), default=1))
    parts = [_chunk_ap(matches, counts[start : start + chunk]) for start in range(0, len(counts), chunk)]
    return np.concatenate(parts)


def _chunk_ap(matches: Sequence[ClassMatches], counts: Ints) -> Floats:
    total, classes = np.zeros((len(counts), len(matches[0].hits))), np.zeros((len(counts), 1))
    for one in matches:
        objects = counts @ one.objects  # [B]
        ap = np.stack(list(_ap(one, counts, objects)), axis=1)  # [B, T]
        total += np.where(objects[:, None] > 0, ap, 0)
        classes += objects[:, None] > 0
    return np.divide(total, classes, out=np.full_like(total, np.nan), where=classes > 0)


def _ap(one: ClassMatches, counts: Ints, objects: Ints) -> Iterator[Floats]:
    """AP [B] of a class at each IoU threshold.

    Only hits matter: the precision after a false alarm is lower than before it, and no recall is first reached there.
    """
    drawn = counts[:, one.images]  # [B, D]
    kept = np.cumsum(drawn, axis=1)
    for hits, ignored in zip(one.hits, one.ignored, strict=True):
        if not len(hits):
            yield np.zeros(len(counts))
            continue
        found = np.cumsum(drawn[:, hits], axis=1)  # [B, H]
        uncounted = np.cumsum(np.pad(drawn[:, ignored], ((0, 0), (1, 0))), axis=1)[:, np.searchsorted(ignored, hits)]
        precision = found / np.maximum(kept[:, hits] - uncounted, 1)
        best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]  # at this recall or a higher one
        reached = np.searchsorted(_RECALLS, found / np.maximum(objects, 1)[:, None], side="right")
        yield (best * np.diff(reached, axis=1, prepend=0)).sum(axis=1) / len(_RECALLS)
