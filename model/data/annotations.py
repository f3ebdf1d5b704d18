"""COCO JSON, read and checked once; later stages trust it.

A file that is not COCO JSON is an error. Whatever is wrong with a record is a `Finding`, which `prepare` raises or
counts. Boxes leave here as (x1, y1, x2, y2) in pixels, clipped to the frame; polygons as [V, 2] float32, not clipped.
"""

import re
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.data.bbox import SLACK_PX, Box, clip_bbox, read_bbox
from model.data.coco_json import AnnotationError, read_tree
from model.data.findings import Fault, Finding, Findings
from model.data.segmentation import Mask, read_mask
from model.data.values import CONTROL, MAX_PIXELS, MAX_PX, Size, distinct, integer, is_text, show, whole

_AREA_FACTOR, _FEW_PX2 = 3, 16  # an area further from that of its object, beyond a few pixels, is a warning
_MANY_BEYOND = 0.2  # share of boxes; in a sound data set a few extend beyond the frame


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
    box: Box  # xyxy, clipped
    polygons: list[NDArray[np.float32]]  # none for a crowd, or with a box alone
    is_crowd: bool
    was_clipped: bool
    has_mask: bool = True


@dataclass
class CocoFile:
    """One annotation file: the usable records of the first `limit` images, and the findings of all."""

    path: Path
    categories: dict[int, str]  # id → name, sorted by id; names are unique
    images: dict[int, ImageRecord]  # id → record, sorted by id
    instances: dict[int, list[Instance]]  # image id → annotations
    raw: dict[int, list[dict[str, Any]]]  # image id → the same annotations as COCO JSON with the keys evaluation reads
    findings: list[Finding] = field(default_factory=list)
    annotated: set[str] = field(default_factory=set)  # image ids, as text, of all annotations, usable or not

    def drop_image(self, image_id: int, finding: Finding) -> None:
        """Remove an image and its annotations, and record why."""
        self.findings.append(finding)
        del self.images[image_id], self.instances[image_id], self.raw[image_id]

    @property
    def num_instances(self) -> int:
        """Number of annotations other than crowds."""
        return sum(not instance.is_crowd for of_image in self.instances.values() for instance in of_image)


def read_coco(
    path: Path,
    limit: int = 0,
    *,
    chosen: Callable[[list[int]], list[int]] = list,
    masks: bool = True,
    repairs: bool = False,
    size_of: Callable[[str], Size | None] = lambda file_name: None,
) -> CocoFile:
    """Read and check an annotation file.

    Args:
        limit: number of images to keep, lowest ids first; 0 keeps all.
        chosen: of ascending image ids those to keep, before `limit`.
        masks: a segmentation is needed; else a box suffices.
        repairs: repair what can be repaired safely, instead of refusing it.
        size_of: (height, width) of an image file as displayed, None if it cannot be read; asked where the annotation
            file gives no size.

    Raises:
        AnnotationError: if the file is missing, not JSON, or not in COCO's instances format.
    """
    findings = Findings(repairs)
    tree = read_tree(path, findings)
    coco = CocoFile(path, _categories(tree["categories"], path, findings), {}, {}, {}, findings.all)
    records: dict[int, ImageRecord] = {}
    files = _files_of_ids(tree["images"])
    names: dict[str, int] = {}  # file name → id
    # Ids of images that cannot be used, None if one has no id; faults of their annotations are of no interest.
    refused: set[str | float | None] = set()
    for i, entry in enumerate(tree["images"]):
        with findings.record(f"{path}: {_name('image', i, entry)}"):
            raw_id = entry.get("id") if isinstance(entry, dict) else None
            raw_id = raw_id if isinstance(raw_id, str | int | float) else None
            if raw_id not in records:
                refused.add(raw_id)
            record = _image_record(entry, records, files, findings, size_of)
            records[record.id] = record
            refused -= {raw_id, record.id}
            if (first := names.setdefault(record.file_name, record.id)) != record.id:
                findings.warn("file listed twice", f"{show(record.file_name)} is the file of image {first}, too")
    for image_id in chosen(sorted(records))[: limit or None]:
        coco.images[image_id] = records[image_id]
        coco.instances[image_id], coco.raw[image_id] = [], []
    ids = [entry.get("image_id") for entry in tree["annotations"] if isinstance(entry, dict)]
    coco.annotated = {str(given if (number := whole(given)) is None else number) for given in ids}
    checks = _AnnotationChecks(coco, records, refused, findings, masks)
    for i, entry in enumerate(tree["annotations"]):
        name = _name("annotation", i, entry)
        of = f" of image {show(entry.get('image_id'))}" if isinstance(entry, dict) else ""
        with findings.record(f"{path}: {name}{of}"):
            checks.add(entry)
    _guess_corners(coco, findings)
    if checks.must_number:
        for number, entry in enumerate((entry for of_image in coco.raw.values() for entry in of_image), 1):
            entry["id"] = number
    return coco


