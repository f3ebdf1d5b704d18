"""Dataset of a prepared split: samples are decoded, resized, cropped and flipped, but not yet padded."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import get_worker_info

from model.config import AugmentConfig, DataConfig
from model.data.copy_paste import paste
from model.data.crop import Window, crop_image, crop_instances, draw_window
from model.data.index import CocoIndex, CocoInstances, offsets
from model.data.seeds import quarter_turns
from model.data.transforms import (
    UNREADABLE,
    Pixels,
    Size,
    fitted_size,
    flip_boxes,
    flip_boxes_vertically,
    flip_image,
    flip_image_vertically,
    flip_xy,
    flip_xy_vertically,
    read_image,
    resize_image,
    resized_size,
    scale_boxes,
    scale_xy,
    turn_boxes,
    turn_image,
    turn_size,
    turn_xy,
)
from model.errors import UserError
from model.files import SlowFileError, within

ChangeColors = Callable[[Pixels, AugmentConfig, np.random.Generator], Pixels]
_VERTICAL_FLIP, _COLORS, _COPY_PASTE = range(1, 4)  # a sample's random streams, beside that of scale, window and flip


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
    """Operations on one image: turn, then resize, then crop, then flip."""

    size: Size  # resize to this
    window: Window | None = None  # crop to this, pixels of `size`
    flip: bool = False  # left and right
    quarter_turns: int = 0  # counterclockwise
    flip_vertically: bool = False


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
            f"{path}: must be as `maskrcnn prepare` saw it, {_by(index.size(i))} (height × width), got "
            f"{_by(pixels.shape[:2])}; restore it, or run `maskrcnn prepare` again"
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


def _generator(seed: int, stream: int) -> np.random.Generator:
    """A stream of random numbers of a sample; what one augmentation draws changes no other."""
    return np.random.default_rng((seed, stream))


class CocoDataset(torch.utils.data.Dataset[Sample]):
    """Samples of an index.

    Training takes keys (index, seed): scale, window and flip are functions of the seed, so a sample does not depend on
    the process that makes it, or when. Evaluation takes the index alone, always resizes alike, and gives no instances.
    """

    def __init__(self, index: CocoIndex, data: DataConfig, *, training: bool) -> None:
        self.index = index
        self._data = data
        self._training = training
        self._sources = np.flatnonzero(index.has_instances)  # for copy-paste
        self._change_colors: ChangeColors | None = None
        if training and data.augment.changes_colors:
            from model.data.photometric import change_colors  # imported once, before workers are forked

            self._change_colors = change_colors

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        i, seed = key if isinstance(key, tuple) else (key, 0)
        image, instances = self._augmented(i, seed)
        if instances is not None and self._data.augment.copy_paste:
            image, instances = self._pasted(image, instances, _generator(seed, _COPY_PASTE))
        if self._change_colors is not None:
            image = self._change_colors(image, self._data.augment, _generator(seed, _COLORS))
        return Sample(
            image=image,
            image_id=int(self.index.image_ids[i]),
            original_size=self.index.size(i),
            seed=seed,
            instances=instances,
        )

    def _pasted(
        self, image: Pixels, instances: CocoInstances, rng: np.random.Generator
    ) -> tuple[Pixels, CocoInstances]:
        """Paste objects of another image, drawn from all that have any, with a scale, window and flip of its own."""
        if rng.random() >= self._data.augment.copy_paste:
            return image, instances
        i, seed = int(rng.choice(self._sources)), int(rng.integers(2**63))
        source, source_instances = self._augmented(i, seed)
        assert source_instances is not None
        return paste(image, instances, source, source_instances, rng)

    def _augmented(self, i: int, seed: int) -> tuple[Pixels, CocoInstances | None]:
        """Image i as augmented by a seed and, when training, its instances in these pixels."""
        original = self.index.size(i)
        augmentation = self._draw(original, seed)
        image = _augmented_image(read_indexed(self.index, i), augmentation)
        return image, _augmented(self.index.instances(i), original, augmentation) if self._training else None

    def _draw(self, original: Size, seed: int) -> Augmentation:
        """Draw the augmentation of one image from its seed."""
        data = self._data
        if not self._training:
            return Augmentation(resized_size(original, data.eval_min_size_px, data.eval_max_size_px))
        turns = int(quarter_turns(np.array([seed]))[0]) if data.augment.quarter_turns else 0
        upside_down = bool(_generator(seed, _VERTICAL_FLIP).random() < data.augment.vertical_flip)
        augmentation = self._draw_window(turn_size(original, turns), np.random.default_rng(seed))
        return replace(augmentation, quarter_turns=turns, flip_vertically=upside_down)

    def _draw_window(self, original: Size, rng: np.random.Generator) -> Augmentation:
        """Draw scale, window and horizontal flip of one image."""
        data = self._data
        if data.scale_jitter:
            lowest, highest = data.scale_jitter
            size = fitted_size(original, data.crop_size_px, rng.uniform(lowest, highest))
            window = draw_window(size, data.crop_size_px, rng)
            return Augmentation(size, window, flip=bool(rng.random() < data.horizontal_flip))
        min_size_px = data.min_sizes_px[int(rng.integers(len(data.min_sizes_px)))]
        size = resized_size(original, min_size_px, data.max_size_px)
        return Augmentation(size, flip=bool(rng.random() < data.horizontal_flip))


def _augmented_image(pixels: Pixels, augmentation: Augmentation) -> Pixels:
    pixels = turn_image(pixels, augmentation.quarter_turns)
    if augmentation.window is None:
        image = resize_image(pixels, augmentation.size, flip=augmentation.flip)
    else:
        image = crop_image(resize_image(pixels, augmentation.size), augmentation.window)
        image = flip_image(image) if augmentation.flip else image
    return flip_image_vertically(image) if augmentation.flip_vertically else image


def _augmented(instances: CocoInstances, old: Size, augmentation: Augmentation) -> CocoInstances:
    """Instances in the pixels of the augmented image, without crowds."""
    turns, (height, width) = augmentation.quarter_turns, augmentation.size
    instances = _without_crowds(instances)
    if turns:
        boxes, xy = turn_boxes(instances.boxes, old, turns), turn_xy(instances.xy, old, turns)
        instances = replace(instances, boxes=boxes, xy=xy)
    instances = _resized(instances, turn_size(old, turns), augmentation.size)
    if augmentation.window is not None:
        instances, (height, width) = crop_instances(instances, augmentation.window), augmentation.window[2:]
    boxes, xy = instances.boxes, instances.xy
    if augmentation.flip:
        boxes, xy = flip_boxes(boxes, width), flip_xy(xy, width)
    if augmentation.flip_vertically:
        boxes, xy = flip_boxes_vertically(boxes, height), flip_xy_vertically(xy, height)
    return replace(instances, boxes=boxes, xy=xy)


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
