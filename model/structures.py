"""Data structures passed between the parts: packed polygons, batches, detections, outcomes of updates.

Shapes: N images, H × W the bucket, G ground-truth rows (padded), I = N·G instances, T polygon parts, V vertices,
D detections. Boxes are (x1, y1, x2, y2) in pixels; sizes are (height, width).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

TensorFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Polygons:
    """Packed instance outlines.

    Instance i owns parts instance_offsets[i] to [i + 1]; part t owns vertices part_offsets[t] to [t + 1]. A part is
    filled by the even-odd rule; an instance is the union of its parts. Offsets past the real rows repeat the last one,
    so padding is instances without parts and parts without vertices.
    """

    xy: Tensor  # [V, 2] float32 pixels
    part_offsets: Tensor  # [T + 1] int32
    instance_offsets: Tensor  # [I + 1] int32
    max_vertices: int  # upper bound of the vertices of one instance, known to the host
    max_parts: int  # upper bound of the parts of one instance

    def map(self, function: TensorFunction) -> "Polygons":
        """Apply a function to every tensor."""
        return replace(self, **_mapped(self, function))


@dataclass(frozen=True)
class Targets:
    """Ground truth of a batch, padded to G rows per image; rows from num_gt[n] on are padding."""

    gt_boxes: Tensor  # [N, G, 4] float32, input pixels
    gt_labels: Tensor  # [N, G] int64, 1 … classes; 0 is background
    num_gt: Tensor  # [N] int32
    polygons: Polygons  # I = N·G instances, input pixels

    def map(self, function: TensorFunction) -> "Targets":
        """Apply a function to every tensor."""
        return replace(self, polygons=self.polygons.map(function), **_mapped(self, function))


@dataclass(frozen=True)
class Batch:
    """Input of the network. Images lie in the top left corner of the bucket; padding is 0."""

    images: Tensor  # [N, 3, H, W] uint8 RGB
    image_sizes: Tensor  # [N, 2] int32: valid (height, width) inside the padding
    original_sizes: Tensor  # [N, 2] int32: (height, width) of the files
    image_ids: Tensor  # [N] int64, COCO's; stays on the host
    seeds: Tensor  # [N] int64; seeds[n] determines the sampling of anchors and RoIs of image n
    targets: Targets | None = None  # None outside training

    def __len__(self) -> int:
        return self.images.shape[0]

    def map(self, function: TensorFunction) -> "Batch":
        """Apply a function to every tensor."""
        return replace(self, targets=self.targets and self.targets.map(function), **_mapped(self, function))

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        """Move all tensors but the image ids to a device."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        targets = self.targets and self.targets.map(move)
        return replace(self, targets=targets, **_mapped(self, move, besides="image_ids"))

    def pin_memory(self) -> "Batch":
        """Copy to page-locked memory, for asynchronous copies to a GPU; called by the data loader."""
        return self.map(lambda tensor: tensor.pin_memory())


@dataclass(frozen=True)
class Detections:
    """Output of the network, highest score first, padded to D rows; rows from num_detections[n] on are padding."""

    boxes: Tensor  # [N, D, 4] float32, input pixels
    scores: Tensor  # [N, D] float32, 0 to 1
    labels: Tensor  # [N, D] int64, 1 … classes
    num_detections: Tensor  # [N] int64
    mask_probs: Tensor | None  # [N, D, M, M] float32, 0 to 1, in the frame of the box; None without a mask head


@dataclass(frozen=True)
class Outcome:
    """Outcome of one update of the weights: scalars on the device."""

    losses: dict[str, Tensor]  # mean over micro-batches and processes
    grad_norm: Tensor  # before clipping
    skipped: Tensor  # 1 if the weights were left unchanged, because a loss or a gradient was not finite
    diverged: Tensor  # 1 if the cause was not merely a float16 loss scale that was too large
    is_replayed: bool = False  # True for a replay of a CUDA graph

    def map(self, function: TensorFunction) -> "Outcome":
        """Apply a function to every tensor."""
        losses = {name: function(loss) for name, loss in self.losses.items()}
        return replace(self, losses=losses, **_mapped(self, function))


def _mapped(record: Any, function: TensorFunction, besides: str = "") -> dict[str, Any]:
    return {n: function(value) for n, value in vars(record).items() if isinstance(value, Tensor) and n != besides}
