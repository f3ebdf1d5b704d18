"""Greedy non-maximum suppression of many rows at once, with outputs of fixed size.

Shapes: R rows (an image, or an image × level), K boxes a row, B boxes of a block. Boxes are (x1, y1, x2, y2) in pixels.
"""

import struct
from typing import Any

import torch
from torch import Tensor

from cuda_ops import examples
from cuda_ops.boxes import box_area, widened
from cuda_ops.checks import is_integer, kind, require, require_boxes, require_one_device, require_whole
from cuda_ops.declaration import Kernel, Operator

__all__ = ["batched_nms"]

BLOCK = 64  # boxes decided one after another; the steps grow with K, the work inside blocks with K × BLOCK


def batched_nms(
    boxes: Tensor, scores: Tensor, iou_threshold: float, max_output: int, groups: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Greedy non-maximum suppression of each row on its own.

    Args:
        boxes: [R, K, 4] float; a row is an image, or a level of an image. One whose IoU is no number (nan or an
            infinite area) neither suppresses nor is suppressed.
        scores: [R, K] float; -inf marks boxes that are never kept and suppress nothing.
        iou_threshold: 0 to 1; a box goes if its IoU with a kept, better one is greater. Of equals the first is better.
        max_output: boxes to keep of a row, at most.
        groups: [R, K] int (uint8, int8 to int64); boxes of different groups never suppress each other.

    Returns:
        indices [R, max_output] int64 into K by descending score, of equal scores the lowest index first, 0 from counts
        on, and counts [R] int64.

    Raises:
        ValueError: if a shape or dtype is not as above, iou_threshold is not 0 to 1, or max_output < 0.

    Source: keeps what torchvision.ops.nms keeps of each row and group.
    """
    op = "batched_nms"
    require_boxes(boxes, op, "boxes", dims=(3,))
    require(scores.shape == boxes.shape[:2], op, "scores", list(boxes.shape[:2]), scores.shape)
    require(scores.is_floating_point(), op, "scores", "float", scores.dtype)
    if groups is not None:
        is_right = is_integer(groups) and groups.shape == scores.shape
        require(is_right, op, "groups", f"{list(scores.shape)} int", kind(groups))
    require(0 <= iou_threshold <= 1, op, "iou_threshold", "0 to 1", iou_threshold)
    require(max_output >= 0, op, "max_output", "0 or more", max_output)
    require_whole(op, max_output=max_output)
    require_one_device(op, boxes=boxes, scores=scores, groups=groups)
    return OPERATOR.on(boxes.device)(widened(boxes), scores, iou_threshold, max_output, groups)


@torch.no_grad()
def _reference(
    boxes: Tensor, scores: Tensor, iou_threshold: float, max_output: int, groups: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Boxes are sorted by score and taken in blocks. Inside a block the decisions follow one another; then the
    survivors of the block suppress all later boxes at once. So only pairs above the diagonal are computed, and
    K / BLOCK large steps replace K small ones.
    """
    num_boxes = scores.shape[1]
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    planes = boxes.gather(1, order[..., None].expand(-1, -1, 4)).permute(2, 0, 1).contiguous()  # [4, R, K]
    groups = None if groups is None else groups.gather(1, order)
    is_dead = scores == -torch.inf
    threshold = _comparable(iou_threshold, boxes.dtype)
    for start in range(0, num_boxes, BLOCK):
        block = slice(start, start + BLOCK)
        later = slice(start + BLOCK, None)
        inside = _iou(planes[..., block], planes[..., block], groups, block, block) > threshold
        is_dead[:, block] = _decide(inside, is_dead[:, block])
        if start + BLOCK < num_boxes:
            planes[..., block].masked_fill_(is_dead[:, block], 0)  # no area: the dead suppress nothing
            outside = _iou(planes[..., block], planes[..., later], groups, block, later) > threshold
            is_dead[:, later] |= outside.any(dim=1)  # not the highest IoU: nan would hide the others
    return _first_alive(is_dead, order, max_output)


def _iou(one: Tensor, two: Tensor, groups: Tensor | None, block: slice, other: slice) -> Tensor:
    """IoU of boxes [4, R, B] with boxes [4, R, C]; 0 where their groups differ: [R, B, C]."""
    area = box_area(one.movedim(0, -1))[:, :, None], box_area(two.movedim(0, -1))[:, None, :]
    x1, y1, x2, y2 = one[..., None]
    other_x1, other_y1, other_x2, other_y2 = two[:, :, None]
    iou = torch.minimum(x2, other_x2).sub_(start := torch.maximum(x1, other_x1)).clamp_(min=0)
    side = torch.minimum(y2, other_y2).sub_(torch.maximum(y1, other_y1, out=start)).clamp_(min=0)
    iou.mul_(side)
    iou.div_(torch.add(*area, out=side).sub_(iou))
    if groups is not None:
        iou.mul_(groups[:, block, None] == groups[:, None, other])
    return iou


def _decide(suppresses: Tensor, is_dead: Tensor) -> Tensor:
    """Boxes of a block that die, given who would suppress whom [R, B, B] and who is dead already [R, B]."""
    rows = suppresses.triu_(diagonal=1).permute(1, 2, 0).contiguous().unbind(0)  # B of [B, R]
    dead = is_dead.t().contiguous()
    for row, is_suppressor_dead in zip(rows, dead.unbind(0), strict=True):
        dead |= row > is_suppressor_dead  # suppressed, and the suppressor lives
    return dead.t()


def _first_alive(is_dead: Tensor, order: Tensor, max_output: int) -> tuple[Tensor, Tensor]:
    """The first max_output living entries of order [R, K], padded with 0, and how many there are."""
    rank = (~is_dead).cumsum(dim=1).sub_(1)
    slot = rank.masked_fill_(is_dead, max_output).clamp_(max=max_output)  # one column more takes what is left over
    kept = order.new_zeros(order.shape[0], max_output + 1)
    kept.scatter_(1, slot, order)
    counts = (slot < max_output).sum(dim=1)
    return kept[:, :max_output], counts


def _comparable(threshold: float, dtype: torch.dtype) -> float:
    """The largest float32 that is ≤ threshold.

    torchvision compares a float32 IoU with a float64 threshold, torch rounds the threshold first: 0.3 would become
    0.30000001, and an IoU of just that would no longer exceed it.
    """
    if dtype != torch.float32:
        return threshold
    rounded = struct.unpack("f", struct.pack("f", threshold))[0]
    if rounded <= threshold:
        return rounded
    (bits,) = struct.unpack("i", struct.pack("f", rounded))
    return struct.unpack("f", struct.pack("i", bits - 1))[0]


@torch.no_grad()
def _compiled(
    boxes: Tensor, scores: Tensor, iou_threshold: float, max_output: int, groups: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return torch.ops.cuda_ops.batched_nms(
        boxes, scores, iou_threshold, max_output, None if groups is None else groups.long()
    )


def _fake(
    boxes: Tensor, scores: Tensor, iou_threshold: float, max_output: int, groups: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    num_rows = boxes.shape[0]
    return boxes.new_empty(num_rows, max_output, dtype=torch.int64), boxes.new_empty(num_rows, dtype=torch.int64)


def _example(device: torch.device) -> dict[str, Any]:
    return {
        "boxes": examples.boxes(2, 300, device=device),
        "scores": examples.uniform(2, 300, device=device),
        "iou_threshold": 0.5,
        "max_output": 100,
        "groups": torch.arange(300, device=device).expand(2, -1) % 2,
    }


OPERATOR = Operator(
    function=batched_nms,
    reference=_reference,
    compiled=_compiled,
    kernels=(
        Kernel(
            "batched_nms(Tensor boxes, Tensor scores, float iou_threshold, int max_output, Tensor? groups=None)"
            " -> (Tensor indices, Tensor counts)",
            fake=_fake,
        ),
    ),
    example=_example,
)
