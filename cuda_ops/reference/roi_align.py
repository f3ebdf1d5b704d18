"""RoIAlign over a feature pyramid, as one weighted sum of table rows for each output bin.

Shapes: N images, R boxes an image, B = N·R, L levels of [N, C, H_l, W_l], O output size, S samples of a bin on one axis. Heads
differ in R, O and S. Boxes are (x1, y1, x2, y2) in input pixels. A bin averages S × S samples of 4 corners each: 2S rows × 2S
columns of the feature map with weights that factor into a row part and a column part. Where sampling is adaptive, S is the most
that a box within its image may need, and what a box does not need weighs 0. Gathering and weighing is `embedding_bag`'s work,
whose backward is the gradient of the features, of all heads in one; boxes get none.
Source: Mask R-CNN (arXiv:1703.06870), section 3; FPN (arXiv:1612.03144), equation 1; borders are torchvision's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

CANONICAL_SIZE_PX = 224
CANONICAL_LEVEL = 4
MAX_CHUNK_BYTES = 64 * 2**20  # of indices and weights at once

# Table offsets and weights of the rows, then of the columns, that each bin's samples touch: four [B, O, 2S].
Corners = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Sampling:
    """How bins are sampled on either axis."""

    output_size: int  # O
    max_samples: int  # S
    is_adaptive: bool  # a bin takes as many samples as it is cells long, S at most; else S
    aligned: bool


@dataclass(frozen=True)
class _Pyramid:
    """Features of all levels and images as rows of one table: level, image, y, x."""

    table: Tensor  # [Σ N·H_l·W_l, C]
    level_shapes: tuple[tuple[int, int], ...]  # (H_l, W_l), finest first
    num_images: int


def _flatten_pyramid(features: Sequence[Tensor]) -> _Pyramid:
    """Lay features [N, C, H_l, W_l] out as a table; free of charge but one copy if they are channels-last in memory.

    Half precision becomes float32, in which all that falls on a cell is summed; its gradient is rounded once.
    """
    rows = [level.permute(0, 2, 3, 1).reshape(-1, level.shape[1]) for level in features]
    shapes = tuple((level.shape[2], level.shape[3]) for level in features)
    table = torch.cat(rows)
    return _Pyramid(table.to(torch.promote_types(table.dtype, torch.float32)), shapes, features[0].shape[0])


def multilevel_roi_align(
    features: Sequence[Tensor],
    boxes: Sequence[Tensor],
    *,
    image_size: tuple[int, int],
    output_sizes: Sequence[int],
    sampling_ratio: int,
    aligned: bool,
) -> list[Tensor]:
    """See `cuda_ops.multilevel_roi_align_heads`."""
    pyramid = _flatten_pyramid(features)
    longest = max(max(shape) for shape in pyramid.level_shapes)
    heads = []
    with torch.no_grad():
        for own, size in zip(boxes, output_sizes, strict=True):
            sampling = Sampling(size, sampling_ratio or -(-longest // size), sampling_ratio == 0, aligned)
            heads.append(_corners(pyramid, own, image_size, sampling))
    num_chunks = max(1, -(-sum(map(_bag_bytes, heads)) // MAX_CHUNK_BYTES))
    chunks = zip(*(zip(*(part.tensor_split(num_chunks) for part in head), strict=True) for head in heads), strict=True)
    pooled = [_pool(pyramid.table, chunk) for chunk in chunks]  # [chunks][heads]
    results = []
    for own, size, parts in zip(boxes, output_sizes, zip(*pooled, strict=True), strict=True):
        flat = (parts[0] if num_chunks == 1 else torch.cat(parts)).to(features[0].dtype)  # [B·O·O, C]
        results.append(flat.view(*own.shape[:2], size, size, flat.shape[1]).permute(0, 1, 4, 2, 3))
    return results


def _bag_bytes(corners: Corners) -> int:
    """What the indices and weights of all bins of a head take."""
    row_idx, row_weight, column_idx, _ = corners
    taps = row_idx.shape[2] * column_idx.shape[2]
    return row_idx.shape[0] * row_idx.shape[1] ** 2 * taps * (row_idx.element_size() + row_weight.element_size())


def _pool(table: Tensor, heads: Sequence[Corners]) -> Sequence[Tensor]:
    """Weighted sums of table rows, one for each of the O × O bins of each head's boxes: [B·O·O, C] a head."""
    idxs, weights, offsets, first = [], [], [], 0
    with torch.no_grad():
        for row_idx, row_weight, column_idx, column_weight in heads:
            idx = (row_idx[:, :, None, :, None] + column_idx[:, None, :, None, :]).flatten()
            idxs.append(idx)
            weights.append((row_weight[:, :, None, :, None] * column_weight[:, None, :, None, :]).flatten())
            taps = row_idx.shape[2] * column_idx.shape[2]
            offsets.append(torch.arange(first, first + len(idx), taps, dtype=idx.dtype, device=idx.device))
            first += len(idx)
        weight = torch.cat(weights).to(table.dtype)
    bags = F.embedding_bag(torch.cat(idxs), table, torch.cat(offsets), per_sample_weights=weight, mode="sum")
    return bags.split([len(of_head) for of_head in offsets])


def _corners(pyramid: _Pyramid, boxes: Tensor, image_size: tuple[int, int], sampling: Sampling) -> Corners:
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
