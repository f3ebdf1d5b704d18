"""Collation of samples into one batch of fixed shapes: smallest bucket, padded ground truth, packed polygons.

Shapes: N images, H × W the bucket, G ground-truth rows, I = N·G instances, T parts, V vertices.
G, T and V are powers of two.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.data.dataset import Sample
from model.data.index import CocoInstances, offsets
from model.data.transforms import Pixels, Size
from model.errors import UserError
from model.structures import Batch, Polygons, Targets

_MIN_GT_ROWS = 8
Buckets = Sequence[tuple[int, int]]


def smallest_bucket(sizes: Sequence[Size], buckets: Buckets) -> Size:
    """Return the bucket (height, width) of least area that holds all sizes.

    Raises:
        UserError: if no bucket does.
    """
    height, width = max(size[0] for size in sizes), max(size[1] for size in sizes)
    holding = [bucket for bucket in buckets if bucket[0] >= height and bucket[1] >= width]
    if not holding:
        raise UserError(
            f"data.buckets: none of {list(buckets)} holds {height} × {width} (height × width); add one that does"
        )
    return min(holding, key=lambda bucket: (bucket[0] * bucket[1], bucket))


def collate(samples: Sequence[Sample], buckets: Buckets) -> Batch:
    """Pad samples into one batch, with targets if the samples have instances.

    Raises:
        UserError: if no bucket holds all images.
    """
    bucket = smallest_bucket([sample.image.shape[:2] for sample in samples], buckets)
    instances = [sample.instances for sample in samples if sample.instances is not None]
    return Batch(
        images=_pad_images([sample.image for sample in samples], bucket),
        image_sizes=torch.tensor([sample.image.shape[:2] for sample in samples], dtype=torch.int32),
        original_sizes=torch.tensor([sample.original_size for sample in samples], dtype=torch.int32),
        image_ids=torch.tensor([sample.image_id for sample in samples], dtype=torch.int64),
        seeds=torch.tensor([sample.seed for sample in samples], dtype=torch.int64),
        targets=_targets(instances) if instances else None,
    )


def _pad_images(images: Sequence[Pixels], bucket: Size) -> Tensor:
    """Pad images to [N, 3, H, W] uint8, channels-last in memory as they are decoded and convolved."""
    batch = np.zeros((len(images), *bucket, 3), dtype=np.uint8)
    for row, image in zip(batch, images, strict=True):
        row[: image.shape[0], : image.shape[1]] = image
    return torch.from_numpy(batch).permute(0, 3, 1, 2)


def _targets(instances: Sequence[CocoInstances]) -> Targets:
    counts = [len(of_image.labels) for of_image in instances]
    rows = max(_MIN_GT_ROWS, power_of_two(max(counts)))
    boxes = np.zeros((len(instances), rows, 4), dtype=np.float32)
    labels = np.zeros((len(instances), rows), dtype=np.int64)
    parts = np.zeros((len(instances), rows), dtype=np.int64)  # parts per instance
    for n, (of_image, count) in enumerate(zip(instances, counts, strict=True)):
        boxes[n, :count] = of_image.boxes
        labels[n, :count] = of_image.labels
        parts[n, :count] = np.diff(of_image.instance_offsets)
    return Targets(
        gt_boxes=torch.from_numpy(boxes),
        gt_labels=torch.from_numpy(labels),
        num_gt=torch.tensor(counts, dtype=torch.int32),
        polygons=_pack(instances, parts.ravel()),
    )


def _pack(instances: Sequence[CocoInstances], parts: NDArray[np.int64]) -> Polygons:
    """Concatenate the polygons of all images; `parts` [I] is the number of parts of each instance."""
    xy = np.concatenate([of_image.xy for of_image in instances])
    vertices = np.concatenate([np.diff(of_image.part_offsets) for of_image in instances])  # vertices per part
    instance_offsets, part_offsets = offsets(parts), offsets(vertices)
    vertices_of_instance = np.diff(part_offsets[instance_offsets])
    padded_xy = np.zeros((power_of_two(len(xy)), 2), dtype=np.float32)
    padded_xy[: len(xy)] = xy
    padding = power_of_two(len(vertices)) - len(vertices)
    return Polygons(
        xy=torch.from_numpy(padded_xy),
        part_offsets=torch.from_numpy(np.pad(part_offsets, (0, padding), mode="edge").astype(np.int32)),
        instance_offsets=torch.from_numpy(instance_offsets.astype(np.int32)),
        max_vertices=power_of_two(int(vertices_of_instance.max())),
        max_parts=power_of_two(int(parts.max())),
    )


def power_of_two(count: int) -> int:
    """Smallest power of two ≥ `count`; 1 for 0."""
    return 1 << max(count - 1, 0).bit_length()
