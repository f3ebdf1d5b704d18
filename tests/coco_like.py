"""A small data set in the form and layout of COCO 2017, drawn by a seed: what tests take for COCO wherever they run.

Like COCO: its 80 classes with ids 1 to 90 and gaps, 12-digit file names, ids with gaps in no order, frames of many
shapes, many small objects and few large ones, outlines of a few to many vertices with two decimals, that touch the
frame, of several parts where something stands before them, with a hole as a path in and out; crowds as RLE with holes
in it; an image without any object. Beyond COCO: PNG beside JPEG, compressed RLE beside lists of runs, and some files of
a single channel, of which COCO has few.

Image k of a split depends on the seed, the split and k alone. Coordinates are (x, y) in pixels, sizes (height, width).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from pycocotools import mask as coco_mask
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

Points = NDArray[np.float64]  # [V, 2]
Textures = list[NDArray[np.uint8]]  # [700, 700] each, of brightness
Record = dict[str, Any]

SPLITS = {"train": 48, "val": 32}  # images
_NAMES = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
CATEGORIES = {i: name for i, name in enumerate(_NAMES) if name not in ("__background__", "N/A")}
_SIZES = ((480, 640), (427, 640), (640, 480), (480, 640), (333, 500), (640, 427), (512, 640), (240, 640))
_SIDE = 700


def write(root: Path, splits: dict[str, int] = SPLITS, seed: int = 0) -> None:
    """`annotations/instances_{train,val}2017.json`, `train2017/` and `val2017/` below root."""
    textures = draw_textures(np.random.default_rng(seed))
    (root / "annotations").mkdir(parents=True)
    for number, (split, count) in enumerate(splits.items()):
        folder = root / f"{split}2017"
        folder.mkdir()
        shuffled = np.random.default_rng([seed, number])
        image_ids = np.cumsum(shuffled.integers(2, 9000, count)).tolist()  # image k has the k-th smallest id
        images: list[Record] = []
        annotations: list[Record] = []
        for k, image_id in enumerate(image_ids):
            pixels, found = draw_image(k, textures, np.random.default_rng([seed, number, k]))
            images.append({"id": image_id, **_save(pixels, folder, image_id, k)})
            annotations += [{"image_id": image_id, **annotation} for annotation in found]
        annotation_ids = shuffled.permutation(np.cumsum(shuffled.integers(1, 5000, len(annotations)))).tolist()
        document = {
            "info": {"description": "drawn for tests"},
            "images": [images[i] for i in shuffled.permutation(count)],
            "annotations": [{"id": i, **a} for i, a in zip(annotation_ids, annotations, strict=True)],
            "categories": [{"id": i, "name": name, "supercategory": "thing"} for i, name in CATEGORIES.items()],
        }
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(document))


def _save(pixels: Image.Image, folder: Path, image_id: int, k: int) -> Record:
    """Every eighth a PNG, every eighth of one channel; JPEGs of several qualities and subsamplings,
    some progressive.
    """
    name = f"{image_id:012d}.{'png' if k % 8 == 3 else 'jpg'}"
    image = pixels.convert("L") if k % 8 == 4 or k % 24 == 19 else pixels
    options = {"compress_level": 1} if k % 8 == 3 else {"quality": 80 + 5 * (k % 4), "subsampling": k % 3 and 2}
    image.save(folder / name, progressive=k % 5 == 2, **options)
    return {"file_name": name, "height": image.height, "width": image.width}


def draw_textures(rng: Generator) -> Textures:
    """Noise of several octaves: as it is, in bands, in folds and in checks."""
    fields = [_noise(rng) for _ in range(4)]
    y, x = np.mgrid[:_SIDE, :_SIDE].astype(np.float32)
    kinds = [
        fields[0],
        0.5 + 0.35 * np.sin(0.25 * x + 9 * fields[1]) + 0.3 * (fields[0] - 0.5),
        np.abs(2 * fields[1] - 1) ** 0.7,
        0.3 + 0.35 * ((x // 17 + y // 23) % 2) + 0.5 * (fields[2] - 0.4),
        fields[3] ** 2 + 0.25 * np.sin(0.9 * y),
    ]
    return [(255 * np.clip(kind, 0, 1)).astype(np.uint8) for kind in kinds]


def _noise(rng: Generator) -> NDArray[np.float32]:
    total = np.zeros((_SIDE, _SIDE), np.float32)
    for cells, weight in ((3, 0.45), (12, 0.25), (50, 0.18), (200, 0.12), (_SIDE, 0.04)):
        grid = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
        total += weight * np.asarray(grid.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC))
    return (total - total.min()) / np.ptp(total)


def draw_image(k: int, textures: Textures, rng: Generator) -> tuple[Image.Image, list[Record]]:
    """Pixels, and annotations without ids. The larger an object, the farther back it lies, so that none is buried."""
    height, width = _SIZES[k % len(_SIZES)]
    canvas = Image.fromarray(_textured((height, width), textures, rng))
    horizon = int(height * rng.uniform(0.3, 0.8))
    canvas.paste(Image.fromarray(_textured((height - horizon, width), textures, rng)), (0, horizon))
    if k % 16 == 9:
        return canvas, []
    crowd = [_draw_crowd(canvas, textures, rng, as_text=k % 2 == 0)] if k % 5 == 1 else []
    count = 40 if k % 16 == 11 else int(np.clip(rng.geometric(0.15), 3, 25))
    sides = np.exp(rng.uniform(np.log(10), np.log(0.95 * min(height, width)), count))
    found = []
    for side in sorted(sides.tolist(), reverse=True):
        category_id = _category(rng)
        parts = _parts(category_id, side, (height, width), rng)
        _paint(canvas, parts, category_id, textures, rng)
        found.append(_annotation(parts, category_id))
    return canvas, found + crowd


def _category(rng: Generator) -> int:
    """Every fourth object a person, as in COCO; the others of any class, some rare."""
    ids = list(CATEGORIES)
    return 1 if rng.random() < 0.25 else ids[int(len(ids) * rng.random() ** 2)]


def _textured(size: tuple[int, int], textures: Textures, rng: Generator, hue: float | None = None) -> NDArray[np.uint8]:
    """A piece of a texture in shades between two colours: [h, w, 3]."""
    texture = textures[int(rng.integers(len(textures)))]
    y, x = (int(rng.integers(0, _SIDE - side + 1)) for side in size)
    angle = 2 * np.pi * (rng.random() if hue is None else hue)
    tint = 60 * np.cos(angle + np.array([0, 2.1, 4.2])) * (0.4 if hue is None else 1)
    dark, light = rng.uniform(20, 90, 3) + tint / 2, rng.uniform(130, 220, 3) + tint
    shades = np.clip(dark + np.linspace(0, 1, 256)[:, None] * (light - dark), 0, 255).astype(np.uint8)
    return np.take(shades, texture[y : y + size[0], x : x + size[1]], axis=0)


def _parts(category_id: int, side: float, size: tuple[int, int], rng: Generator) -> list[Points]:
    """The outline of an object about as large as side, within the frame: one part, or several, or one with a hole."""
    centre = rng.uniform(0.02, 0.98, 2) * size[::-1]
    angle = rng.normal(0, 0.4)
    turn = np.array([(np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))])
    ring = _ring(category_id, side, rng)
    parts, draw = [ring], rng.random()
    if draw < 0.10 and side > 24:  # something thin stands before it
        left, right = np.sort(rng.uniform(-0.25, 0.25, 2)) * side
        parts = [_left_of(ring, left), -_left_of(-ring, -max(right, left + 2))]
        if draw < 0.03:
            parts.append(ring.mean(0) + np.array([(0.6, -0.6), (0.7, -0.6), (0.65, -0.5)]) * side)
    elif draw > 0.94 and side > 40:
        hole = 0.4 * ring[::-1]
        parts = [np.concatenate([ring, ring[:1], hole[-1:], hole])]
    placed = [part @ turn + centre for part in parts if len(part) >= 3]
    inside = [np.clip(part, 0, np.array(size[::-1])).round(2) for part in placed]
    whole = [part for part in inside if _area(part) > 6 and np.ptp(part, axis=0).min() > 1]
    return whole or _parts(category_id, side, size, rng)


def _ring(category_id: int, side: float, rng: Generator) -> Points:
    """Round the origin, its shape told by the class: lumps, boards, rods, or limbs; the larger, the more vertices."""
    vertices = int(np.clip(rng.normal(6 + 1.3 * np.sqrt(side), 3), 4, 90))
    angles = np.sort(rng.uniform(0, 2 * np.pi, vertices) * 0.3 + 0.7 * np.linspace(0, 2 * np.pi, vertices, False))
    kind = category_id % 4
    across, along = np.cos(angles), np.sin(angles)
    if kind == 0:  # a board: the circle pressed into a square
        across, along = np.clip(1.4 * across, -0.9, 0.9), np.clip(1.4 * along, -0.9, 0.9)
    waves = np.array([0.12, 0.12, 0.08, 0.05]) * (2.2 if kind == 1 else 1)
    radius = 1 + sum(w * np.cos(f * angles + rng.uniform(0, 6)) for f, w in enumerate(waves, 2))
    aspect = {0: 1.3, 1: 0.5, 2: 1.0, 3: 4.0}[kind] * np.exp(rng.normal(0, 0.2))
    ring = np.stack([across * np.sqrt(aspect), along / np.sqrt(aspect)], 1) * np.clip(radius, 0.3, 2)[:, None]
    return np.asarray(ring * side / np.ptp(ring, axis=0).max())


def _left_of(ring: Points, x: float) -> Points:
    """What of a polygon lies left of a vertical line."""
    kept = []
    for a, b in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        if a[0] <= x:
            kept.append(a)
        if (a[0] <= x) != (b[0] <= x):
            kept.append(a + (b - a) * (x - a[0]) / (b[0] - a[0]))
    return np.array(kept).reshape(-1, 2)


def _area(part: Points) -> float:
    x, y = part.T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def _annotation(parts: list[Points], category_id: int) -> Record:
    low, high = np.concatenate(parts).min(0), np.concatenate(parts).max(0)
    return {
        "category_id": category_id,
        "iscrowd": 0,
        "bbox": [*low.tolist(), *(high - low).round(2).tolist()],
        "area": round(sum(map(_area, parts)), 4),
        "segmentation": [part.ravel().tolist() for part in parts],
    }


def _paint(canvas: Image.Image, parts: list[Points], category_id: int, textures: Textures, rng: Generator) -> None:
    """Fill an outline with a texture in the colour of its class, its border softened as by a lens."""
    corner = np.floor(np.concatenate(parts).min(0)).astype(int) - 1
    width, height = (np.ceil(np.concatenate(parts).max(0)).astype(int) + 2 - corner).tolist()
    shape = Image.new("L", (width, height))
    for part in parts:
        ImageDraw.Draw(shape).polygon((part - corner - 0.5).ravel().tolist(), fill=255)
    piece = Image.fromarray(_textured((height, width), textures, rng, hue=category_id * 0.618 % 1))
    canvas.paste(piece, tuple(corner.tolist()), shape.filter(ImageFilter.BoxBlur(0.5)))


def _draw_crowd(canvas: Image.Image, textures: Textures, rng: Generator, *, as_text: bool) -> Record:
    """Many small objects in a ring, annotated as one region a little wider than they are: its middle, and gaps, are
    holes.
    """
    category_id, reach = _category(rng), 0.3 * np.array(canvas.size)
    centre = rng.uniform(reach + 12, np.array(canvas.size) - reach - 12)
    region, places = Image.new("L", canvas.size), []
    for angle in np.linspace(0, 2 * np.pi, 40) + rng.normal(0, 0.03, 40):
        places.append(centre + reach * rng.uniform(0.7, 1.0) * (np.cos(angle), np.sin(angle)))
        ring = _ring(category_id, float(rng.uniform(8, 26)), rng) + places[-1]
        _paint(canvas, [ring], category_id, textures, rng)
        ImageDraw.Draw(region).polygon(ring.ravel().tolist(), fill=255)
    ImageDraw.Draw(region).line(np.array([*places, places[0]]).ravel().tolist(), fill=255)
    mask = (np.asarray(region.filter(ImageFilter.BoxBlur(6))) > 8).astype(np.uint8)
    code = coco_mask.encode(np.asfortranarray(mask))
    columns = mask.T.ravel()
    runs = np.diff([0, *(np.flatnonzero(np.diff(columns)) + 1), columns.size]).tolist()
    counts = code["counts"].decode() if as_text else [0, *runs] if columns[0] else runs
    return {
        "category_id": category_id,
        "iscrowd": 1,
        "bbox": coco_mask.toBbox(code).tolist(),
        "area": int(coco_mask.area(code)),
        "segmentation": {"size": list(mask.shape), "counts": counts},
    }
