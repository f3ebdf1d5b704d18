"""Pascal VOC: XML with boxes, and PNG masks of objects in SegmentationObject where there are some.

Source: the development kit of VOC2012 (http://host.robots.ox.ac.uk/pascal/VOC/voc2012/devkit_doc.pdf). Value i of a
mask in SegmentationObject is the i-th object of the XML file, 0 is background and 255 void; SegmentationClass has the
class of each pixel. Boxes count pixels from 1. CVAT's "Segmentation mask 1.1" has the same folders without XML, and
labelmap.txt (https://docs.cvat.ai/docs/dataset_management/formats/format-smask/). Roboflow's has images and XML side by
side in train/, valid/ and test/.
"""

from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from components.formats.records import (
    LabelledImage,
    LabelledSet,
    Part,
    Shape,
    find_file,
    images_below,
    part_of,
    part_of_path,
    pixels_of,
    rle,
    size_of,
)
from components.formats.texts import lines_of, number_of, xml_of
from model.data.file_names import FileNames
from model.data.findings import Fault, Findings
from model.data.values import Size
from model.errors import UserError

_VOID = 255
_VOC_NAMES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
_NO_NAME = ""


def read(src: Path, findings: Findings) -> LabelledSet:
    """Read Annotations, JPEGImages, SegmentationObject, SegmentationClass and ImageSets, or those there are.

    Raises:
        UserError: if there are neither masks nor XML files.
    """
    masks = {path.stem: path for path in sorted((src / "SegmentationObject").rglob("*.png"))}
    texts = {path.relative_to(src).with_suffix("").as_posix(): path for path in sorted(src.rglob("*.xml"))}
    if not masks and not texts:
        raise UserError(f"{src}: must have XML files, or PNG files in SegmentationObject, has neither")
    by_stem = {path.stem: path for path in texts.values()}
    keys = {stem: by_stem.get(stem) for stem in masks} if masks else dict(texts.items())
    parts = _parts(src / "ImageSets" / ("Segmentation" if masks else "Main"))
    names, colors, images = FileNames(src), _label_map(src), []
    folder = images_below(src / "JPEGImages")
    by_name = {path.stem: path for path in folder}
    for key, text in keys.items():
        stem = Path(key).stem
        source = text or masks[stem]
        with findings.record(str(source)):
            tree = xml_of(text, "annotation") if text else None
            name = (tree.findtext("filename") if tree is not None else None) or stem
            if tree is None and stem in by_name:
                image = by_name[stem]
            else:
                image = find_file([src / "JPEGImages" / name, source.parent / name], names, src, name)
            size = _size(tree, image)
            found = _masked(masks[stem], tree, size, colors) if masks else _boxes(tree, source, findings)
            part = parts.get(stem, "") if parts else part_of_path(source, src)
            if parts and not part:
                findings.warn("image in no list", f"{stem} is in no list of ImageSets; it is left out")
                continue
            images.append(LabelledImage(image, size, part, list(found), source))
    if masks:
        for stem in sorted(by_name.keys() - masks.keys()):
            findings.where = str(by_name[stem])
            findings.warn("image without masks", "it has no file in SegmentationObject; it is left out")
    present = {shape.label for image in images for shape in image.shapes}
    declared = [name for name in colors.values() if name != "background"] if (src / "labelmap.txt").is_file() else []
    return LabelledSet([*declared, *sorted(present - {*declared})], images)


def _parts(folder: Path) -> dict[str, Part]:
    """The part of each image of the lists train.txt, val.txt and test.txt; empty without train and val."""
    if not all((folder / f"{name}.txt").is_file() for name in ("train", "val")):
        return {}
    found: dict[str, Part] = {}
    for path in sorted(folder.glob("*.txt")):
        if part := part_of(path.stem):
            for line in lines_of(path, "the name of an image"):
                stem = line.split()[0]
                if found.setdefault(stem, part) != part:
                    raise UserError(
                        f"{path}: {stem} is also in {found[stem]}.txt, but an image must be in one part; take it "
                        "out of one of the lists in a copy of the folder"
                    )
    return found


def _size(tree: ElementTree.Element | None, image: Path) -> Size:
    """The size that the XML file states, or else that of the image."""
    words = [] if tree is None else [(tree.findtext(f"size/{name}") or "").strip() for name in ("height", "width")]
    height, width = [float(word) if word.isdecimal() else None for word in words] or [None, None]
    return size_of(height, width, image)


