"""Samples: what training sees depends on the seed alone, what evaluation sees on nothing."""

import itertools
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from pycocotools import mask as coco_mask
from torchvision.transforms.v2 import functional

from model.config import AugmentConfig, DataConfig
from model.data.annotations import ImageRecord, Instance
from model.data.dataset import CocoDataset, Sample
from model.data.index import CocoIndex, CocoInstances, IndexedImage, images_location, write_index
from model.data.polygons import mask_to_polygons
from model.data.seeds import quarter_turns as drawn_turns
from model.data.transforms import read_image, resize_image, resized_size, turn_size, turn_xy

Array = NDArray[Any]


@pytest.fixture(scope="module")
def training(train_index: CocoIndex, coco_data: DataConfig) -> CocoDataset:
    return CocoDataset(train_index, coco_data, training=True)


def with_instances(sample: Sample):
    assert sample.instances is not None
    return sample.instances


def test_evaluation_gives_the_resized_image_and_no_instances(train_index: CocoIndex, coco_data: DataConfig):
    dataset = CocoDataset(train_index, coco_data, training=False)
    sample = dataset[3]
    height, width = train_index.size(3)
    assert min(sample.image.shape[:2]) == 128
    assert np.array_equal(sample.image, resize_image(read_image(train_index.image_path(3)), sample.image.shape[:2]))
    assert (sample.original_size, sample.image_id) == ((height, width), train_index.image_ids[3])
    assert sample.instances is None


def test_one_seed_gives_one_sample_and_seeds_vary_size_and_side(training: CocoDataset):
    again = [training[2, 5] for _ in range(2)]
    assert np.array_equal(again[0].image, again[1].image)
    assert np.array_equal(with_instances(again[0]).boxes, with_instances(again[1]).boxes)
    samples = [training[2, seed] for seed in range(20)]
    expected = {resized_size(training.index.size(2), short, 192) for short in (96, 128)}
    assert {sample.image.shape[:2] for sample in samples} == expected
    assert len({sample.image.tobytes() for sample in samples}) == 4  # two sizes × two sides


def test_flipped_boxes_and_polygons_mirror_the_plain_ones(train_index: CocoIndex, coco_data: DataConfig):
    plain, flipped = (
        CocoDataset(
            train_index, coco_data.model_copy(update={"horizontal_flip": p, "min_sizes_px": (128,)}), training=True
        )[2, 0]
        for p in (0.0, 1.0)
    )
    width = plain.image.shape[1]
    assert np.array_equal(flipped.image, plain.image[:, ::-1])
    boxes, mirrored = with_instances(plain).boxes, with_instances(flipped).boxes
    np.testing.assert_allclose(mirrored[:, [0, 2]], width - boxes[:, [2, 0]], atol=1e-4)
    np.testing.assert_allclose(with_instances(flipped).xy[:, 0], width - with_instances(plain).xy[:, 0], atol=1e-4)
    assert np.array_equal(mirrored[:, [1, 3]], boxes[:, [1, 3]])


def test_boxes_are_scaled_with_the_image(train_index: CocoIndex, training: CocoDataset):
    sample = training[2, 0]
    (old_height, old_width), (new_height, new_width) = sample.original_size, sample.image.shape[:2]
    areas = np.prod(with_instances(sample).boxes[:, 2:] - with_instances(sample).boxes[:, :2], axis=1)
    original = train_index.instances(2).boxes
    expected = np.prod(original[:, 2:] - original[:, :2], axis=1) * new_height * new_width / (old_height * old_width)
    np.testing.assert_allclose(areas, expected, rtol=1e-3)


def test_crowds_are_left_out_with_the_polygons_still_in_step(train_index: CocoIndex, training: CocoDataset):
    holding = [
        i for i in range(len(train_index)) if train_index.instances(i).is_crowd.any() and train_index.has_instances[i]
    ]
    assert holding
    for i in holding:
        before, after = train_index.instances(i), with_instances(training[i, 0])
        assert not after.is_crowd.any()
        assert len(after.labels) == len(before.labels) - before.is_crowd.sum()
        assert after.instance_offsets[-1] == len(after.part_offsets) - 1
        assert np.array_equal(np.diff(after.instance_offsets), np.diff(before.instance_offsets)[~before.is_crowd])


