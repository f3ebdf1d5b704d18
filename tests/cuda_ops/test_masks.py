"""Codes of masks: what pycocotools makes of torchvision's pasted masks, byte for byte."""

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch
from torch.nn import functional as F
from torchvision.models.detection.roi_heads import paste_masks_in_image

import cuda_ops
from cuda_ops import encode_masks

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # within pycocotools

only_compiled = pytest.mark.parametrize("backend", ["compiled"], indirect=True)


def coded(mask):
    return coco_mask.encode(np.asfortranarray(np.asarray(mask, dtype=np.uint8)))


def test_a_box_full_of_mask_is_one_run_a_column():
    (rle,) = encode_masks(torch.ones(1, 28, 28), torch.tensor([[1.0, 1.0, 2.0, 3.0]]), (5, 4))
    mask = coco_mask.decode(rle)
    assert mask[1:4, 1:3].all()
    assert rle["size"] == [5, 4]
    assert isinstance(rle["counts"], bytes)


def test_a_mask_over_the_whole_image_is_one_run():
    (rle,) = encode_masks(torch.ones(1, 28, 28), torch.tensor([[-50.0, -50.0, 60.0, 60.0]]), (4, 3))
    assert rle == coded(np.ones((4, 3)))


@pytest.mark.parametrize("box", [[90.0, 90.0, 120.0, 120.0], [-40.0, 2.0, -20.0, 5.0], [3.0, 3.0, 3.0, 3.0]])
@pytest.mark.parametrize("size", [(6, 7), (3000, 2000)])
def test_a_mask_that_sets_no_pixel_is_one_run_of_zeros(box, size):
    empty = coded(np.zeros(size))
    assert encode_masks(torch.zeros(1, 28, 28), torch.tensor([box]), size) == [empty]
    assert encode_masks(torch.ones(1, 28, 28), torch.tensor([box]), size, threshold=1.0) == [empty]


def random_case(seed):
    """Masks and boxes, many of which reach out of the image, and a threshold; every other time that of some very pixel."""
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if seed % 5 == 4 else torch.float32
    num_masks, side = 5 if seed % 20 else 0, [28, 28, 14, 7, 1, 56][seed % 6]
    size = [(37, 53), (160, 141), (1, 230), (225, 1), (97, 260)][seed % 7 % 5]
    extent = torch.tensor([size[1], size[0]], dtype=dtype)
    centre = torch.rand(num_masks, 2, generator=generator, dtype=dtype) * extent
    half_side = torch.rand(num_masks, 2, generator=generator, dtype=dtype) ** 2 * extent * 0.8
    boxes = torch.cat((centre - half_side, centre + half_side), dim=1)
    boxes = boxes.round() if seed % 3 == 0 else boxes
    coarse = torch.rand(max(num_masks, 1), 1, 3, 3, generator=generator, dtype=dtype)
    smooth = F.interpolate(coarse, side, mode="bilinear")[:num_masks, 0]
    noise = torch.rand(num_masks, side, side, generator=generator, dtype=dtype)
    probs = [smooth, noise, (smooth > 0.5).to(dtype), (smooth * 4).round() / 4][seed % 4]
    pasted = paste_masks_in_image(probs[:, None], boxes, size)[:, 0] if num_masks else probs.new_zeros(0, *size)
    threshold = 0.5
    if seed % 2 and pasted.any():
        threshold = pasted[pasted > 0][seed % int((pasted > 0).sum())].item()
    return probs, boxes, size, threshold, pasted


@pytest.mark.parametrize("seed", range(240))
def test_codes_equal_those_of_the_pasted_masks_of_torchvision(seed):
    probs, boxes, size, threshold, pasted = random_case(seed)
    assert encode_masks(probs, boxes, size, threshold) == [coded(mask > threshold) for mask in pasted]


@only_compiled
@pytest.mark.parametrize("seed", range(240, 480))
def test_compiled_codes_equal_those_of_the_reference(seed):
    probs, boxes, size, threshold, _ = random_case(seed)
    codes = encode_masks(probs, boxes, size, threshold)
    with cuda_ops.backend("reference"):
        assert codes == encode_masks(probs, boxes, size, threshold)


