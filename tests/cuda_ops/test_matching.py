"""Matching: torchvision's Matcher on the real rows, image by image."""

import pytest
import torch
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from cuda_ops import BACKGROUND, IGNORE, match_boxes

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


@pytest.mark.parametrize("seed", range(120))
def test_matches_equal_those_of_torchvision(seed, random_boxes):
    num_rows = 1 + seed % 6
    gt_boxes = random_boxes(2, num_rows, seed=seed, whole=bool(seed % 2))
    shape = (40,) if seed % 3 else (2, 40)
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
