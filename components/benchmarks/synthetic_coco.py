"""Generated ground truth and results for timing evaluators, similar to COCO in all that affects their work.

There are 80 classes, some frequent, most rare; seven objects per image, from a few pixels to the whole image, 1 % of
them crowds; outlines are polygons. Results are displaced copies of the ground truth, and noise; their masks are
compressed RLE.

Shapes: B boxes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from model.scoring.backends import Result
from model.scoring.names import IouType

_HEIGHT, _WIDTH = 480, 640  # image size
_CLASSES = 80
_OBJECTS = 7  # mean per image
_CROWDS = 0.01  # fraction of objects
_NOISE = 0.3  # fraction of results
_CORNERS = 24  # vertices per outline

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Objects:
    """Boxes of all images, concatenated."""

    image_ids: NDArray[np.int64]  # [B]
    labels: NDArray[np.int64]  # [B]: category ids, 1 to _CLASSES
    boxes: Array  # [B, 4] xywh

    def rows(self) -> Iterator[tuple[int, int, list[float]]]:
        """Iterate over (image id, label, box) as JSON values."""
        return zip(self.image_ids.tolist(), self.labels.tolist(), self.boxes.tolist(), strict=True)


def place_objects(rng: Generator, images: int) -> Objects:
    """Draw objects for image ids 1 to `images`, at least one each."""
    image_ids = np.repeat(np.arange(1, images + 1), rng.geometric(1 / _OBJECTS, images))
    return Objects(image_ids, _labels(rng, len(image_ids)), _boxes(rng, len(image_ids)))


def ground_truth(rng: Generator, objects: Objects, images: int) -> dict[str, Any]:
    """Make COCO JSON of the objects."""
    annotations = []
    for number, (image_id, label, xywh) in enumerate(objects.rows(), 1):
        outline: Any = _outline(rng, xywh)
        (rle,) = _packed([outline])
        is_crowd = rng.random() < _CROWDS
        annotation = {"id": number, "image_id": image_id, "category_id": label, "bbox": xywh, "iscrowd": int(is_crowd)}
        area = float(coco_mask.area(rle))
        annotations.append({**annotation, "area": area, "segmentation": rle if is_crowd else [outline]})
    return {
        "images": [{"id": image_id, "height": _HEIGHT, "width": _WIDTH} for image_id in range(1, images + 1)],
        "annotations": annotations,
        "categories": [{"id": label, "name": f"class {label}"} for label in range(1, _CLASSES + 1)],
    }


def synthetic_results(rng: Generator, objects: Objects, iou_type: IouType, detections: int) -> list[Result]:
    """Draw `detections` COCO results per image: most near an object, with scores by distance, others anywhere."""
    image_ids, first, counts = np.unique(objects.image_ids, return_index=True, return_counts=True)
    shape = (len(image_ids), detections)
    source = (first[:, None] + rng.integers(0, counts[:, None], shape)).ravel()
    is_noise = rng.random(source.size) < _NOISE
    distance = rng.gamma(2.0, 0.06, source.size)  # distance from the object, relative to its sides
    boxes = np.where(is_noise[:, None], _boxes(rng, source.size), _moved(rng, objects.boxes[source], distance))
    labels = np.where(is_noise, _labels(rng, source.size), objects.labels[source])
    confidence = np.where(is_noise, rng.beta(1, 8, source.size), np.exp(-4 * distance) * rng.beta(8, 2, source.size))
    found = Objects(objects.image_ids[source], labels, boxes)
    scores = confidence.astype(np.float32).tolist()  # precision of a network's scores
    results = []
    for (image_id, label, xywh), score in zip(found.rows(), scores, strict=True):
        result = {"image_id": image_id, "category_id": label, "score": score}
        shape_of = {"bbox": xywh} if iou_type == "bbox" else {"segmentation": _packed([_outline(rng, xywh)])[0]}
        results.append(result | shape_of)
    return results


def _labels(rng: Generator, count: int) -> NDArray[np.int64]:
    frequencies = 1 / np.arange(1, _CLASSES + 1)
    return rng.choice(_CLASSES, count, p=frequencies / frequencies.sum()) + 1


def _boxes(rng: Generator, count: int) -> Array:
    """Draw boxes [count, 4] xywh inside the frame, about a third each small, medium and large."""
    frame = np.array([_WIDTH, _HEIGHT])
    side = np.exp(rng.normal(np.log(55), 1.0, (count, 1)))
    sides = np.clip(side * np.exp(rng.normal(0, 0.3, (count, 2))), 4, frame)
    return np.hstack([rng.random((count, 2)) * (frame - sides), sides])


def _moved(rng: Generator, boxes: Array, distance: Array) -> Array:
    """Move and stretch boxes by `distance` [count], relative to their sides, and clip them to the frame."""
    corners = np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]])
    corners += rng.normal(0, 1, corners.shape) * distance[:, None] * np.tile(boxes[:, 2:], 2)
    corners = np.clip(corners, 0, [_WIDTH, _HEIGHT, _WIDTH, _HEIGHT])
    return np.hstack([np.minimum(corners[:, :2], corners[:, 2:]), np.abs(corners[:, 2:] - corners[:, :2])])


def _outline(rng: Generator, xywh: list[float]) -> list[float]:
    """Draw an irregular polygon (x, y, x, y, …) within the box."""
    x, y, width, height = xywh
    angles = np.linspace(0, 2 * np.pi, _CORNERS, endpoint=False)
    reach = rng.uniform(0.7, 1.0, _CORNERS) / 2
    points = [x + width * (0.5 + reach * np.cos(angles)), y + height * (0.5 + reach * np.sin(angles))]
    return np.stack(points, 1).ravel().tolist()


def _packed(polygons: list[list[float]]) -> list[dict[str, Any]]:
    """Encode each polygon as compressed RLE with text counts, for JSON."""
    codes = coco_mask.frPyObjects(polygons, _HEIGHT, _WIDTH)
    return [{"size": [_HEIGHT, _WIDTH], "counts": code["counts"].decode("ascii")} for code in codes]
