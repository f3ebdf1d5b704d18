"""Cropping annotated images: what is left of boxes and polygons is what is left of their painted masks."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from model.config import DataConfig
from model.data.collate import collate
from model.data.crop import clip_polygon, crop_image, crop_instances, draw_window
from model.data.dataset import CocoDataset
from model.data.index import CocoIndex, CocoInstances
from model.data.loader import train_loader
from model.data.polygons import mask_to_polygons
from model.data.transforms import fitted_size

Masks = NDArray[np.bool_]
SIZE = (48, 64)


def painted(parts: list[NDArray[np.float32]], size: tuple[int, int]) -> Masks:
    """pycocotools' rasterisation of the union of polygons."""
    if not parts:
        return np.zeros(size, dtype=bool)
    codes = coco_mask.frPyObjects([part.ravel().astype(float).tolist() for part in parts], *size)
    return coco_mask.decode(coco_mask.merge(codes)).astype(bool)


def parts_of(instances: CocoInstances, k: int) -> list[NDArray[np.float32]]:
    spans = instances.part_offsets[instances.instance_offsets[k] : instances.instance_offsets[k + 1] + 1]
    return [instances.xy[start:stop] for start, stop in pairwise(spans)]


def packed(shapes: list[list[NDArray[np.float32]]]) -> CocoInstances:
    """Instances of given parts, labelled 1, 2, …; the box of one without parts covers the image."""
    parts = [part for shape in shapes for part in shape]
    boxes = [[*np.concatenate(s).min(0), *np.concatenate(s).max(0)] if s else [0, 0, SIZE[1], SIZE[0]] for s in shapes]
    return CocoInstances(
        boxes=np.array(boxes, dtype=np.float32),
        labels=np.arange(1, len(shapes) + 1),
        is_crowd=np.zeros(len(shapes), dtype=bool),
        xy=np.concatenate([np.zeros((0, 2), np.float32), *parts]),
        part_offsets=np.cumsum([0] + [len(part) for part in parts]),
        instance_offsets=np.cumsum([0] + [len(shape) for shape in shapes]),
    )


def random_mask(rng: np.random.Generator) -> Masks:
    """Blobs and holes, some of them touching the border of the image."""
    mask = np.zeros(SIZE, dtype=bool)
    for value in (True, True, False, True, False):
        top, left = rng.integers(0, SIZE[0] - 6), rng.integers(0, SIZE[1] - 6)
        mask[top : top + rng.integers(3, 30), left : left + rng.integers(3, 40)] = value
    return mask


