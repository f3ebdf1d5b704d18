"""Segmentation of an annotation, polygons or RLE: checked, so that nothing that reads it later can fail.

pycocotools rasterises without checks: a coordinate of 1e12 ends the process, and an outline of many long edges takes
all memory. Therefore coordinates and the length of outlines have limits.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
from numpy.typing import NDArray

from model.data.findings import Fault, Findings
from model.data.polygons import mask_to_polygons
from model.data.rle import rle_runs, runs_to_mask
from model.data.values import MAX_PX, Size, from_text, numbers, show

_MAX_LENGTH_PX = 20_000_000  # all edges of an annotation; pycocotools needs 100 bytes per pixel


@dataclass(frozen=True)
class Mask:
    """A checked segmentation, which covers at least one pixel."""

    segmentation: Any  # COCO's, with integers where COCO has integers
    polygons: list[NDArray[np.float32]]  # [V, 2] each, not clipped; none for an RLE without `outline`
    area: int  # pixels
    box: tuple[float, float, float, float]  # xyxy of its pixels


def read_mask(segmentation: Any, size: Size, findings: Findings, *, outline: bool) -> Mask:
    """Check a segmentation.

    Args:
        size: (height, width) of the image.
        findings: gets the repairs.
        outline: also trace an RLE, which is slow.

    Raises:
        Fault: if it cannot be used.
    """
    segmentation = _unwrapped(_from_text(segmentation, findings), findings)
    if isinstance(segmentation, dict):
        return _rle_mask(segmentation, size, findings, outline=outline)
    if not isinstance(segmentation, list) or not segmentation:
        raise Fault(
            "no segmentation",
            f"segmentation must be polygons or an RLE, got {show(segmentation)}; boxes alone suffice for "
            "model.task=box and proposals",
        )
    parts, polygons = _parts(from_text(segmentation, "segmentation", findings), findings)
    length_px = sum(float(np.abs(np.diff(xy, axis=0, append=xy[:1])).max(axis=1).sum()) for xy in polygons)
    if length_px > _MAX_LENGTH_PX:
        raise Fault("bad polygon", f"polygons must be at most {_MAX_LENGTH_PX:,} px long, got {length_px:,.0f}")
    packed = coco_mask.merge(coco_mask.frPyObjects(parts, *size))
    area = int(coco_mask.area(packed))
    if not area:
        are_pixels = any(((xy < 0) | (xy > 1)).any() for xy in polygons)
        hint = "" if are_pixels else "; they must be in pixels, neither fractions of the image nor a mask of 0 and 1"
        text = f"polygons cover no pixel of the image of {size[1]} × {size[0]} (width × height){hint}"
        raise Fault("empty mask", text)
    return Mask(parts, [xy.astype(np.float32) for xy in polygons], area, _extent(packed))


def _from_text(segmentation: Any, findings: Findings) -> Any:
    """The list or object that a text holds as JSON; anything else as it is."""
    if not isinstance(segmentation, str):
        return segmentation
    try:
        value = json.loads(segmentation)
    except (ValueError, RecursionError):
        return segmentation
    if not isinstance(value, list | dict):
        return segmentation
    findings.repairable("segmentation as text", f"segmentation must be a list or an object, got {show(segmentation)}")
    return value


def _unwrapped(segmentation: Any, findings: Findings) -> Any:
    """A segmentation without lists around it, or around a part, that hold nothing else.

    A list of several lists is left: the others may be parts, or holes as in GeoJSON.
    """
    if not isinstance(segmentation, list):
        return segmentation
    parts = [_innermost(part) for part in segmentation]
    found = parts[0] if len(parts) == 1 and isinstance(parts[0], dict) and "counts" in parts[0] else parts
    if found != segmentation:
        must = "an RLE must not be in a list" if isinstance(found, dict) else "a polygon must be in one list alone"
        findings.repairable("too many lists", f"{must}, got {show(segmentation)}")
    return found


def _innermost(part: Any) -> Any:
    while isinstance(part, list) and len(part) == 1 and isinstance(part[0], list):
        part = part[0]
    return part


def _from_points(part: Any) -> list[float] | None:
    """Coordinates x, y, x, y, … of points, each [x, y] or {"x": x, "y": y}; None for anything else."""
    if not isinstance(part, list) or not part:
        return None
    points: list[Any] = [[one.get("x"), one.get("y")] if isinstance(one, dict) else one for one in part]
    if not all(isinstance(point, list) and len(point) == 2 and numbers(point) is not None for point in points):
        return None
    return [value for point in points for value in point]


def _parts(segmentation: list[Any], findings: Findings) -> tuple[list[list[float]], list[NDArray[np.float64]]]:
    """Parts of at least three points, as in the file and as arrays [V, 2]; stray points and lines are left out."""
    if numbers(segmentation) is not None:
        findings.repairable("polygon not in a list", "segmentation must be a list of polygons, got a list of numbers")
        segmentation = [segmentation]
    else:
        whole = _from_points(segmentation) if len(segmentation) > 2 else None
        found = [_from_points(part) for part in segmentation]
        if whole is not None or any(part is not None for part in found):
            findings.repairable("polygon as points", "a polygon must be one list x, y, x, y, …, got a list of points")
            both = zip(found, segmentation, strict=True)
            segmentation = [whole] if whole else [part if points is None else points for points, part in both]
    parts, polygons = [], []
    for part in segmentation:
        values = numbers(part)
        if values is None:
            raise Fault(
                "bad polygon", f"polygon must be a list of finite numbers, at most {MAX_PX:,} px, got {show(part)}"
            )
        if len(part) % 2 or (len(part) < 6 and len(segmentation) == 1):
            raise Fault("bad polygon", f"polygon must have an even number of coordinates, at least 6, got {len(part)}")
        if len(part) >= 6:
            parts.append(part)
            polygons.append(values.reshape(-1, 2))
    if not parts:
        raise Fault("bad polygon", "no part has an area: a part must have at least 6 coordinates")
    if len(parts) < len(segmentation):
        stray = len(segmentation) - len(parts)
        findings.repaired("stray part", f"{stray} of {len(segmentation)} parts have less than three points; left out")
    return parts, polygons


def _rle_mask(rle: dict[str, Any], size: Size, findings: Findings, *, outline: bool) -> Mask:
    given, counts = (from_text(rle.get(key), f"RLE {key}", findings) for key in ("size", "counts"))
    counts = _from_bytes(counts, findings)
    if given != list(size):
        raise Fault("bad RLE", f"RLE size must be the image's {list(size)}, got {show(given)}")
    if not isinstance(counts, (str, list)):
        raise Fault("bad RLE", f"RLE counts must be a string or a list, got a {type(counts).__name__}")
    try:
        runs = rle_runs(counts)
    except ValueError as error:
        raise Fault("bad RLE", f"RLE: {error}") from error
    total = sum(runs.tolist())
    if total != size[0] * size[1]:
        text = f"RLE runs must add up to {size[0]} × {size[1]} (height × width) pixels, got {total}"
        raise Fault("bad RLE", text)
    clean = {"size": list(size), "counts": counts if isinstance(counts, str) else runs.tolist()}
    packed = clean if isinstance(counts, str) else coco_mask.frPyObjects(clean, *size)
    area = int(runs[1::2].sum())
    if not area:
        raise Fault("empty mask", f"RLE covers no pixel of the image of {size[0]} × {size[1]} (height × width)")
    polygons = mask_to_polygons(runs_to_mask(runs, size)) if outline else []
    return Mask(clean, polygons, area, _extent(packed))


def _from_bytes(counts: Any, findings: Findings) -> Any:
    """The text that Python's str() has made `b'…'` of, as it does of pycocotools' counts."""
    if not isinstance(counts, str) or not re.fullmatch(r"b'[0-o]*'", counts):
        return counts
    findings.repairable("RLE as Python's bytes", f"RLE counts must be the text alone, got {show(counts)}")
    return counts[2:-1].replace("\\\\", "\\")


def _extent(packed: Any) -> tuple[float, float, float, float]:
    """Box of a mask's pixels, xyxy."""
    x, y, width, height = coco_mask.toBbox(packed).tolist()
    return x, y, x + width, y + height
