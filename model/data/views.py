"""Images of a split at several scales, for test-time augmentation: decoded once, resized to each scale."""

from collections.abc import Sequence

import torch

from model.config import DataConfig
from model.data.collate import collate
from model.data.dataset import Sample, read_indexed
from model.data.index import CocoIndex
from model.data.loader import eval_batches
from model.data.transforms import resize_image, resized_size
from model.data.workers import Loader
from model.structures import Batch

_STRIDE_PX = 32


def views_loader(
    index: CocoIndex, data: DataConfig, scales: Sequence[float], *, batch_size: int, shard: tuple[int, int] = (0, 1)
) -> Loader[tuple[Batch, ...]]:
    """Every image once, without targets, as a tuple of one batch per scale, each of the same images in the same order.

    Args:
        scales: factors for data.eval_min_size_px, data.eval_max_size_px and data.buckets.
        shard: (rank, number of processes), see `eval_loader`.
    """
    views = ImageViews(index, [scaled(data, scale) for scale in scales])
    return Loader(index, views, views.collate, eval_batches(index, data, batch_size, shard), data)


class ImageViews(torch.utils.data.Dataset[list[Sample]]):
    """Images of the index, each as one sample per scale."""

    def __init__(self, index: CocoIndex, scales: Sequence[DataConfig]) -> None:
        self._index, self._scales = index, scales

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, i: int) -> list[Sample]:
        original = self._index.size(i)
        pixels = read_indexed(self._index, i)
        sizes = [resized_size(original, data.eval_min_size_px, data.eval_max_size_px) for data in self._scales]
        image_id = int(self._index.image_ids[i])
        return [Sample(resize_image(pixels, size), image_id, original, seed=0, instances=None) for size in sizes]

    def collate(self, images: Sequence[Sequence[Sample]]) -> tuple[Batch, ...]:
        """Collate samples into one batch per scale."""
        views = zip(*images, strict=True)
        return tuple(collate(samples, data.buckets) for samples, data in zip(views, self._scales, strict=True))


def scaled(data: DataConfig, scale: float) -> DataConfig:
    """Scale the evaluation sizes and buckets of the section; buckets stay multiples of 32."""

    def times(size_px: int) -> int:
        return max(round(size_px * scale), 1)

    def bucket_side(side_px: int) -> int:
        return -(-times(side_px) // _STRIDE_PX) * _STRIDE_PX

    buckets = tuple(dict.fromkeys((bucket_side(height), bucket_side(width)) for height, width in data.buckets))
    sizes = {"eval_min_size_px": times(data.eval_min_size_px), "eval_max_size_px": times(data.eval_max_size_px)}
    return data.model_copy(update=sizes | {"buckets": buckets})
