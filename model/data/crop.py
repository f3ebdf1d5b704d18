"""Cutting a window out of an annotated image: pixels, boxes and polygons.

A window is (top, left, height, width) in whole pixels of the image. Polygons keep the even-odd rule, so keyholes (see polygons.py)
stay holes. Source of the clipping: Sutherland & Hodgman, Reentrant polygon clipping (1974), one side of the window after another.
"""

import numpy as np
from numpy.typing import NDArray

from model.data.index import CocoInstances
from model.data.transforms import Floats, Pixels, Size

Window = tuple[int, int, int, int]

MIN_SIDE_PX = 1e-2  # what is left of an instance, and smaller, is not worth learning


def draw_window(image: Size, crop: Size, rng: np.random.Generator) -> Window:
    """A window of the crop's size, or the image's where that is smaller, anywhere within the image."""
    height, width = min(image[0], crop[0]), min(image[1], crop[1])
    top = int(rng.integers(image[0] - height + 1))
    left = int(rng.integers(image[1] - width + 1))
    return top, left, height, width


def crop_image(pixels: Pixels, window: Window) -> Pixels:
    """The pixels of the window, a view: [height, width, 3]."""
    top, left, height, width = window
    return pixels[top : top + height, left : left + width]


def crop_instances(instances: CocoInstances, window: Window) -> CocoInstances:
    """What is seen of the instances through the window, in its pixels; those that are not seen are gone.

    The box of an instance that is cut becomes that of its remaining outline, or, where it has none, of its remaining box.
    """
    top, left, height, width = window
    limits = np.array([width, height], dtype=np.float32)
    shift = np.array([left, top], dtype=np.float32)
    xy, boxes = instances.xy - shift, instances.boxes - np.tile(shift, 2)
    kept, new_boxes, parts_of_instances = [], [], []
    for k, box in enumerate(boxes):
        first, last = instances.instance_offsets[k : k + 2]
        parts = [xy[start:stop] for start, stop in _spans(instances.part_offsets[first : last + 1])]
        if (box[:2] < 0).any() or (box[2:] > limits).any():
            parts, box = _cut(parts, box, limits)
        if (box[2:] - box[:2] >= MIN_SIDE_PX).all():
            kept.append(k)
            new_boxes.append(box)
            parts_of_instances.append(parts)
    every_part = [part for parts in parts_of_instances for part in parts]
    return CocoInstances(
        boxes=np.array(new_boxes, dtype=np.float32).reshape(-1, 4),
        labels=instances.labels[kept],
        is_crowd=instances.is_crowd[kept],
        xy=np.concatenate([np.zeros((0, 2), dtype=np.float32), *every_part]),
        part_offsets=_offsets([len(part) for part in every_part]),
        instance_offsets=_offsets([len(parts) for parts in parts_of_instances]),
    )


def clip_polygon(xy: Floats, limits: Floats) -> Floats:
    """The part of a polygon [v, 2] within (0, 0) and limits (x, y): [w, 2], where w may be 0.

    Parts that the window separates stay joined along its side, by edges that enclose nothing.
    """
    for axis in (0, 1):
        for sign, limit in ((1.0, 0.0), (-1.0, -float(limits[axis]))):
            if not len(xy):
                return xy
            depth = sign * xy[:, axis] - limit  # ≥ 0 inside
            if depth.min() < 0:
                xy = _clip_side(xy, depth)
    return xy


def _clip_side(xy: Floats, depth: Floats) -> Floats:
    """Keep where depth ≥ 0: each vertex inside, and a new one where an edge crosses over."""
    following, following_depth = np.roll(xy, -1, axis=0), np.roll(depth, -1)
    is_inside = depth >= 0
    crosses = is_inside != (following_depth >= 0)
    share = depth / np.where(crosses, depth - following_depth, 1.0)
    crossing = xy + share[:, None] * (following - xy)
    both = np.stack([xy, crossing], axis=1).reshape(-1, 2)  # a vertex, then the crossing of the edge that leaves it
    return both[np.stack([is_inside, crosses], axis=1).ravel()].astype(np.float32)


def _cut(parts: list[Floats], box: Floats, limits: Floats) -> tuple[list[Floats], Floats]:
    """Parts and box of an instance that reaches beyond the window."""
    if not parts:
        return [], np.clip(box, 0, np.tile(limits, 2))
    remaining = [part for part in (clip_polygon(part, limits) for part in parts) if len(part)]
    if not remaining:
        return [], np.zeros(4, dtype=np.float32)
    xy = np.concatenate(remaining)
    return remaining, np.concatenate([xy.min(0), xy.max(0)])


def _spans(offsets: NDArray[np.int64]) -> list[tuple[int, int]]:
    return list(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))


def _offsets(lengths: list[int]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
