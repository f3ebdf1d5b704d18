"""Matching of boxes with the ground truth that they should learn.

Shapes: N images, A boxes, G ground-truth rows (padded). Boxes are (x1, y1, x2, y2) in input pixels.
Source: Faster R-CNN (arXiv:1506.01497), section 3.1.2.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cuda_ops import examples
from cuda_ops.boxes import box_area, widened
from cuda_ops.checks import is_integer, kind, require, require_boxes, require_one_device
from cuda_ops.declaration import Kernel, Operator
from cuda_ops.operators import generate_anchors

__all__ = ["BACKGROUND", "IGNORE", "match_boxes"]

BACKGROUND = -1
IGNORE = -2


def match_boxes(
    boxes: Tensor, gt_boxes: Tensor, num_gt: Tensor, fg_iou: float, bg_iou: float, low_quality: bool = False
) -> Tensor:
    """Give each box the ground truth it should learn, or the reason why not.

    Args:
        boxes: [N, A, 4] float, or [A, 4] shared by all images.
        gt_boxes: [N, G, 4] float; rows from num_gt[n] on are padding.
        num_gt: [N] int, on the same device. 0 is allowed.
        fg_iou: IoU from which a box learns its best ground truth (of equals, the lowest row).
        bg_iou: IoU below which a box is background; between the two it is ignored.
        low_quality: whether boxes that overlap some ground truth more than any other box does also learn (their own
            best ground truth), however low their IoU is, unless it is 0.

    Returns:
        [N, A] int64: a row of gt_boxes, or BACKGROUND (-1), or IGNORE (-2).

    Raises:
        ValueError: if bg_iou > fg_iou, or a shape or dtype is not as above.

    Source: Faster R-CNN (arXiv:1506.01497), section 3.1.2; equals torchvision's Matcher.
    """
    op = "match_boxes"
    require_boxes(boxes, op, "boxes", dims=(2, 3))
    require_boxes(gt_boxes, op, "gt_boxes", dims=(3,))
    require(boxes.dtype == gt_boxes.dtype, op, "gt_boxes", f"{boxes.dtype} as boxes", gt_boxes.dtype)
    num_images = gt_boxes.shape[0]
    require(boxes.dim() == 2 or boxes.shape[0] == num_images, op, "boxes", f"of {num_images} images", boxes.shape)
    require(is_integer(num_gt) and num_gt.shape == (num_images,), op, "num_gt", f"[{num_images}] int", kind(num_gt))
    require(bg_iou <= fg_iou, op, "bg_iou", f"at most fg_iou ({fg_iou})", bg_iou)
    require_one_device(op, boxes=boxes, gt_boxes=gt_boxes, num_gt=num_gt)
    own, gt_boxes = widened(boxes), widened(gt_boxes)
    return OPERATOR.on(gt_boxes.device)(own, gt_boxes, num_gt, fg_iou, bg_iou, low_quality)


@torch.no_grad()
def _reference(
    boxes: Tensor, gt_boxes: Tensor, num_gt: Tensor, fg_iou: float, bg_iou: float, low_quality: bool = False
) -> Tensor:
    """One ground-truth row at a time: the IoU matrix of 268,569 anchors × 64 rows × N images never exists, and the few
    buffers of [N, A] stay in cache.
    """
    boxes = boxes if boxes.dim() == 3 else boxes[None]  # [N, A, 4] or [1, A, 4]
    num_images, num_boxes = gt_boxes.shape[0], boxes.shape[1]
    best = gt_boxes.new_zeros(num_images, num_boxes)
    best_idx = torch.zeros_like(best, dtype=torch.int32)
    is_best_of_gt = torch.zeros_like(best, dtype=torch.bool)
    if num_boxes:
        for row, iou in enumerate(_iou_rows(boxes, gt_boxes, num_gt)):
            best_idx.masked_fill_(iou > best, row)  # strictly greater: the lowest row wins a tie
            torch.maximum(best, iou, out=best)
            if low_quality:
                best_of_gt = iou.amax(dim=1, keepdim=True)
                best_of_gt.masked_fill_(best_of_gt <= 0, -1)  # no IoU is -1: a row without overlap marks nothing
                is_best_of_gt |= iou == best_of_gt
    idx = best_idx.long()
    matched = idx.masked_fill(best < fg_iou, IGNORE).masked_fill_(best < bg_iou, BACKGROUND)
    if low_quality:
        matched = torch.where(is_best_of_gt, idx, matched)
    return matched.masked_fill_((num_gt <= 0)[:, None], BACKGROUND)


def _iou_rows(boxes: Tensor, gt_boxes: Tensor, num_gt: Tensor) -> Iterator[Tensor]:
    """IoU of all boxes with ground-truth row 0, 1, …: [N, A], overwritten by the next. Padding has IoU 0 with all."""
    num_rows = gt_boxes.shape[1]
    is_padding = torch.arange(num_rows, device=num_gt.device) >= num_gt[:, None]  # [N, G]
    gt_area = box_area(gt_boxes.masked_fill(is_padding[..., None], 0))  # padding may hold anything, nan too
    nowhere = gt_boxes.new_full((), float("inf"))
    starts = torch.where(is_padding[..., None], nowhere, gt_boxes[..., :2])
    ends = torch.where(is_padding[..., None], -nowhere, gt_boxes[..., 2:])
    x1, y1, x2, y2 = (plane.contiguous() for plane in boxes.unbind(-1))  # [N, A] or [1, A] each
    area = box_area(boxes)
    inter, side, start = (gt_boxes.new_empty(gt_boxes.shape[0], boxes.shape[1]) for _ in range(3))
    for row in range(num_rows):
        gt_x1, gt_y1 = starts[:, row, :1], starts[:, row, 1:]  # [N, 1]
        gt_x2, gt_y2 = ends[:, row, :1], ends[:, row, 1:]
        torch.minimum(x2, gt_x2, out=inter).sub_(torch.maximum(x1, gt_x1, out=start)).clamp_(min=0)
        torch.minimum(y2, gt_y2, out=side).sub_(torch.maximum(y1, gt_y1, out=start)).clamp_(min=0)
        inter.mul_(side)
        union = torch.add(gt_area[:, row, None], area, out=side).sub_(inter)
        yield inter.div_(union)


def _compiled(
    boxes: Tensor, gt_boxes: Tensor, num_gt: Tensor, fg_iou: float, bg_iou: float, low_quality: bool = False
) -> Tensor:
    boxes = boxes if boxes.dim() == 3 else boxes[None]
    num_gt = num_gt if num_gt.dtype in (torch.int32, torch.int64) else num_gt.long()
    return torch.ops.cuda_ops.match_boxes(boxes, gt_boxes, num_gt, fg_iou, bg_iou, low_quality)


def _fake(boxes: Tensor, gt_boxes: Tensor, num_gt: Tensor, fg_iou: float, bg_iou: float, low_quality: bool) -> Tensor:
    return gt_boxes.new_empty(gt_boxes.shape[0], boxes.shape[1], dtype=torch.int64)


def _example(device: torch.device) -> dict[str, Any]:
    return {
        "boxes": generate_anchors.OPERATOR.of_example(device),
        "gt_boxes": examples.boxes(2, 5, device=device),
        "num_gt": torch.tensor([5, 0], device=device),
        "fg_iou": 0.7,
        "bg_iou": 0.3,
        "low_quality": True,
    }


OPERATOR = Operator(
    function=match_boxes,
    reference=_reference,
    compiled=_compiled,
    kernels=(
        Kernel(
            "match_boxes(Tensor boxes, Tensor gt_boxes, Tensor num_gt, float fg_iou, float bg_iou, bool low_quality)"
            " -> Tensor",
            fake=_fake,
        ),
    ),
    example=_example,
)
