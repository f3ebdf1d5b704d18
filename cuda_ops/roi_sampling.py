"""Positions and weights of RoIAlign's samples, in plain torch.

Shapes: N images, R boxes an image, B = N·R, L levels of [N, C, H_l, W_l], O output size, S samples of a bin on one
axis. Boxes are (x1, y1, x2, y2) in input pixels. A bin averages S × S samples of 4 corners each: 2S rows × 2S columns
of the feature map with weights that factor into a row part and a column part. Where sampling is adaptive, S is the most
that a box within its image may need, and what a box does not need weighs 0.
Source: Mask R-CNN (arXiv:1703.06870), section 3; FPN (arXiv:1612.03144), equation 1; borders are torchvision's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CANONICAL_SIZE_PX = 224
CANONICAL_LEVEL = 4

# Table offsets and weights of the rows, then of the columns, that each bin's samples touch: four [B, O, 2S].
Corners = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Sampling:
    """The sampling of bins on either axis."""

    output_size: int  # O
    max_samples: int  # S
    is_adaptive: bool  # a bin takes as many samples as it is cells long, S at most; else S
    aligned: bool


@dataclass(frozen=True)
class Pyramid:
    """Features of all levels and images as rows of one table: level, image, y, x."""

    table: Tensor  # [Σ N·H_l·W_l, C]
    level_shapes: tuple[tuple[int, int], ...]  # (H_l, W_l), finest first
    num_images: int


def flatten_pyramid(features: Sequence[Tensor]) -> Pyramid:
    """Lay features [N, C, H_l, W_l] out as a table; free of charge but one copy if they are channels-last in memory.

    Half precision becomes float32, in which all that falls on a cell is summed; its gradient is rounded once.
    """
    rows = [level.permute(0, 2, 3, 1).reshape(-1, level.shape[1]) for level in features]
    shapes = tuple((level.shape[2], level.shape[3]) for level in features)
    table = torch.cat(rows)
    return Pyramid(table.to(torch.promote_types(table.dtype, torch.float32)), shapes, features[0].shape[0])


def sample_corners(pyramid: Pyramid, boxes: Tensor, image_size: tuple[int, int], sampling: Sampling) -> Corners:
    """The corners of all samples of boxes [N, R, 4], each in the level that suits its size."""
    num_images, num_boxes = boxes.shape[:2]
    shapes = pyramid.level_shapes
    boxes = boxes.detach().nan_to_num().reshape(-1, 4)
    scales = [2.0 ** round(math.log2(shape[0] / image_size[0])) for shape in shapes]
    level = assign_levels(boxes, scales)  # [N·R]
    first_rows = [0]
    for shape in shapes[:-1]:
        first_rows.append(first_rows[-1] + num_images * shape[0] * shape[1])
    scale = _by_level(level, scales, boxes.dtype)
    height = _by_level(level, [shape[0] for shape in shapes], torch.int32)
    width = _by_level(level, [shape[1] for shape in shapes], torch.int32)
    image = torch.arange(num_images, dtype=torch.int32, device=boxes.device).repeat_interleave(
        num_boxes, output_size=num_images * num_boxes
    )
    first = _by_level(level, first_rows, torch.int32) + image * height * width
    x1, y1, x2, y2 = (boxes * scale[:, None] - (0.5 if sampling.aligned else 0.0)).unbind(-1)
    y, y_weight = _axis(y1, y2, height, sampling)
    x, x_weight = _axis(x1, x2, width, sampling)
    y = y.mul_(width[:, None, None]).add_(first[:, None, None])
    return y, y_weight, x, x_weight


def assign_levels(boxes: Tensor, scales: Sequence[float]) -> Tensor:
    """Pyramid level of each box [B, 4] by its area, counted from the finest: [B] int64."""
    finest, coarsest = (int(-math.log2(scale)) for scale in (scales[0], scales[-1]))
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    size = area.clamp_(min=0).sqrt_()
    level = torch.floor(CANONICAL_LEVEL + torch.log2(size / CANONICAL_SIZE_PX) + 1e-6)
    return level.clamp_(finest, coarsest).long() - finest


def _by_level(level: Tensor, values: Sequence[float], dtype: torch.dtype) -> Tensor:
    """values[level], without copying the values to the device, for which the host would wait."""
    chosen = torch.full_like(level, values[0], dtype=dtype)
    for idx, value in enumerate(values[1:], start=1):
        chosen.masked_fill_(level == idx, value)
    return chosen


def _axis(start: Tensor, end: Tensor, size: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Cells and bilinear weights along one axis: start, end, size [B] → int32 and float [B, O, 2S].

    A sample outside -1 … size counts as 0; one nearer is moved onto the border.
    """
    length = end - start if sampling.aligned else (end - start).clamp_(min=1)
    bin_size = length[:, None, None] / sampling.output_size
    bins = torch.arange(sampling.output_size, device=start.device, dtype=start.dtype)[:, None]
    samples = torch.arange(sampling.max_samples, device=start.device, dtype=start.dtype)
    count = torch.full_like(bin_size, sampling.max_samples)  # [B, 1, 1]
    if sampling.is_adaptive:
        count = bin_size.ceil().clamp_(0, sampling.max_samples)
    share = 1 / count.clamp(min=1)
    at = start[:, None, None] + bins * bin_size + (samples + 0.5) * bin_size / count.clamp(min=1)  # [B, O, S]
    size = size[:, None, None]
    inside = ((at >= -1) & (at <= size) & (samples < count)).to(at.dtype) * share
    last = size - 1
    at = torch.minimum(at.nan_to_num_().clamp_(min=0), last.to(at.dtype))
    low = at.int()
    high = torch.minimum(low + 1, last)
    high_weight = at.sub_(low)
    weights = torch.stack(((1 - high_weight) * inside, high_weight * inside), dim=-1)
    return torch.stack((low, high), dim=-1).flatten(-2), weights.flatten(-2)