def _categories(entries: list[Any], path: Path, findings: Findings) -> dict[int, str]:
    """Names by id. A name that occurs twice gets a number, since scores and counts go by name."""
    categories: dict[int, str] = {}
    for entry in entries:
        findings.where = f"{path}: category {show(entry)}"
        try:
            category_id, name = _category(entry, findings)
        except Fault as fault:
            raise AnnotationError(f"{findings.where}: {fault}") from fault
        if category_id in categories:
            raise AnnotationError(f"{path}: category id {category_id} occurs twice; ids must be unique")
        categories[category_id] = name
    if not categories:
        raise AnnotationError(f"{path}: must list at least one category, got none")
    categories = dict(sorted(categories.items()))
    names = distinct(list(categories.values()))
    for (category_id, name), new in zip(categories.items(), names, strict=True):
        if new != name:
            first = next(other for other, same in categories.items() if same == name)
            findings.where = f"{path}: category {category_id}"
            text = f"name {show(name)} is that of category {first}, too; category {category_id} is called {show(new)}"
            findings.repaired("duplicate category name", text)
    return dict(zip(categories, names, strict=True))


def _category(entry: Any, findings: Findings) -> tuple[int, str]:
    name = entry.get("name") if isinstance(entry, dict) else None
    if not is_text(name):
        raise Fault("bad category", "must have an integer id ≥ 0 and a name")
    if re.search(CONTROL, name):
        findings.repairable(
            "control character", f"a name must be one line without control characters, got {show(name)}"
        )
        name = re.sub(CONTROL, " ", name).strip()
    if not name:
        raise Fault("bad category", "must have a name")
    return integer(entry.get("id"), "id", "bad category", findings), name


def _files_of_ids(entries: list[Any]) -> dict[int, list[str]]:
    """File names by image id, each once."""
    files: dict[int, list[str]] = {}
    for entry in entries:
        image_id = _number(entry.get("id")) if isinstance(entry, dict) else None
        if image_id is not None and (name := str(entry.get("file_name"))) not in files.setdefault(image_id, []):
            files[image_id].append(name)
    return files


def _number(value: Any) -> int | None:
    """An id as `integer` reads it, with repairs."""
    try:
        return integer(value, "id", "", Findings(repairs=True))
    except Fault:
        return None


def _image_record(
    entry: Any,
    known: Container[int],
    files: dict[int, list[str]],
    findings: Findings,
    size_of: Callable[[str], Size | None],
) -> ImageRecord:
    if not isinstance(entry, dict):
        raise Fault("no object", f"an image must be an object, got {show(entry)}")
    image_id = integer(entry.get("id"), "id", "no id", findings)
    if len(files[image_id]) > 1:
        text = f"id is that of {len(files[image_id])} files, {show(files[image_id])}, so whose its annotations are"
        raise Fault("duplicate image id", f"{text} is unknown; ids must be unique")
    if image_id in known:
        raise Fault("duplicate image id", "id occurs twice; ids must be unique")
    file_name = entry.get("file_name")
    if not is_text(file_name) or "\0" in file_name:
        raise Fault("no file name", f"file_name must be a non-empty string, got {show(file_name)}")
    given = entry.get("height"), entry.get("width")
    height, width = map(whole, given)
    if not height or not width:
        size = size_of(file_name)
        if size is None:
            raise Fault(
                "no size",
                f"height and width must be integers ≥ 1, got {show(given[0])} and {show(given[1])}, and the file "
                "cannot be read",
            )
        height, width = size
        findings.repaired(
            "no size", f"height and width are {show(given[0])} and {show(given[1])}; the file has {height} and {width}"
        )
    if max(height, width) > MAX_PX or height * width > MAX_PIXELS:
        raise Fault("too large", f"height and width must be at most {MAX_PIXELS:,} pixels, got {height} and {width}")
    return ImageRecord(image_id, file_name, height, width)


