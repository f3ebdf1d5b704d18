"""Masks of objects in other forms than COCO's run-length encoding: arrays, and outlines as polygons."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from model.data.polygons import mask_to_polygons
from model.data.rle import rle_runs

Rle = dict[str, Any]  # "size", "counts"


def mask_of(rle: Rle) -> NDArray[np.bool_]:
    """The mask, [height, width]."""
    mask: NDArray[np.bool_] = coco_mask.decode(rle).astype(bool)
    return mask


def polygons_of(rle: Rle) -> list[NDArray[np.float32]]:
    """The outlines of a mask, [V, 2] each, (x, y) in pixels: pycocotools makes the same mask of them.

    A mask with a hole is one polygon, with a bridge to the hole and back; the hole runs the other way round.
    """
    inside, left, top = cropped_mask(rle)
    offset = np.array([left, top], dtype=np.float32)
    return [polygon + offset for polygon in mask_to_polygons(inside, reverses_holes=True)]


def cropped_mask(rle: Mapping[str, Any]) -> tuple[NDArray[np.bool_], int, int]:
    """The part of a mask in its box, [h, w], and the box's left and top: what lies around it costs nothing."""
    left, top, width, height = (int(value) for value in coco_mask.toBbox(rle))
    rows = int(rle["size"][0])
    counts = rle["counts"]
    ends = np.cumsum(rle_runs(counts if isinstance(counts, str) else counts.decode()))
    starts, ends = ends[:-1:2] - left * rows, ends[1::2] - left * rows
    steps = np.zeros(width * rows + 1, dtype=np.int8)
    steps[starts] += 1
    steps[ends] -= 1
    inside = np.cumsum(steps[:-1], dtype=np.int8).reshape(width, rows).T[top : top + height]
    return inside.astype(bool), left, top
