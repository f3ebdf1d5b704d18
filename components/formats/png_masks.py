"""PNG masks: one file with the numbers of all objects for each image, or one file for each object.

    images/a.jpg
    masks/a.png             values (8 or 16 bits, or of a palette): 0 is background, each other value is one object;
                            or colors: black is background, each other color is one object
    masks/a/dog_1.png       or: one object, where the file is not black; its class is the name before the last `_`
    classes.txt             names of the classes, one on each line

With one class in classes.txt, or without the file, all objects of a file of numbers have one class, `object` if it has
no name. With several classes, a value is class × 1000 + object, and the classes count from 1: a form of Cityscapes
(https://github.com/mcordts/cityscapesScripts, instanceIds).
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from components.formats.records import (
    LabelledImage,
    LabelledSet,
    Shape,
    displayed_size,
    images_below,
    part_of_path,
    pixels_of,
    rle,
)
from components.formats.texts import lines_of
from model.data.findings import Fault, Findings
from model.data.values import Size
from model.errors import UserError

_OBJECTS_OF_A_CLASS = 1000
_ONLY_CLASS = "object"


def read(src: Path, findings: Findings) -> LabelledSet:
    """Read the folders `images` and `masks`.

    Raises:
        UserError: if there is no such folder.
    """
    for name in ("images", "masks"):
        if not (src / name).is_dir():
            raise UserError(f"{src}: must have the folders images and masks, {name} is not there")
    path = src / "classes.txt"
    listed, images, used = lines_of(path, "the name of a class") if path.is_file() else [], [], set()
    for path in images_below(src / "images"):
        place = src / "masks" / path.relative_to(src / "images").with_suffix("")
        numbers = place.with_name(f"{place.name}.png")  # a name may have a dot
        files = sorted(place.glob("*.png"))
        used |= {numbers, *files}
        with findings.record(str(path)):
            if not numbers.is_file() and not place.is_dir():
                findings.warn("image without masks", f"neither {numbers} nor {place} is there; it is left out")
                continue
            source = numbers if numbers.is_file() else place
            size = displayed_size(path)
            shapes = list(_numbered(numbers, size, listed, findings)) if numbers.is_file() else []
            for file in files:
                with findings.record(str(file)):
                    shapes.append(_single(file, size))
            images.append(LabelledImage(path, size, part_of_path(path, src), shapes, source))
    for path in images_below(src / "masks"):
        if path not in used:
            findings.where = str(path)
            findings.warn("mask without an image", "no image of this name is in the folder images; it is left out")
    present = {shape.label for image in images for shape in image.shapes}
    return LabelledSet([*listed, *sorted(present - {*listed})], images)


def _numbered(path: Path, size: Size, classes: list[str], findings: Findings) -> Iterator[Shape]:
    """The objects of a file of numbers or colors."""
    pixels = pixels_of(path, "1", "L", "P", "I", "I;16", "I;16B").astype(np.int64)
    if pixels.ndim == 3:
        pixels = pixels @ np.array([1 << 16, 1 << 8, 1])
        if len(classes) > 1:
            raise Fault("colors without classes", f"{path}: colors tell no classes; write class × 1000 + object")
    if pixels.shape != size:
        raise Fault("other size", f"{path}: must be {size[0]} × {size[1]} like its image, got {pixels.shape}")
    for number in np.unique(pixels).tolist():
        if number == 0:
            continue
        with findings.record(f"{path}: value {number}"):
            place = number // _OBJECTS_OF_A_CLASS if len(classes) > 1 else 1
            if len(classes) > 1 and not 1 <= place <= len(classes):
                raise Fault(
                    "unknown class",
                    f"with {len(classes)} classes a value must be class × 1000 + object, classes from 1, got {number}",
                )
            yield Shape(classes[place - 1] if classes else _ONLY_CLASS, rle(pixels == number))


def _single(path: Path, size: Size) -> Shape:
    """The object of a file of its own."""
    pixels = pixels_of(path, "1", "L", "I", "I;16", "I;16B")
    mask = pixels > 0 if pixels.ndim == 2 else (pixels > 0).any(axis=2)
    if mask.shape != size:
        raise Fault("other size", f"must be {size[0]} × {size[1]} like its image, got {mask.shape}")
    name = path.stem.rpartition("_")[0] or path.stem
    return Shape(name, rle(mask))
