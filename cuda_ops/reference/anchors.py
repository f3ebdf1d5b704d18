"""Pyramid anchors.

Shapes: L levels, A anchors of one image over all levels. Boxes are (x1, y1, x2, y2) in input pixels.
Source: Faster R-CNN (arXiv:1506.01497), FPN (arXiv:1612.03144); torchvision's AnchorGenerator, Detectron2's DefaultAnchorGenerator.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

Conventions = Literal["detectron2", "torchvision"]
CONVENTIONS: tuple[str, ...] = get_args(Conventions)


def generate_anchors(
    feature_sizes: Sequence[tuple[int, int]],
    image_size: tuple[int, int],
    sizes: Sequence[Sequence[float]],
    aspect_ratios: Sequence[float],
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    conventions: Conventions = "detectron2",
) -> Tensor:
    """See `cuda_ops.generate_anchors`."""
    levels = []
    strides = anchor_strides(feature_sizes, image_size, conventions)
    for (height, width), (stride_y, stride_x), level_sizes in zip(feature_sizes, strides, sizes, strict=True):
        x = torch.arange(width, dtype=dtype, device=device) * stride_x
        y = torch.arange(height, dtype=dtype, device=device) * stride_y
        shift_y, shift_x = torch.meshgrid(y, x, indexing="ij")
        shifts = torch.stack((shift_x, shift_y, shift_x, shift_y), dim=-1)  # [H, W, 4]
        make_cell = _rounded_anchors if conventions == "torchvision" else _exact_anchors
        cell = make_cell(level_sizes, aspect_ratios, shifts)
        levels.append((shifts[:, :, None] + cell).reshape(-1, 4))
    return torch.cat(levels)


def anchor_strides(
    feature_sizes: Sequence[tuple[int, int]], image_size: tuple[int, int], conventions: Conventions
) -> list[tuple[int, int]]:
    """Pixels between neighbouring cells of each level, (y, x): torchvision counts the cells, Detectron2 takes the powers of two.

    They differ where a level has a cell more than fits the image, as P6 of an odd P5 has.
    """
    if conventions == "torchvision":
        return [(image_size[0] // height, image_size[1] // width) for height, width in feature_sizes]
    return [
        (2 ** max(0, round(math.log2(image_size[0] / height))), 2 ** max(0, round(math.log2(image_size[1] / width))))
        for height, width in feature_sizes
    ]


def _rounded_anchors(sizes: Sequence[float], aspect_ratios: Sequence[float], like: Tensor) -> Tensor:
    """torchvision's anchors of a cell, centred on 0 and rounded, by ratio (height / width) and size: [ratios · sizes, 4]."""
    # Filled, not copied from a list: a copy from host memory would make the host wait for the device.
    ratios = torch.stack([like.new_full((), ratio) for ratio in aspect_ratios])[:, None]
    h_ratios = torch.sqrt(ratios)
    sides = torch.stack([like.new_full((), size) for size in sizes])
    heights, widths = (h_ratios * sides).flatten(), ((1 / h_ratios) * sides).flatten()
    return (torch.stack((-widths, -heights, widths, heights), dim=1) / 2).round()


def _exact_anchors(sizes: Sequence[float], aspect_ratios: Sequence[float], like: Tensor) -> Tensor:
    """Detectron2's anchors of a cell, centred on 0 and not rounded, by size and ratio: [sizes · ratios, 4]."""
    anchors = []
    for size in sizes:
        for ratio in aspect_ratios:
            width = math.sqrt(size * size / ratio)
            half = width / 2, ratio * width / 2
            anchors.append(torch.stack([like.new_full((), corner) for corner in (-half[0], -half[1], *half)]))
    return torch.stack(anchors)
