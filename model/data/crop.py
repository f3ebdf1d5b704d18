"""Cropping an annotated image to a window: pixels, boxes and polygons.

A window is (top, left, height, width) in whole pixels of the image. Polygons keep the even-odd rule, so keyholes
(see polygons.py) remain holes. Source of the clipping: Sutherland & Hodgman, Reentrant polygon clipping (1974),
one side of the window after another.
"""

from dataclasses import replace

import numpy as np

from model.data.index import CocoInstances
from model.data.outlines import Parts, pack_instances, parts_of_each
from model.data.transforms import Floats, Pixels, Size

Window = tuple[int, int, int, int]

MIN_SIDE_PX = 1e-2  # smaller remainders of an instance are dropped


def draw_window(image: Size, crop: Size, rng: np.random.Generator) -> Window:
    """Draw a window of the crop's size (or the image's, where smaller) uniformly within the image."""
    height, width = min(image[0], crop[0]), min(image[1], crop[1])
    top = int(rng.integers(image[0] - height + 1))
    left = int(rng.integers(image[1] - width + 1))
    return top, left, height, width


def crop_image(pixels: Pixels, window: Window) -> Pixels:
    """Pixels of the window [height, width, 3], as a view."""
    top, left, height, width = window
    return pixels[top : top + height, left : left + width]


def crop_instances(instances: CocoInstances, window: Window) -> CocoInstances:
    """Clip instances to the window, in pixels of the window; instances outside it are dropped.

    A clipped instance gets the bounding box of its remaining outline or, if it has no outline, its clipped box.
    """
    top, left, height, width = window
    limits = np.array([width, height], dtype=np.float32)
    shift = np.array([left, top], dtype=np.float32)
    xy, boxes = instances.xy - shift, instances.boxes - np.tile(shift, 2)
    kept, new_boxes, parts_of_instances = [], [], []
    for k, (box, parts) in enumerate(zip(boxes, parts_of_each(replace(instances, xy=xy)), strict=True)):
        if (box[:2] < 0).any() or (box[2:] > limits).any():
            parts, box = _cut(parts, box, limits)
        if (box[2:] - box[:2] >= MIN_SIDE_PX).all():
            kept.append(k)
            new_boxes.append(box)
            parts_of_instances.append(parts)
    return pack_instances(new_boxes, instances.labels[kept], instances.is_crowd[kept], parts_of_instances)


def clip_polygon(xy: Floats, limits: Floats) -> Floats:
    """Clip a polygon [v, 2] to (0, 0) … limits (x, y): [w, 2], where w may be 0.

    Pieces that the window separates stay joined along its side by edges that enclose no area.
    """
    for axis in (0, 1):
        for limit, sign in ((0.0, 1.0), (float(limits[axis]), -1.0)):
            if len(xy) and (sign * xy[:, axis] < sign * limit).any():
                xy = _clip_side(xy, axis, limit, sign)
    return xy


def enclosed_box(xy: Floats, limits: Floats) -> Floats:
    """Bounding box [4] of the area that a clipped polygon encloses; (0, 0, 0, 0) if it encloses none.

    Edges that cancel out are not part of the outline: bridges of keyholes, which are traversed in both directions, and
    stretches along a side of the window that are traversed an even number of times.
    """
    edges = np.concatenate([xy, np.roll(xy, -1, axis=0)], axis=1)  # [w, 4]
    ends = []
    for axis in (0, 1):
        for limit in (0.0, limits[axis]):
            is_along = (edges[:, axis] == limit) & (edges[:, axis + 2] == limit)
            coordinates = np.sort(edges[is_along][:, [1 - axis, 3 - axis]].ravel())
            odd = coordinates.reshape(-1, 2)  # intervals traversed an odd number of times
            along = odd[odd[:, 1] - odd[:, 0] > MIN_SIDE_PX].ravel()
            ends.append(np.stack([along, np.full_like(along, limit)], 1)[:, :: -1 if axis == 0 else 1])
            edges = edges[~is_along]
    is_turned = (edges[:, 0] > edges[:, 2]) | ((edges[:, 0] == edges[:, 2]) & (edges[:, 1] > edges[:, 3]))
    edges[is_turned] = edges[is_turned][:, [2, 3, 0, 1]]
    single, times = np.unique(edges, axis=0, return_counts=True)
    outline = np.concatenate([single[times % 2 == 1].reshape(-1, 2), *ends])
    return np.concatenate([outline.min(0), outline.max(0)]) if len(outline) else np.zeros(4, dtype=np.float32)


def _clip_side(xy: Floats, axis: int, limit: float, sign: float) -> Floats:
    """Keep one side of a line: the vertices on it, and a new vertex where an edge crosses the line."""
    depth = sign * (xy[:, axis] - limit)  # ≥ 0 stays
    following, following_depth = np.roll(xy, -1, axis=0), np.roll(depth, -1)
    stays = depth >= 0
    crosses = stays != (following_depth >= 0)
    # Interpolate from the inner end to the outer one, so that an edge traversed in both directions is cut at one point.
    inner, outer = np.where(stays[:, None], xy, following), np.where(stays[:, None], following, xy)
    inner_depth, outer_depth = np.where(stays, depth, following_depth), np.where(stays, following_depth, depth)
    share = inner_depth / np.where(crosses, inner_depth - outer_depth, 1.0)
    crossing = inner + share[:, None] * (outer - inner)
    crossing[:, axis] = limit
    both = np.stack([xy, crossing], axis=1).reshape(-1, 2)  # each vertex, then the crossing on its outgoing edge
    return both[np.stack([stays, crosses], axis=1).ravel()].astype(np.float32)


def _cut(parts: Parts, box: Floats, limits: Floats) -> tuple[Parts, Floats]:
    """Clip the parts and the box of an instance that extends beyond the window."""
    if not parts:
        return [], np.clip(box, 0, np.tile(limits, 2))
    clipped = [clip_polygon(part, limits) for part in parts]
    boxes = [enclosed_box(part, limits) for part in clipped]
    remaining = [k for k, box in enumerate(boxes) if (box[2:] > box[:2]).all()]
    if not remaining:
        return [], np.zeros(4, dtype=np.float32)
    of_parts = np.stack([boxes[k] for k in remaining])
    return [clipped[k] for k in remaining], np.concatenate([of_parts[:, :2].min(0), of_parts[:, 2:].max(0)])
