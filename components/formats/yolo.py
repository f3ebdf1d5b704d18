"""YOLO's text files: a class and a polygon, or a box, on each line, as fractions of the image.

Source: Ultralytics, https://docs.ultralytics.com/datasets/segment/ and /datasets/detect/ (data.yaml: path, train, val,
test, names; labels lie in `labels/` where images lie in `images/`). Without data.yaml, the names are the lines of
classes.txt (Label Studio's export) or obj.names (CVAT's YOLO 1.1), and an image's labels may lie beside it.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from components.formats.records import (
    LabelledImage,
    LabelledSet,
    Part,
    Shape,
    displayed_size,
    images_below,
    is_file,
    part_of_path,
)
from components.formats.texts import lines_of, text_of
from model.data.findings import Fault, Findings
from model.data.values import Size
from model.errors import UserError

_LISTS = ("classes.txt", "obj.names")
_SLACK = 0.01  # fraction of the image: rounding beyond its border, which Ultralytics takes too


def read(src: Path, findings: Findings) -> LabelledSet:
    """Read a folder with data.yaml, classes.txt or obj.names.

    Raises:
        UserError: if it has none of them, or data.yaml cannot be used.
    """
    names, files = _described(src)
    images, used = [], set()
    once: dict[Path, list[LabelledImage]] = {}  # path → the image; none if it cannot be used
    for part, path in files:
        if path in once:  # without a split of their own, data sets name one folder for train and val
            images += [replace(image, part=part) for image in once[path]]
            continue
        once[path] = []
        labels = _labels_of(path)
        used.add(labels)
        if labels is None and part != "test":
            findings.where = str(path)
            findings.warn("image without labels", "no file of labels belongs to it, so it counts as background")
        with findings.record(str(labels or path)):
            size = displayed_size(path)
            shapes = list(_shapes(labels, size, names, findings)) if labels else []
            once[path] = [LabelledImage(path, size, part, shapes, labels or path)]
        images += once[path]
    for folder in sorted({path.parent for path in used if path is not None}):
        for path in sorted({*folder.glob("*.txt")} - used):
            if path.name not in (*_LISTS, "train.txt", "val.txt", "test.txt"):
                findings.where = str(path)
                findings.warn("labels without an image", "no image of this name is in the data set")
    return LabelledSet(names, images)


def _described(src: Path) -> tuple[list[str], list[tuple[Part, Path]]]:
    """Class names, and the images with their parts."""
    path = src / "data.yaml"
    if not path.is_file():
        path = next(iter(sorted([*src.glob("*.yaml"), *src.glob("*.yml")])), path)
    if not path.is_file():
        return _listed(src)
    try:
        tree = YAML(typ="safe").load(text_of(path))
    except (Fault, YAMLError) as error:
        raise UserError(f"{path}: must be the YAML of a YOLO data set: {error}") from error
    if not isinstance(tree, dict) or "names" not in tree:
        raise UserError(f"{path}: must have `names`, the classes of a YOLO data set")
    if "kpt_shape" in tree:
        raise UserError(f"{path}: must be a data set of polygons or boxes, but has keypoints (kpt_shape)")
    names = _names(path, tree["names"])
    parts: tuple[Part, ...] = ("train", "val", "test")
    return names, [(part, image) for part in parts if tree.get(part) for image in _images(path, tree, part)]


def _names(path: Path, names: Any) -> list[str]:
    """Names in the order of their numbers, which must be 0, 1, 2, …"""
    listed = dict(enumerate(names)) if isinstance(names, list) else names
    try:
        numbered = {int(number): str(name) for number, name in listed.items()}
    except (AttributeError, TypeError, ValueError):
        numbered = {}
    if not numbered or sorted(numbered) != list(range(len(numbered))):
        raise UserError(f"{path}: names must be a list, or have the numbers 0, 1, 2, …, got {names!r:.200}")
    return [numbered[number] for number in range(len(numbered))]


def _images(path: Path, tree: dict[str, Any], part: str) -> Iterator[Path]:
    """The images of a part: those of folders, or of lists of paths, which Windows may have written."""
    entries = tree[part] if isinstance(tree[part], list) else [tree[part]]
    base = Path(_with_slashes(tree.get("path") or "."))
    for entry in map(_with_slashes, entries):
        # Roboflow writes `../train/images` for the folder beside data.yaml, and Ultralytics takes it so.
        tried = [path.parent / base / entry, base / entry, path.parent / entry, path.parent / entry.removeprefix("../")]
        found = next((one for one in tried if one.exists()), None)
        if found is None and part == "test":  # left out anyway; Roboflow names it also where there is none
            continue
        if found is None:
            raise UserError(
                f"{path}: {part}: there is no {tried[0]}; correct `path` ({base}) or `{part}` ({entry}) in a copy of it"
            )
        if found.is_dir():
            yield from images_below(found)
            continue
        for line in map(_with_slashes, lines_of(found, "the path of an image")):
            named = [found.parent / line, path.parent / base / line, path.parent / line]
            yield next((one for one in named if is_file(one)), named[0])


def _with_slashes(path: Any) -> str:
    return str(path).replace("\\", "/")


def _listed(src: Path) -> tuple[list[str], list[tuple[Part, Path]]]:
    """Class names of a list, and all images below the folder."""
    path = next((path for name in _LISTS for path in sorted(src.rglob(name))), None)
    if path is None:
        raise UserError(
            f"{src}: must have data.yaml, classes.txt or obj.names with the names of the classes, has none of them"
        )
    return lines_of(path, "the name of a class"), [(part_of_path(image, src), image) for image in images_below(src)]


def _labels_of(image: Path) -> Path | None:
    """The file of an image's labels; None if there is none, for an image without objects."""
    parts = image.parts
    places = [number for number, word in enumerate(parts) if word == "images"]
    beside = image.with_suffix(".txt")
    elsewhere = Path(*parts[: places[-1]], "labels", *beside.parts[places[-1] + 1 :]) if places else beside
    return next((path for path in (elsewhere, beside) if is_file(path)), None)


def _shapes(path: Path, size: Size, names: list[str], findings: Findings) -> Iterator[Shape]:
    height, width = size
    for number, line in enumerate(text_of(path).splitlines(), 1):
        if not line.strip():
            continue
        with findings.record(f"{path}: line {number}"):
            label, values = _values(line.split(), names)
            if len(values) == 4:
                x, y, w, h = values
                box = ((x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height)
                yield Shape(label, None, box)
            else:
                # Decimals of COCO: a corner on the line between two pixels would fall to either side else.
                points = [round(value * (height if i % 2 else width), 2) for i, value in enumerate(values)]
                yield Shape(label, [points])


def _values(words: list[str], names: list[str]) -> tuple[str, list[float]]:
    """The class and the coordinates of a line."""
    try:
        number, *values = map(float, words)
    except ValueError as error:
        raise Fault("bad line", f"must be numbers, got {' '.join(words)[:60]!r}") from error
    if number not in range(len(names)):
        raise Fault("unknown class", f"the class must be from 0 to {len(names) - 1}, got {words[0]}")
    if len(values) != 4 and (len(values) < 6 or len(values) % 2):
        raise Fault("bad line", f"a class must be followed by 4 numbers, or 6, 8, … of a polygon, got {len(values)}")
    if not all(-_SLACK <= value <= 1 + _SLACK for value in values):
        raise Fault(
            "not a fraction", f"coordinates must be fractions of the image, 0 to 1, got {' '.join(words)[:60]!r}"
        )
    return names[int(number)], values
