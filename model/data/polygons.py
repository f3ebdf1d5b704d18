"""Exact conversion of masks to polygons: pycocotools rasterises them back to the same mask, pixel for pixel.

A mask's outline consists of rings of pixel edges. Every corner has one vertical and one horizontal neighbour on its
ring: the corners of one column, in order, pair up into vertical edges, and those of one row into horizontal edges. If
a ring is a hole, all rings become one polygon, joined by bridges that are traversed once in each direction, so that the
even-odd rule cancels them.
"""

import numpy as np
from numpy.typing import NDArray


def mask_to_polygons(mask: NDArray[np.generic], *, reverses_holes: bool = False) -> list[NDArray[np.float32]]:
    """Trace the outline of a mask: one polygon per ring, or a single keyholed polygon if there are holes.

    Args:
        mask: [height, width], any dtype; non-zero is inside.
        reverses_holes: holes run the other way round than outlines, so that the polygon's area, and what programs fill
            that go by its direction, are right too.

    Returns:
        Polygons [V, 2] float32, (x, y) in pixels, first vertex not repeated; their union under the even-odd rule is the
        mask. An empty mask gives an empty list.
    """
    inside = np.pad(np.asarray(mask) != 0, 1)
    rings = _rings(inside)
    if any(_is_hole(ring, inside) for ring in rings):
        if reverses_holes:
            rings = [np.concatenate([r[:1], r[:0:-1]]) if _is_hole(r, inside) else r for r in rings]
        return [_keyhole(rings)]
    return rings


def _rings(inside: NDArray[np.bool_]) -> list[NDArray[np.float32]]:
    """Closed walks along the pixel edges of a padded mask, [V, 2] each; the first vertex is leftmost, then topmost."""
    xy = _corners(inside)
    up_down = _partners(np.lexsort((xy[:, 1], xy[:, 0])))
    left_right = _partners(np.lexsort((xy[:, 0], xy[:, 1])))
    rings, seen = [], [False] * len(xy)
    for start in range(len(xy)):
        ring, corner = [], start
        while not seen[corner]:
            ring += [corner, up_down[corner]]
            seen[corner] = seen[up_down[corner]] = True
            corner = left_right[up_down[corner]]
        if ring:
            rings.append(xy[ring].astype(np.float32))
    return rings


def _corners(inside: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Corners of the outline [V, 2] (x, y), sorted by x, then y; twice where two pixels touch only at a corner."""
    top_left, top_right = inside[:-1, :-1], inside[:-1, 1:]
    bottom_left, bottom_right = inside[1:, :-1], inside[1:, 1:]
    turns = top_left ^ top_right ^ bottom_left ^ bottom_right
    crosses = (top_left == bottom_right) & (top_right == bottom_left) & (top_left != top_right)
    times = turns + 2 * crosses.astype(np.int64)
    xy = np.argwhere(times.T)
    return np.repeat(xy, times.T[xy[:, 0], xy[:, 1]], axis=0)


def _partners(order: NDArray[np.int64]) -> list[int]:
    """Other end of each corner's edge: in this line-by-line order, corners 0 and 1 share an edge, then 2 and 3."""
    partner = np.empty_like(order)
    partner[order[0::2]], partner[order[1::2]] = order[1::2], order[0::2]
    return list(partner.tolist())


def _is_hole(ring: NDArray[np.float32], inside: NDArray[np.bool_]) -> bool:
    """True if the enclosed pixel to the lower right of the ring's first corner is outside the mask."""
    x, y = ring[0].astype(int)
    return not inside[y + 1, x + 1]


def _keyhole(rings: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Join rings into one polygon: around the first, across to the next, around it, …, back over the same bridges."""
    forth = [np.concatenate([ring, ring[:1]]) for ring in rings]
    back = [ring[:1] for ring in rings[-2:0:-1]]
    return np.concatenate(forth + back)
