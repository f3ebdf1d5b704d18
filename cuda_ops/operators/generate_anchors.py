"""Pyramid anchors.

Shapes: L levels, A anchors of one image over all levels. Boxes are (x1, y1, x2, y2) in input pixels.
Source: Faster R-CNN (arXiv:1506.01497), FPN (arXiv:1612.03144); torchvision's AnchorGenerator, Detectron2's
DefaultAnchorGenerator.
"""

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from cuda_ops import examples
from cuda_ops.checks import KERNEL_DTYPES, Conventions, require, require_conventions
from cuda_ops.declaration import Kernel, Operator

__all__ = ["generate_anchors"]


def generate_anchors(
    feature_sizes: Sequence[tuple[int, int]],
    image_size: tuple[int, int],
    sizes: Sequence[Sequence[float]],
    aspect_ratios: Sequence[float],
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    conventions: Conventions = "detectron2",
) -> Tensor:
    """Anchors of every cell of every level.

    Args:
        feature_sizes: (height, width) of each level's feature map, finest first.
        image_size: padded (height, width) in pixels, from which the strides of the levels follow, see `conventions`.
        sizes: sides of a square anchor in pixels, as many for each level.
        aspect_ratios: height / width, shared by all levels.
        device: where the anchors are made.
        dtype: a floating type.
        conventions: torchvision: corners relative to the cell are rounded to whole pixels, and a level's stride is
            image_size // feature size on either axis. detectron2: nothing is rounded, and strides are powers of two.

    Returns:
        [A, 4], ordered by level, y, x, and within a cell by ratio and size (torchvision) or by size and ratio
        (detectron2).

    Raises:
        ValueError: if the levels of feature_sizes and sizes differ, an argument is empty or not positive, or the
            conventions are unknown.

    Source: Faster R-CNN (arXiv:1506.01497), FPN (arXiv:1612.03144); equals torchvision's AnchorGenerator, or
        Detectron2's DefaultAnchorGenerator.
    """
    op = "generate_anchors"
    require_conventions(op, conventions)
    require(len(feature_sizes) == len(sizes) > 0, op, "sizes", f"one a level, {len(feature_sizes)}", len(sizes))
    require(all(h > 0 and w > 0 for h, w in feature_sizes), op, "feature_sizes", "positive", list(feature_sizes))
    is_even = len({len(level) for level in sizes}) == 1 and len(sizes[0]) > 0
    require(is_even, op, "sizes", "as many for each level, one at least", [len(level) for level in sizes])
    flat_sizes = list(chain.from_iterable(sizes))
    require(min(*image_size, *flat_sizes) > 0, op, "image_size and sizes", "positive", (*image_size, *flat_sizes))
    require(min(aspect_ratios, default=0) > 0, op, "aspect_ratios", "positive, at least one", list(aspect_ratios))
    device = torch.get_default_device() if device is None else torch.device(device)
    return OPERATOR.on(device)(feature_sizes, image_size, sizes, aspect_ratios, device, dtype, conventions)


def _reference(
    feature_sizes: Sequence[tuple[int, int]],
    image_size: tuple[int, int],
    sizes: Sequence[Sequence[float]],
    aspect_ratios: Sequence[float],
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    conventions: Conventions = "detectron2",
) -> Tensor:
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
    """Pixels between neighbouring cells of each level, (y, x): torchvision divides, Detectron2 takes powers of two.

    They differ where a level has a cell more than fits the image, as P6 of an odd P5 has.
    """
    if conventions == "torchvision":
        return [(image_size[0] // height, image_size[1] // width) for height, width in feature_sizes]
    return [
        (2 ** max(0, round(math.log2(image_size[0] / height))), 2 ** max(0, round(math.log2(image_size[1] / width))))
        for height, width in feature_sizes
    ]


def _rounded_anchors(sizes: Sequence[float], aspect_ratios: Sequence[float], like: Tensor) -> Tensor:
    """torchvision's anchors of a cell, centred on 0 and rounded, by ratio and size: [ratios · sizes, 4]."""
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


def _compiled(
    feature_sizes: Sequence[tuple[int, int]],
    image_size: tuple[int, int],
    sizes: Sequence[Sequence[float]],
    aspect_ratios: Sequence[float],
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    conventions: Conventions = "detectron2",
) -> Tensor:
    if dtype not in KERNEL_DTYPES:
        return _reference(feature_sizes, image_size, sizes, aspect_ratios, device, dtype, conventions)
    like = torch.empty(0, device=device, dtype=dtype)
    strides = anchor_strides(feature_sizes, image_size, conventions)
    flat = [list(chain.from_iterable(pairs)) for pairs in (feature_sizes, strides, sizes)]
    return torch.ops.cuda_ops.generate_anchors(like, *flat, aspect_ratios, conventions == "torchvision")


def _fake(
    like: Tensor,
    feature_sizes: Sequence[int],
    strides: Sequence[int],
    sizes: Sequence[float],
    aspect_ratios: Sequence[float],
    rounded: bool,
) -> Tensor:
    levels = list(zip(feature_sizes[::2], feature_sizes[1::2], strict=True))
    cells = sum(height * width for height, width in levels)
    return like.new_empty(cells * (len(sizes) // len(levels)) * len(aspect_ratios), 4)


def _example(device: torch.device) -> dict[str, Any]:
    return {
        "feature_sizes": examples.LEVEL_SHAPES,
        "image_size": examples.IMAGE_SIZE,
        "sizes": ((32,), (64,), (128,)),
        "aspect_ratios": (0.5, 1.0, 2.0),
        "device": device,
    }


OPERATOR = Operator(
    function=generate_anchors,
    reference=_reference,
    compiled=_compiled,
    kernels=(
        Kernel(
            "generate_anchors(Tensor like, int[] feature_sizes, int[] strides, float[] sizes, float[] aspect_ratios,"
            " bool rounded) -> Tensor",
            fake=_fake,
        ),
    ),
    example=_example,
)
