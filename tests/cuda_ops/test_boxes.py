"""Overlap and the code of boxes, against torchvision; and the compiled overlap against the reference."""

import random

import pytest
import torch
import torchvision
from torchvision.models.detection._utils import BoxCoder

import cuda_ops
from cuda_ops import box_iou, decode_boxes, encode_boxes

compiled_only = pytest.mark.parametrize("backend", ["compiled"], indirect=True)


def test_boxes_that_share_a_quarter_of_their_union():
    one = torch.tensor([[0.0, 0.0, 4.0, 4.0]])
    two = torch.tensor([[0.0, 0.0, 4.0, 1.0], [4.0, 4.0, 8.0, 8.0], [0.0, 0.0, 4.0, 4.0]])
    assert box_iou(one, two).tolist() == [[0.25, 0.0, 1.0]]


@pytest.mark.parametrize("seed", range(200))
def test_iou_equals_that_of_torchvision(seed, random_boxes):
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
@pytest.mark.parametrize("seed", range(400))
def test_compiled_iou_equals_that_of_the_reference(seed, random_boxes):
    boxes1, boxes2 = random_case(seed, random_boxes)
    with cuda_ops.backend("reference"):
        expected = box_iou(boxes1, boxes2)
    iou = box_iou(boxes1, boxes2)
    assert iou.dtype == boxes1.dtype
    torch.testing.assert_close(iou, expected, rtol=0, atol=0, equal_nan=True)


@compiled_only
@pytest.mark.parametrize("seed", range(80))
def test_iou_of_cuda_equals_that_of_the_reference(seed, random_boxes, cuda):
    boxes1, boxes2 = random_case(seed, random_boxes)
    with cuda_ops.backend("reference"):
        expected = box_iou(boxes1, boxes2)
    iou = box_iou(boxes1.to(cuda), boxes2.to(cuda)).cpu()
    torch.testing.assert_close(iou, expected, rtol=0, atol=0, equal_nan=True)


@compiled_only
def test_torch_knows_the_compiled_iou(random_boxes):
    arguments = (random_boxes(2, 5, seed=0), random_boxes(2, 3, seed=1))
    assert set(torch.library.opcheck(torch.ops.cuda_ops.box_iou.default, arguments).values()) == {"SUCCESS"}


def test_gradient_of_the_iou_reaches_both_boxes(random_boxes):
    pairs = [random_boxes(3, seed=seed).double().requires_grad_() for seed in (0, 1)]
    assert (box_iou(*pairs) > 0).any()
    assert torch.autograd.gradcheck(box_iou, pairs)


@pytest.mark.parametrize("seed", range(100))
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)])
def test_code_equals_that_of_torchvision(seed, weights, random_boxes):
    gt_boxes, anchors = (
        random_boxes(6, seed=seed) + torch.tensor([0, 0, 1, 1]),
        random_boxes(6, seed=seed + 1) + torch.tensor([0, 0, 1, 1]),
    )
    coder = BoxCoder(weights)
    deltas = encode_boxes(gt_boxes, anchors, weights)
    torch.testing.assert_close(deltas, coder.encode_single(gt_boxes, anchors), rtol=1e-6, atol=1e-6)
    steps = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)) * 8
    torch.testing.assert_close(
        decode_boxes(steps, anchors, weights), coder.decode_single(steps, anchors), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(decode_boxes(deltas, anchors, weights), gt_boxes, rtol=1e-4, atol=1e-3)


def test_a_box_grows_62_and_a_half_times_at_most():
    anchor = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
    x1, _, x2, _ = decode_boxes(torch.tensor([[0.0, 0.0, 99.0, 99.0]]), anchor)[0].tolist()
    assert x2 - x1 == pytest.approx(125.0)


def test_code_of_padding_is_finite(random_boxes):
    nothing, boxes = torch.zeros(4, 4), random_boxes(4, seed=0, extent=2000.0)
    for gt_boxes, anchors in ((nothing, nothing), (nothing, boxes), (boxes, nothing), (boxes.flip(-1), boxes)):
        assert encode_boxes(gt_boxes, anchors, (10.0, 10.0, 5.0, 5.0)).isfinite().all()


def test_gradient_reaches_the_deltas(random_boxes):
    deltas = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    anchors = random_boxes(3, seed=0).double() + torch.tensor([0, 0, 1, 1])
    assert torch.autograd.gradcheck(lambda d: decode_boxes(d, anchors), deltas)
