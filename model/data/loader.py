"""Data loaders: batches in a deterministic order, the same for one seed in every process and after any resume.

Training runs over one permutation per epoch, without end. Each image waits in the queue of its bucket; a full queue is
a batch. Queues outlive the epoch, so no image is dropped or repeated. All randomness of a sample is a function of
(seed, epoch, image).
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import count, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from model.config import DataConfig
from model.data.collate import collate, smallest_bucket
from model.data.dataset import CocoDataset
from model.data.index import CocoIndex
from model.data.repeats import draw_repeats, repeat_factors, training_images
from model.data.seeds import quarter_turns, sample_seeds
from model.data.transforms import Size, resized_size
from model.data.workers import Loader
from model.errors import UserError
from model.structures import Batch


def train_loader(
    index: CocoIndex,
    data: DataConfig,
    *,
    batch_size: int,
    seed: int,
    start_batch: int = 0,
    shard: tuple[int, int] = (0, 1),
) -> Loader[Batch]:
    """Training batches with targets, without end.

    Args:
        batch_size: images per batch over all processes; a multiple of their number.
        start_batch: number of batches to skip, as if they had been drawn; nothing is decoded for them.
        shard: (rank, number of processes). Each process takes its part of every batch, so the batches as a whole do not
            depend on the number of processes.

    Raises:
        UserError: if no image has an instance to learn.
    """
    sampler = GroupedBatchSampler(index, data, batch_size=batch_size, seed=seed, start_batch=start_batch)
    return _loader(CocoDataset(index, data, training=True), ShardedBatches(sampler, *shard), data)


def eval_loader(
    index: CocoIndex, data: DataConfig, *, batch_size: int, shard: tuple[int, int] = (0, 1)
) -> Loader[Batch]:
    """Every image once, without targets, bucket by bucket; the last batch of a bucket may be smaller.

    Args:
        shard: (rank, number of processes). Each process takes whole batches in turn, so results do not depend on the
            number of processes.
    """
    return _loader(CocoDataset(index, data, training=False), eval_batches(index, data, batch_size, shard), data)


def eval_batches(index: CocoIndex, data: DataConfig, batch_size: int, shard: tuple[int, int]) -> list[list[int]]:
    """Batches of image indices for one process, each within one bucket."""
    buckets = _nominal_buckets(index.sizes, data, data.eval_min_size_px, data.eval_max_size_px)
    batches: list[list[int]] = []
    for bucket in range(len(data.buckets)):
        members = np.flatnonzero(buckets == bucket).tolist()
        batches += [members[first : first + batch_size] for first in range(0, len(members), batch_size)]
    rank, world_size = shard
    return batches[rank::world_size]


def batches_per_epoch(index: CocoIndex, data: DataConfig, batch_size: int) -> int:
    """Number of batches per epoch: each training image occurs as often as its repeat factor says, on average."""
    return max(round(repeat_factors(index, data).sum() / batch_size), 1)


class GroupedBatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (image index, sample seed), each within one bucket, without end."""

    def __init__(self, index: CocoIndex, data: DataConfig, *, batch_size: int, seed: int, start_batch: int = 0) -> None:
        if not index.has_instances.any():
            raise UserError(
                "the train split must have an image with an instance to learn, got none (crowds do not count); check "
                "data.train_annotations"
            )
        self._images, self._factors = training_images(index, data), repeat_factors(index, data)
        self._buckets, self._turns = _training_buckets(index, data), data.augment.quarter_turns
        self._batch_size, self._seed, self._start_batch = batch_size, seed, start_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return islice(self._batches(), self._start_batch, None)

    def _batches(self) -> Iterator[list[tuple[int, int]]]:
        queues: dict[int, list[tuple[int, int]]] = {}
        for epoch in count():
            images, repetition = self._repeated(epoch)
            order = np.random.default_rng((self._seed, epoch)).permutation(len(images))
            order, repetition = images[order], repetition[order]
            seeds = sample_seeds(self._seed, epoch, order, repetition)
            is_turned = quarter_turns(seeds) % 2 if self._turns else 0
            buckets = self._buckets[is_turned, order]
            for i, sample_seed, bucket in zip(order.tolist(), seeds.tolist(), buckets.tolist(), strict=True):
                queue = queues.setdefault(bucket, [])
                queue.append((i, sample_seed))
                if len(queue) == self._batch_size:
                    yield queues.pop(bucket)

    def _repeated(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The images of an epoch [n], and the number of each among its repetitions, from 0: [n]."""
        times = draw_repeats(self._factors, self._seed, epoch)
        first = np.cumsum(times) - times
        return np.repeat(self._images, times), np.arange(times.sum()) - np.repeat(first, times)


class ShardedBatches(Sampler[list[tuple[int, int]]]):
    """One process's part of each batch: as many images as every other process, all of one bucket."""

    def __init__(self, batches: GroupedBatchSampler, rank: int, world_size: int) -> None:
        self._batches, self._rank, self._world_size = batches, rank, world_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self._batches:
            part = len(batch) // self._world_size
            yield batch[self._rank * part : (self._rank + 1) * part]


def _training_buckets(index: CocoIndex, data: DataConfig) -> NDArray[np.int64]:
    """Bucket index of each image at its largest training size, upright and after a quarter turn: [2, n].

    With scale_jitter, all crops share one bucket.
    """
    if data.scale_jitter:
        return np.full((2, len(index)), _bucket_index(data, data.crop_size_px), dtype=np.int64)
    limits = max(data.min_sizes_px), data.max_size_px
    return np.stack([_nominal_buckets(sizes, data, *limits) for sizes in (index.sizes, index.sizes[:, ::-1])])


def _nominal_buckets(
    image_sizes: NDArray[np.int32], data: DataConfig, min_size_px: int, max_size_px: int
) -> NDArray[np.int64]:
    """Index in data.buckets of each image [n, 2] resized to the given limits: [n]."""
    sizes, inverse = np.unique(image_sizes, axis=0, return_inverse=True)
    buckets = [_bucket_index(data, resized_size((h, w), min_size_px, max_size_px)) for h, w in sizes.tolist()]
    return np.array(buckets, dtype=np.int64)[inverse.ravel()]


def _bucket_index(data: DataConfig, size: Size) -> int:
    return data.buckets.index(smallest_bucket([size], data.buckets))


def _loader(dataset: CocoDataset, batches: Iterable[Sequence[Any]], data: DataConfig) -> Loader[Batch]:
    return Loader(dataset.index, dataset, partial(collate, buckets=data.buckets), batches, data)
