"""Objects of large images from tiles. A detector that sees exactly what is there stands for the network, so that
whatever is lost or doubled is the joining's fault.
"""

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from model.inference.tiles import Tile, _Grid, join, moved_rle, tiles_of

Mask = NDArray[np.bool_]


def ellipse(size: tuple[int, int], y: float, x: float, ry: float, rx: float) -> Mask:
    ys, xs = np.mgrid[: size[0], : size[1]]
    return ((ys - y) / ry) ** 2 + ((xs - x) / rx) ** 2 <= 1


def scene(size: tuple[int, int], seed: int, count: int = 25) -> list[tuple[int, Mask]]:
    """Labels and masks of ellipses that do not touch, from small to nearly as large as the overlap."""
    rng = np.random.default_rng(seed)
    objects: list[tuple[int, Mask]] = []
    taken = np.zeros(size, dtype=bool)
    while len(objects) < count:
        mask = ellipse(size, *rng.uniform(0, size), *rng.uniform(4, 28, 2))
        if mask.sum() > 30 and not (taken & mask).any():
            taken |= mask
            objects.append((int(rng.integers(1, 4)), mask))
    return objects


def rle_of(mask: Mask) -> dict[str, Any]:
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": rle["counts"].decode()}


def seen(objects: list[tuple[int, Mask]], tile: Tile, *, has_masks: bool = True) -> list[dict[str, Any]]:
    """What a perfect detector finds in a tile: each object's part there, the larger the surer."""
    found = []
    for label, mask in objects:
        part = mask[tile.y : tile.y + tile.height, tile.x : tile.x + tile.width]
        if part.any():
            ys, xs = np.nonzero(part)
            box = [float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1)]
            one = {"label": label, "score": 0.5 + 0.5 * part.sum() / mask.sum(), "bbox": box}
            found.append(one | ({"segmentation": rle_of(part)} if has_masks else {}))
    return found


def joined(
    objects: list[tuple[int, Mask]], tile_px: int, overlap: float, *, whole: bool = False
) -> list[dict[str, Any]]:
    size = objects[0][1].shape
    tiles = [(tile, seen(objects, tile)) for tile in tiles_of(size, tile_px, overlap)]
    return join(tiles, seen(objects, Tile(0, 0, *size)) if whole else [], size)


@pytest.mark.parametrize(("size", "seed"), [((300, 420), 0), ((420, 300), 1), ((250, 250), 2), ((128, 500), 3)])
def test_no_object_is_lost_or_doubled_at_seams(size: tuple[int, int], seed: int) -> None:
    objects = scene(size, seed)
    found = joined(objects, tile_px=128, overlap=0.5)
    expected = sorted((label, rle_of(mask)["counts"]) for label, mask in objects)
    assert sorted((one["label"], one["segmentation"]["counts"]) for one in found) == expected
    for one in found:
        x, y, width, height = coco_mask.toBbox(one["segmentation"])
        assert one["bbox"] == [x, y, x + width, y + height]


def test_an_object_larger_than_a_tile_is_that_of_the_whole_image() -> None:
    size = (300, 300)
    objects = [(1, ellipse(size, 150, 150, 140, 140)), (2, ellipse(size, 10, 10, 8, 8))]
    found = joined(objects, tile_px=100, overlap=0.2, whole=True)
    assert sorted((one["label"], one["segmentation"]["counts"]) for one in found) == [
        (label, rle_of(mask)["counts"]) for label, mask in objects
    ]


def test_pieces_that_no_tile_shows_as_one_give_way_to_the_whole_object() -> None:
    """A bar over three tiles of which the middle one found nothing."""
    size = (60, 240)
    bar = [(1, ellipse(size, 30, 120, 10, 110))]
    tiles = tiles_of(size, 100, 0.3)
    found = [(tile, seen(bar, tile) if tile.x in (tiles[0].x, tiles[-1].x) else []) for tile in tiles]
    assert len(join(found, [], size)) == 2
    (one,) = join(found, seen(bar, Tile(0, 0, *size)), size)
    assert one["segmentation"] == rle_of(bar[0][1])