@dataclass
class _AnnotationChecks:
    """Checks of annotations, one after another, and what they must remember."""

    coco: CocoFile
    records: dict[int, ImageRecord]
    refused: set[str | float | None]
    findings: Findings
    masks: bool
    must_number: bool = False  # ids are faulty
    _ids: set[int] = field(default_factory=set)
    _seen: set[tuple[Any, ...]] = field(default_factory=set)

    def add(self, entry: Any) -> None:
        """Check one annotation and add it to its image; those of images past the limit, or unusable, are skipped."""
        if not isinstance(entry, dict):
            raise Fault("no object", f"an annotation must be an object, got {show(entry)}")
        given = entry.get("image_id")
        if isinstance(given, str | int | float) and given in self.refused:
            return
        image_id = integer(given, "image_id", "unknown image id", self.findings)
        if image_id not in self.records and None in self.refused:
            return  # an image without an id may be its own
        if image_id not in self.records:
            raise Fault("unknown image id", f"image_id {image_id} is not among the images")
        if image_id not in self.coco.images:
            return
        instance, clean = self._instance(entry, self.records[image_id])
        clean["id"] = self._id(entry.get("id"))
        self.coco.instances[image_id].append(instance)
        self.coco.raw[image_id].append(clean)

    def _id(self, given: Any) -> int:
        """The id of an annotation; where one is faulty, all are numbered in the end, for nothing refers to them."""
        number = whole(given)
        if number is None or number in self._ids:
            self.must_number = True
            kind = "no annotation id" if number is None else "duplicate annotation id"
            self.findings.repaired(
                kind, f"id must be a unique integer ≥ 0, got {show(given)}; annotations are numbered"
            )
            return 0
        self._ids.add(number)
        return number

    def _instance(self, entry: dict[str, Any], image: ImageRecord) -> tuple[Instance, dict[str, Any]]:
        """An annotation as instance, and as JSON with the keys that evaluation reads."""
        findings = self.findings
        category_id = integer(entry.get("category_id"), "category_id", "unknown category", findings)
        if category_id not in self.coco.categories:
            raise Fault("unknown category", f"category_id {category_id} is not among the categories")
        crowd = _crowd(entry.get("iscrowd"), findings)
        mask = self._mask(entry.get("segmentation"), image, outline=not crowd)
        size = (image.height, image.width)
        bbox = read_bbox(entry.get("bbox"), size, mask, findings)
        box, was_clipped = clip_bbox(bbox, size)
        clean = {"id": 0, "image_id": image.id, "category_id": category_id, "bbox": bbox}
        if mask is not None:
            clean["segmentation"] = mask.segmentation
        clean |= {"area": _area(entry.get("area"), mask, bbox, findings), "iscrowd": crowd}
        key = (image.id, category_id, crowd, *bbox)
        if key in self._seen:
            findings.warn("duplicate annotation", f"category {category_id} and bbox {show(bbox)} occur twice")
        self._seen.add(key)
        polygons = mask.polygons if mask and not crowd else []
        return Instance(category_id, box, polygons, bool(crowd), was_clipped, mask is not None), clean

    def _mask(self, segmentation: Any, image: ImageRecord, *, outline: bool) -> Mask | None:
        """The mask; None if a box suffices and there is no usable one."""
        try:
            return read_mask(segmentation, (image.height, image.width), self.findings, outline=outline)
        except Fault as fault:
            if self.masks:
                raise
            if segmentation:
                self.findings.warn(fault.kind, f"{fault}; only its box is used")
            return None


def _guess_corners(coco: CocoFile, findings: Findings) -> None:
    """Warn if boxes without segmentations are x1, y1, x2, y2: as such all fit, as x, y, width, height they do not."""
    entries = [(entry, image_id) for image_id, raw in coco.raw.items() for entry in raw if "segmentation" not in entry]
    fits = beyond = 0
    for entry, image_id in entries:
        (x, y, width, height), image = entry["bbox"], coco.images[image_id]
        fits += x < width <= image.width and y < height <= image.height
        beyond += x + width > image.width + SLACK_PX or y + height > image.height + SLACK_PX
    if fits == len(entries) and beyond > len(entries) * _MANY_BEYOND:
        findings.where = str(coco.path)
        findings.warn(
            "bbox as x1, y1, x2, y2?",
            f"{beyond} of {len(entries)} boxes extend beyond their image as x, y, width, height, and none would as "
            "x1, y1, x2, y2; bbox must be the former",
        )


def _area(area: Any, mask: Mask | None, bbox: list[float], findings: Findings) -> float:
    """The area as given; where it is missing or impossible, that of the mask or else of the box."""
    computed = mask.area if mask else bbox[2] * bbox[3]
    if not isinstance(area, int | float) or isinstance(area, bool) or not 0 < area <= MAX_PX**2:  # NaN is not
        if area is not None:
            findings.repaired("bad area", f"area must be a finite number > 0, got {show(area)}; it is {computed}")
        return computed
    least, most = mask.area if mask else 0, max(computed, bbox[2] * bbox[3])  # many tools give that of the box
    if not (least - _FEW_PX2) / _AREA_FACTOR <= area <= most * _AREA_FACTOR + _FEW_PX2:
        findings.warn("area not of its object", f"area is {show(area)}, the {'mask' if mask else 'box'} has {computed}")
    return area


def _crowd(value: Any, findings: Findings) -> int:
    if value is None:
        return 0
    if isinstance(value, str) and value in ("0", "1"):
        findings.repairable("number as text", f"iscrowd must be a number, got {value!r}")
        return int(value)
    if not isinstance(value, int | float) or value not in (0, 1):
        raise Fault("bad iscrowd", f"iscrowd must be 0 or 1, got {show(value)}")
    return int(value)


def _name(what: str, position: int, entry: Any) -> str:
    """Name of a record in messages: by its id, or else by its position in the list."""
    given = entry.get("id") if isinstance(entry, dict) else None
    return f"{what} {given}" if whole(given) is not None else f"{what}s[{position}] (id {show(given)})"
