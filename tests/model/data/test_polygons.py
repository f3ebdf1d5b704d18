"""Outlines of masks; the oracle is pycocotools' own rasteriser."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from model.data.polygons import mask_to_polygons


def rasterise(polygons: list[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    parts = coco_mask.frPyObjects([polygon.ravel().tolist() for polygon in polygons], *shape)
    return coco_mask.decode(coco_mask.merge(parts))


def test_a_rectangle_has_four_corners():
    mask = np.zeros((4, 5))
    mask[1:3, 1:4] = 1
    (polygon,) = mask_to_polygons(mask)
    assert sorted(map(tuple, polygon.tolist())) == [(1, 1), (1, 3), (4, 1), (4, 3)]


def test_an_empty_mask_has_no_polygon():
    assert mask_to_polygons(np.zeros((3, 3))) == []


def test_separate_blobs_are_separate_polygons():
    mask = np.zeros((3, 7))
    mask[:, 0:2] = mask[:, 4:7] = 1
    assert len(mask_to_polygons(mask)) == 2


def test_a_hole_stays_a_hole():
    mask = np.ones((7, 7))
    mask[2:5, 2:5] = 0
    mask[3, 3] = 1
    polygons = mask_to_polygons(mask)
    assert len(polygons) == 1
    assert np.array_equal(rasterise(polygons, (7, 7)), mask)


@pytest.mark.parametrize("density", [0.02, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (17, 1), (13, 31), (40, 24)])
def test_the_outline_of_a_random_mask_rasterises_to_the_mask(shape, density):
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = (rng.random(shape) < density).astype(np.uint8)
        polygons = mask_to_polygons(mask)
        assert bool(polygons) == bool(mask.any())
        if polygons:
            assert np.array_equal(rasterise(polygons, shape), mask)