def test_of_what_both_show_tiles_have_the_finer_mask() -> None:
    size = (100, 180)
    exact, coarse = ellipse(size, 50, 90, 20, 20), ellipse(size, 50, 90, 24, 24)
    tiles = [(tile, seen([(1, exact)], tile)) for tile in tiles_of(size, 100, 0.3)]
    (one,) = join(tiles, seen([(1, coarse)], Tile(0, 0, *size)), size)
    assert one["segmentation"] == rle_of(exact)


def test_a_thin_object_that_the_whole_image_shows_a_little_beside_is_not_doubled() -> None:
    size = (100, 180)
    ys, xs = np.mgrid[:100, :180]
    thin = (abs(ys - xs + 40) < 4) & (ys > 20) & (ys < 80)
    aside = np.roll(thin, 6, axis=1)
    assert (thin & aside).sum() < 0.2 * (thin | aside).sum()
    tiles = [(tile, seen([(1, thin)], tile)) for tile in tiles_of(size, 100, 0.3)]
    (one,) = join(tiles, seen([(1, aside)], Tile(0, 0, *size)), size)
    assert one["segmentation"] == rle_of(thin)


def test_neighbours_of_one_class_and_of_two_classes_stay_apart() -> None:
    size = (100, 180)
    left, right = ellipse(size, 50, 80, 12, 8), ellipse(size, 50, 97, 12, 8)
    for labels in ((1, 1), (1, 2)):
        found = joined([(labels[0], left), (labels[1], right)], tile_px=100, overlap=0.3)
        assert sorted(one["bbox"] for one in found) == sorted(
            one["bbox"] for one in seen([(1, left), (1, right)], Tile(0, 0, *size))
        )


def test_a_bar_longer_than_the_overlap_is_joined_by_what_both_tiles_see_of_it() -> None:
    size = (60, 180)
    bar = [(1, ellipse(size, 30, 90, 8, 85))]
    (one,) = joined(bar, tile_px=100, overlap=0.2)
    assert one["segmentation"] == rle_of(bar[0][1])
    tiles = [(tile, seen(bar, tile)) for tile in tiles_of(size, 100, 0.2)]
    coarse = seen([(1, ellipse(size, 30, 90, 10, 88))], Tile(0, 0, *size))
    assert join(tiles, coarse, size)[0]["segmentation"] == one["segmentation"], "the finer mask of two"


def test_an_object_within_another_stays_whatever_their_classes() -> None:
    size = (100, 180)
    outer, inner = ellipse(size, 50, 70, 14, 10), ellipse(size, 50, 70, 12, 9)  # an IoU of 0.77
    large = ellipse(size, 50, 90, 45, 85)
    for labels in ((1, 1), (1, 2)):
        nested = [(labels[0], outer), (labels[1], inner)]
        assert len(joined(nested, tile_px=100, overlap=0.5)) == 2
        found = joined([*nested, (1, large)], tile_px=100, overlap=0.5, whole=True)
        assert sorted(coco_mask.area(one["segmentation"]) for one in found) == sorted(
            mask.sum() for mask in (outer, inner, large)
        )
    tiles = [(tile, seen([(1, inner)], tile)) for tile in tiles_of(size, 100, 0.5)]
    assert len(join(tiles, seen([(1, large)], Tile(0, 0, *size)), size)) == 2, "the whole image shows one of them alone"


def test_views_of_two_classes_are_two_objects() -> None:
    size = (100, 180)
    first, second = tiles_of(size, 100, 0.2)
    mask = ellipse(size, 50, 90, 8, 8)
    assert len(join([(first, seen([(1, mask)], first)), (second, seen([(2, mask)], second))], [], size)) == 2


def test_what_a_tile_cuts_off_is_left_out_though_it_was_taken_for_something_smaller() -> None:
    """The cut view's mask agrees too little with the other's, but lies in it."""
    size = (100, 180)
    mask = ellipse(size, 50, 100, 30, 25)
    first, second = tiles_of(size, 100, 0.2)
    (cut,) = seen([(1, mask)], first)
    sliver = coco_mask.decode(cut["segmentation"]).astype(bool)
    sliver[:45] = False
    sliver[55:] = False
    cut |= {"segmentation": rle_of(sliver), "bbox": [cut["bbox"][0], 45.0, cut["bbox"][2], 55.0], "score": 0.99}
    (one,) = join([(first, [cut]), (second, seen([(1, mask)], second))], [], size)
    assert one["bbox"][0] >= second.x