@pytest.mark.parametrize("seed", range(20))
def test_run_length_masks_with_holes_are_cropped_pixel_for_pixel(seed: int):
    """Masks given as RLE become keyholed outlines along pixel edges: cropping the outline is cropping the mask."""
    rng = np.random.default_rng(seed)
    masks = [random_mask(rng) for _ in range(3)]
    window = draw_window(SIZE, (30, 40), rng)
    cropped = crop_instances(packed([mask_to_polygons(mask) for mask in masks]), window)
    seen = {label: crop_image(mask, window) for label, mask in enumerate(masks, 1)}
    assert cropped.labels.tolist() == [label for label, mask in seen.items() if mask.any()]
    for k, label in enumerate(cropped.labels.tolist()):
        mask = seen[label]
        assert np.array_equal(painted(parts_of(cropped, k), (30, 40)), mask)
        (rows,), (columns,) = np.nonzero(mask.any(1)), np.nonzero(mask.any(0))
        assert cropped.boxes[k].tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def test_outlines_of_coco_are_cropped_as_their_masks(train_index: CocoIndex):
    """Where an outline is cut, its new corner is rounded anew: a pixel beside the border may differ,
    and nothing else.
    """
    rng = np.random.default_rng(0)
    cut = 0
    for i in range(24):
        size, instances = train_index.size(i), train_index.instances(i)
        window = draw_window(size, (size[0] // 2, size[1] // 2), rng)
        cropped = crop_instances(instances, window)
        before = {k: crop_image(painted(parts_of(instances, k), size), window) for k in range(len(instances.labels))}
        after = [painted(parts_of(cropped, k), window[2:]) for k in range(len(cropped.labels))]
        for k, mask in before.items():
            if instances.is_crowd[k] or mask.sum() < 20:
                continue
            fits = [np.count_nonzero(mask ^ other) for other in after]
            best = int(np.argmin(fits))
            assert fits[best] <= 0.01 * mask.sum() + 4
            (rows,), (columns,) = np.nonzero(mask.any(1)), np.nonzero(mask.any(0))
            tight = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            np.testing.assert_allclose(cropped.boxes[best], tight, atol=3)  # a sharp corner shows no pixel
            cut += not np.array_equal(painted(parts_of(instances, k), size).sum(), mask.sum())
    assert cut > 20


def test_what_lies_inside_stays_as_it_is_and_what_lies_outside_goes():
    inside, outside = np.float32([(12, 12), (20, 12), (16, 20)]), np.float32([(50, 40), (60, 40), (55, 46)])
    cropped = crop_instances(packed([[outside], [inside]]), (10, 10, 20, 20))
    assert cropped.labels.tolist() == [2]
    assert np.array_equal(cropped.xy, inside - 10)
    assert cropped.boxes.tolist() == [[2, 2, 10, 10]]


def test_a_part_outside_goes_and_its_instance_stays():
    left, right = np.float32([(0, 0), (8, 0), (8, 8), (0, 8)]), np.float32([(40, 0), (50, 0), (50, 8), (40, 8)])
    cropped = crop_instances(packed([[left, right]]), (0, 0, 48, 30))
    assert cropped.instance_offsets.tolist() == [0, 1]
    assert cropped.boxes.tolist() == [[0, 0, 8, 8]]


def test_an_instance_without_outline_keeps_what_is_left_of_its_box():
    assert crop_instances(packed([[]]), (8, 4, 16, 20)).boxes.tolist() == [[0, 0, 20, 16]]


def test_a_polygon_round_the_window_becomes_the_window():
    around = np.float32([(-50, -50), (90, -50), (90, 90), (-50, 90)])
    clipped = clip_polygon(around, np.float32([30, 20]))
    assert {tuple(corner) for corner in clipped.tolist()} == {(0, 0), (30, 0), (30, 20), (0, 20)}


@pytest.mark.parametrize(("factor", "size"), [(0.1, (77, 102)), (1.0, (768, 1024)), (2.0, (1536, 2048))])
def test_jitter_fits_the_image_into_the_crop_times_the_factor(factor: float, size: tuple[int, int]):
    assert fitted_size((480, 640), (1024, 1024), factor) == size


@pytest.fixture
def jittered(coco_data: DataConfig) -> DataConfig:
    """So wide a range that most of an image is cut away at its upper end."""
    changes = {"scale_jitter": (0.1, 4.0), "crop_size_px": (128, 128), "buckets": ((64, 64), (128, 128))}
    return DataConfig.model_validate(
        coco_data.model_dump() | changes | {"eval_min_size_px": 64, "eval_max_size_px": 64}
    )


def test_jittered_samples_are_small_or_cut_and_depend_on_the_seed_alone(train_index: CocoIndex, jittered: DataConfig):
    dataset = CocoDataset(train_index, jittered, training=True)
    samples = [dataset[2, seed] for seed in range(40)]
    sides = [max(sample.image.shape[:2]) for sample in samples]
    assert max(sides) == 128
    assert min(sides) < 40
    assert np.array_equal(samples[7].image, dataset[2, 7].image)
    for sample in samples:
        assert sample.instances is not None
        limits = np.tile(sample.image.shape[1::-1], 2)
        assert (sample.instances.boxes >= -1e-3).all()
        assert (sample.instances.boxes <= limits + 1e-3).all()
    assert len({len(sample.instances.labels) for sample in samples if sample.instances}) > 1


def test_a_sample_that_shows_no_instance_can_be_learned_from(train_index: CocoIndex, jittered: DataConfig):
    dataset = CocoDataset(train_index, jittered, training=True)
    samples = (dataset[i, seed] for seed in range(8) for i in range(len(train_index)))
    empty = next(sample for sample in samples if not len(sample.instances.labels))  # type: ignore[union-attr]
    batch = collate([empty, dataset[2, 0]], jittered.buckets)
    assert batch.targets is not None
    assert batch.targets.num_gt[0] == 0


def test_jittered_batches_mix_shapes_in_the_crops_bucket(train_index: CocoIndex, jittered: DataConfig):
    batches = iter(train_loader(train_index, jittered, batch_size=8, seed=0))
    originals = {tuple(size) for _ in range(2) for size in next(batches).original_sizes.tolist()}
    assert {height > width for height, width in originals} == {True, False}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale_jitter": (2.0, 0.1)}, "lowest and a highest"),
        ({"scale_jitter": (0.1, 2.0)}, "buckets must include crop"),
    ],
)
def test_jitter_that_cannot_be_drawn_is_refused(changes: dict[str, object], message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        DataConfig(**changes)  # type: ignore[arg-type]
