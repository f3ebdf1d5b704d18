"""What flows between the parts: packed polygons, batches, detections, outcomes of updates.

Shapes: N images, H × W the bucket, G ground-truth rows (padded), I = N·G instances, T polygon parts, V vertices,
D detections. Boxes are (x1, y1, x2, y2) in pixels; sizes are (height, width).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Polygons:
    """Instance outlines, packed: instance i owns parts instance_offsets[i] to [i + 1], part t owns vertices part_offsets[t] to [t + 1].

    Within a part the even-odd rule fills; parts of one instance unite. Offsets past the real rows repeat the last one, so
    padding is instances of no part and parts of no vertex.
    """

    xy: Tensor  # [V, 2] float32 pixels
    part_offsets: Tensor  # [T + 1] int32
    instance_offsets: Tensor  # [I + 1] int32
    max_vertices: int  # at least the vertices of any one instance: a bound known to the host
    max_parts: int  # at least the parts of any one instance

    def map(self, change: Change) -> "Polygons":
        """Every tensor changed alike."""
        return replace(self, **_changed(self, change))


@dataclass(frozen=True)
class Targets:
    """Ground truth of a batch, padded to G rows an image; rows from num_gt[n] on are padding."""

    gt_boxes: Tensor  # [N, G, 4] float32, input pixels
    gt_labels: Tensor  # [N, G] int64, 1 … classes; 0 is background
    num_gt: Tensor  # [N] int32
    polygons: Polygons  # I = N·G instances, input pixels

    def map(self, change: Change) -> "Targets":
        """Every tensor changed alike."""
        return replace(self, polygons=self.polygons.map(change), **_changed(self, change))


@dataclass(frozen=True)
class Batch:
    """What the network is given. Images lie in the top left corner of the bucket; padding is 0."""

    images: Tensor  # [N, 3, H, W] uint8 RGB
    image_sizes: Tensor  # [N, 2] int32: valid (height, width) inside the padding
    original_sizes: Tensor  # [N, 2] int32: (height, width) of the files
    image_ids: Tensor  # [N] int64, COCO's; stays on the host
    seeds: (
        Tensor  # [N] int64: all that is random about image n (its sampling of anchors and RoIs) follows from seeds[n]
    )
    targets: Targets | None = None  # None when nothing is to be learned

    def __len__(self) -> int:
        return self.images.shape[0]

    def map(self, change: Change) -> "Batch":
        """Every tensor changed alike."""
        return replace(self, targets=self.targets and self.targets.map(change), **_changed(self, change))

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        """On a device, but for the image ids."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        targets = self.targets and self.targets.map(move)
        return replace(self, targets=targets, **_changed(self, move, besides="image_ids"))

    def pin_memory(self) -> "Batch":
        """In page-locked memory, from which copies to a GPU need not wait; the data loader calls this."""
        return self.map(lambda tensor: tensor.pin_memory())


@dataclass(frozen=True)
class Detections:
    """What the network found, highest score first, padded to D rows an image; rows from num_detections[n] on are padding."""

    boxes: Tensor  # [N, D, 4] float32, input pixels
    scores: Tensor  # [N, D] float32, 0 to 1
    labels: Tensor  # [N, D] int64, 1 … classes
    num_detections: Tensor  # [N] int64
    mask_probs: Tensor | None  # [N, D, M, M] float32, 0 to 1, in the frame of the box; None without a mask head


@dataclass(frozen=True)
class Outcome:
    """What an update of the weights tells: scalars on the device."""

    losses: dict[str, Tensor]  # mean over micro-batches and processes
    grad_norm: Tensor  # before clipping
    skipped: Tensor  # 1 where the weights were left alone, since a loss or a gradient was not finite
    diverged: Tensor  # 1 where that was not just float16's loss scale being too large
    is_replayed: bool = False  # as a CUDA graph

    def map(self, change: Change) -> "Outcome":
        """Every tensor changed alike."""
        losses = {name: change(loss) for name, loss in self.losses.items()}
        return replace(self, losses=losses, **_changed(self, change))


def _changed(record: Any, change: Change, besides: str = "") -> dict[str, Any]:
    return {n: change(value) for n, value in vars(record).items() if isinstance(value, Tensor) and n != besides}
