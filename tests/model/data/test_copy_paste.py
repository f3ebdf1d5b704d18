"""Copy-paste: pixels, masks and boxes are those of paper cut-outs laid on a picture."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from model.config import AugmentConfig, DataConfig
from model.data.copy_paste import paste
from model.data.dataset import CocoDataset
from model.data.index import CocoIndex, CocoInstances
from model.data.outlines import pack_instances
from model.data.polygons import mask_to_polygons

Masks = NDArray[np.bool_]
RED, BLUE = np.uint8((200, 0, 0)), np.uint8((0, 0, 200))


def painted(instances: CocoInstances, size: tuple[int, int]) -> list[Masks]:
    masks = []
    for first, last in pairwise(instances.instance_offsets.tolist()):
        parts = [instances.xy[start:stop] for start, stop in pairwise(instances.part_offsets[first : last + 1])]
        codes = coco_mask.frPyObjects([part.ravel().astype(float).tolist() for part in parts], *size)
        masks.append(coco_mask.decode(coco_mask.merge(codes)).astype(bool))
    return masks


def tight_box(mask: Masks) -> list[int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def with_masks(masks: list[Masks], first_label: int) -> CocoInstances:
    return pack_instances(
        [np.float32(tight_box(mask)) for mask in masks],
        np.arange(first_label, first_label + len(masks)),
        np.zeros(len(masks), dtype=bool),
        [mask_to_polygons(mask) for mask in masks],
    )


def rectangle(size: tuple[int, int], top: int, left: int, height: int, width: int) -> Masks:
    mask = np.zeros(size, dtype=bool)
    mask[top : top + height, left : left + width] = True
    return mask


def random_masks(size: tuple[int, int], rng: np.random.Generator) -> list[Masks]:
    """Masks with holes and several parts."""
    masks = []
    for _ in range(rng.integers(1, 6)):
        mask = np.zeros(size, dtype=bool)
        for value in (True, True, False):
            top, left = rng.integers(size[0] - 4), rng.integers(size[1] - 4)
            mask[top : top + rng.integers(4, 20), left : left + rng.integers(4, 20)] = value
        masks += [mask] if mask.any() else []
    return masks


def filled(size: tuple[int, int], color: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.broadcast_to(color, (*size, 3)).copy()


def test_pasted_pixels_and_what_is_left_of_every_object_are_exact():
    """Sources that are larger, smaller, or larger along one side alone."""
    size, hidden, cut = (40, 50), 0, 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        source_size = [(40, 50), (60, 70), (20, 30), (60, 30)][seed % 4]
        below, above = random_masks(size, rng), random_masks(source_size, rng)
        below += [rectangle(size, *rng.integers(30, size=2), 3, 3) for _ in range(4)]
        image, found = paste(
            filled(size, RED), with_masks(below, 1), filled(source_size, BLUE), with_masks(above, 101), rng
        )
        is_pasted = (image == BLUE).all(-1)
        assert ((image == RED).all(-1) ^ is_pasted).all()
        masks = dict(zip(found.labels.tolist(), painted(found, size), strict=True))
        on_top = [mask for label, mask in masks.items() if label > 100]
        assert np.array_equal(np.any(on_top, axis=0) if on_top else np.zeros(size, dtype=bool), is_pasted)
        for label, mask in enumerate(below, 1):
            left = mask & ~is_pasted
            assert (label in masks) == left.any()
            hidden += not left.any()
            cut += left.any() and not np.array_equal(left, mask)
            assert label not in masks or np.array_equal(masks[label], left)
        for label, box in zip(found.labels.tolist(), found.boxes.tolist(), strict=True):
            assert box == tight_box(masks[label])
        assert list(masks) == sorted(masks)  # each mask has its own label
    assert hidden > 5
    assert cut > 20


def test_objects_keep_their_arrangement_and_a_random_subset_is_taken():
    size = (40, 50)
    above = [rectangle(size, 2, 2, 5, 5), rectangle(size, 20, 30, 5, 5), rectangle(size, 30, 5, 5, 5)]
    taken = set()
    for seed in range(40):
        _image, found = paste(
            filled(size, RED), with_masks([], 1), filled(size, BLUE), with_masks(above, 0), np.random.default_rng(seed)
        )
        taken.add(tuple(found.labels.tolist()))
        for label, mask in zip(found.labels.tolist(), painted(found, size), strict=True):
            assert np.array_equal(mask, above[label])
    assert len(taken) == 7


def test_what_is_not_touched_keeps_its_outline_and_its_box():
    outline = np.float32([(30.3, 30.2), (45.1, 30.7), (38.4, 38.9)])
    below = pack_instances([np.float32((29, 29, 46, 39))], np.array([1]), np.array([False]), [[outline]])
    above = with_masks([rectangle((40, 50), 0, 0, 9, 9)], 2)
    _image, found = paste(filled((40, 50), RED), below, filled((40, 50), BLUE), above, np.random.default_rng(0))
    assert np.array_equal(found.xy[:3], outline)
    assert found.boxes[0].tolist() == [29, 29, 46, 39]


def test_an_outline_beyond_its_picture_pastes_nothing_that_is_not_there():
    size, below = (40, 50), [rectangle((40, 50), 0, 0, 40, 50)]
    outline = np.float32([(10, 5), (90, 5), (90, 15), (10, 15)])
    for seed in range(10):
        above = pack_instances([np.float32((10, 5, 20, 15))], np.array([2]), np.array([False]), [[outline]])
        image, found = paste(
            filled(size, RED), with_masks(below, 1), filled((20, 20), BLUE), above, np.random.default_rng(seed)
        )
        assert [mask.sum() for mask in painted(found, size)] == [40 * 50 - 100, 100]
        assert (image == BLUE).all(-1).sum() == 100


def test_the_number_of_pasted_objects_is_bounded():
    size = (40, 50)
    above = [rectangle(size, 4 * row, 5 * column, 2, 2) for row in range(10) for column in range(10)]
    counts = []
    for seed in range(8):
        arguments = filled(size, RED), with_masks([], 1), filled(size, BLUE), with_masks(above, 1)
        counts.append(len(paste(*arguments, np.random.default_rng(seed))[1].labels))
    assert max(counts) <= 30
    assert len(set(counts)) > 3


def test_samples_get_objects_of_other_images_and_never_crowds(train_index: CocoIndex, coco_data: DataConfig):
    def dataset(copy_paste: float) -> CocoDataset:
        options = {"horizontal_flip": 0.0, "augment": AugmentConfig(copy_paste=copy_paste)}
        return CocoDataset(train_index, coco_data.model_copy(update=options), training=True)

    pasting, plain = dataset(0.5), dataset(0.0)
    labels_anywhere, changed = set(), 0
    crowded = [i for i in range(len(train_index)) if train_index.instances(i).is_crowd.any()][:2]
    for i in (2, *crowded):
        for seed in range(8):
            one, other = pasting[i, seed], plain[i, seed]
            assert one.instances is not None
            assert other.instances is not None
            is_changed = not np.array_equal(one.image, other.image)
            changed += is_changed
            labels_anywhere |= set(one.instances.labels.tolist()) - set(other.instances.labels.tolist())
            assert not one.instances.is_crowd.any()
            assert is_changed or np.array_equal(one.instances.xy, other.instances.xy)
            assert np.array_equal(one.image, pasting[i, seed].image)
    assert 4 < changed < 20
    assert len(labels_anywhere) > 3


@pytest.mark.parametrize("changes", [{}, {"scale_jitter": (0.5, 2.0), "crop_size_px": (128, 160)}])
def test_pasting_fits_whatever_the_image_was_resized_or_cropped_to(
    train_index: CocoIndex, coco_data: DataConfig, changes: dict[str, Any]
):
    augment = AugmentConfig(copy_paste=1.0, quarter_turns=True, vertical_flip=0.5)
    dataset = CocoDataset(train_index, coco_data.model_copy(update={"augment": augment, **changes}), training=True)
    for i in range(6):
        sample = dataset[i, i]
        assert sample.instances is not None
        limits = np.tile(sample.image.shape[1::-1], 2)
        assert len(sample.instances.labels)
        assert (sample.instances.boxes >= -1e-3).all()
        assert (sample.instances.boxes <= limits + 1e-3).all()
