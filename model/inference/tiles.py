"""Large images in overlapping tiles: each tile is an image of its own, and what they show of one object is joined.

Neighbouring tiles share a zone that both see. Objects of one class are one object if their masks agree there; each is
joined with at most one of a neighbour. The whole image, at the network's usual size, may be predicted too, for objects
that are larger than a tile: what tiles show of such an object are pieces, which it replaces.
Boxes are (x1, y1, x2, y2), sizes (height, width), both in pixels of the image. Masks are COCO RLE.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from model.data.transforms import Pixels
from model.inference.predictor import Object, Predictor

_SAME = 0.5  # IoU of two views of one object
_PIECE = 0.7  # part of a piece's area that lies in the object that it belongs to
_EDGE_PX = 2.0  # a box that comes as near to an edge inside the image is cut there


@dataclass(frozen=True)
class Tiling:
    """Division of large images into tiles."""

    side_px: int  # a tile's
    overlap: float = 0.2  # part of a tile's side that it shares with the next; objects up to it are whole in a tile
    with_whole: bool = True  # the whole image is predicted, too


@dataclass(frozen=True)
class Tile:
    """Part of an image."""

    y: int
    x: int
    height: int
    width: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        return self.x, self.y, self.x + self.width, self.y + self.height


@dataclass
class _View:
    """An object as a tile, or several, or the whole image shows it; in the image's pixels."""

    object: Object
    mask: dict[str, Any]  # the box's, if the network has no masks
    is_cut: bool = False  # a tile's edge that is none of the image cuts it
    is_joined: bool = False  # several tiles show it


def find_objects(
    predictor: Predictor,
    images: Iterable[tuple[int, Pixels]],
    lowest_scores: Mapping[str, float],
    *,
    tiling: Tiling | None,
    batch_size: int,
) -> Iterator[tuple[int, list[Object]]]:
    """Yield each image's number with its objects as `Predictor.objects` does, found in tiles where an image is larger.

    Args:
        lowest_scores: names of the wanted classes, each with the lowest score of its objects.
        tiling: for images that are larger than a tile; None for whole images.
    """
    options: dict[str, Any] = {"batch_size": batch_size, "score_threshold": min(lowest_scores.values(), default=1.0)}
    found = predictor.objects(images, **options) if tiling is None else _in_tiles(predictor, images, tiling, options)
    for number, objects in found:
        yield number, [one for one in objects if one["score"] >= lowest_scores.get(one["class"], math.inf)]


def _in_tiles(
    predictor: Predictor, images: Iterable[tuple[int, Pixels]], tiling: Tiling, options: dict[str, Any]
) -> Iterator[tuple[int, list[Object]]]:
    for number, pixels in images:
        size = (pixels.shape[0], pixels.shape[1])
        tiles = tiles_of(size, tiling.side_px, tiling.overlap)
        parts = [pixels[tile.y : tile.y + tile.height, tile.x : tile.x + tile.width] for tile in tiles]
        with_whole = tiling.with_whole and len(tiles) > 1
        found = dict(predictor.objects(enumerate([*parts, *([pixels] if with_whole else [])]), **options))
        in_tiles = [(tile, found[i]) for i, tile in enumerate(tiles)]
        yield number, join(in_tiles, found[len(tiles)] if with_whole else [], size)


def tiles_of(size: tuple[int, int], tile_px: int, overlap: float) -> list[Tile]:
    """Tiles that cover an image: as few as overlap at least so much, evenly spread; none is larger than the image."""
    (ys, height), (xs, width) = (_starts(side, tile_px, overlap) for side in size)
    return [Tile(y, x, height, width) for y in ys for x in xs]