def _name(entry: ElementTree.Element) -> str:
    name = (entry.findtext("name") or "").strip()
    if not name:
        raise Fault("no name", "an object must have a <name>")
    return name


def _boxes(tree: ElementTree.Element | None, source: Path, findings: Findings) -> Iterator[Shape]:
    for number, entry in enumerate([] if tree is None else tree.findall("object"), 1):
        with findings.record(f"{source}: object {number}"):
            yield _boxed(entry)


def _boxed(entry: ElementTree.Element) -> Shape:
    """An object as a box, or as its polygon where it has one."""
    corners = entry.find("polygon")
    if corners is not None:  # x1, y1, x2, y2, …
        count = len(corners) // 2
        values = [number_of(corners, f"{axis}{i}") for i in range(1, count + 1) for axis in "xy"]
        return Shape(_name(entry), [[value - 1 for value in values]])
    box = entry.find("bndbox")
    if box is None:
        raise Fault("no box", f"object {_name(entry)!r} must have a <bndbox>")
    x1, y1, x2, y2 = (number_of(box, name) for name in ("xmin", "ymin", "xmax", "ymax"))
    return Shape(_name(entry), None, (max(x1 - 1, 0.0), max(y1 - 1, 0.0), x2, y2))


def _masked(
    path: Path, tree: ElementTree.Element | None, size: Size, colors: dict[tuple[int, ...], str]
) -> Iterator[Shape]:
    """The objects of a mask, each with the name that the XML file and SegmentationClass give it."""
    instances = _indices(path)
    if instances.shape != size:
        raise Fault("other size", f"{path}: must be {size[0]} × {size[1]} like its image, got {instances.shape}")
    entries = [] if tree is None else tree.findall("object")
    beside = path.parents[1] / "SegmentationClass" / path.name
    classes = pixels_of(beside, "RGB") if beside.is_file() else None
    for number in np.unique(instances).tolist():
        if number in (0, _VOID):
            continue
        mask = instances == number
        from_text = _name(entries[number - 1]) if number <= len(entries) else _NO_NAME
        from_pixels = _NO_NAME if classes is None else _class_below(classes, mask, colors)
        if not from_text and not from_pixels:
            raise Fault(
                "no class", f"{path}: object {number} has no <object> in XML, and no class in SegmentationClass"
            )
        if from_text and from_pixels and from_text != from_pixels:
            raise Fault(
                "other class",
                f"{path}: object {number} is {from_text!r} in XML, but {from_pixels!r} in SegmentationClass",
            )
        yield Shape(from_text or from_pixels, rle(mask))


def _class_below(classes: NDArray[np.generic], mask: NDArray[np.bool_], colors: dict[tuple[int, ...], str]) -> str:
    """Name of the color that most pixels of an object have; empty if that is no class."""
    found, counts = np.unique(classes[mask], axis=0, return_counts=True)
    return colors.get(tuple(found[counts.argmax()].tolist()), _NO_NAME)


def _indices(path: Path) -> NDArray[np.int64]:
    """Values of a mask [H, W]: those of a palette or of gray, or the place of a color in VOC's palette."""
    pixels = pixels_of(path, "P", "L", "1").astype(np.int64)
    if pixels.ndim == 2:
        return pixels
    found = np.zeros(pixels.shape[:2], dtype=np.int64)
    for bit in range(
        8
    ):  # the devkit's VOClabelcolormap, inverted: bits 0, 1, 2 of an index are the top bits of r, g, b
        for channel in range(3):
            if bit * 3 + channel < 8:
                found |= ((pixels[..., channel] >> (7 - bit)) & 1) << (bit * 3 + channel)
    return found


def _label_map(src: Path) -> dict[tuple[int, ...], str]:
    """Class names by color: those of labelmap.txt (`name:r,g,b:parts:actions`), or VOC's own."""
    path, found = src / "labelmap.txt", {}
    if not path.is_file():
        return {_color(number): name for number, name in enumerate(_VOC_NAMES, 1)}
    for line in lines_of(path, "a class"):
        if line.startswith("#"):
            continue
        name, _, rest = line.partition(":")
        color = rest.partition(":")[0].split(",")
        if len(color) != 3 or not all(word.strip().isdecimal() for word in color):
            raise UserError(f"{path}: a line must be name:red,green,blue:parts:actions, got {line!r}")
        found[tuple(int(word) for word in color)] = name.strip()
    return found


def _color(index: int) -> tuple[int, ...]:
    """Color of an index in VOC's palette."""
    return tuple(sum(((index >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(8)) for channel in range(3))