def turned_pixels(pixels: Array, turns: int) -> Array:
    for _ in range(turns):
        pixels = pixels.transpose(1, 0, *range(2, pixels.ndim))[::-1]  # columns become rows, the last one first
    return pixels


def painted(instances: CocoInstances, size: tuple[int, int]) -> list[Array]:
    """pycocotools' mask of each instance."""
    masks = []
    for first, last in pairwise(instances.instance_offsets.tolist()):
        parts = [instances.xy[start:stop] for start, stop in pairwise(instances.part_offsets[first : last + 1])]
        codes = coco_mask.frPyObjects([part.ravel().astype(float).tolist() for part in parts], *size) if parts else []
        masks.append(coco_mask.decode(coco_mask.merge(codes)).astype(bool) if parts else np.zeros(size, dtype=bool))
    return masks


def test_turned_and_flipped_instances_are_pycocotools_masks_of_the_picture_turned(
    tmp_path: Path, coco_data: DataConfig
):
    """Boxes, polygons along pixel edges, RLE with holes and crowds, at the size of the file: equal in each pixel."""
    index, masks = index_of_masks(tmp_path)
    plain = coco_data.model_copy(
        update={"min_sizes_px": (48,), "max_size_px": 64, "horizontal_flip": 0.0, "buckets": ((64, 64),)}
    )
    seen = set()
    for flip, vertical_flip, quarter_turns in itertools.product((0.0, 1.0), (0.0, 1.0), (False, True)):
        augment = AugmentConfig(vertical_flip=vertical_flip, quarter_turns=quarter_turns)
        dataset = CocoDataset(
            index, plain.model_copy(update={"horizontal_flip": flip, "augment": augment}), training=True
        )
        for seed in range(8):
            turns = int(drawn_turns(np.array([seed]))[0]) if quarter_turns else 0
            seen.add((flip, vertical_flip, turns))
            sample = dataset[0, seed]
            instances = with_instances(sample)

            def moved(pixels: Array, turns: int = turns, flips: tuple[float, float] = (vertical_flip, flip)):
                pixels = turned_pixels(pixels, turns)
                return pixels[:: -1 if flips[0] else 1, :: -1 if flips[1] else 1]

            assert np.array_equal(sample.image, moved(read_image(index.image_path(0))))
            found = painted(instances, sample.image.shape[:2])
            assert len(found) == len(masks)
            for mask, expected, box in zip(found, map(moved, masks), instances.boxes, strict=True):
                assert np.array_equal(mask, expected)
                rows, columns = np.flatnonzero(expected.any(1)), np.flatnonzero(expected.any(0))
                assert box.tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    assert len(seen) == 16


def index_of_masks(folder: Path) -> tuple[CocoIndex, list[Array]]:
    """A prepared image of 48 × 64 with a polygon, an RLE with a hole, two parts and a crowd; the masks without it."""
    rng, masks = np.random.default_rng(0), np.zeros((3, 48, 64), dtype=bool)
    masks[0, 3:20, 5:30] = True
    masks[1, 25:45, 10:40], masks[1, 30:35, 20:22] = True, False
    masks[2, 0:4, 60:64] = masks[2, 40:48, 50:55] = True
    crowd = np.zeros((48, 64), dtype=bool)
    crowd[:10, :10] = True
    Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(folder / "a.png")

    def instance(mask: Array, *, is_crowd: bool = False) -> Instance:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        return Instance(1, box, [] if is_crowd else mask_to_polygons(mask), is_crowd=is_crowd, was_clipped=False)

    instances = [instance(masks[0]), instance(crowd, is_crowd=True), instance(masks[1]), instance(masks[2])]
    write_index(
        folder / "prepared" / "train", [IndexedImage(ImageRecord(1, "a.png", 48, 64), False, instances)],
        categories={1: "a"}, data_hash="", origin=images_location(folder, Path(), folder / "prepared"),
    )  # fmt: skip
    return CocoIndex.open(folder / "prepared", "train"), list(masks)


