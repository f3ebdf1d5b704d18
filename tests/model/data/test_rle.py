"""Run-length encoding; the oracle is pycocotools."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from model.data.rle import rle_runs, runs_to_mask


@pytest.mark.parametrize("density", [0.0, 0.01, 0.5, 1.0])
def test_both_forms_decode_to_the_mask(density: float):
    mask = (np.random.default_rng(0).random((40, 70)) < density).astype(np.uint8)
    packed = coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
    runs = rle_runs(packed)
    assert np.array_equal(runs_to_mask(runs, (40, 70)), mask)
    assert np.array_equal(rle_runs(runs.tolist()), runs)


def test_a_long_run_takes_several_characters():
    packed = coco_mask.encode(np.asfortranarray(np.ones((2000, 1000), dtype=np.uint8)))["counts"].decode()
    assert rle_runs(packed).tolist() == [0, 2_000_000]


@pytest.mark.parametrize("counts", ["o", "1 2", [3, -1], [1.5], ["1"]])
def test_counts_that_are_no_runs_are_refused(counts: object):
    with pytest.raises(ValueError, match=r"runs must|compressed counts"):
        rle_runs(counts)  # type: ignore[arg-type]
