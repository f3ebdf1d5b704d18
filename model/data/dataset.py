"""Dataset of a prepared split: samples are decoded, resized, cropped and flipped, but not yet padded."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import get_worker_info

from model.config import DataConfig
from model.data.crop import Window, crop_image, crop_instances, draw_window
from model.data.index import CocoIndex, CocoInstances, offsets
from model.data.transforms import (
    UNREADABLE,
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
from model.errors import UserError
from model.files import SlowFileError, within


@dataclass(frozen=True)
class Sample:
    """One image as the network will see it and, when training, its instances (without crowds)."""

    image: Pixels  # [h, w, 3] uint8 RGB
    image_id: int
    original_size: Size
    seed: int
    instances: CocoInstances | None  # pixels of `image`


@dataclass(frozen=True)
class Augmentation:
    """Operations on one image: resize, then crop, then flip."""

    size: Size  # resize to this
    window: Window | None = None  # crop to this, pixels of `size`
    flip: bool = False


def read_indexed(index: CocoIndex, i: int) -> Pixels:
    """Decode image i of an index.

    Returns:
        [h, w, 3] uint8 RGB, upright as prepare saw it.

    Raises:
        UserError: if the file is gone, can no longer be read, or has another size than prepare saw; or if it cannot be
            read in time, which in a loader's worker the loader finds out.
    """
    path = index.image_path(i)
    read = partial(read_image, path, apply_exif=bool(index.apply_exif[i]), pixel_range=index.pixel_range)
    try:
        pixels = within(index.timeout_s, path, read) if get_worker_info() is None else read()
    except SlowFileError:
        raise
    except UNREADABLE as error:
        raise UserError(_why_unreadable(path, error)) from error
    if pixels.shape[:2] != index.size(i):
        raise UserError(
            f"{path}: must be as `maskrcnn prepare` saw it, {_by(index.size(i))}, got {_by(pixels.shape[:2])}; "
            "restore it, or run `maskrcnn prepare` again"
        )
    return pixels


def _why_unreadable(path: Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return f"{path}: is gone since `maskrcnn prepare`; restore it, or run `maskrcnn prepare` again"
    reason = getattr(error, "strerror", None) or error  # Pillow's own errors have no strerror
    return (
        f"{path}: cannot be read any more, though `maskrcnn prepare` could ({reason}); look at the file and its disk, "
        "or run `maskrcnn prepare` again"
    )


def _by(size: tuple[int, ...]) -> str:
    return f"{size[0]} × {size[1]}"


class CocoDataset(torch.utils.data.Dataset[Sample]):
    """Samples of an index.

    Training takes keys (index, seed): scale, window and flip are functions of the seed, so a sample does not depend on
    the process that makes it, or when. Evaluation takes the index alone, always resizes alike, and gives no instances.
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
        augmentation = self._draw(original, seed)
        pixels = read_indexed(self.index, i)
        return Sample(
            image=_augmented_image(pixels, augmentation),
            image_id=int(self.index.image_ids[i]),
            original_size=original,
            seed=seed,
            instances=_augmented(self.index.instances(i), original, augmentation) if self._training else None,
        )

    def _draw(self, original: Size, seed: int) -> Augmentation:
        """Draw the augmentation of one image from its seed."""
        data = self._data
        if not self._training:
            return Augmentation(resized_size(original, data.eval_min_size_px, data.eval_max_size_px))
        rng = np.random.default_rng(seed)
        if data.scale_jitter:
            lowest, highest = data.scale_jitter
            size = fitted_size(original, data.crop_size_px, rng.uniform(lowest, highest))
            window = draw_window(size, data.crop_size_px, rng)
            return Augmentation(size, window, flip=bool(rng.random() < data.horizontal_flip))
        min_size_px = data.min_sizes_px[int(rng.integers(len(data.min_sizes_px)))]
        size = resized_size(original, min_size_px, data.max_size_px)
        return Augmentation(size, flip=bool(rng.random() < data.horizontal_flip))


def _augmented_image(pixels: Pixels, augmentation: Augmentation) -> Pixels:
    if augmentation.window is None:
        return resize_image(pixels, augmentation.size, flip=augmentation.flip)
    cropped = crop_image(resize_image(pixels, augmentation.size), augmentation.window)
    return flip_image(cropped) if augmentation.flip else cropped


def _augmented(instances: CocoInstances, old: Size, augmentation: Augmentation) -> CocoInstances:
    """Instances in the pixels of the augmented image, without crowds."""
    instances = _without_crowds(_resized(instances, old, augmentation.size))
    width = augmentation.size[1]
    if augmentation.window is not None:
        instances, width = crop_instances(instances, augmentation.window), augmentation.window[3]
    if augmentation.flip:
        return replace(instances, boxes=flip_boxes(instances.boxes, width), xy=flip_xy(instances.xy, width))
    return instances


def _resized(instances: CocoInstances, old: Size, new: Size) -> CocoInstances:
    return replace(instances, boxes=scale_boxes(instances.boxes, old, new), xy=scale_xy(instances.xy, old, new))


def _without_crowds(instances: CocoInstances) -> CocoInstances:
    keep = ~instances.is_crowd
    # A crowd owns no part, so dropping it leaves parts and vertices unchanged.
    parts = np.diff(instances.instance_offsets)[keep]
    return replace(
        instances,
        boxes=instances.boxes[keep],
        labels=instances.labels[keep],
        is_crowd=instances.is_crowd[keep],
        instance_offsets=offsets(parts),
    )
