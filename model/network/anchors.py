"""Anchors and the neighbourhoods of their cells, both determined by the sizes of the feature maps.

Shapes: L levels, A anchors of one image over all levels, A / k cells of the feature maps with k anchors each.
Boxes are (x1, y1, x2, y2) in input pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import cuda_ops
from model.config import ModelConfig


@dataclass(frozen=True)
class Grid:
    """Anchors and cell neighbours for feature maps of given sizes."""

    anchors: Tensor  # [A, 4] float32, ordered (level, y, x, anchor of the cell)
    neighbors: Tensor  # [A / k, 9] int64, see cell_neighbors


def anchors_per_cell(config: ModelConfig) -> int:
    """Number of anchors per cell: one per ratio; without a pyramid, one per size and ratio."""
    return len(config.aspect_ratios) * (1 if config.features == "fpn" else len(config.anchor_sizes_px))


def make_grid(
    config: ModelConfig, feature_sizes: Sequence[tuple[int, int]], image_size: tuple[int, int], device: torch.device
) -> Grid:
    """Make the grid of feature maps of these (height, width), for a padded image of `image_size`."""
    has_levels = config.features == "fpn"
    sizes = [(size,) for size in config.anchor_sizes_px] if has_levels else [config.anchor_sizes_px]
    anchors = cuda_ops.generate_anchors(
        feature_sizes, image_size, sizes, config.aspect_ratios, device, conventions=config.conventions
    )
    return Grid(anchors, cell_neighbors(feature_sizes, device))


def cell_neighbors(feature_sizes: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """3×3 cells around each cell of all levels: [cells, 9] int64, numbered (level, y, x); -1 is outside the level."""
    levels, first = [], 0
    for height, width in feature_sizes:
        grid = torch.arange(first, first + height * width, device=device).view(height, width)
        levels.append(F.pad(grid, (1, 1, 1, 1), value=-1).unfold(0, 3, 1).unfold(1, 3, 1).reshape(-1, 9))
        first += height * width
    return torch.cat(levels)
