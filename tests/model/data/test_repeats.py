"""Repeat-factor sampling: images of rare classes occur as often as LVIS' formula says, in an order of seeds alone."""

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from model.config import DataConfig
from model.data.annotations import ImageRecord, Instance
from model.data.index import CocoIndex, IndexedImage, images_location, write_index
from model.data.loader import GroupedBatchSampler, ShardedBatches, batches_per_epoch
from model.data.repeats import repeat_factors

# Classes of each image; a crowd in image 2 is of class 3, and image 5 has nothing.
CLASSES = [[1], [1, 1, 2], [1], [1, 3, 3], [1, 4], [], [1], [1], [1, 4], [1, 4], [1, 4, 2]]
# Ten images: f(1) = 1, f(2) = 0.2, f(3) = 0.1, f(4) = 0.4. With t = 0.45, sqrt(t / f):
EXPECTED = {2: 1.5, 3: 4.5**0.5, 4: 1.125**0.5}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> CocoIndex:
    folder = tmp_path_factory.mktemp("index")

    def instance(label: int, *, is_crowd: bool = False) -> Instance:
        outline = [] if is_crowd else [np.float32([(0, 0), (9, 0), (9, 9)])]
        return Instance(label, (0, 0, 9, 9), outline, is_crowd=is_crowd, was_clipped=False)

    images = [
        IndexedImage(ImageRecord(i, "", 100, 140), False, [instance(label) for label in labels])
        for i, labels in enumerate(CLASSES)
    ]
    images[2].instances.append(instance(3, is_crowd=True))
    names = {label: str(label) for label in range(1, 5)}
    write_index(
        folder / "train", images, categories=names, data_hash="", origin=images_location(folder, Path(), folder)
    )
    return CocoIndex.open(folder, "train")


def data(threshold: float, **changes: object) -> DataConfig:
    return DataConfig(repeat_threshold=threshold).model_copy(update=changes)


def epochs(index: CocoIndex, threshold: float, batches: int, seed: int = 0) -> list[tuple[int, int]]:
    sampler = GroupedBatchSampler(index, data(threshold), batch_size=1, seed=seed)
    return [key for batch in islice(sampler, batches) for key in batch]


def test_factors_are_those_of_the_formula(index: CocoIndex):
    expected = [max([EXPECTED.get(label, 1) for label in labels], default=1) for labels in CLASSES]
    np.testing.assert_allclose(repeat_factors(index, data(0.45)), [one for i, one in enumerate(expected) if i != 5])
    np.testing.assert_allclose(
        repeat_factors(index, data(0.45, keep_empty_images=True)),
        [max([max(1, (0.45 * 11 / n) ** 0.5) for n in (
            sum(label in labels for labels in CLASSES) for label in own)], default=1) for own in CLASSES],
    )  # fmt: skip
    assert repeat_factors(index, data(0.0)).tolist() == [1] * 10
    assert repeat_factors(index, data(0.1)).tolist() == [1] * 10  # no class is rarer


def test_an_epoch_has_each_image_as_often_as_its_factor_says(index: CocoIndex):
    factors = repeat_factors(index, data(0.45))
    total = factors.sum()
    drawn = epochs(index, 0.45, round(300 * total))
    counts = Counter(i for i, _ in drawn)
    images = [i for i in range(len(CLASSES)) if i != 5]
    np.testing.assert_allclose([counts[i] / 300 for i in images], factors, rtol=0.06)
    assert len(set(drawn)) == len(drawn)  # each repetition has a seed of its own
    assert batches_per_epoch(index, data(0.45), 2) == round(total / 2)
    # In each epoch the factor is rounded up or down: of 2.12, image 3 occurs two or three times.
    first = Counter(i for i, _ in drawn[: int(total) - 1])
    assert first[3] <= 3
    assert {counts[0], counts[2]} <= set(range(297, 304))


def test_order_depends_on_the_seed_alone_and_ranks_and_resumed_runs_share_it(index: CocoIndex):
    def sampler(start_batch: int = 0, seed: int = 3) -> GroupedBatchSampler:
        return GroupedBatchSampler(index, data(0.45), batch_size=4, seed=seed, start_batch=start_batch)

    whole = list(islice(sampler(), 40))
    assert list(islice(sampler(), 40)) == whole
    assert list(islice(sampler(start_batch=23), 17)) == whole[23:]
    assert list(islice(sampler(seed=4), 40)) != whole
    halves = [list(islice(ShardedBatches(sampler(), rank, 2), 40)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole


def test_without_a_threshold_the_order_is_as_before(index: CocoIndex):
    images = np.array([i for i in range(len(CLASSES)) if i != 5])
    expected = [i for epoch in range(3) for i in np.random.default_rng((7, epoch)).permutation(images).tolist()]
    assert [i for i, _ in epochs(index, 0.0, 30, seed=7)] == expected
