"""The order of batches: grouped, complete, reproducible, resumable."""

import multiprocessing
import sys
from collections import Counter
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.config import AugmentConfig, DataConfig
from model.data.annotations import ImageRecord, Instance
from model.data.index import CocoIndex, IndexedImage, images_location, write_index
from model.data.loader import GroupedBatchSampler, batches_per_epoch, eval_loader, train_loader
from model.data.seeds import sample_seeds
from model.data.views import views_loader
from model.errors import UserError

WIDE, TALL = (100, 140), (140, 100)
EVERY_AUGMENTATION = AugmentConfig(
    brightness=0.3,
    contrast=0.3,
    saturation=0.3,
    hue=0.1,
    grayscale=0.3,
    blur=0.5,
    vertical_flip=0.5,
    quarter_turns=True,
    copy_paste=0.7,
)


def tensors(record: Any) -> list[Any]:
    """Every value of a batch, in depth."""
    values = [getattr(record, field.name) for field in fields(record)]
    return [
        leaf for value in values for leaf in (tensors(value) if hasattr(value, "__dataclass_fields__") else [value])
    ]


def same(one: Any, other: Any) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(tensors(one), tensors(other), strict=True)
    )


@pytest.fixture(scope="module")
def sized_index(tmp_path_factory: pytest.TempPathFactory) -> CocoIndex:
    """13 wide and 6 tall images with an instance each, and one with none; there are no files."""
    folder = tmp_path_factory.mktemp("index")
    instance = Instance(1, (0, 0, 9, 9), [np.float32([(0, 0), (9, 0), (9, 9)])], is_crowd=False, was_clipped=False)
    sizes = [WIDE] * 13 + [TALL] * 6 + [WIDE]
    images = [
        IndexedImage(ImageRecord(i, "", *size), False, [instance] if i < 19 else []) for i, size in enumerate(sizes)
    ]
    write_index(
        folder / "train", images, categories={1: "a"}, data_hash="", origin=images_location(folder, Path(), folder)
    )
    return CocoIndex.open(folder, "train")


def keys(index: CocoIndex, data: DataConfig, batches: int, **options: Any) -> list[list[tuple[int, int]]]:
    sampler = GroupedBatchSampler(index, data, **{"batch_size": 4, "seed": 0} | options)
    return list(islice(sampler, batches))


def test_a_batch_holds_images_of_one_bucket(sized_index: CocoIndex, coco_data: DataConfig):
    for batch in keys(sized_index, coco_data, 50):
        assert len(batch) == 4
        assert len({sized_index.size(i) for i, _ in batch}) == 1


