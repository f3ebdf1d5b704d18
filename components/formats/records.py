"""Records of other tools: images and the objects on them, as the readers in this folder give them.

Coordinates are x, y in pixels of the image as displayed; (0, 0) is the upper left corner of the first pixel.
"""

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pycocotools.mask as coco_mask
from numpy.typing import NDArray
from PIL import ExifTags, Image

from components.formats.options import Boxes
from model.data.bbox import read_bbox
from model.data.file_kinds import why_path_unreadable
from model.data.file_names import FileNames
from model.data.findings import Fault, Findings
from model.data.measure import EXIF_QUARTER_TURNS
from model.data.segmentation import Mask, read_mask
from model.data.transforms import UNREADABLE
from model.data.values import MAX_PIXELS, MAX_PX, Size
from model.files import require_file

Part = Literal["train", "val", "test", ""]  # empty: the source has no split

_PARTS: dict[str, Part] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_ENDINGS = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class Shape:
    """An object, or a part of one: parts share label and group."""

    label: str
    segmentation: list[list[float]] | dict[str, Any] | None = None  # polygons or RLE, as COCO has them
    box: tuple[float, float, float, float] | None = None  # xyxy, where there is no segmentation
    group: Hashable = None
    is_crowd: bool = False


@dataclass(frozen=True)
class LabelledImage:
    """An image file and what is on it."""

    path: Path
    size: Size
    part: Part
    shapes: list[Shape]
    source: Path  # the file that labels it, or itself
    content: bytes | None = field(default=None, repr=False)  # the image, if that file holds it


@dataclass(frozen=True)
class LabelledSet:
    """A data set of another tool."""

    class_names: list[str]  # in the order of the source
    images: list[LabelledImage]


def part_of(word: str) -> Part:
    """The part of a data set that a folder's or list's name stands for; empty if none."""
    return _PARTS.get(word.lower(), "")


def part_of_path(path: Path, root: Path) -> Part:
    """The part that the folders of a file stand for."""
    return next((part for word in path.relative_to(root).parts[:-1] if (part := part_of(word))), "")


def images_below(folder: Path) -> list[Path]:
    """The image files below a folder, in order."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in _ENDINGS and path.is_file())


def displayed_size(path: Path) -> Size:
    """(height, width) of an image file as displayed.

    Raises:
        Fault: if it cannot be read.
    """
    try:
        require_file(path)
        with Image.open(path) as image:
            is_turned = image.getexif().get(ExifTags.Base.Orientation) in EXIF_QUARTER_TURNS
            return image.size if is_turned else image.size[::-1]
    except UNREADABLE as error:
        raise Fault("unreadable image", f"{path}: {why_path_unreadable(path, error)}") from error


def size_of(height: float | None, width: float | None, image: Path) -> Size:
    """(height, width) as stated, or that of the image file where they are not stated.

    Raises:
        Fault: if they cannot be those of an image, or the file cannot be read.
    """
    if not height or not width or min(height, width) < 1:
        return displayed_size(image)
    if max(height, width) > MAX_PX or height * width > MAX_PIXELS:
        raise Fault("too large", f"height and width must be at most {MAX_PIXELS:,} pixels, got {height} and {width}")
    return int(height), int(width)


def pixels_of(path: Path, *modes: str) -> NDArray[np.uint8] | NDArray[np.int32]:
    """Values of an image file, indices where it has a palette: [H, W] or [H, W, 3]; another mode becomes RGB.

    Raises:
        Fault: if it cannot be read.
    """
    try:
        require_file(path)
        with Image.open(path) as image:
            return np.asarray(image if image.mode in modes else image.convert("RGB"))
    except UNREADABLE as error:
        raise Fault("unreadable image", f"{path}: {why_path_unreadable(path, error)}") from error


def is_file(path: Path) -> bool:
    """True for a file; False also for a name that no file can have, at which `Path.is_file` fails."""
    try:
        return path.is_file()
    except OSError:  # too long
        return False


def find_file(candidates: Iterable[Path], names: FileNames, root: Path, name: str) -> Path:
    """The first candidate that exists, or else the one file below `root` that the name safely means.

    Raises:
        Fault: if there is none.
    """
    for path in candidates:
        if is_file(path):
            return path
    near = names.near(name)
    if near and near.is_safe:
        return root / near.names[0]
    hint = f"; is it {near}?" if near else ""
    raise Fault("image missing", f"image {name!r} is not below {root}{hint}")


def rle(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """COCO's RLE of a mask [H, W]."""
    return _with_text(coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8)))


def rectangle(box: tuple[float, float, float, float]) -> list[float]:
    """The outline of a box, xyxy."""
    x1, y1, x2, y2 = box
    return [x1, y1, x2, y1, x2, y2, x1, y2]


