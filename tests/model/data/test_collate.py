"""Batches of fixed shapes."""

import numpy as np
import pytest

from model.data.collate import collate, smallest_bucket
from model.data.dataset import Sample
from model.data.index import CocoInstances
from model.errors import UserError
from model.structures import Batch

BUCKETS = ((64, 96), (96, 64), (96, 96))


def instances(parts_of_each: list[list[int]]) -> CocoInstances:
    """Instance k has a part for each entry, of so many vertices; vertices and boxes are numbered."""
    vertices = [count for parts in parts_of_each for count in parts]
    k = len(parts_of_each)
    return CocoInstances(
        boxes=np.arange(4 * k, dtype=np.float32).reshape(k, 4),
        labels=np.arange(1, k + 1),
        is_crowd=np.zeros(k, dtype=bool),
        xy=np.arange(2 * sum(vertices), dtype=np.float32).reshape(-1, 2),
        part_offsets=np.cumsum([0, *vertices]),
        instance_offsets=np.cumsum([0, *(len(parts) for parts in parts_of_each)]),
    )


def sample(height: int, width: int, found: CocoInstances | None = None, seed: int = 0) -> Sample:
    image = np.full((height, width, 3), 7, dtype=np.uint8)
    return Sample(image, image_id=seed + 100, original_size=(height * 2, width * 2), seed=seed, instances=found)


def unpack(batch: Batch, n: int, g: int) -> list[np.ndarray]:
    assert batch.targets
    polygons, rows = batch.targets.polygons, batch.targets.gt_labels.shape[1]
    first, last = polygons.instance_offsets[n * rows + g : n * rows + g + 2].tolist()
    return [polygons.xy[slice(*polygons.part_offsets[t : t + 2].tolist())].numpy() for t in range(first, last)]


def test_the_smallest_bucket_holds_all_images():
    assert smallest_bucket([(64, 96), (60, 80)], BUCKETS) == (64, 96)
    assert smallest_bucket([(96, 64)], BUCKETS) == (96, 64)
    assert smallest_bucket([(64, 96), (96, 64)], BUCKETS) == (96, 96)
    assert smallest_bucket([(40, 40)], [(32, 64), (128, 64), (48, 48), (64, 128)]) == (48, 48)


def test_an_image_that_no_bucket_holds_is_an_error():
    with pytest.raises(UserError, match=r"holds 97 × 64 \(height × width\)"):
        smallest_bucket([(97, 64)], BUCKETS)


def test_images_lie_in_the_top_left_corner_of_zeros():
    batch = collate([sample(60, 80), sample(64, 50)], BUCKETS)
    assert batch.images.shape == (2, 3, 64, 96)
    assert batch.image_sizes.tolist() == [[60, 80], [64, 50]]
    assert batch.original_sizes.tolist() == [[120, 160], [128, 100]]
    assert (batch.images[0, :, :60, :80] == 7).all()
    assert batch.images[0].sum() == 7 * 3 * 60 * 80
    assert batch.images[1].sum() == 7 * 3 * 64 * 50
    assert batch.targets is None


def test_ids_and_seeds_come_along():
    batch = collate([sample(8, 8, seed=2**62), sample(8, 8, seed=1)], BUCKETS)
    assert batch.seeds.tolist() == [2**62, 1]
    assert batch.image_ids.tolist() == [2**62 + 100, 101]


@pytest.mark.parametrize(("most", "rows"), [(1, 8), (8, 8), (9, 16), (17, 32), (100, 128)])
def test_ground_truth_rows_are_padded_to_a_power_of_two(most: int, rows: int):
    batch = collate([sample(8, 8, instances([[3]] * most)), sample(8, 8, instances([[3]]))], BUCKETS)
    assert batch.targets
    assert batch.targets.gt_boxes.shape == (2, rows, 4)
    assert batch.targets.num_gt.tolist() == [most, 1]
    assert batch.targets.gt_labels[1].tolist() == [1] + [0] * (rows - 1)
    assert batch.targets.gt_boxes[0, most:].abs().sum() == 0
    assert batch.targets.polygons.instance_offsets.shape == (2 * rows + 1,)


def test_polygons_are_padded_to_powers_of_two_so_that_few_shapes_of_batches_are_met():
    batch = collate([sample(8, 8, instances([[3, 5, 4], [5]])), sample(8, 8, instances([[7]]))], BUCKETS)
    assert batch.targets
    polygons = batch.targets.polygons
    assert (len(polygons.xy), len(polygons.part_offsets) - 1) == (32, 8)
    assert (polygons.max_vertices, polygons.max_parts) == (16, 4)


def test_every_instance_finds_its_own_polygons():
    first, second = instances([[3, 5], [4]]), instances([[6], [3], [3, 3, 3]])
    batch = collate([sample(8, 8, first), sample(8, 8, second)], BUCKETS)
    for n, found in enumerate((first, second)):
        for g in range(8):
            if g >= len(found.labels):
                assert unpack(batch, n, g) == []
                continue
            parts = range(*found.instance_offsets[g : g + 2])
            expected = [found.xy[slice(*found.part_offsets[t : t + 2])] for t in parts]
            assert all(np.array_equal(a, b) for a, b in zip(unpack(batch, n, g), expected, strict=True))


def test_polygons_are_padded_to_powers_of_two_with_bounds_known_to_the_host():
    batch = collate([sample(8, 8, instances([[3, 5], [4], [3, 3, 3]]))], BUCKETS)
    assert batch.targets
    polygons = batch.targets.polygons
    assert polygons.xy.shape == (32, 2)  # 21 vertices
    assert polygons.part_offsets.tolist() == [0, 3, 8, 12, 15, 18, 21, 21, 21]  # 6 parts
    assert polygons.instance_offsets.tolist() == [0, 2, 3, 6, 6, 6, 6, 6, 6]
    assert (polygons.max_vertices, polygons.max_parts) == (16, 4)  # of 9 and 3
