"""Generated COCO data set: simple shapes on textured backgrounds, as JPEG and real COCO JSON.

Shapes overlap and hide one another; an annotation is the outline of the visible part. Colour is independent of the
class. Some images have a crowd: a cluster of tiny shapes annotated as one RLE region. Image k of a split depends only
on shapes.seed, the split and k, so any process may draw it; the splits draw from disjoint streams.
"""

import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from model.config import ShapesConfig
from model.data.layout import SPLITS, Split
from model.data.polygons import mask_to_polygons
from model.data.scene import CLASS_NAMES, area, coverage, ground, paint, place_shapes
from model.errors import UserError
from model.files import read_json, write_atomically

MARKER = "shapes.json"  # file beside the data: its configuration, and whether it is complete

_MIN_VISIBLE_FRACTION = 0.3
_MIN_VISIBLE_PX = 16


def write_shapes(config: ShapesConfig, root: Path, workers: int = 0) -> bool:
    """Write `annotations/instances_{train,val}.json`, `train/` and `val/` below root, unless they exist already.

    Args:
        workers: number of drawing processes; 0 draws in this process.

    Returns:
        True if anything was written; False if root holds a complete data set of the same configuration.

    Raises:
        UserError: if root holds one of these files or folders from another source, or its marker is damaged.
    """
    marker, recipe = root / MARKER, config.model_dump(mode="json")
    if marker.is_file():
        if _read_marker(root) == {"config": recipe, "complete": True}:
            return False
    elif foreign := [path for split in SPLITS for path in (root / split, _annotations(root, split)) if path.exists()]:
        raise UserError(
            f"{foreign[0]}: already exists and was not made by `data.source: shapes`; it is not overwritten. "
            "Set data.raw_dir to another folder, or data.source to the source of this data."
        )
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    write_atomically(marker, json.dumps({"config": recipe, "complete": False}))
    for split, images in zip(SPLITS, (config.train_images, config.val_images), strict=True):
        shutil.rmtree(root / split, ignore_errors=True)
        (root / split).mkdir()
        records = _draw_all(partial(_write_image, config, root, split), images, workers)
        _annotations(root, split).write_text(json.dumps(_coco_json(records)))
    write_atomically(marker, json.dumps({"config": recipe, "complete": True}))
    return True


def holds_other_shapes(config: ShapesConfig, root: Path) -> bool:
    """True if root holds a generated data set of another configuration, which `write_shapes` would replace.

    Raises:
        UserError: if its marker is damaged.
    """
    return (root / MARKER).is_file() and _read_marker(root).get("config") != config.model_dump(mode="json")


def _read_marker(root: Path) -> dict[str, Any]:
    marker: dict[str, Any] = read_json(root / MARKER, dict[str, Any], f"delete {root} to generate the data set anew")
    return marker


def _annotations(root: Path, split: Split) -> Path:
    return root / "annotations" / f"instances_{split}.json"


def _draw_all(write: Callable[[int], dict[str, Any]], images: int, workers: int) -> list[dict[str, Any]]:
    if workers == 0:
        return [write(k) for k in range(images)]
    # spawn: a forked child could inherit locks that the caller's threads hold.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(write, range(images), chunksize=16))


def _write_image(config: ShapesConfig, root: Path, split: Split, k: int) -> dict[str, Any]:
    """Draw image k of a split, save it and return its COCO image record, including its `annotations`."""
    rng = np.random.default_rng([config.seed, SPLITS.index(split), k])
    pixels, annotations = draw_scene(config, rng)
    name = f"{k + 1:06d}.jpg"
    Image.fromarray(pixels).save(root / split / name, quality=92, subsampling=0)
    height, width = pixels.shape[:2]
    return {"id": k + 1, "file_name": name, "height": height, "width": width, "annotations": annotations}


def _coco_json(records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for record in records:
        for annotation in record.pop("annotations"):
            annotations.append({"id": len(annotations) + 1, "image_id": record["id"], **annotation})
        images.append(record)
    categories = [{"id": label, "name": name, "supercategory": "shape"} for label, name in enumerate(CLASS_NAMES, 1)]
    return {
        "info": {"description": "generated shapes"},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }


def draw_scene(config: ShapesConfig, rng: Generator) -> tuple[NDArray[np.uint8], list[dict[str, Any]]]:
    """Draw one image and annotate it.

    Returns:
        Pixels [h, w, 3] uint8 RGB, and COCO annotations without ids: polygons of the visible parts; for a crowd, an
        uncompressed RLE with iscrowd 1.
    """
    size = (config.height_px, config.width_px)
    background = ground(size, rng)
    shapes = place_shapes(
        size,
        config.max_objects,
        crowd=bool(rng.random() < config.crowd_probability),
        mean_colour=background.mean(axis=(0, 1)),
        rng=rng,
    )
    whole = np.array([area(shape) for shape in shapes])
    seen = coverage(shapes, size).sum(axis=(1, 2))
    # Removing a hidden shape never hides another, so one pass is enough.
    shown = seen >= np.maximum(_MIN_VISIBLE_FRACTION * whole, _MIN_VISIBLE_PX)
    shapes = [shape for shape, keep in zip(shapes, shown, strict=True) if keep]
    cover = coverage(shapes, size)
    masks = cover >= 0.5
    annotations = [_annotation(shape.label, mask) for shape, mask in zip(shapes, masks, strict=True) if not shape.crowd]
    members = [rank for rank, shape in enumerate(shapes) if shape.crowd]
    if members:
        annotations.append(_crowd_annotation(shapes[members[0]].label, np.any(masks[members], axis=0)))
    return paint(background, shapes, cover, rng), annotations


def _annotation(label: int, mask: NDArray[np.bool_]) -> dict[str, Any]:
    polygons = mask_to_polygons(mask)
    return {
        "category_id": label,
        "iscrowd": 0,
        "bbox": _bbox(mask),
        "area": int(mask.sum()),
        "segmentation": [polygon.astype(int).ravel().tolist() for polygon in polygons],
    }


def _crowd_annotation(label: int, mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Annotate a cluster as one region, slightly wider than its members, as COCO's annotators do."""
    wide = np.asarray(Image.fromarray(mask.astype(np.uint8)).filter(ImageFilter.MaxFilter(5))) > 0
    column_major = wide.T.ravel()
    ends = np.flatnonzero(np.diff(column_major)) + 1
    runs = np.diff(np.concatenate([[0], ends, [column_major.size]])).tolist()
    return {
        "category_id": label,
        "iscrowd": 1,
        "bbox": _bbox(wide),
        "area": int(wide.sum()),
        "segmentation": {"size": list(mask.shape), "counts": [0, *runs] if column_major[0] else runs},
    }


def _bbox(mask: NDArray[np.bool_]) -> list[int]:
    xs, ys = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return [int(xs[0]), int(ys[0]), int(xs[-1] - xs[0] + 1), int(ys[-1] - ys[0] + 1)]