def turned(points: NDArray[np.float64], center: tuple[float, float], degrees: float) -> list[float]:
    """Points [V, 2] turned clockwise about a center, as x, y, x, y, …"""
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return ((points - center) @ np.array([[cos, sin], [-sin, cos]]) + center).ravel().tolist()


def ellipse(center: tuple[float, float], radii: tuple[float, float], degrees: float = 0.0) -> list[float]:
    """The outline of an ellipse; its edges deviate from it by less than 0.1 px."""
    count = max(16, int(np.ceil(np.pi / np.arccos(1 - min(0.1 / max(*radii, 0.1), 0.5)))))
    angles = np.linspace(0, 2 * np.pi, count, endpoint=False)
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii + center
    return turned(points, center, degrees)


def annotations_of(image: LabelledImage, boxes: Boxes, findings: Findings) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of an image as COCO annotations without ids, each with its label; parts of one are joined.

    Args:
        boxes: what a box without a mask becomes: a box (keep), a rectangular mask, or nothing (skip).
        findings: gets what cannot be used, and what was skipped.
    """
    for number, parts in enumerate(_objects(image.shapes), 1):
        label = parts[0].label
        with findings.record(f"{image.source}: object {number} ({label}) of {image.path.name}"):
            mask = _joined([_outlined(part) if boxes == "mask" else part for part in parts], image.size, findings)
            entry: dict[str, Any] = {"iscrowd": int(any(part.is_crowd for part in parts))}
            if mask is not None:
                x1, y1, x2, y2 = _extent(mask, image.size)
                entry |= {"segmentation": mask.segmentation, "area": mask.area}
            else:
                corners = np.array([part.box for part in parts if part.box is not None])
                (x1, y1), (x2, y2) = corners[:, :2].min(axis=0).tolist(), corners[:, 2:].max(axis=0).tolist()
                read_bbox([x1, y1, x2 - x1, y2 - y1], image.size, None, findings)
                entry |= {"area": (x2 - x1) * (y2 - y1)}
                if boxes == "skip":
                    findings.warn("box without a mask", "it is left out, as --boxes=skip asks")
                    continue
            yield label, entry | {"bbox": [x1, y1, x2 - x1, y2 - y1]}


def _objects(shapes: list[Shape]) -> list[list[Shape]]:
    """The parts of each object, in the order of the first ones."""
    found: dict[Hashable, list[Shape]] = {}
    for number, shape in enumerate(shapes):
        key = number if shape.group is None else (shape.label, shape.group)
        found.setdefault(key, []).append(shape)
    return list(found.values())


def _outlined(shape: Shape) -> Shape:
    if shape.segmentation is not None or shape.box is None:
        return shape
    return Shape(shape.label, [rectangle(shape.box)], None, shape.group, shape.is_crowd)


def _extent(mask: Mask, size: Size) -> tuple[float, float, float, float]:
    """Box of a mask, xyxy, within the frame: that of the corners of polygons, or of the pixels of an RLE."""
    if isinstance(mask.segmentation, dict):
        return mask.box
    xy = np.concatenate([np.array(part, dtype=np.float64).reshape(-1, 2) for part in mask.segmentation])
    (x1, y1), (x2, y2) = xy.min(axis=0).tolist(), xy.max(axis=0).tolist()
    return max(x1, 0.0), max(y1, 0.0), min(x2, float(size[1])), min(y2, float(size[0]))


def _joined(parts: list[Shape], size: Size, findings: Findings) -> Mask | None:
    """One mask of all parts; None if all are boxes. A box beside a mask is that of the mask."""
    masks = [
        read_mask(part.segmentation, size, findings, outline=False) for part in parts if part.segmentation is not None
    ]
    if len(masks) < 2:
        return masks[0] if masks else None
    if all(isinstance(mask.segmentation, list) for mask in masks):
        polygons = [polygon for mask in masks for polygon in mask.segmentation]
        return read_mask(polygons, size, findings, outline=False)
    packed: list[Any] = []
    for mask in masks:
        given = mask.segmentation
        if isinstance(given, dict) and isinstance(given["counts"], str):
            packed.append(given)
        else:
            found = coco_mask.frPyObjects(given, *size)
            packed += found if isinstance(found, list) else [found]
    merged = coco_mask.merge(packed)
    return read_mask(_with_text(merged), size, findings, outline=False)


def _with_text(packed: dict[str, Any]) -> dict[str, Any]:
    """An RLE of pycocotools as JSON has it."""
    return {"size": list(packed["size"]), "counts": packed["counts"].decode()}
