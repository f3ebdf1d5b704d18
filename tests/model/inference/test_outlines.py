"""Masks as polygons and as parts of the image."""

import numpy as np
import pytest
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from model.inference.outlines import cropped_mask, mask_of, polygons_of


def rle_of(mask: NDArray[np.bool_]) -> dict:
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": rle["counts"].decode()}


def shoelace(polygon: NDArray[np.float32]) -> float:
    x, y = polygon.T.astype(np.float64)
    return abs((x * np.roll(y, -1) - y * np.roll(x, -1)).sum()) / 2


def masks() -> list[NDArray[np.bool_]]:
    ring = np.zeros((9, 11), dtype=bool)
    ring[2:7, 3:8] = True
    ring[4, 5] = False
    two = ring.copy()
    two[0, 10] = two[8, 0] = True
    random = np.random.default_rng(0).random((20, 30)) < 0.6
    return [ring, two, random, np.ones((4, 5), dtype=bool), random & False]


@pytest.mark.parametrize("number", range(5))
def test_polygons_have_the_masks_pixels_and_its_area(number: int) -> None:
    mask = masks()[number]
    polygons = polygons_of(rle_of(mask))
    parts = [polygon.ravel().tolist() for polygon in polygons]
    found = (
        coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(parts, *mask.shape))) if parts else np.zeros(mask.shape)
    )
    assert (found == mask).all()
    assert sum(map(shoelace, polygons)) == mask.sum(), "a hole counts against it"


@pytest.mark.parametrize("number", range(5))
def test_the_cropped_mask_is_the_mask_in_its_box(number: int) -> None:
    mask = masks()[number]
    inside, left, top = cropped_mask(rle_of(mask))
    whole = np.zeros_like(mask)
    whole[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    assert (whole == mask).all()
    assert (mask_of(rle_of(mask)) == mask).all()
    if mask.any():
        assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()  # noqa: PT018
