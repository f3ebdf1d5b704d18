"""Overlap of boxes, against torchvision; and the compiled operator against the reference."""

import random

import pytest
import torch
import torchvision

import cuda_ops
from cuda_ops import box_iou

compiled_only = pytest.mark.parametrize("backend", ["compiled"], indirect=True)


def test_boxes_that_share_a_quarter_of_their_union():
    one = torch.tensor([[0.0, 0.0, 4.0, 4.0]])
    two = torch.tensor([[0.0, 0.0, 4.0, 1.0], [4.0, 4.0, 8.0, 8.0], [0.0, 0.0, 4.0, 4.0]])
    assert box_iou(one, two).tolist() == [[0.25, 0.0, 1.0]]


def test_iou_equals_that_of_torchvision(seeds, random_boxes):
    for seed in seeds(200):
        one = random_boxes(2, 1 + seed % 7, seed=seed, whole=bool(seed % 2))
        two = random_boxes(2, 1 + seed % 5, seed=seed + 1, whole=bool(seed % 2))
        assert torch.equal(box_iou(one, two), torchvision.ops.box_iou(one, two).nan_to_num(0.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_iou_in_low_precision_is_that_of_float32_rounded_once(dtype, random_boxes):
    """Areas up to 400,000 px² are more than float16 holds."""
    one, two = (random_boxes(40, seed=seed, extent=1000.0).to(dtype) for seed in (0, 1))
    iou = box_iou(one, two)
    assert (iou > 0.1).any()
    assert torch.equal(iou, torchvision.ops.box_iou(one.float(), two.float()).nan_to_num(0.0).to(dtype))


def test_two_boxes_without_area_have_iou_0():
    point = torch.tensor([[3.0, 3.0, 3.0, 3.0]])
    assert box_iou(point, point).item() == 0


@pytest.mark.parametrize("shapes", [((0, 4), (3, 4)), ((2, 3, 4), (2, 0, 4)), ((0, 4), (0, 4))])
def test_iou_with_no_boxes_is_empty(shapes):
    one, two = (torch.zeros(shape) for shape in shapes)
    assert box_iou(one, two).shape == (*shapes[0][:-1], shapes[1][-2])


def test_leading_dimensions_broadcast_and_strides_do_not_matter(random_boxes):
    one, two = random_boxes(5, seed=0), random_boxes(3, 4, seed=1)
    strided = two.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    expected = torch.stack([torchvision.ops.box_iou(one, image) for image in two])
    assert torch.equal(box_iou(one, strided), expected)


def random_case(seed, random_boxes):
    """Two sets of boxes of awkward shapes: none, one, broadcast, strided, half, without area, not finite."""
    draw = random.Random(seed)
    leading = draw.choice([((), ()), ((3,), ()), ((), (2,)), ((2, 1), (1, 3)), ((0,), (0,)), ((2, 3), (2, 3))])
    whole = draw.random() < 0.5
    dtype = draw.choice([torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16])
    boxes = []
    for n, shape in enumerate(leading):
        own = random_boxes(*shape, draw.choice([0, 1, 2, 7, 33, 200]), seed=seed + n, whole=whole).to(dtype)
        for _ in range(draw.choice([0, 0, 4]) if own.numel() else 0):
            own.view(-1)[draw.randrange(own.numel())] = draw.choice([torch.nan, torch.inf, -torch.inf, 1e30])
        is_strided = draw.random() < 0.3
        boxes.append(own.transpose(-1, -2).contiguous().transpose(-1, -2) if is_strided else own)
    return boxes


@compiled_only
def test_compiled_iou_equals_that_of_the_reference(seeds, random_boxes):
    for seed in seeds(400):
        boxes1, boxes2 = random_case(seed, random_boxes)
        with cuda_ops.backend("reference"):
            expected = box_iou(boxes1, boxes2)
        iou = box_iou(boxes1, boxes2)
        assert iou.dtype == boxes1.dtype
        torch.testing.assert_close(iou, expected, rtol=0, atol=0, equal_nan=True)


@compiled_only
def test_iou_of_cuda_equals_that_of_the_reference(seeds, random_boxes, cuda):
    for seed in seeds(80):
        boxes1, boxes2 = random_case(seed, random_boxes)
        with cuda_ops.backend("reference"):
            expected = box_iou(boxes1, boxes2)
        iou = box_iou(boxes1.to(cuda), boxes2.to(cuda)).cpu()
        torch.testing.assert_close(iou, expected, rtol=0, atol=0, equal_nan=True)


def test_gradient_of_the_iou_reaches_both_boxes(random_boxes):
    pairs = [random_boxes(3, seed=seed).double().requires_grad_() for seed in (0, 1)]
    assert (box_iou(*pairs) > 0).any()
    assert torch.autograd.gradcheck(box_iou, pairs)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"boxes1": torch.zeros(2, 3, 3)}, r"boxes1 must be \[…, boxes, 4\] float, got \[2, 3, 3\] torch.float32"),
        ({"boxes2": torch.zeros(3, 4).double()}, r"boxes2 must be torch.float32 as boxes1, got torch.float64"),
    ],
)
def test_wrong_input_is_named(wrong, message):
    with pytest.raises(ValueError, match=f"^box_iou: {message}"):
        box_iou(**{"boxes1": torch.zeros(3, 4), "boxes2": torch.zeros(3, 4)} | wrong)
