"""Masks of objects in other forms than COCO's run-length encoding: arrays, and outlines as polygons."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from model.data.polygons import mask_to_polygons

Rle = dict[str, Any]  # "size", "counts"


def mask_of(rle: Rle) -> NDArray[np.bool_]:
    """The mask, [height, width]."""
    mask: NDArray[np.bool_] = coco_mask.decode(rle).astype(bool)
    return mask


def polygons_of(rle: Rle) -> list[NDArray[np.float32]]:
    """The outlines of a mask, [V, 2] each, (x, y) in pixels: pycocotools makes the same mask of them."""
    left, top, width, height = (int(value) for value in coco_mask.toBbox(rle))
    inside = mask_of(rle)[top : top + height, left : left + width]
    return [polygon + np.array([left, top], dtype=np.float32) for polygon in mask_to_polygons(inside)]
