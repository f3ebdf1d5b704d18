"""Codes of masks: those of torchvision's pasted masks."""

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch
from torchvision.models.detection.roi_heads import paste_masks_in_image

from cuda_ops import encode_masks

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # within pycocotools


def decoded(rle):
    return coco_mask.decode(coco_mask.frPyObjects(rle, *rle["size"]))


def test_a_box_full_of_mask_is_one_run_a_column():
    (rle,) = encode_masks(torch.ones(1, 28, 28), torch.tensor([[1.0, 1.0, 2.0, 3.0]]), (5, 4))
    mask = decoded(rle)
    assert mask[1:4, 1:3].all()
    assert rle["size"] == [5, 4]
    assert sum(rle["counts"]) == 20


def test_a_mask_over_the_whole_image_is_one_run():
    (rle,) = encode_masks(torch.ones(1, 28, 28), torch.tensor([[-50.0, -50.0, 60.0, 60.0]]), (4, 3))
    assert rle["counts"] == [0, 12]


@pytest.mark.parametrize("box", [[90.0, 90.0, 120.0, 120.0], [-40.0, 2.0, -20.0, 5.0], [3.0, 3.0, 3.0, 3.0]])
def test_a_mask_that_sets_no_pixel_is_one_run_of_zeros(box):
    (rle,) = encode_masks(torch.zeros(1, 28, 28), torch.tensor([box]), (6, 7))
    assert rle["counts"] == [42]
    (rle,) = encode_masks(torch.ones(1, 28, 28), torch.tensor([box]), (6, 7), threshold=1.0)
    assert rle["counts"] == [42]


@pytest.mark.parametrize("seed", range(60))
def test_codes_equal_the_pasted_masks_of_torchvision(seed):
    generator = torch.Generator().manual_seed(seed)
    side = [28, 28, 14, 7, 1][seed % 5]
    size = [(37, 53), (60, 41), (1, 30), (25, 1)][seed % 4]
    extent = torch.tensor([size[1], size[0]]) * 1.0
    centre = torch.rand(5, 2, generator=generator) * extent
    half_side = torch.rand(5, 2, generator=generator) ** 2 * extent * 0.8
    boxes = torch.cat((centre - half_side, centre + half_side), dim=1)  # many reach out of the image
    smooth = torch.nn.functional.interpolate(torch.rand(5, 1, 3, 3, generator=generator), side, mode="bilinear")[:, 0]
    probs = smooth if seed % 2 else torch.rand(5, side, side, generator=generator)
    expected = paste_masks_in_image(probs[:, None], boxes, size)[:, 0] > 0.5
    codes = encode_masks(probs, boxes, size)
    for code, mask in zip(codes, expected, strict=True):
        np.testing.assert_array_equal(decoded(code), mask.numpy())
        assert all(count > 0 for count in code["counts"][1:])
        column_major = np.asfortranarray(mask.numpy().astype(np.uint8))
        assert coco_mask.frPyObjects(code, *size) == coco_mask.encode(column_major)


def test_no_detections_have_no_codes():
    assert encode_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), (5, 5)) == []


def test_strides_and_precision_of_scores_do_not_matter():
    probs, boxes = torch.rand(2, 8, 8), torch.tensor([[1.0, 2.0, 9.0, 7.0], [0.0, 0.0, 20.0, 20.0]])
    strided = probs.permute(2, 1, 0).contiguous().permute(2, 1, 0), boxes.t().contiguous().t()
    assert encode_masks(*strided, (12, 15)) == encode_masks(probs, boxes, (12, 15))
