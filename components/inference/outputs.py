"""Files of an image's objects: its drawing, masks and crops; and their entries in predictions.json."""

import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from components.config import PredictConfig
from components.inference.images import KINDS, Source
from model.data.transforms import Pixels
from model.files import replacing
from model.inference.outlines import mask_of, polygons_of
from model.inference.predictor import Object
from model.inference.visualize import draw_objects


def write_image(
    source: Source,
    pixels: Pixels,
    objects: Sequence[Object],
    class_names: Sequence[str],
    folder: Path,
    settings: PredictConfig,
) -> dict[str, Any]:
    """Write the files of one image below `folder`; return its entry of predictions.json."""
    drawing = folder / source.drawing
    drawing.parent.mkdir(parents=True, exist_ok=True)
    _save(draw_objects(pixels, objects, class_names), drawing, quality=92)
    detections = [dict(one) for one in objects]
    crops, masks = (drawing.with_name(f"{drawing.name}.{kind}") for kind in KINDS)
    for parts in (crops, masks):  # an earlier call's
        _clear(parts)
    if settings.crop:
        crops.mkdir(exist_ok=True)
        for number, (one, entry) in enumerate(zip(objects, detections, strict=True), 1):
            entry["crop"] = as_text(_save(crop(pixels, one), crops / f"{number:03}.png").relative_to(folder))
    if settings.masks == "png" and any("segmentation" in one for one in objects):
        masks.mkdir(exist_ok=True)
    for number, entry in enumerate(detections, 1):
        if "segmentation" not in entry or settings.masks == "rle":
            continue
        if settings.masks == "polygons":
            entry["segmentation"] = [polygon.ravel().tolist() for polygon in polygons_of(entry["segmentation"])]
        else:
            picture = Image.fromarray(mask_of(entry["segmentation"]).astype(np.uint8) * 255)
            entry["mask"] = as_text(_save(picture, masks / f"{number:03}.png").relative_to(folder))
            del entry["segmentation"]
    size = list(pixels.shape[:2])
    return {"file": as_text(source.path), "drawing": as_text(source.drawing), "size": size, "detections": detections}


def crop(pixels: Pixels, one: Object) -> Image.Image:
    """The part of an image within an object's box, at least one pixel; transparent outside of its mask."""
    height, width = pixels.shape[:2]
    x1, y1 = (
        min(max(math.floor(value), 0), side - 1) for value, side in zip(one["bbox"][:2], (width, height), strict=True)
    )
    x2, y2 = max(min(math.ceil(one["bbox"][2]), width), x1 + 1), max(min(math.ceil(one["bbox"][3]), height), y1 + 1)
    part = Image.fromarray(np.ascontiguousarray(pixels[y1:y2, x1:x2]))
    if "segmentation" in one:
        part.putalpha(Image.fromarray(mask_of(one["segmentation"])[y1:y2, x1:x2].astype(np.uint8) * 255))
    return part


def _clear(folder: Path) -> None:
    """Remove the numbered pictures of a folder, and the folder if nothing else is there."""
    if folder.is_dir():
        for path in folder.glob("*.png"):
            if path.stem.isdecimal():
                path.unlink()
        with suppress(OSError):
            folder.rmdir()


def _save(picture: Image.Image, path: Path, **options: Any) -> Path:
    with replacing(path) as partial:
        picture.save(partial, **options)
    return path


def as_text(path: Path) -> str:
    """Path as JSON and terminals can hold it: bytes of a name that are not UTF-8 are written as `\\udcXX`."""
    return path.as_posix().encode("utf-8", "backslashreplace").decode()
