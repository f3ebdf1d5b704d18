"""CVAT's XML 1.1, for images or for video, with polygons, boxes, ellipses and masks.

Source: https://docs.cvat.ai/docs/dataset_management/formats/format-cvat/ and the XML format's page beside it. The runs
of a mask are those of its own rectangle, row by row, outside first. Shapes of one label and group_id are one object, as
in CVAT's COCO export. A video has shapes for each frame; frame 7 is images/frame_000007.png, or .jpg.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from components.formats.records import (
    LabelledImage,
    LabelledSet,
    Shape,
    ellipse,
    find_file,
    part_of,
    rectangle,
    rle,
    size_of,
    turned,
)
from components.formats.texts import number_of, xml_of
from model.data.file_names import FileNames
from model.data.findings import Fault, Findings
from model.data.rle import runs_to_mask
from model.data.values import Size
from model.errors import UserError

_NOT_OBJECTS = ("cuboid", "points", "polyline", "skeleton", "tag")


def read(src: Path, findings: Findings) -> LabelledSet:
    """Read the XML files of a folder, which has images beside them or in `images/`.

    Raises:
        UserError: if there is no XML file.
    """
    files = sorted(src.glob("*.xml")) or sorted(src.rglob("*.xml"))
    if not files:
        raise UserError(f"{src}: must have CVAT's annotations.xml, has no XML file")
    found, images = FileNames(src), []
    class_names: dict[str, None] = {}
    for path in files:
        with findings.record(str(path)):
            tree = xml_of(path, "annotations")
            for label in tree.iterfind("meta//label"):
                if (name := (label.findtext("name") or "").strip()) and not label.findtext("parent"):
                    class_names[name] = None
            images += [*_images(path, tree, found, findings), *_frames(path, tree, found, findings)]
    used = {shape.label: None for image in images for shape in image.shapes}
    return LabelledSet(list(class_names | used), images)


def _images(path: Path, tree: ElementTree.Element, names: FileNames, findings: Findings) -> Iterator[LabelledImage]:
    for entry in tree.iterfind("image"):
        name, subset = entry.get("name") or "", entry.get("subset") or ""
        with findings.record(f"{path}: image {name!r}"):
            root = path.parent
            candidates = [root / folder / name for folder in ("images", f"images/{subset}", "")]
            image = find_file(candidates, names, root, name)
            size = _size(entry, image)
            shapes = list(_shapes(entry, f"{path}: image {name!r}", size, findings))
            yield LabelledImage(image, size, part_of(subset), shapes, path)


def _size(entry: ElementTree.Element | None, image: Path) -> Size:
    """The size that an element states, or that of the image file."""
    if entry is None:
        return size_of(None, None, image)
    return size_of(number_of(entry, "height"), number_of(entry, "width"), image)


def _frames(path: Path, tree: ElementTree.Element, names: FileNames, findings: Findings) -> Iterator[LabelledImage]:
    """The frames of a video that have shapes; a track is an object."""
    by_frame: dict[int, list[ElementTree.Element]] = {}
    for track in tree.iterfind("track"):
        for entry in track:
            if entry.get("outside") != "1":
                for name in ("label", "group_id"):  # a track has them, its shapes do not
                    entry.set(name, track.get(name) or "")
                by_frame.setdefault(int(number_of(entry, "frame")), []).append(entry)
    for frame in sorted(by_frame):
        name = f"frame_{frame:06}"
        with findings.record(f"{path}: frame {frame}"):
            endings = (".png", ".PNG", ".jpg", ".JPG", ".jpeg")
            image = find_file([path.parent / "images" / f"{name}{end}" for end in endings], names, path.parent, name)
            size = _size(tree.find("meta//original_size"), image)
            shapes = [
                shape
                for entry in by_frame[frame]
                for shape in _shapes([entry], f"{path}: frame {frame}", size, findings)
            ]
            yield LabelledImage(image, size, "", shapes, path)


def _shapes(
    entries: "ElementTree.Element | list[ElementTree.Element]", where: str, size: Size, findings: Findings
) -> Iterator[Shape]:
    for number, entry in enumerate(entries, 1):
        with findings.record(f"{where}: {entry.tag} {number}"):
            if entry.tag in _NOT_OBJECTS:
                findings.warn(f"shape {entry.tag}", f"a {entry.tag} is no object; it is left out")
                continue
            if entry.tag not in _READERS:
                raise Fault("unknown shape", f"<{entry.tag}> must be one of {', '.join(_READERS)}")
            label, group = (entry.get("label") or "").strip(), entry.get("group_id")
            if not label:
                raise Fault("no label", f"a {entry.tag} must have a label")
            shape = _READERS[entry.tag](entry, size)
            yield Shape(label, shape.segmentation, shape.box, None if group in (None, "", "0") else group)


def _polygon(entry: ElementTree.Element, size: Size) -> Shape:
    try:
        points = [tuple(map(float, point.split(","))) for point in (entry.get("points") or "").split(";")]
    except ValueError as error:
        raise Fault("bad points", f"points must be x,y;x,y;…, got {(entry.get('points') or '')[:60]!r}") from error
    if any(len(point) != 2 for point in points):
        raise Fault("bad points", f"points must be x,y;x,y;…, got {(entry.get('points') or '')[:60]!r}")
    return Shape("", [[value for point in points for value in point]])


def _degrees(entry: ElementTree.Element) -> float:
    return number_of(entry, "rotation") if entry.get("rotation") else 0.0


def _box(entry: ElementTree.Element, size: Size) -> Shape:
    """A box; one that is turned has the box around its corners."""
    x1, y1, x2, y2 = (number_of(entry, name) for name in ("xtl", "ytl", "xbr", "ybr"))
    if not (degrees := _degrees(entry)):
        return Shape("", None, (x1, y1, x2, y2))
    corners = np.array(rectangle((x1, y1, x2, y2))).reshape(-1, 2)
    return Shape("", [turned(corners, ((x1 + x2) / 2, (y1 + y2) / 2), degrees)])


def _ellipse(entry: ElementTree.Element, size: Size) -> Shape:
    x, y, rx, ry = (number_of(entry, name) for name in ("cx", "cy", "rx", "ry"))
    return Shape("", [ellipse((x, y), (rx, ry), _degrees(entry))])


def _mask(entry: ElementTree.Element, size: Size) -> Shape:
    left, top, width, height = (int(number_of(entry, name)) for name in ("left", "top", "width", "height"))
    try:
        runs = np.array([int(word) for word in (entry.get("rle") or "").split(",")])
    except (ValueError, OverflowError) as error:
        raise Fault("bad mask", f"rle must be runs like 3,2,5, got {(entry.get('rle') or '')[:60]!r}") from error
    fits = 0 <= left <= left + width <= size[1] and 0 <= top <= top + height <= size[0]
    if not fits or runs.min() < 0 or sum(runs.tolist()) != width * height:
        raise Fault(
            "bad mask",
            f"a mask must lie in the image of {size[1]} × {size[0]}, and its runs add up to its pixels; got "
            f"{width} × {height} at {left}, {top} and {sum(runs.tolist())} pixels",
        )
    mask = np.zeros(size, dtype=bool)
    mask[top : top + height, left : left + width] = runs_to_mask(runs, (width, height)).T  # row by row
    return Shape("", rle(mask))


_READERS: dict[str, Callable[[ElementTree.Element, Size], Shape]] = {
    "polygon": _polygon,
    "box": _box,
    "ellipse": _ellipse,
    "mask": _mask,
}