def by_comparing_all(
    found: list[tuple[Tile, list[dict[str, Any]]]], whole: list[dict[str, Any]], size: tuple[int, int]
) -> list[dict[str, Any]]:
    """The objects that `join` must give: every view is compared with every other, pixel by pixel."""

    def view(one: dict[str, Any], tile: Tile) -> SimpleNamespace:
        mask = np.zeros(size, dtype=bool)
        mask[tile.y : tile.y + tile.height, tile.x : tile.x + tile.width] = coco_mask.decode(one["segmentation"])
        box = np.add(one["bbox"], [tile.x, tile.y, tile.x, tile.y])
        inner = [tile.x > 0, tile.y > 0, tile.x + tile.width < size[1], tile.y + tile.height < size[0]]
        gaps = [*one["bbox"][:2], tile.width - one["bbox"][2], tile.height - one["bbox"][3]]
        is_cut = any(edge and gap < 2 for edge, gap in zip(inner, gaps, strict=True))
        return SimpleNamespace(label=one["label"], score=one["score"], box=box, mask=mask, cut=is_cut, joined=False)

    def alike(a: SimpleNamespace, b: SimpleNamespace) -> bool:
        return (
            a is not b and a.label == b.label and bool((a.box[:2] < b.box[2:]).all() and (b.box[:2] < a.box[2:]).all())
        )

    def iou(a: Mask, b: Mask) -> float:
        return float((a & b).sum() / max((a | b).sum(), 1))

    def piece(a: SimpleNamespace, of: SimpleNamespace) -> bool:
        share = (a.mask & of.mask).sum() / max(a.mask.sum(), 1)
        return alike(a, of) and share >= 0.7 and bool(of.mask.sum() > a.mask.sum())

    def same(a: SimpleNamespace, b: SimpleNamespace) -> bool:
        boxes = (np.maximum(np.minimum(a.box[2:], b.box[2:]) - np.maximum(a.box[:2], b.box[:2]), 0)).prod()
        areas = sum((one.box[2:] - one.box[:2]).prod() for one in (a, b))
        return alike(a, b) and (iou(a.mask, b.mask) >= 0.5 or boxes / (areas - boxes) >= 0.5)

    tiles = [(tile, [view(one, tile) for one in objects]) for tile, objects in found]
    groups = [[one] for _, views in tiles for one in views]
    for (a, ones), (b, others) in itertools.combinations(tiles, 2):
        zone = np.zeros(size, dtype=int)
        for tile in (a, b):
            zone[tile.y : tile.y + tile.height, tile.x : tile.x + tile.width] += 1
        pairs = [(iou(x.mask & (zone > 1), y.mask & (zone > 1)), x, y) for x in ones for y in others if alike(x, y)]
        taken: list[SimpleNamespace] = []
        for value, *pair in sorted(pairs, key=lambda entry: -entry[0]):
            if value >= 0.5 and not any(one is other for one in pair for other in taken):
                taken += pair
                kept, gone = (next(g for g in groups if any(v is one for v in g)) for one in pair)
                if kept is not gone:
                    kept += gone
                    groups = [group for group in groups if group is not gone]
    views = []
    for group in groups:
        best = max(group, key=lambda one: one.score)
        ends = [np.min([one.box for one in group], 0)[:2], np.max([one.box for one in group], 0)[2:]]
        mask, is_cut = np.any([one.mask for one in group], 0), all(one.cut for one in group)
        views.append(SimpleNamespace(**vars(best) | {"box": np.concatenate(ends), "mask": mask, "cut": is_cut}))
        views[-1].joined = len(group) > 1
    views = [one for one in views if not (one.cut and any(piece(one, other) for other in views))]
    of_image = [view(one, Tile(0, 0, *size)) for one in whole]

    def better(one: SimpleNamespace, other: SimpleNamespace) -> bool:
        return piece(other, one) and not (other.joined and iou(other.mask, one.mask) >= 0.5)

    views = [one for one in views if not (one.cut and any(better(other, one) for other in of_image))]
    views += [one for one in of_image if not any(same(one, other) for other in views)]
    return [
        {"label": one.label, "score": one.score, "bbox": one.box.tolist(), "segmentation": rle_of(one.mask)}
        for one in sorted(views, key=lambda one: -one.score)
    ]


