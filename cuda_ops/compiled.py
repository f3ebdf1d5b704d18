"""The compiled operators, with the signatures of `reference`. Arguments were checked in ops.py.

Each kernel lives in csrc/<operator>.cpp and .cu; what torch must know besides (shapes without data, gradients) stands in
registration.py.
"""

import torch
from torch import Tensor

import cuda_ops.registration  # noqa: F401  # tells torch of shapes and gradients
from cuda_ops import reference

_ops = torch.ops.cuda_ops


def box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """See `cuda_ops.box_iou`."""
    leading = torch.broadcast_shapes(boxes1.shape[:-2], boxes2.shape[:-2])
    pairs = [
        boxes.expand(*leading, *boxes.shape[-2:]).flatten(0, -3) if leading else boxes[None]
        for boxes in (boxes1, boxes2)
    ]
    return _ops.box_iou(*pairs).view(*leading, boxes1.shape[-2], boxes2.shape[-2])


# Not compiled yet.
batched_nms = reference.batched_nms
encode_masks = reference.encode_masks
generate_anchors = reference.generate_anchors
match_boxes = reference.match_boxes
multilevel_roi_align = reference.multilevel_roi_align
rasterize_polygons = reference.rasterize_polygons
select_proposals = reference.select_proposals