def test_over_epochs_no_image_is_dropped_or_doubled(sized_index: CocoIndex, coco_data: DataConfig):
    epochs = 20
    drawn = Counter(i for batch in keys(sized_index, coco_data, 19 * epochs // 4) for i, _ in batch)
    # What still waits in the two queues is at most 3 images each; an image may be one epoch ahead of another.
    assert sorted(drawn) == list(range(19))
    assert min(drawn.values()) >= epochs - 1
    assert max(drawn.values()) <= epochs + 1
    assert sum(drawn.values()) == 19 * epochs // 4 * 4


def test_an_image_without_instances_is_not_drawn(sized_index: CocoIndex, coco_data: DataConfig):
    assert 19 not in {i for batch in keys(sized_index, coco_data, 50) for i, _ in batch}


def test_epochs_and_seeds_differ_in_order_and_sample_seeds(sized_index: CocoIndex, coco_data: DataConfig):
    assert keys(sized_index, coco_data, 5) == keys(sized_index, coco_data, 5)
    assert keys(sized_index, coco_data, 5) != keys(sized_index, coco_data, 5, seed=1)
    seeds = [seed for batch in keys(sized_index, coco_data, 100) for _, seed in batch]
    assert len(set(seeds)) == len(seeds)


def test_starting_late_passes_over_the_first_batches(sized_index: CocoIndex, coco_data: DataConfig):
    assert keys(sized_index, coco_data, 3, start_batch=17) == keys(sized_index, coco_data, 20)[17:]


def splitmix(state: int) -> int:
    """SplitMix64 in plain integers."""
    state = (state + 0x9E3779B97F4A7C15) % 2**64
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
    return state ^ (state >> 31)


def test_sample_seeds_are_the_same_on_every_machine():
    assert splitmix(0) == 0xE220A8397B1DCDAF  # the published first output of the generator seeded with 0
    expected = [splitmix(splitmix(splitmix(3) ^ 1) ^ image) >> 1 for image in (0, 1, 2**40)]
    assert sample_seeds(3, 1, np.array([0, 1, 2**40])).tolist() == expected


def test_seed_and_epoch_do_not_stand_for_one_another():
    assert sample_seeds(0, 1, np.array([5])) != sample_seeds(1, 0, np.array([5]))


def test_a_split_with_nothing_to_learn_is_an_error(tmp_path: Path, coco_data: DataConfig):
    images = [IndexedImage(ImageRecord(1, "a.jpg", 9, 9), False, [])]
    write_index(
        tmp_path / "train",
        images,
        categories={1: "a"},
        data_hash="",
        origin=images_location(tmp_path, Path(), tmp_path),
    )
    with pytest.raises(UserError, match="must have an image with an instance to learn, got none"):
        train_loader(CocoIndex.open(tmp_path, "train"), coco_data, batch_size=2, seed=0)


@pytest.fixture
def augmenting(coco_data: DataConfig) -> DataConfig:
    """Every augmentation at once."""
    return coco_data.model_copy(update={"augment": EVERY_AUGMENTATION})


def test_a_resumed_loader_gives_the_same_batches_bit_for_bit(
    train_index: CocoIndex, coco_data: DataConfig, augmenting: DataConfig
):
    for data, count in ((coco_data, 14), (augmenting, 6)):
        whole = list(islice(train_loader(train_index, data, batch_size=2, seed=0), count))
        late = list(islice(train_loader(train_index, data, batch_size=2, seed=0, start_batch=count - 3), 3))
        assert all(same(a, b) for a, b in zip(whole[-3:], late, strict=True))
        assert not same(whole[0], whole[1])


def test_worker_processes_change_nothing(train_index: CocoIndex, coco_data: DataConfig, augmenting: DataConfig):
    for data in (coco_data, augmenting):
        alone = list(islice(train_loader(train_index, data, batch_size=2, seed=0), 5))
        helped = list(
            islice(train_loader(train_index, data.model_copy(update={"workers": 2}), batch_size=2, seed=0), 5)
        )
        assert all(same(a, b) for a, b in zip(alone, helped, strict=True))


def test_turned_images_are_batched_by_the_bucket_of_their_new_size(train_index: CocoIndex, coco_data: DataConfig):
    """No bucket holds both a wide and a tall image, so a batch of both would be an error."""
    data = coco_data.model_copy(update={"augment": AugmentConfig(quarter_turns=True)})
    turned = 0
    for batch in islice(train_loader(train_index, data, batch_size=3, seed=0), 20):
        is_tall, was_tall = (sizes[:, 0] > sizes[:, 1] for sizes in (batch.image_sizes, batch.original_sizes))
        turned += (is_tall != was_tall).sum().item()
    assert 15 < turned < 45


def test_a_worker_computes_on_one_thread(train_index: CocoIndex, coco_data: DataConfig):
    loader = train_loader(train_index, coco_data.model_copy(update={"workers": 1}), batch_size=2, seed=0)
    loader.torch_loader.dataset.collate = lambda samples: torch.get_num_threads()
    assert next(iter(loader)) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_a_worker_outlives_sigterm(train_index: CocoIndex, coco_data: DataConfig):
    """Batch systems send it to every process of a job, of which training saves a checkpoint first."""
    others = {process.pid for process in multiprocessing.active_children()}
    batches = iter(train_loader(train_index, coco_data.model_copy(update={"workers": 1}), batch_size=2, seed=0))
    next(batches)
    (worker,) = [process for process in multiprocessing.active_children() if process.pid not in others]
    worker.terminate()
    assert len(list(islice(batches, 6))) == 6  # more than are ready
    assert worker.is_alive()


def test_training_batches_have_the_shape_of_a_bucket_and_targets(train_index: CocoIndex, coco_data: DataConfig):
    for batch in islice(train_loader(train_index, coco_data, batch_size=3, seed=0), 8):
        assert tuple(batch.images.shape[2:]) in coco_data.buckets
        assert batch.targets.num_gt.min() >= 1
        assert (batch.targets.gt_boxes[..., 2] <= batch.image_sizes[:, None, 1] + 1e-3).all()


def test_evaluation_sees_every_image_once(train_index: CocoIndex, coco_data: DataConfig):
    loader = eval_loader(train_index, coco_data, batch_size=5)
    batches = list(loader)
    assert len(batches) == len(loader)
    assert sorted(i for batch in batches for i in batch.image_ids.tolist()) == train_index.image_ids.tolist()
    assert all(batch.targets is None for batch in batches)


def test_an_epoch_is_counted_in_images_that_are_used(sized_index: CocoIndex, coco_data: DataConfig):
    keeping = coco_data.model_copy(update={"keep_empty_images": True})
    assert batches_per_epoch(sized_index, coco_data, 4) == 5  # 19 images
    assert batches_per_epoch(sized_index, coco_data, 100) == 1
    assert batches_per_epoch(sized_index, keeping, 1) == 20


def test_empty_images_are_drawn_if_asked_for(sized_index: CocoIndex, coco_data: DataConfig):
    keeping = coco_data.model_copy(update={"keep_empty_images": True})
    for data, images in ((coco_data, 19), (keeping, 20)):
        drawn = [batch[0][0] for batch in keys(sized_index, data, images, batch_size=1)]
        assert sorted(drawn) == list(range(images))


def test_polygons_span_the_box_of_their_own_row(train_index: CocoIndex, coco_data: DataConfig):
    for batch in islice(train_loader(train_index, coco_data, batch_size=3, seed=0), 10):
        polygons, boxes = batch.targets.polygons, batch.targets.gt_boxes.flatten(0, 1)
        for row in batch.targets.gt_labels.flatten().nonzero().flatten().tolist():
            first, last = polygons.part_offsets[polygons.instance_offsets[row : row + 2].long()].tolist()
            xy = polygons.xy[first:last]
            torch.testing.assert_close(torch.cat([xy.amin(0), xy.amax(0)]), boxes[row], atol=1.0, rtol=0)


def test_each_epoch_has_an_order_of_its_own(sized_index: CocoIndex, coco_data: DataConfig):
    """With batches of one image an epoch is its permutation, whatever the buckets."""
    drawn = {
        seed: [batch[0][0] for batch in keys(sized_index, coco_data, 57, batch_size=1, seed=seed)] for seed in (0, 1)
    }
    epochs = [tuple(order[first : first + 19]) for order in drawn.values() for first in (0, 19, 38)]
    assert {tuple(sorted(epoch)) for epoch in epochs} == {tuple(range(19))}
    assert len({*epochs, tuple(range(19))}) == 7


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_workers_are_forked_whatever_the_default_of_this_python(sized_index: CocoIndex):
    """forkserver is the default of Python 3.14; spawn nobody's on Linux, so whoever set it wanted it."""
    data = DataConfig(workers=1)
    usual = multiprocessing.get_start_method(allow_none=True)
    try:
        for method, expected in [(None, "fork"), ("fork", None), ("forkserver", "fork"), ("spawn", None)]:
            multiprocessing.set_start_method(method, force=True)
            loaders = [
                train_loader(sized_index, data, batch_size=4, seed=0),
                eval_loader(sized_index, data, batch_size=4),
                views_loader(sized_index, data, [1.0], batch_size=4),
            ]
            for loader in loaders:
                context = loader.torch_loader.multiprocessing_context
                assert (context and context.get_start_method()) == expected, method
    finally:
        multiprocessing.set_start_method(usual, force=True)
    assert (
        train_loader(sized_index, DataConfig(workers=0), batch_size=4, seed=0).torch_loader.multiprocessing_context
        is None
    )
