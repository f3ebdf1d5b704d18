"""Anchors matched with many and with few ground truths, beside torchvision's box_iou and Matcher."""

import torch
import torchvision
from torchvision.models.detection._utils import Matcher

import cuda_ops
from cuda_ops.benchmark import Case, anchors, random_boxes


def cases(device: torch.device) -> list[Case]:
    return [_case(64, device), _case(8, device)]


def _case(num_gt: int, device: torch.device) -> Case:
    boxes, gt_boxes = anchors(device), random_boxes(1, num_gt, device=device)
    counts = torch.tensor([num_gt], device=device)
    matcher = Matcher(0.7, 0.3, allow_low_quality_matches=True)
    return Case(
        f"match_boxes, {num_gt} ground truths",
        lambda: cuda_ops.match_boxes(boxes, gt_boxes, counts, 0.7, 0.3, low_quality=True),
        "box_iou + Matcher",
        lambda: matcher(torchvision.ops.box_iou(gt_boxes[0], boxes)),
    )
