"""A prepared split as samples: decoded, resized, flipped, but not yet padded."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from model.config import DataConfig
from model.data.index import CocoIndex, CocoInstances
from model.data.transforms import (
    Pixels,
    Size,
    flip_boxes,
    flip_xy,
    read_image,
    resize_image,
    resized_size,
    scale_boxes,
    scale_xy,
)


@dataclass(frozen=True)
class Sample:
    """One image as the network will see it, and, when training, what to learn from it (crowds left out)."""

    image: Pixels  # [h, w, 3] uint8 RGB
    image_id: int
    original_size: Size
    seed: int
    instances: CocoInstances | None  # in pixels of `image`


class CocoDataset(torch.utils.data.Dataset[Sample]):
    """Samples of an index.

    Training takes keys (index, seed): scale and flip follow from the seed alone, so a sample does not depend on which process
    makes it, or when. Evaluation takes the index alone, always the same size, and gives no instances.
    """

    def __init__(self, index: CocoIndex, data: DataConfig, *, training: bool) -> None:
        self.index = index
        self._data = data
        self._training = training

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        i, seed = key if isinstance(key, tuple) else (key, 0)
        original = self.index.size(i)
        min_size_px, max_size_px, flip = self._draw(seed)
        size = resized_size(original, min_size_px, max_size_px)
        pixels = read_image(self.index.image_path(i), apply_exif=bool(self.index.apply_exif[i]))
        return Sample(
            image=resize_image(pixels, size, flip=flip),
            image_id=int(self.index.image_ids[i]),
            original_size=original,
            seed=seed,
            instances=_resized(self.index.instances(i), original, size, flip=flip) if self._training else None,
        )

    def _draw(self, seed: int) -> tuple[int, int, bool]:
        """(min_size_px, max_size_px, flip) of one sample."""
        data = self._data
        if not self._training:
            return data.eval_min_size_px, data.eval_max_size_px, False
        rng = np.random.default_rng(seed)
        min_size_px = data.min_sizes_px[int(rng.integers(len(data.min_sizes_px)))]
        return min_size_px, data.max_size_px, bool(rng.random() < data.horizontal_flip)


def _resized(instances: CocoInstances, old: Size, new: Size, *, flip: bool) -> CocoInstances:
    """The instances that are no crowd, in the resized and perhaps mirrored image."""
    boxes, xy = scale_boxes(instances.boxes, old, new), scale_xy(instances.xy, old, new)
    if flip:
        boxes, xy = flip_boxes(boxes, new[1]), flip_xy(xy, new[1])
    keep = ~instances.is_crowd
    # A crowd owns no part, so leaving it out leaves parts and vertices as they are.
    parts = np.diff(instances.instance_offsets)[keep]
    return CocoInstances(
        boxes=boxes[keep],
        labels=instances.labels[keep],
        is_crowd=instances.is_crowd[keep],
        xy=xy,
        part_offsets=instances.part_offsets,
        instance_offsets=_offsets(parts),
    )


def _offsets(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths)])
