"""IoU of 2,000 proposals and 512 RoIs, beside torchvision's."""

import torch
import torchvision

import cuda_ops
from cuda_ops.benchmark import Case, random_boxes


def cases(device: torch.device) -> list[Case]:
    one, two = random_boxes(2000, device=device), random_boxes(512, device=device)
    case = Case(
        "box_iou, 2,000 × 512",
        lambda: cuda_ops.box_iou(one, two),
        "torchvision box_iou",
        lambda: torchvision.ops.box_iou(one, two),
    )
    return [case]