@pytest.mark.parametrize("seed", range(8))
def test_what_is_joined_is_what_comparing_all_with_all_would_join(seed: int) -> None:
    """Objects touch and overlap, masks of tiles differ a little, some views are absent, and some scores are equal."""
    rng = np.random.default_rng(seed)
    size = (int(rng.integers(100, 200)), int(rng.integers(150, 250)))
    objects = [
        (int(rng.integers(1, 3)), ellipse(size, *rng.uniform(0, size), *rng.uniform(3, 45, 2))) for _ in range(25)
    ]
    objects = [(label, mask) for label, mask in objects if mask.any()]

    def noisy(tile: Tile) -> list[dict[str, Any]]:
        shifted = [(label, np.roll(mask, rng.integers(-3, 4), axis=rng.integers(2))) for label, mask in objects]
        return [one | {"score": round(one["score"], 1)} for one in seen(shifted, tile) if rng.uniform() < 0.8]

    tiles = [(tile, noisy(tile)) for tile in tiles_of(size, 64, float(rng.choice([0.2, 0.5])))]
    whole = noisy(Tile(0, 0, *size))
    expected = by_comparing_all(tiles, whole, size)
    assert 3 < len(expected) < sum(len(views) for _, views in tiles)
    assert join(tiles, whole, size) == expected


def test_a_box_is_compared_with_the_few_near_it_and_with_all_that_meet_it() -> None:
    rng = np.random.default_rng(0)
    corners = rng.uniform(-5, 3000, (2000, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(1, 60, (2000, 2))], axis=1)
    boxes[0] = (-5, -5, 3000, 3000)
    grid = _Grid(boxes.tolist(), 64)
    for box in boxes[1:100].tolist():
        meet = (boxes[:, :2] < box[2:]).all(1) & (boxes[:, 2:] > box[:2]).all(1)
        near = grid.near(box)
        assert {*np.flatnonzero(meet).tolist()} <= {*near}
        assert near == sorted(near)
        assert len(near) < 30
    assert grid.near(boxes[0].tolist()) == list(range(2000))


def test_boxes_without_masks_are_joined_too() -> None:
    size = (100, 180)
    objects = [(1, ellipse(size, 50, 90, 20, 18)), (1, ellipse(size, 50, 20, 10, 10))]
    tiles = [(tile, seen(objects, tile, has_masks=False)) for tile in tiles_of(size, 100, 0.3)]
    found = join(tiles, [], size)
    whole = seen(objects, Tile(0, 0, *size), has_masks=False)
    assert sorted(one["bbox"] for one in found) == sorted(one["bbox"] for one in whole)
    assert not any("segmentation" in one for one in found)


@pytest.mark.parametrize(
    ("size", "tiles"),
    [
        ((100, 100), [(0, 0, 100, 100)]),
        ((60, 100), [(0, 0, 60, 100)]),
        ((100, 101), [(0, 0, 100, 100), (0, 1, 100, 100)]),
        ((100, 260), [(0, 0, 100, 100), (0, 80, 100, 100), (0, 160, 100, 100)]),
        ((100, 300), [(0, x, 100, 100) for x in (0, 67, 133, 200)]),
        ((180, 90), [(0, 0, 100, 90), (80, 0, 100, 90)]),
    ],
)
def test_tiles_cover_the_image_evenly_and_overlap_as_asked(size: tuple[int, int], tiles: list[tuple[int, ...]]) -> None:
    assert tiles_of(size, 100, 0.2) == [Tile(*tile) for tile in tiles]


def test_a_mask_is_moved_as_it_is() -> None:
    rng = np.random.default_rng(0)
    for tile in (Tile(0, 0, 20, 30), Tile(7, 11, 20, 30), Tile(20, 0, 20, 30), Tile(0, 20, 40, 30)):
        full = rng.random((tile.height, tile.width)) < 0.5
        full[:, 3] = True  # a whole column
        inner = np.zeros_like(full)
        inner[4:9, 5:12] = full[4:9, 5:12]
        for part in (full, inner):
            mask = np.zeros((40, 50), dtype=bool)
            mask[tile.y : tile.y + tile.height, tile.x : tile.x + tile.width] = part
            assert moved_rle(rle_of(part), tile, (40, 50)) == rle_of(mask)
    assert moved_rle(rle_of(np.zeros((20, 30), dtype=bool)), Tile(5, 5, 20, 30), (40, 50)) == rle_of(
        np.zeros((40, 50), bool)
    )