@pytest.mark.gpu
@only_compiled
@pytest.mark.parametrize("seed", range(240))
def test_codes_of_a_gpu_equal_those_of_the_pasted_masks_of_torchvision(seed):
    probs, boxes, size, threshold, pasted = random_case(seed)
    codes = encode_masks(probs.cuda(), boxes.cuda(), size, threshold)
    assert codes == [coded(mask > threshold) for mask in pasted]


@pytest.mark.gpu
@only_compiled
def test_codes_of_a_gpu_equal_those_of_the_cpu_where_columns_outnumber_threads():
    probs, boxes = (
        torch.rand(3, 28, 28),
        torch.tensor([[-9.0, -9.0, 2000.0, 900.0], [3.0, 5.0, 1990.0, 700.0], [900.0, 1.0, 1300.0, 99.0]]),
    )
    assert encode_masks(probs.cuda(), boxes.cuda(), (600, 1900)) == encode_masks(probs, boxes, (600, 1900))


@only_compiled
def test_torch_knows_enough_of_the_compiled_operator():
    args = (torch.rand(2, 7, 7), torch.tensor([[1.0, 2.0, 9.0, 7.0], [0.0, 0.0, 20.0, 20.0]]), 12, 15, 0.5)
    assert set(torch.library.opcheck(torch.ops.cuda_ops.encode_masks.default, args).values()) == {"SUCCESS"}


@pytest.mark.parametrize("size", [(40, 50), (50, 40), (30, 21)])
def test_runs_that_go_on_over_columns_are_one(size):
    """Masks that touch top and bottom, the last pixel, or all four sides."""
    height, width = size
    boxes = torch.tensor([[10.0, -99.0, 20.0, 200.0], [5.0, 5.0, 300.0, 300.0], [-200.0, -200.0, 300.0, 300.0]])
    pasted = paste_masks_in_image(torch.ones(3, 1, 14, 14), boxes, size)[:, 0] > 0.5
    codes = encode_masks(torch.ones(3, 14, 14), boxes, size)
    assert codes == [coded(mask) for mask in pasted]
    assert [int(coco_mask.area(code)) for code in codes] == pasted.sum((1, 2)).tolist()
    assert int(coco_mask.area(codes[2])) == height * width


def test_no_detections_have_no_codes():
    assert encode_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), (5, 5)) == []


def test_strides_of_scores_and_boxes_do_not_matter():
    probs, boxes = torch.rand(2, 8, 8), torch.tensor([[1.0, 2.0, 9.0, 7.0], [0.0, 0.0, 20.0, 20.0]])
    strided = probs.permute(2, 1, 0).contiguous().permute(2, 1, 0), boxes.t().contiguous().t()
    assert encode_masks(*strided, (12, 15)) == encode_masks(probs, boxes, (12, 15))


@pytest.mark.parametrize(
    "dtypes", [(torch.float64, torch.float32), (torch.float32, torch.float64), (torch.bfloat16, torch.float32)]
)
def test_scores_and_boxes_may_differ_in_precision(dtypes):
    probs = (torch.rand(2, 8, 8) > 0.4).to(dtypes[0])
    boxes = torch.tensor([[1.0, 2.0, 9.0, 7.0], [0.0, 0.0, 20.0, 20.0]], dtype=dtypes[1])
    pasted = paste_masks_in_image(probs[:, None], boxes, (12, 15))[:, 0]
    assert encode_masks(probs, boxes, (12, 15)) == [coded(mask > 0.5) for mask in pasted]


@only_compiled
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_a_box_or_score_that_is_no_number_does_no_harm(value):
    probs, boxes = torch.rand(5, 8, 8), torch.tensor([[1.0, 2.0, 9.0, 7.0]]).repeat(5, 1)
    boxes[torch.arange(4), torch.arange(4)] = value
    probs[4, 2:5, 3] = value
    for code in encode_masks(probs, boxes, (12, 15)):
        assert coco_mask.decode(code).shape == (12, 15)
