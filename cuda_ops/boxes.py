"""Boxes in plain torch: area, and the code by which a regressor moves one box onto another.

Shapes: A, B boxes; leading dimensions broadcast. Boxes are (x1, y1, x2, y2) in pixels; deltas are (dx, dy, dw, dh).
Source: R-CNN (arXiv:1311.2524), appendix C; clamping and order of arithmetic are torchvision's.
"""

import math

import torch
from torch import Tensor

MAX_LOG_SCALE = math.log(1000.0 / 16)  # a box may grow 62.5 times at most, so that exp cannot overflow
MIN_SIDE_PX = 1e-6  # below any real side; keeps the code of a padding row finite

BoxWeights = tuple[float, float, float, float]


def box_area(boxes: Tensor) -> Tensor:
    """Area, at least the smallest normal number: the IoU of two boxes without area is then 0, not 0 / 0."""
    area = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    return area.clamp_(min=torch.finfo(area.dtype).tiny)


def widened(boxes: Tensor) -> Tensor:
    """Boxes as float32 at least: float16 holds no area beyond 65,504 px², bfloat16 three digits of one."""
    return boxes.to(torch.promote_types(boxes.dtype, torch.float32))


def encode_boxes(gt_boxes: Tensor, anchors: Tensor, weights: BoxWeights = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """Deltas that move anchors onto gt_boxes; the inverse of `decode_boxes`.

    Args:
        gt_boxes: [..., 4] float.
        anchors: [..., 4] float, broadcast against gt_boxes.
        weights: factors of dx, dy, dw, dh.

    Returns:
        [..., 4] float. Always finite: a side is taken as at least 1e-6 px, so padding rows can be weighed with 0.
    """
    wx, wy, ww, wh = weights
    x, y, width, height = _centre_form(anchors)
    gt_x, gt_y, gt_width, gt_height = _centre_form(gt_boxes)
    width, height = width.clamp(min=MIN_SIDE_PX), height.clamp(min=MIN_SIDE_PX)
    dx = wx * (gt_x - x) / width
    dy = wy * (gt_y - y) / height
    dw = ww * torch.log(gt_width.clamp(min=MIN_SIDE_PX) / width)
    dh = wh * torch.log(gt_height.clamp(min=MIN_SIDE_PX) / height)
    return torch.stack((dx, dy, dw, dh), dim=-1)


def decode_boxes(deltas: Tensor, anchors: Tensor, weights: BoxWeights = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """Move anchors by deltas.

    Args:
        deltas: [..., 4] float; dw and dh are cut at log(1000 / 16) after division by their weight.
        anchors: [..., 4] float, broadcast against deltas.
        weights: factors of dx, dy, dw, dh that `encode_boxes` applied.

    Returns:
        [..., 4] boxes, dtype of deltas; not clipped.
    """
    wx, wy, ww, wh = weights
    x, y, width, height = _centre_form(anchors.to(deltas.dtype))
    dx, dy, dw, dh = deltas.unbind(-1)
    x = dx / wx * width + x
    y = dy / wy * height + y
    half_width = torch.exp((dw / ww).clamp_(max=MAX_LOG_SCALE)) * width * 0.5
    half_height = torch.exp((dh / wh).clamp_(max=MAX_LOG_SCALE)) * height * 0.5
    return torch.stack((x - half_width, y - half_height, x + half_width, y + half_height), dim=-1)


def _centre_form(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x1, y1, x2, y2 = boxes.unbind(-1)
    width, height = x2 - x1, y2 - y1
    return x1 + 0.5 * width, y1 + 0.5 * height, width, height
