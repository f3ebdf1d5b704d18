"""Pyramid anchors.

Shapes: L levels, A anchors of one image over all levels. Boxes are (x1, y1, x2, y2) in input pixels.
Source: Faster R-CNN (arXiv:1506.01497), FPN (arXiv:1612.03144); rounding and strides are torchvision's.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def generate_anchors(
    feature_sizes: Sequence[tuple[int, int]],
    image_size: tuple[int, int],
    sizes: Sequence[float],
    aspect_ratios: Sequence[float],
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """See `cuda_ops.generate_anchors`."""
    levels = []
    for (height, width), size in zip(feature_sizes, sizes, strict=True):
        x = torch.arange(width, dtype=dtype, device=device) * (image_size[1] // width)
        y = torch.arange(height, dtype=dtype, device=device) * (image_size[0] // height)
        shift_y, shift_x = torch.meshgrid(y, x, indexing="ij")
        shifts = torch.stack((shift_x, shift_y, shift_x, shift_y), dim=-1)  # [H, W, 4]
        cell = _cell_anchors(size, aspect_ratios, shifts)
        levels.append((shifts[:, :, None] + cell).reshape(-1, 4))
    return torch.cat(levels)


def _cell_anchors(size: float, aspect_ratios: Sequence[float], like: Tensor) -> Tensor:
    """One anchor a ratio (height / width), centred on 0 and rounded: [ratios, 4]."""
    # Filled, not copied from a list: a copy from host memory would make the host wait for the device.
    ratios = torch.stack([like.new_full((), ratio) for ratio in aspect_ratios])
    h_ratios = torch.sqrt(ratios)
    heights, widths = h_ratios * size, (1 / h_ratios) * size
    return (torch.stack((-widths, -heights, widths, heights), dim=1) / 2).round()
