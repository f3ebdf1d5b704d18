"""Views of a split: every image at several scales."""

import pytest
import torch

from model.config import DataConfig
from model.data.index import CocoIndex
from model.data.loader import eval_loader
from model.data.views import scaled, views_loader


def test_the_view_of_scale_one_is_the_batch_of_plain_evaluation(train_index: CocoIndex, coco_data: DataConfig):
    plain = eval_loader(train_index, coco_data, batch_size=4)
    views = views_loader(train_index, coco_data, (0.5, 1.0), batch_size=4)
    assert len(plain) == len(views)
    for batch, (small, same) in zip(plain, views, strict=True):
        assert torch.equal(batch.images, same.images)
        assert torch.equal(batch.image_ids, small.image_ids)
        assert (small.image_sizes.amin(1) <= 64).all()
        assert torch.equal(small.original_sizes, batch.original_sizes)


@pytest.mark.parametrize("scale", [0.013, 0.5, 0.51, 1.0, 1.37, 3.0])
def test_scaled_sizes_are_whole_and_fit_their_buckets(coco_data: DataConfig, scale: float):
    DataConfig.model_validate(scaled(coco_data, scale).model_dump() | {"min_sizes_px": (1,), "max_size_px": 1})
    assert scaled(coco_data, 1.0) == coco_data
