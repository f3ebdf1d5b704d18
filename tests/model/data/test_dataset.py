"""Samples: what training sees depends on the seed alone, what evaluation sees on nothing."""

import numpy as np
import pytest

from model.config import DataConfig
from model.data.dataset import CocoDataset, Sample
from model.data.index import CocoIndex
from model.data.transforms import read_image, resize_image, resized_size


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
