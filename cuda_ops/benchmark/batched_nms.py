"""Suppression of a batch's proposals, in one group and by level, beside torchvision's batched_nms."""

import torch
import torchvision

import cuda_ops
from cuda_ops.benchmark import Case, random_boxes


def cases(device: torch.device) -> list[Case]:
    return [_case(8819, 1, device), _case(8819, 5, device)]


def _case(num_boxes: int, num_groups: int, device: torch.device) -> Case:
    generator = torch.Generator().manual_seed(1)
    boxes, scores = random_boxes(1, num_boxes, device=device), torch.rand(1, num_boxes, generator=generator).to(device)
    groups = torch.randint(num_groups, (1, num_boxes), generator=generator).to(device)
    return Case(
        f"batched_nms, {num_boxes:,} boxes, {num_groups} group{'s' if num_groups > 1 else ''}",
        lambda: cuda_ops.batched_nms(boxes, scores, 0.7, num_boxes, groups if num_groups > 1 else None),
        "torchvision batched_nms",
        lambda: torchvision.ops.batched_nms(boxes[0], scores[0], groups[0], 0.7),
    )
