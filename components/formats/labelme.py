"""labelme's JSON files, one for each image.

Source: labelme 5 and 6, https://github.com/wkentaro/labelme (labelme/_label_file.py; labelme/utils/shape.py;
examples/instance_segmentation/labelme2coco.py, which joins shapes of one label and group_id to an object, too).
"""

import base64
import binascii
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from components.formats.records import (
    LabelledImage,
    LabelledSet,
    Shape,
    ellipse,
    find_file,
    images_below,
    part_of_path,
    rle,
    size_of,
)
from components.formats.texts import json_of, list_of
from model.data.file_names import FileNames
from model.data.findings import Fault, Findings
from model.data.transforms import UNREADABLE
from model.data.values import Size, numbers, show, whole
from model.errors import UserError
from model.files import real

_NOT_OBJECTS = ("point", "points", "line", "linestrip")
_NOT_CLASSES = ("__ignore__", "_background_")  # names in labelme's labels.txt
_POLYGONS = ("polygon", "oriented_rectangle", "rotation")  # the last one is X-AnyLabeling's


def read(src: Path, findings: Findings) -> LabelledSet:
    """Read all JSON files below a folder.

    Raises:
        UserError: if there are none.
    """
    files = sorted(src.rglob("*.json"))
    if not files:
        raise UserError(f"{src}: must have labelme's JSON files, has no JSON file")
    names, images = FileNames(src), []
    for path in files:
        with findings.record(str(path)):
            tree = json_of(path, "shapes", "imagePath")
            image, content = _image(path, tree, names, src)
            size = _size(tree, image, content)
            shapes: list[Shape] = []
            for number, entry in enumerate(list_of(tree, "shapes"), 1):
                with findings.record(f"{path}: shape {number}"):
                    if shape := _shape(entry, size, findings):
                        shapes.append(shape)
            images.append(LabelledImage(image, size, part_of_path(path, src), shapes, path, content))
    labelled = {real(image.path) for image in images}
    for path in images_below(src):
        if real(path) not in labelled:
            findings.where = str(path)
            findings.warn(
                "image without a JSON file", "it is left out; an image without objects has one with no shapes"
            )
    return LabelledSet(sorted({shape.label for image in images for shape in image.shapes}), images)


def _image(path: Path, tree: dict[str, Any], names: FileNames, src: Path) -> tuple[Path, bytes | None]:
    """The image file; where there is none, its name and the content that the JSON file holds."""
    name = str(tree["imagePath"]).replace("\\", "/")
    try:
        return find_file([path.parent / name, path.parent / Path(name).name], names, src, name), None
    except Fault:
        if not isinstance(tree.get("imageData"), str):
            raise
    try:
        content = base64.b64decode(tree["imageData"], validate=True)
    except (binascii.Error, ValueError) as error:
        raise Fault("image missing", f"image {name!r} is not there, and imageData is damaged: {error}") from error
    return path.parent / Path(name).name, content


def _size(tree: dict[str, Any], image: Path, content: bytes | None) -> Size:
    """The size that the JSON file states, or that of the image."""
    height, width = whole(tree.get("imageHeight")), whole(tree.get("imageWidth"))
    if content is not None and not (height and width):
        height, width = _decoded(content, "imageData").shape[:2]
    return size_of(height, width, image)


def _shape(entry: Any, size: Size, findings: Findings) -> Shape | None:
    if not isinstance(entry, dict):
        raise Fault("no object", f"a shape must be an object, got {show(entry)}")
    kind, label = entry.get("shape_type") or "polygon", str(entry.get("label") or "").strip()
    if kind in _NOT_OBJECTS or label in _NOT_CLASSES:
        what = label if label in _NOT_CLASSES else kind
        findings.warn(f"shape {what}", f"a shape of this kind ({what}) is no object; it is left out")
        return None
    if not label:
        raise Fault("no label", "a shape must have a label")
    points = [number for point in list_of(entry, "points") if isinstance(point, list) for number in point]
    values = numbers(points)
    if values is None or len(points) % 2:
        raise Fault("bad points", f"points must be a list of [x, y], got {show(entry.get('points'))}")
    xy, group = values.reshape(-1, 2), None if entry.get("group_id") is None else str(entry["group_id"])
    if kind in _POLYGONS or (kind == "rectangle" and len(xy) == 4):
        if len(xy) < 3:
            raise Fault("bad points", f"a {kind} must have at least 3 points, got {len(xy)}")
        return Shape(label, [points], None, group)
    if len(xy) != 2:
        raise Fault("bad points", f"a {kind} must have 2 points, got {len(xy)}")
    (x1, y1), (x2, y2) = xy.min(axis=0).tolist(), xy.max(axis=0).tolist()
    if kind == "rectangle":
        return Shape(label, None, (x1, y1, x2, y2), group)
    if kind == "circle":  # center, and a point on the line
        radius = float(np.hypot(*(xy[1] - xy[0])))
        return Shape(label, [ellipse((xy[0, 0], xy[0, 1]), (radius, radius))], None, group)
    if kind == "mask":
        return Shape(label, rle(_mask(entry.get("mask"), (round(x1), round(y1)), size)), None, group)
    raise Fault("unknown shape", f"shape_type must be polygon, rectangle, circle or mask, got {show(kind)}")


def _mask(text: Any, corner: tuple[int, int], size: Size) -> NDArray[np.bool_]:
    """A mask of the whole image, of a PNG in base64 that begins at a corner, x and y."""
    try:
        content = base64.b64decode(text, validate=True)
    except (TypeError, binascii.Error, ValueError) as error:
        raise Fault("bad mask", f"mask must be a PNG in base64: {error}") from error
    cut = _decoded(content, "mask")
    x, y = corner
    whole_image = np.zeros(size, dtype=bool)
    space = whole_image[max(y, 0) :, max(x, 0) :]
    cut = cut[max(-y, 0) :, max(-x, 0) :][: space.shape[0], : space.shape[1]]
    space[: cut.shape[0], : cut.shape[1]] = cut > 0
    return whole_image


def _decoded(content: bytes, name: str) -> NDArray[np.uint8]:
    """Gray values [H, W] of an image."""
    try:
        with Image.open(BytesIO(content)) as image:
            return np.asarray(image.convert("L"))
    except UNREADABLE as error:
        raise Fault(f"bad {name}", f"{name} must be an image in base64: {error}") from error
