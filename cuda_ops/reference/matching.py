"""Which ground truth each box should learn.

Shapes: N images, A boxes, G ground-truth rows (padded). Boxes are (x1, y1, x2, y2) in input pixels.
Source: Faster R-CNN (arXiv:1506.01497), section 3.1.2.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from cuda_ops.reference.boxes import box_area

BACKGROUND = -1
IGNORE = -2


@torch.no_grad()
def match_boxes(
    boxes: Tensor, gt_boxes: Tensor, num_gt: Tensor, fg_iou: float, bg_iou: float, low_quality: bool = False
) -> Tensor:
    """See `cuda_ops.match_boxes`.

    One ground-truth row at a time: the IoU matrix of 268,569 anchors × 64 rows × N images never exists, and the few
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
    """IoU of all boxes with ground-truth row 0, 1, …: [N, A], overwritten by the next. A padding row has IoU 0 with all."""
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
