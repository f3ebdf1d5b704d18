"""A prepared split as samples: decoded, resized, cropped, flipped, but not yet padded."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from model.config import DataConfig
from model.data.crop import Window, crop_image, crop_instances, draw_window
from model.data.index import CocoIndex, CocoInstances
from model.data.transforms import (
    Pixels,
    Size,
    fitted_size,
    flip_boxes,
    flip_image,
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


@dataclass(frozen=True)
class Change:
    """What is done to an image, in this order."""

    size: Size  # to which it is resized
    window: Window | None = None  # which is cut out, in pixels of `size`
    flip: bool = False


class CocoDataset(torch.utils.data.Dataset[Sample]):
    """Samples of an index.

    Training takes keys (index, seed): scale, window and flip follow from the seed alone, so a sample does not depend on which process
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
        change = self._draw(original, seed)
        pixels = read_image(self.index.image_path(i), apply_exif=bool(self.index.apply_exif[i]))
        return Sample(
            image=_changed_image(pixels, change),
            image_id=int(self.index.image_ids[i]),
            original_size=original,
            seed=seed,
            instances=_changed(self.index.instances(i), original, change) if self._training else None,
        )

    def _draw(self, original: Size, seed: int) -> Change:
        """What happens to one image."""
        data = self._data
        if not self._training:
            return Change(resized_size(original, data.eval_min_size_px, data.eval_max_size_px))
        rng = np.random.default_rng(seed)
        if data.scale_jitter:
            lowest, highest = data.scale_jitter
            size = fitted_size(original, data.crop_size_px, rng.uniform(lowest, highest))
            window = draw_window(size, data.crop_size_px, rng)
            return Change(size, window, flip=bool(rng.random() < data.horizontal_flip))
        min_size_px = data.min_sizes_px[int(rng.integers(len(data.min_sizes_px)))]
        size = resized_size(original, min_size_px, data.max_size_px)
        return Change(size, flip=bool(rng.random() < data.horizontal_flip))


def _changed_image(pixels: Pixels, change: Change) -> Pixels:
    if change.window is None:
        return resize_image(pixels, change.size, flip=change.flip)
    cropped = crop_image(resize_image(pixels, change.size), change.window)
    return flip_image(cropped) if change.flip else cropped


def _changed(instances: CocoInstances, old: Size, change: Change) -> CocoInstances:
    """The instances that are no crowd, as they are in the changed image."""
    instances = _without_crowds(_resized(instances, old, change.size))
    width = change.size[1]
    if change.window is not None:
        instances, width = crop_instances(instances, change.window), change.window[3]
    if change.flip:
        return replace(instances, boxes=flip_boxes(instances.boxes, width), xy=flip_xy(instances.xy, width))
    return instances


def _resized(instances: CocoInstances, old: Size, new: Size) -> CocoInstances:
    return replace(instances, boxes=scale_boxes(instances.boxes, old, new), xy=scale_xy(instances.xy, old, new))


def _without_crowds(instances: CocoInstances) -> CocoInstances:
    keep = ~instances.is_crowd
    # A crowd owns no part, so leaving it out leaves parts and vertices as they are.
    parts = np.diff(instances.instance_offsets)[keep]
    return replace(
        instances,
        boxes=instances.boxes[keep],
        labels=instances.labels[keep],
        is_crowd=instances.is_crowd[keep],
        instance_offsets=_offsets(parts),
    )


def _offsets(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths)])
