"""Matching: torchvision's Matcher on the real rows, image by image; and the compiled operator against the reference."""

import random

import pytest
import torch
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from cuda_ops import BACKGROUND, IGNORE, generate_anchors, match_boxes, reference

compiled_only = pytest.mark.parametrize("backend", ["compiled"], indirect=True)
GT = torch.tensor([[[0.0, 0.0, 10.0, 10.0]]])
ONE = torch.tensor([1])


def torchvision_matches(boxes, gt_boxes, num_gt, fg_iou, bg_iou, low_quality):
    """As torchvision, except that a ground truth without overlap marks no box (torchvision would mark all)."""
    rows = []
    for n, count in enumerate(num_gt.tolist()):
        own = boxes if boxes.dim() == 2 else boxes[n]
        iou = box_iou(gt_boxes[n, :count], own).nan_to_num(0.0)
        if not count:
            rows.append(torch.full((len(own),), BACKGROUND))
            continue
        matcher = Matcher(fg_iou, bg_iou, allow_low_quality_matches=False)
        matches = matcher(iou)
        if low_quality:
            has_overlap = iou.amax(1) > 0
            if has_overlap.any():
                is_best = ((iou == iou.amax(1, keepdim=True)) & has_overlap[:, None]).any(0)
                matches[is_best] = iou.max(0).indices[is_best]
                if has_overlap.all():
                    assert torch.equal(matches, Matcher(fg_iou, bg_iou, allow_low_quality_matches=True)(iou))
        rows.append(matches)
    return torch.stack(rows)


@pytest.mark.parametrize(("width", "expected"), [(8.0, 0), (7.0, 0), (5.0, IGNORE), (3.0, IGNORE), (2.0, BACKGROUND)])
def test_a_box_learns_is_ignored_or_is_background_by_its_iou(width, expected):
    boxes = torch.tensor([[0.0, 0.0, width, 10.0]])  # IoU = width / 10
    assert match_boxes(boxes, GT, ONE, 0.7, 0.3).tolist() == [[expected]]


def test_the_best_box_of_a_ground_truth_learns_it_however_low_its_iou():
    boxes = torch.tensor([[0.0, 0.0, 2.0, 10.0], [0.0, 0.0, 1.0, 10.0], [8.0, 0.0, 10.0, 10.0]])
    assert match_boxes(boxes, GT, ONE, 0.7, 0.3, low_quality=True).tolist() == [[0, BACKGROUND, 0]]


def test_a_ground_truth_that_overlaps_nothing_marks_no_box():
    boxes = torch.tensor([[20.0, 20.0, 30.0, 30.0]])
    assert match_boxes(boxes, GT, ONE, 0.7, 0.3, low_quality=True).tolist() == [[BACKGROUND]]


def test_of_equal_ground_truths_the_lowest_row_wins():
    assert match_boxes(GT[0], GT.repeat(1, 3, 1), torch.tensor([3]), 0.7, 0.3).tolist() == [[0]]


def test_matches_equal_those_of_torchvision(seeds, random_boxes):
    for seed in seeds(120):
        num_rows = 1 + seed % 6
        gt_boxes = random_boxes(2, num_rows, seed=seed, whole=bool(seed % 2))
        num_boxes = 600 if seed % 8 == 0 else 40
        shape = (num_boxes,) if seed % 3 else (2, num_boxes)
        boxes = random_boxes(*shape, seed=seed + 1, whole=bool(seed % 2))
        boxes[..., :3, :] = gt_boxes[0, 0]  # an exact hit, three times
        num_gt = torch.tensor([num_rows, seed % (num_rows + 1)], dtype=torch.int32)
        for arguments in ((0.7, 0.3, True), (0.5, 0.5, False), (0.5, 0.1, True), (0.3, 0.0, False)):
            expected = torchvision_matches(boxes, gt_boxes, num_gt, *arguments)
            assert torch.equal(match_boxes(boxes, gt_boxes, num_gt, *arguments), expected)


def test_rows_of_padding_are_never_matched(random_boxes):
    boxes = random_boxes(30, seed=0)
    gt_boxes = boxes[None, :5].clone()
    assert match_boxes(boxes, gt_boxes, torch.tensor([2]), 0.7, 0.3, low_quality=True).max() == 1


@pytest.mark.parametrize("num_rows", [0, 3])
def test_without_ground_truth_all_is_background(num_rows, random_boxes):
    matches = match_boxes(
        random_boxes(7, seed=0),
        torch.zeros(2, num_rows, 4),
        torch.zeros(2, dtype=torch.int32),
        0.5,
        0.0,
        low_quality=True,
    )
    assert matches.tolist() == [[BACKGROUND] * 7] * 2


