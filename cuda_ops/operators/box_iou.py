"""Overlap of boxes.

Shapes: A, B boxes; leading dimensions broadcast. Boxes are (x1, y1, x2, y2) in pixels.
"""

from typing import Any

import torch
from torch import Tensor

from cuda_ops import examples
from cuda_ops.boxes import box_area, widened
from cuda_ops.checks import require, require_boxes, require_one_device
from cuda_ops.declaration import Kernel, Operator

__all__ = ["box_iou"]


def box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Intersection over union of every pair.

    Args:
        boxes1: [..., A, 4] float.
        boxes2: [..., B, 4] float, same dtype; leading dimensions broadcast.

    Returns:
        [..., A, B], 0 to 1, dtype of the boxes; what is less than float32 is computed in it. Two boxes without area
        have IoU 0. Gradient flows to both; plain torch computes it.

    Raises:
        ValueError: if a shape or dtype is not as above.
    """
    require_boxes(boxes1, "box_iou", "boxes1")
    require_boxes(boxes2, "box_iou", "boxes2")
    require(boxes1.dtype == boxes2.dtype, "box_iou", "boxes2", f"{boxes1.dtype} as boxes1", boxes2.dtype)
    require_one_device("box_iou", boxes1=boxes1, boxes2=boxes2)
    return OPERATOR.on(boxes1.device)(widened(boxes1), widened(boxes2)).to(boxes1.dtype)


def _reference(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    one, two = boxes1[..., :, None, :], boxes2[..., None, :, :]
    inter = _overlap(one, two, axis=0).mul_(_overlap(one, two, axis=1))
    union = (box_area(boxes1)[..., :, None] + box_area(boxes2)[..., None, :]).sub_(inter)
    return inter.div_(union)


def _overlap(one: Tensor, two: Tensor, axis: int) -> Tensor:
    """Length that boxes share along x (axis 0) or y (axis 1)."""
    start = torch.maximum(one[..., axis], two[..., axis])
    return torch.minimum(one[..., axis + 2], two[..., axis + 2]).sub_(start).clamp_(min=0)


def _compiled(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    is_learned = torch.is_grad_enabled() and (boxes1.requires_grad or boxes2.requires_grad)
    if is_learned:  # the kernel has no gradient
        return _reference(boxes1, boxes2)
    leading = torch.broadcast_shapes(boxes1.shape[:-2], boxes2.shape[:-2])
    pairs = [
        boxes.expand(*leading, *boxes.shape[-2:]).flatten(0, -3) if leading else boxes[None]
        for boxes in (boxes1, boxes2)
    ]
    return torch.ops.cuda_ops.box_iou(*pairs).view(*leading, boxes1.shape[-2], boxes2.shape[-2])


def _fake(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    return boxes1.new_empty(boxes1.shape[0], boxes1.shape[1], boxes2.shape[1])


def _example(device: torch.device) -> dict[str, Any]:
    return {"boxes1": examples.boxes(50, device=device), "boxes2": examples.boxes(20, device=device)}


OPERATOR = Operator(
    function=box_iou,
    reference=_reference,
    compiled=_compiled,
    kernels=(Kernel("box_iou(Tensor boxes1, Tensor boxes2) -> Tensor", fake=_fake),),
    example=_example,
)
