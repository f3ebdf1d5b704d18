"""Datumaro's JSON: annotations/<subset>.json, and images in images/<subset>/ or images/.

Source: https://openvinotoolkit.github.io/datumaro/stable/docs/data-formats/formats/datumaro.html and datumaro 1.13's
plugins/data_formats/datumaro/base.py. Annotations of one label and group are one object; group 0 is none.
"""

from pathlib import Path
from typing import Any

from components.formats.records import LabelledImage, LabelledSet, Shape, ellipse, find_file, part_of, size_of
from components.formats.texts import json_of, list_of
from model.data.file_names import FileNames
from model.data.findings import Fault, Findings
from model.data.values import numbers, show, whole
from model.errors import UserError


def read(src: Path, findings: Findings) -> LabelledSet:
    """Read a folder with annotations/*.json.

    Raises:
        UserError: if there is no such file, or two of them have other classes.
    """
    files = sorted((src / "annotations").glob("*.json"))
    if not files:
        raise UserError(f"{src}: must have Datumaro's annotations/*.json, has none")
    found, names, images = FileNames(src), {}, []
    for path in files:
        try:
            tree = json_of(path, "categories", "items")
            names[path] = _class_names(tree)
            items = list_of(tree, "items")
        except Fault as fault:
            raise UserError(f"{path}: must be a file of Datumaro: {fault}") from fault
        if names[path] != names[files[0]]:
            raise UserError(f"{path}: classes must be those of {files[0]}; got {show(names[path])}")
        for entry in items:
            with findings.record(f"{path}: item {show(entry.get('id') if isinstance(entry, dict) else entry)}"):
                images.append(_item(entry, path, names[path], found, findings))
    return LabelledSet(names[files[0]], images)


def _class_names(tree: dict[str, Any]) -> list[str]:
    try:
        return [str(one["name"]) for one in tree["categories"]["label"]["labels"]]
    except (KeyError, TypeError) as error:
        raise Fault("no classes", f"categories.label.labels must list the classes ({error!r})") from error


def _item(entry: Any, path: Path, class_names: list[str], names: FileNames, findings: Findings) -> LabelledImage:
    where = findings.where
    if not isinstance(entry, dict) or not isinstance(entry.get("id"), str):
        raise Fault("no id", "an item must be an object with an id")
    media = entry["image"] if isinstance(entry.get("image"), dict) else {}
    root, name = path.parents[1], str(media.get("path") or f"{entry['id']}.jpg")
    image = find_file([root / "images" / path.stem / name, root / "images" / name], names, root, name)
    given = [whole(one) for one in media["size"]] if isinstance(media.get("size"), list) else []
    height, width = given if len(given) == 2 else (None, None)
    size = size_of(height, width, image)
    shapes: list[Shape] = []
    for number, one in enumerate(list_of(entry, "annotations"), 1):
        with findings.record(f"{where}: annotation {number}"):
            if shape := _shape(one, class_names, findings):
                shapes.append(shape)
    return LabelledImage(image, size, part_of(path.stem), shapes, path)


def _shape(entry: Any, class_names: list[str], findings: Findings) -> Shape | None:
    if not isinstance(entry, dict):
        raise Fault("no object", f"an annotation must be an object, got {show(entry)}")
    kind = entry.get("type")
    if kind not in ("polygon", "mask", "bbox", "ellipse"):
        findings.warn(f"annotation {kind}", f"an annotation of this kind ({kind}) is no object; it is left out")
        return None
    number = whole(entry.get("label_id"))
    if number is None or number >= len(class_names):
        raise Fault(
            "unknown class", f"label_id must be from 0 to {len(class_names) - 1}, got {show(entry.get('label_id'))}"
        )
    label, group = class_names[number], str(entry["group"]) if entry.get("group") else None
    attributes = entry.get("attributes")
    is_crowd = isinstance(attributes, dict) and bool(attributes.get("is_crowd"))
    if kind == "mask":
        if not isinstance(entry.get("rle"), dict):
            raise Fault("bad mask", f"a mask must have an rle, got {show(entry.get('rle'))}")
        return Shape(label, entry.get("rle"), None, group, is_crowd)
    if kind == "polygon":
        points = entry.get("points")
        if not isinstance(points, list):
            raise Fault("bad points", f"a polygon must have a list of points, got {show(points)}")
        return Shape(label, [points], None, group, is_crowd)
    if kind == "bbox":
        x, y, width, height = _four(entry, "bbox")
        return Shape(label, None, (x, y, x + width, y + height), group, is_crowd)
    x1, y1, x2, y2 = _four(entry, "points")  # corners of the box around an ellipse
    outline = ellipse(((x1 + x2) / 2, (y1 + y2) / 2), ((x2 - x1) / 2, (y2 - y1) / 2))
    return Shape(label, [outline], None, group, is_crowd)


def _four(entry: dict[str, Any], key: str) -> list[float]:
    values = entry.get(key)
    if not isinstance(values, list) or numbers(values) is None or len(values) != 4:
        raise Fault("bad box", f"{key} must be four numbers, got {show(values)}")
    return [float(value) for value in values]