def _starts(side: int, tile_px: int, overlap: float) -> tuple[list[int], int]:
    if side <= tile_px:
        return [0], side
    step = max(int(tile_px * (1 - overlap)), 1)
    count = 1 + -(-(side - tile_px) // step)
    return [round(i * (side - tile_px) / (count - 1)) for i in range(count)], tile_px


def join(
    found: Sequence[tuple[Tile, Sequence[Object]]], whole: Sequence[Object], size: tuple[int, int]
) -> list[Object]:
    """Join the objects of tiles and of the whole image to the objects of the image, highest score first.

    Args:
        found: each tile with its objects, in the tile's pixels.
        whole: objects of the whole image.
        size: the image's.
    """
    views = [[_view_in_tile(one, tile, size) for one in objects] for tile, objects in found]
    groups = {id(view): [view] for view in itertools.chain.from_iterable(views)}  # id of its first view → a group
    group_of = dict(groups)  # id of a view → its group
    tiles = [tile for tile, _ in found]
    for a, b in _neighbours(tiles):
        for one, other in _same(views[a], views[b], _zone(tiles[a], tiles[b]), size):
            kept, gone = group_of[id(one)], group_of[id(other)]
            if kept is not gone:
                kept += gone
                group_of |= {id(view): kept for view in gone}
                del groups[id(gone[0])]
    cell_px = max((max(tile.height, tile.width) for tile in tiles), default=1)
    joined = _without_pieces([_joined(group) for group in groups.values()], cell_px)
    of_image = [_View(one, _mask_of(one, size)) for one in whole]
    kept = _with_whole(joined, of_image, cell_px)
    return sorted((view.object for view in kept), key=lambda one: -one["score"])


def _neighbours(tiles: Sequence[Tile]) -> Iterator[tuple[int, int]]:
    """Pairs of tiles, by their indices, that see a zone in common; in ascending order."""
    grid = _Grid([tile.box for tile in tiles], max((max(tile.height, tile.width) for tile in tiles), default=1))
    for a, tile in enumerate(tiles):
        yield from ((a, b) for b in grid.near(tile.box) if b > a and _meet(tile.box, tiles[b].box))


class _Grid:
    """Boxes by the squares that they touch, so that those near a box are found without looking at all."""

    def __init__(self, boxes: Iterable[Sequence[float]], cell_px: int) -> None:
        self._cell_px, self._in_cell = cell_px, defaultdict[tuple[int, int], list[int]](list)
        for number, box in enumerate(boxes):
            for cell in self._cells(box):
                self._in_cell[cell].append(number)

    def near(self, box: Sequence[float]) -> list[int]:
        """Indices of all boxes that meet this one, and of some others; in ascending order."""
        return sorted({number for cell in self._cells(box) for number in self._in_cell.get(cell, ())})

    def _cells(self, box: Sequence[float]) -> Iterator[tuple[int, int]]:
        x1, y1, x2, y2 = (int(value // self._cell_px) for value in box)
        return itertools.product(range(x1, x2 + 1), range(y1, y2 + 1))


def _view_in_tile(one: Object, tile: Tile, size: tuple[int, int]) -> _View:
    x1, y1, x2, y2 = one["bbox"]
    moved = one | {"bbox": [x1 + tile.x, y1 + tile.y, x2 + tile.x, y2 + tile.y]}
    if "segmentation" in one:
        moved["segmentation"] = moved_rle(one["segmentation"], tile, size)
    left, top, right, bottom = tile.box
    is_cut = (
        (left > 0 and x1 < _EDGE_PX)
        or (top > 0 and y1 < _EDGE_PX)
        or (right < size[1] and x2 > tile.width - _EDGE_PX)
        or (bottom < size[0] and y2 > tile.height - _EDGE_PX)
    )
    return _View(moved, _mask_of(moved, size), is_cut)


def _mask_of(one: Object, size: tuple[int, int]) -> dict[str, Any]:
    if "segmentation" in one:
        return {"size": list(size), "counts": one["segmentation"]["counts"].encode()}
    return _rectangle(one["bbox"], size)


def _rectangle(box: Sequence[float], size: tuple[int, int]) -> dict[str, Any]:
    x1, y1, x2, y2 = box
    rle: dict[str, Any] = coco_mask.frPyObjects(np.array([[x1, y1, x2 - x1, y2 - y1]], dtype=np.float64), *size)[0]
    return rle


def _zone(a: Tile, b: Tile) -> tuple[int, int, int, int]:
    """The box that both tiles see, which must meet."""
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a.box, b.box
    return max(ax1, bx1), max(ay1, by1), min(ax2, bx2), min(ay2, by2)


def _same(
    ones: Sequence[_View], others: Sequence[_View], zone: tuple[int, int, int, int], size: tuple[int, int]
) -> list[tuple[_View, _View]]:
    """Pairs of views of one object in two tiles, whose masks agree in the zone: the best pairs, each view once."""
    pairs = []
    frame = _rectangle(zone, size)
    ones, others = ([view for view in views if _meet(view.object["bbox"], zone)] for views in (ones, others))
    in_zone = {id(view): coco_mask.merge([view.mask, frame], intersect=True) for view in (*ones, *others)}
    for one, other in itertools.product(ones, others):
        if _may_be_one(one, other):
            iou = float(coco_mask.iou([in_zone[id(one)]], [in_zone[id(other)]], [0])[0, 0])
            if iou >= _SAME:
                pairs.append((iou, one, other))
    chosen: list[tuple[_View, _View]] = []
    taken: set[int] = set()
    for _, one, other in sorted(pairs, key=lambda pair: -pair[0]):
        if not taken & {id(one), id(other)}:
            taken |= {id(one), id(other)}
            chosen.append((one, other))
    return chosen


def _meet(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _joined(group: Sequence[_View]) -> _View:
    """The one object that the views show: the union of their boxes and masks, with the highest score."""
    if len(group) == 1:
        return group[0]
    best = max(group, key=lambda view: view.object["score"])
    boxes = np.array([view.object["bbox"] for view in group])
    mask = coco_mask.merge([view.mask for view in group])
    one = best.object | {"bbox": [*boxes[:, :2].min(0).tolist(), *boxes[:, 2:].max(0).tolist()]}
    if "segmentation" in one:
        one["segmentation"] = {"size": list(mask["size"]), "counts": mask["counts"].decode()}
    return _View(one, mask, all(view.is_cut for view in group), is_joined=True)


def _grid_of(views: Sequence[_View], cell_px: int) -> _Grid:
    return _Grid((view.object["bbox"] for view in views), cell_px)


def _without_pieces(views: Sequence[_View], cell_px: int) -> list[_View]:
    """Leave out what a tile's edge cut off an object that another tile shows better."""
    grid = _grid_of(views, cell_px)

    def is_piece(view: _View) -> bool:
        return view.is_cut and any(_is_piece(view, views[i]) for i in grid.near(view.object["bbox"]))

    return [view for view in views if not is_piece(view)]


def _is_piece(view: _View, of: _View) -> bool:
    """True if a view is a piece of another, larger one of its class."""
    if view is of or not _may_be_one(view, of):
        return False
    covered = float(coco_mask.iou([view.mask], [of.mask], [1])[0, 0])  # the part of the view's own area, as for a crowd
    return covered >= _PIECE and coco_mask.area(of.mask) > coco_mask.area(view.mask)


def _with_whole(views: Sequence[_View], whole: Sequence[_View], cell_px: int) -> list[_View]:
    """Add what the whole image alone shows as a whole; where tiles do, too, theirs is the finer mask."""
    grid = _grid_of(whole, cell_px)
    kept = [view for view in views if not any(_is_better(whole[i], view) for i in grid.near(view.object["bbox"]))]
    grid = _grid_of(kept, cell_px)
    return kept + [one for one in whole if not any(_is_one(one, kept[i]) for i in grid.near(one.object["bbox"]))]


def _is_better(of_image: _View, view: _View) -> bool:
    """True if tiles show only a piece of an object of the whole image."""
    return view.is_cut and _is_piece(view, of_image) and not (view.is_joined and _iou(view, of_image) >= _SAME)


def _is_one(of_image: _View, view: _View) -> bool:
    """True if two views are one object: by their masks, or, as in the network's own NMS, by their boxes.

    The whole image places an object to a few pixels, so that of a thin one the masks may hardly meet.
    """
    if not _may_be_one(of_image, view):
        return False
    boxes = ([[x1, y1, x2 - x1, y2 - y1]] for x1, y1, x2, y2 in (of_image.object["bbox"], view.object["bbox"]))
    return _iou(of_image, view) >= _SAME or float(coco_mask.iou(*boxes, [0])[0, 0]) >= _SAME


def _iou(a: _View, b: _View) -> float:
    return float(coco_mask.iou([a.mask], [b.mask], [0])[0, 0]) if _may_be_one(a, b) else 0.0


def _may_be_one(a: _View, b: _View) -> bool:
    return a.object["label"] == b.object["label"] and _meet(a.object["bbox"], b.object["bbox"])


def moved_rle(rle: dict[str, Any], tile: Tile, size: tuple[int, int]) -> dict[str, Any]:
    """The RLE of a tile's mask in the image: only its runs are moved, so that a large image costs no more.

    Args:
        rle: of the tile, with text counts.
        size: the image's.
    """
    packed = {"size": rle["size"], "counts": rle["counts"].encode()}
    left, top, width, height = (int(value) for value in coco_mask.toBbox(packed))
    mask = coco_mask.decode(packed)[top : top + height, left : left + width]
    steps = np.diff(mask.astype(np.int8), axis=0, prepend=0, append=0).T  # [width, height + 1]: 1 begins a run, -1 ends
    x0, y0 = tile.x + left, tile.y + top
    starts, ends = ((x0 + x) * size[0] + y0 + y for x, y in (np.nonzero(steps == step) for step in (1, -1)))
    is_gap = starts[1:] != ends[:-1]  # else a run goes on in the next column
    bounds = np.stack([starts[np.r_[True, is_gap][: len(starts)]], ends[np.r_[is_gap, True][: len(ends)]]], axis=1)
    counts = np.diff(bounds.ravel(), prepend=0, append=size[0] * size[1])
    counts = counts[:-1] if counts[-1] == 0 and len(counts) > 1 else counts
    packed = coco_mask.frPyObjects({"size": list(size), "counts": counts.tolist()}, *size)
    return {"size": list(size), "counts": packed["counts"].decode()}