def test_no_boxes_have_no_matches():
    assert match_boxes(torch.zeros(0, 4), GT, ONE, 0.7, 0.3, low_quality=True).shape == (1, 0)


def test_strides_do_not_matter(random_boxes):
    boxes, gt_boxes = random_boxes(2, 20, seed=0), random_boxes(2, 4, seed=1)
    num_gt = torch.tensor([4, 2])
    strided = [tensor.permute(2, 1, 0).contiguous().permute(2, 1, 0) for tensor in (boxes, gt_boxes)]
    expected = match_boxes(boxes, gt_boxes, num_gt, 0.5, 0.3)
    assert torch.equal(match_boxes(*strided, num_gt, 0.5, 0.3), expected)


def random_case(seed, random_boxes):
    """Arguments of awkward shapes: none or one of anything, several tiles, ties, strides, thresholds that IoUs just
    reach.
    """
    draw = random.Random(seed)
    num_images, num_rows = draw.choice([0, 1, 2, 3]), draw.choice([0, 1, 2, 5, 33, 70])
    num_boxes = draw.choice([0, 1, 2, 31, 33, 255, 256, 257, 700])
    extent, whole, is_shared = draw.choice([40.0, 400.0, 4000.0]), draw.random() < 0.5, draw.random() < 0.5
    dtype = draw.choice([torch.float32, torch.float64])
    shape = (num_boxes,) if is_shared else (num_images, num_boxes)
    boxes = random_boxes(*shape, seed=seed, extent=extent, whole=whole).to(dtype)
    gt_boxes = random_boxes(num_images, num_rows, seed=seed + 1, extent=extent, whole=whole).to(dtype)
    if gt_boxes.numel() and boxes.numel():
        boxes[..., : num_boxes // 3, :] = gt_boxes[0, draw.randrange(num_rows)]  # ties
    if draw.random() < 0.3:
        boxes = boxes.transpose(0, -1).contiguous().transpose(0, -1)
        gt_boxes = gt_boxes.flip(-1) if draw.random() < 0.3 else gt_boxes.repeat_interleave(2, dim=-1)[..., ::2]
    num_gt = torch.tensor([draw.randint(0, num_rows) for _ in range(num_images)])
    thresholds = sorted(draw.choice([0.0, 0.3, 0.5, 0.7, draw.random()]) for _ in range(2))
    own = boxes if boxes.dim() == 2 else boxes[:1].flatten(0, 1)
    overlaps = [iou for iou in box_iou(own, gt_boxes[:1].flatten(0, 1)).unique().tolist() if 0 <= iou <= 1]
    if overlaps and draw.random() < 0.5:
        thresholds = sorted(draw.choice(overlaps) for _ in range(2))
    num_gt = num_gt.to(draw.choice([torch.int32, torch.int64]))
    return boxes, gt_boxes, num_gt, thresholds[1], thresholds[0], draw.random() < 0.7


@compiled_only
def test_compiled_matches_equal_those_of_the_reference(seeds, random_boxes):
    for seed in seeds(400):
        arguments = random_case(seed, random_boxes)
        assert torch.equal(match_boxes(*arguments), reference.match_boxes(*arguments))


@compiled_only
def test_matches_of_cuda_equal_those_of_the_reference(seeds, random_boxes, cuda):
    for seed in seeds(80):
        boxes, gt_boxes, num_gt, *settings = random_case(seed, random_boxes)
        matches = match_boxes(boxes.to(cuda), gt_boxes.to(cuda), num_gt.to(cuda), *settings)
        assert torch.equal(matches.cpu(), reference.match_boxes(boxes, gt_boxes, num_gt, *settings))


def unruly_case(seed, random_boxes):
    """Arguments with numbers that no box should have, in boxes and in rows that count."""
    draw = random.Random(seed)
    boxes, gt_boxes = random_boxes(300, seed=seed) + draw.choice([0, 500]), random_boxes(2, 5, seed=seed + 1)
    for values, count in ((boxes.view(-1), draw.choice([0, 1, 40])), (gt_boxes.view(-1), draw.choice([0, 1, 3]))):
        for _ in range(count):
            values[draw.randrange(len(values))] = draw.choice(
                [torch.nan, torch.inf, -torch.inf, 1e18, 3e38, -3e38, 1e-40]
            )
    return boxes, gt_boxes, torch.tensor([5, 5]), 0.5, 0.3, seed % 2 == 0


@compiled_only
def test_compiled_matches_of_boxes_that_are_not_finite_equal_those_of_the_reference(seeds, random_boxes):
    for seed in seeds(200):
        arguments = unruly_case(seed, random_boxes)
        assert torch.equal(match_boxes(*arguments), reference.match_boxes(*arguments))


@compiled_only
def test_matches_of_cuda_of_boxes_that_are_not_finite_equal_those_of_the_reference(seeds, random_boxes, cuda):
    for seed in seeds(40):
        boxes, gt_boxes, num_gt, *settings = unruly_case(seed, random_boxes)
        matches = match_boxes(boxes.to(cuda), gt_boxes.to(cuda), num_gt.to(cuda), *settings)
        assert torch.equal(matches.cpu(), reference.match_boxes(boxes, gt_boxes, num_gt, *settings))


@compiled_only
def test_anchors_of_a_pyramid_match_as_in_torchvision_with_any_number_of_threads(random_boxes):
    sizes = [(104, 168), (52, 84), (26, 42), (13, 21), (7, 11)]
    anchors = generate_anchors(sizes, (416, 672), ((32,), (64,), (128,), (256,), (512,)), (0.5, 1.0, 2.0))
    gt_boxes = random_boxes(2, 20, seed=0, extent=400.0)
    num_gt = torch.tensor([20, 3])
    expected = torchvision_matches(anchors, gt_boxes, num_gt, 0.7, 0.3, True)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(match_boxes(anchors, gt_boxes, num_gt, 0.7, 0.3, low_quality=True), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("count_dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_any_float_and_any_int_will_do(dtype, count_dtype):
    boxes = torch.tensor([[0.0, 0.0, 8.0, 10.0], [0.0, 0.0, 5.0, 10.0], [0.0, 0.0, 2.0, 10.0]], dtype=dtype)
    matches = match_boxes(boxes, GT.to(dtype), ONE.to(count_dtype), 0.7, 0.3)
    assert matches.dtype == torch.int64
    assert matches.tolist() == [[0, IGNORE, BACKGROUND]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_boxes_in_low_precision_match_as_in_float32(dtype, random_boxes):
    """Their areas are more than 65,504 px², which float16 does not hold."""
    large = torch.tensor([0, 0, 300, 300])
    boxes, gt_boxes = (
        (random_boxes(*shape, seed=n, extent=500.0) + large).to(dtype) for n, shape in enumerate([(60,), (1, 9)])
    )
    arguments = (torch.tensor([9]), 0.3, 0.2, True)
    expected = match_boxes(boxes.float(), gt_boxes.float(), *arguments)
    assert len(expected.unique()) > 5
    assert torch.equal(match_boxes(boxes, gt_boxes, *arguments), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_iou_equal_to_a_threshold_in_its_own_dtype_reaches_it(dtype):
    boxes = torch.tensor([[0.0, 0.0, 7.0, 10.0], [0.0, 0.0, 3.0, 10.0]], dtype=dtype)  # float32 of 0.7 is less than 0.7
    gt_boxes = GT.to(dtype)
    assert match_boxes(boxes, gt_boxes, ONE, 0.7, 0.3).tolist() == [[0, IGNORE]]
    above = torch.nextafter(torch.tensor([0.7, 0.3], dtype=dtype), torch.tensor(1.0, dtype=dtype)).tolist()
    assert match_boxes(boxes, gt_boxes, ONE, *above).tolist() == [[IGNORE, BACKGROUND]]


def test_boxes_that_learn_elsewhere_get_no_gradient_here(random_boxes):
    boxes = random_boxes(5, seed=0).requires_grad_()
    assert not match_boxes(boxes, boxes[None], torch.tensor([5]), 0.7, 0.3).requires_grad


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"boxes": torch.zeros(2, 3, 4)}, r"boxes must be of 1 images, got \[2, 3, 4\]"),
        ({"gt_boxes": GT.long()}, r"gt_boxes must be \[…, boxes, 4\] float, got .* torch.int64"),
        ({"num_gt": ONE.float()}, r"num_gt must be \[1\] int, got \[1\] torch.float32"),
        ({"num_gt": ONE.bool()}, r"num_gt must be \[1\] int, got \[1\] torch.bool"),
        ({"num_gt": ONE.to(torch.uint64)}, r"num_gt must be \[1\] int, got \[1\] torch.uint64"),
        ({"bg_iou": 0.8}, r"bg_iou must be at most fg_iou \(0.7\), got 0.8"),
    ],
)
def test_wrong_input_is_named(wrong, message):
    right = {"boxes": GT[0], "gt_boxes": GT, "num_gt": ONE, "fg_iou": 0.7, "bg_iou": 0.3}
    with pytest.raises(ValueError, match=f"^match_boxes: {message}"):
        match_boxes(**right | wrong)