def test_outlines_between_pixels_are_rounded_otherwise_at_their_border_alone(train_index: CocoIndex):
    """pycocotools rounds towards one side, so the pixels that an outline crosses may differ after a turn."""
    compared = 0
    for i, turns in itertools.product(range(4), (1, 2, 3)):
        size, instances = train_index.size(i), train_index.instances(i)
        after = painted(replace(instances, xy=turn_xy(instances.xy, size, turns)), turn_size(size, turns))
        for mask, whole, is_crowd in zip(after, painted(instances, size), instances.is_crowd, strict=True):
            if is_crowd:
                continue
            expected = Image.fromarray(turned_pixels(whole, turns))
            inner, outer = (
                np.array(expected.filter(kind(3))) for kind in (ImageFilter.MinFilter, ImageFilter.MaxFilter)
            )
            assert not (inner & ~mask).any()
            assert not (mask & ~outer).any()
            compared += 1
    assert compared > 12


def augmented(index: CocoIndex, data: DataConfig, seed: int, **augment: Any) -> Sample:
    options = {"horizontal_flip": 0.0, "min_sizes_px": (128,), "augment": AugmentConfig(**augment)}
    return CocoDataset(index, data.model_copy(update=options), training=True)[2, seed]


def test_colors_change_as_torchvision_changes_them_and_by_as_much_as_said(
    train_index: CocoIndex, coco_data: DataConfig
):
    plain = torch.from_numpy(augmented(train_index, coco_data, 0).image).permute(2, 0, 1)
    gray = augmented(train_index, coco_data, 0, grayscale=1.0).image
    assert np.array_equal(gray, functional.rgb_to_grayscale(plain, 3).permute(1, 2, 0).numpy())
    changes = {
        "brightness": (functional.adjust_brightness, 1.0),
        "contrast": (functional.adjust_contrast, 1.0),
        "saturation": (functional.adjust_saturation, 1.0),
        "hue": (functional.adjust_hue, 0.0),
    }
    for name, (change, middle) in changes.items():
        extent, nearest = 0.4, []
        candidates = [change(plain, middle + extent * share).permute(1, 2, 0) for share in np.linspace(-1, 1, 41)]
        for seed in range(8):
            image = torch.from_numpy(augmented(train_index, coco_data, seed, **{name: extent}).image)
            distances = [(image.float() - one).abs().mean().item() for one in candidates]
            assert min(distances) < 3, name
            nearest.append(int(np.argmin(distances)))
        assert min(nearest) < 12, name
        assert max(nearest) > 24, name


def test_blur_is_gaussian_and_of_the_probability_said(train_index: CocoIndex, coco_data: DataConfig):
    plain = augmented(train_index, coco_data, 0).image
    image = torch.from_numpy(plain).permute(2, 0, 1)
    blurred = [augmented(train_index, coco_data, seed, blur=0.5).image for seed in range(24)]
    changed = [one for one in blurred if not np.array_equal(one, plain)]
    assert 6 < len(changed) < 18
    candidates = [
        functional.gaussian_blur(image, [13, 13], [s, s]).permute(1, 2, 0).numpy() for s in np.arange(0.1, 2.05, 0.05)
    ]
    for one in changed[:3]:
        assert min(np.abs(one.astype(int) - candidate).mean() for candidate in candidates) < 0.6


def test_what_one_augmentation_draws_changes_no_other(train_index: CocoIndex, coco_data: DataConfig):
    for seed in range(6):
        colors = {"brightness": 0.3, "hue": 0.1, "blur": 0.3}
        alone = augmented(train_index, coco_data, seed, **colors)
        together = augmented(train_index, coco_data, seed, vertical_flip=1.0, saturation=0.0, **colors)
        assert np.abs(together.image.astype(int) - alone.image[::-1]).max() <= 1
        np.testing.assert_allclose(
            with_instances(together).boxes[:, 1], len(alone.image) - with_instances(alone).boxes[:, 3], atol=1e-4
        )


def test_copy_paste_draws_nothing_that_decides_a_flip(train_index: CocoIndex, coco_data: DataConfig):
    """From one stream, only images that are turned upside down would get objects of others."""
    cases = set()
    for seed in range(16):
        alone, flipped, pasted = (
            augmented(train_index, coco_data, seed, **options).image
            for options in ({}, {"vertical_flip": 0.5}, {"copy_paste": 0.5})
        )
        cases.add((bool((alone != flipped).any()), bool((alone != pasted).any())))
    assert cases == {(False, False), (False, True), (True, False), (True, True)}
