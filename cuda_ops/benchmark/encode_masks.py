"""Codes of 100 masks in an image of 800 × 1333, beside pasted masks that pycocotools encodes."""

import numpy as np
import pycocotools.mask as coco_mask
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.roi_heads import paste_masks_in_image

import cuda_ops
from cuda_ops.benchmark import Case, random_boxes
from cuda_ops.checks import Conventions


def cases(device: torch.device) -> list[Case]:
    return [_case(device, "detectron2"), _case(device, "torchvision")]


def _case(device: torch.device, conventions: Conventions) -> Case:
    axis = torch.linspace(-1, 1, 28)
    discs = (1.2 - (axis[:, None] ** 2 + axis**2).sqrt()).clamp(0, 1)  # around 0.5 at the rim of a disc
    probs, boxes = discs.expand(100, 28, 28).contiguous().to(device), random_boxes(100, device=device)
    height, width = 800, 1333

    def theirs() -> list[object]:
        if conventions == "torchvision":
            pasted = paste_masks_in_image(probs[:, None], boxes, (height, width))[:, 0] > 0.5
        else:
            pasted = torch.cat([_paste_exactly(*pair, (height, width)) for pair in zip(probs, boxes, strict=True)])
        return [coco_mask.encode(np.asfortranarray(mask)) for mask in pasted.cpu().numpy().astype(np.uint8)]

    return Case(
        f"encode_masks, 100 at 800×1333, {conventions}",
        lambda: cuda_ops.encode_masks(probs, boxes, (height, width), conventions=conventions),
        "paste + pycocotools",
        theirs,
    )


def _paste_exactly(probs: Tensor, box: Tensor, size: tuple[int, int]) -> Tensor:
    """A mask [M, M] pasted into an image [1, height, width] bool as Detectron2 does: on a CPU within the box alone."""
    height, width = size
    x1, y1, x2, y2 = box
    left, top, right, bottom = 0, 0, width, height
    if box.device.type == "cpu":
        left, top = max(int(x1) - 1, 0), max(int(y1) - 1, 0)
        right, bottom = min(int(x2) + 2, width), min(int(y2) + 2, height)
    x = (torch.arange(left, right, device=box.device) + 0.5 - x1) / (x2 - x1) * 2 - 1
    y = (torch.arange(top, bottom, device=box.device) + 0.5 - y1) / (y2 - y1) * 2 - 1
    grid = torch.stack((x.expand(len(y), -1), y[:, None].expand(-1, len(x))), dim=-1)
    pasted = torch.zeros(1, height, width, dtype=torch.bool, device=box.device)
    pasted[:, top:bottom, left:right] = F.grid_sample(probs[None, None], grid[None], align_corners=False)[:, 0] >= 0.5
    return pasted
