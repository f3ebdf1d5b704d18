"""COCO JSON, read and checked once; later stages trust it.

A file that is not COCO JSON is an error. Whatever is wrong with a record is a `Finding`, which `prepare` raises or counts.
Boxes leave here as (x1, y1, x2, y2) in pixels, clipped to the frame; polygons as [V, 2] float32, not clipped.
"""

import json
import math
from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from model.data.findings import Finding
from model.data.polygons import mask_to_polygons
from model.data.rle import rle_runs, runs_to_mask
from model.errors import UserError

_OUT_OF_FRAME_PX = 1e-3  # a smaller excess over the frame is rounding and not worth a warning


class AnnotationError(UserError):
    """The data set cannot be used as it is; the message names the faulty records."""


class _Fault(Exception):  # noqa: N818 - not an error yet: it becomes a Finding
    """One record cannot be used; `kind` names the class of fault, the message describes this one."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class ImageRecord:
    """An entry of `images`."""

    id: int
    file_name: str
    height: int
    width: int


@dataclass(frozen=True)
class Instance:
    """A checked annotation."""

    category_id: int
    box: tuple[float, float, float, float]  # xyxy, clipped
    polygons: list[NDArray[np.float32]]  # none for a crowd
    is_crowd: bool
    was_clipped: bool


@dataclass
class CocoFile:
    """One annotation file: the usable records of the first `limit` images, and the findings of all."""

    path: Path
    categories: dict[int, str]  # id → name, sorted by id
    images: dict[int, ImageRecord]  # id → record, sorted by id
    instances: dict[int, list[Instance]]  # image id → annotations
    raw: dict[int, list[dict[str, Any]]]  # image id → the same annotations as in the file
    findings: list[Finding] = field(default_factory=list)
    annotated: set[str] = field(default_factory=set)  # image ids, as text, of all annotations, usable or not

    def drop_image(self, image_id: int, finding: Finding) -> None:
        """Remove an image and its annotations, and record why."""
        self.findings.append(finding)
        del self.images[image_id], self.instances[image_id], self.raw[image_id]


def read_coco(path: Path, limit: int = 0) -> CocoFile:
    """Read and check an annotation file.

    Args:
        limit: number of images to keep, lowest ids first; 0 keeps all.

    Raises:
        AnnotationError: if the file is missing, not JSON, or not in COCO's instances format.
    """
    tree = _read_json(path)
    coco = CocoFile(path, _categories(tree["categories"], path), {}, {}, {})
    records: dict[int, ImageRecord] = {}
    for entry in tree["images"]:
        try:
            record = _image_record(entry, records)
        except _Fault as fault:
            coco.findings.append(_finding(path, "image", entry, fault))
        else:
            records[record.id] = record
    for image_id in sorted(records)[: limit or None]:
        coco.images[image_id] = records[image_id]
        coco.instances[image_id], coco.raw[image_id] = [], []
    coco.annotated = {str(entry.get("image_id")) for entry in tree["annotations"] if isinstance(entry, dict)}
    seen: set[int] = set()
    for entry in tree["annotations"]:
        try:
            _add_annotation(coco, entry, records, seen)
        except _Fault as fault:
            coco.findings.append(_finding(path, "annotation", entry, fault))
    return coco


def require_annotations(path: Path) -> None:
    """Refuse the path of an annotation file that does not exist.

    Raises:
        AnnotationError: if there is no such file.
    """
    if not path.is_file():
        raise AnnotationError(
            f"{path}: no such annotation file. Fetch it with `maskrcnn download`, or set data.train_annotations and "
            "data.val_annotations."
        )


def _read_json(path: Path) -> dict[str, Any]:
    require_annotations(path)
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise AnnotationError(
            f"{path}: line {error.lineno}, column {error.colno} (byte {error.pos}): not JSON: {error.msg}"
        ) from error
    except UnicodeDecodeError as error:
        raise AnnotationError(f"{path}: byte {error.start}: not UTF-8 text") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(tree, dict) or not isinstance(tree.get(key), list):
            raise AnnotationError(f"{path}: must be in COCO's instances format: an object with a list under {key!r}")
    return tree


def _categories(entries: list[Any], path: Path) -> dict[int, str]:
    categories: dict[int, str] = {}
    for entry in entries:
        if not isinstance(entry, dict) or not _is_id(entry.get("id")) or not isinstance(entry.get("name"), str):
            raise AnnotationError(f"{path}: category {entry!r}: must have an integer id ≥ 0 and a name")
        if entry["id"] in categories:
            raise AnnotationError(f"{path}: category id {entry['id']} occurs twice; ids must be unique")
        categories[entry["id"]] = entry["name"]
    if not categories:
        raise AnnotationError(f"{path}: must list at least one category, got none")
    return dict(sorted(categories.items()))


def _image_record(entry: Any, known: Container[int]) -> ImageRecord:
    if not isinstance(entry, dict) or not _is_id(entry.get("id")):
        raise _Fault("no id", "id must be an integer ≥ 0")
    if entry["id"] in known:
        raise _Fault("duplicate image id", "id occurs twice; ids must be unique")
    if not isinstance(entry.get("file_name"), str) or not entry["file_name"]:
        raise _Fault("no file name", f"file_name must be a non-empty string, got {entry.get('file_name')!r}")
    height, width = entry.get("height"), entry.get("width")
    if not _is_id(height) or not _is_id(width) or height < 1 or width < 1:
        raise _Fault("no size", f"height and width must be integers ≥ 1, got {height!r} and {width!r}")
    return ImageRecord(entry["id"], entry["file_name"], height, width)


def _add_annotation(coco: CocoFile, entry: Any, records: dict[int, ImageRecord], seen: set[int]) -> None:
    """Check one annotation and add it to its image; annotations of images past the limit are skipped."""
    if not isinstance(entry, dict) or not _is_id(entry.get("id")):
        raise _Fault("no id", "id must be an integer ≥ 0")
    if entry["id"] in seen:
        raise _Fault("duplicate annotation id", "id occurs twice; ids must be unique")
    seen.add(entry["id"])
    image = records.get(entry["image_id"]) if _is_id(entry.get("image_id")) else None
    if image is None:
        raise _Fault("unknown image id", f"image_id {entry.get('image_id')!r} is not among the usable images")
    if image.id in coco.images:
        coco.instances[image.id].append(_instance(entry, image, coco.categories))
        coco.raw[image.id].append(entry)


def _instance(entry: dict[str, Any], image: ImageRecord, categories: Container[int]) -> Instance:
    category_id, crowd = entry.get("category_id"), entry.get("iscrowd", 0)
    if not _is_id(category_id) or category_id not in categories:
        raise _Fault("unknown category", f"category_id {category_id!r} is not among the categories")
    if crowd not in (0, 1):
        raise _Fault("bad iscrowd", f"iscrowd must be 0 or 1, got {crowd!r}")
    box, was_clipped = _box(entry.get("bbox"), image)
    polygons = _polygons(entry.get("segmentation"), image, outline=not crowd)
    return Instance(category_id, box, [] if crowd else polygons, bool(crowd), was_clipped)


def _box(bbox: Any, image: ImageRecord) -> tuple[tuple[float, float, float, float], bool]:
    """Box as xyxy clipped to the frame, and whether clipping changed it."""
    if not _are_numbers(bbox) or len(bbox) != 4:
        raise _Fault("bad box", f"bbox must be four finite numbers (x, y, width, height), got {bbox!r}")
    x, y, width, height = map(float, bbox)
    if width <= 0 or height <= 0:
        raise _Fault("box without area", f"bbox {bbox} has no area; width and height must be > 0")
    x1, y1, x2, y2 = max(x, 0.0), max(y, 0.0), min(x + width, float(image.width)), min(y + height, float(image.height))
    if x2 <= x1 or y2 <= y1:
        raise _Fault("box outside the image", f"bbox {bbox} lies outside the image of {image.width} × {image.height}")
    beyond = max(x1 - x, y1 - y, x + width - x2, y + height - y2)
    return (x1, y1, x2, y2), beyond > _OUT_OF_FRAME_PX


def _polygons(segmentation: Any, image: ImageRecord, *, outline: bool) -> list[NDArray[np.float32]]:
    """Polygons of a segmentation; an RLE is only traced if `outline`, since tracing is slow."""
    if isinstance(segmentation, list) and segmentation:
        return [_polygon(part) for part in segmentation]
    if isinstance(segmentation, dict):
        return _rle_polygons(segmentation, image, outline=outline)
    raise _Fault("no segmentation", f"segmentation must be polygons or an RLE, got {segmentation!r}")


def _polygon(part: Any) -> NDArray[np.float32]:
    if not _are_numbers(part):
        raise _Fault("bad polygon", "polygon must be a list of finite numbers")
    if len(part) % 2 or len(part) < 6:
        raise _Fault("bad polygon", f"polygon must have an even number of coordinates, at least 6, got {len(part)}")
    return np.array(part, dtype=np.float32).reshape(-1, 2)


def _rle_polygons(rle: dict[str, Any], image: ImageRecord, *, outline: bool) -> list[NDArray[np.float32]]:
    size, counts = rle.get("size"), rle.get("counts")
    if size != [image.height, image.width]:
        raise _Fault("bad RLE", f"RLE size must be the image's [{image.height}, {image.width}], got {size}")
    if not isinstance(counts, (str, list)):
        raise _Fault("bad RLE", f"RLE counts must be a string or a list, got a {type(counts).__name__}")
    try:
        runs = rle_runs(counts)
    except ValueError as error:
        raise _Fault("bad RLE", f"RLE: {error}") from error
    if runs.sum() != image.height * image.width:
        raise _Fault("bad RLE", f"RLE runs must add up to {image.height} × {image.width} pixels, got {runs.sum()}")
    polygons = mask_to_polygons(runs_to_mask(runs, (image.height, image.width))) if outline else []
    if outline and not polygons:
        raise _Fault("empty mask", "RLE covers no pixel")
    return polygons


def _finding(path: Path, what: str, entry: Any, fault: _Fault) -> Finding:
    record = entry if isinstance(entry, dict) else {}
    where = f"{path}: {what} {record.get('id')!r}"
    if what == "annotation":
        where += f" of image {record.get('image_id')!r}"
    return Finding(fault.kind, str(fault), where)


def _is_id(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and set(map(type, values)) <= {int, float} and all(map(math.isfinite, values))
