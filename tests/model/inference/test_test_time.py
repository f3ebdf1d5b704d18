"""Test-time augmentation: views, their boxes, and what they find together."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from model.config import EvaluateConfig, ModelConfig
from model.inference.test_time import View, detect_views, is_plain, mirrored, predict_views, to_frame, to_view
from model.network.mask_rcnn import MaskRCNN
from model.structures import Batch, Detections

CPU = torch.device("cpu")


@pytest.fixture
def network(tiny_config: Callable[..., ModelConfig]) -> MaskRCNN:
    """Untrained: unsure, so the threshold is low, and busy."""
    torch.manual_seed(0)
    return MaskRCNN(tiny_config(score_threshold=0.01, detections_per_image=15), 3).eval()


@pytest.fixture
def batch(shapes_batch: Callable[..., Batch]) -> Batch:
    """Two images of 64 px in a bucket of 64, the second one 40 px wide."""
    whole = shapes_batch(images=2, with_targets=False)
    sizes = torch.tensor([[64, 64], [64, 40]], dtype=torch.int32)
    images = whole.images.clone()
    images[1, :, :, 40:] = 0
    return replace(whole, images=images, image_sizes=sizes, original_sizes=sizes)


def assert_same(one: Detections, other: Detections, **tolerance: float) -> None:
    for name in ("num_detections", "labels", "boxes", "scores", "mask_probs"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), **tolerance)


def enlarged(batch: Batch, bucket: int) -> Batch:
    """The same images at twice the size: each pixel becomes four."""
    images = batch.images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    padded = torch.zeros(*images.shape[:2], bucket, bucket, dtype=images.dtype)
    padded[:, :, : images.shape[2], : images.shape[3]] = images
    return replace(batch, images=padded, image_sizes=batch.image_sizes * 2)


def test_one_plain_view_is_what_the_network_detects(network: MaskRCNN, batch: Batch) -> None:
    with torch.inference_mode():
        assert_same(detect_views(network, [batch], EvaluateConfig()), network(batch), rtol=0, atol=0)


def test_mirroring_twice_is_nothing_and_padding_stays_at_the_right(batch: Batch) -> None:
    once = mirrored(batch)
    assert torch.equal(once.images[1, :, :, :40], batch.images[1, :, :, :40].flip(2))
    assert not once.images[1, :, :, 40:].any()
    assert torch.equal(mirrored(once).images, batch.images)


@pytest.mark.parametrize("is_mirrored", [False, True])
def test_boxes_of_a_view_come_back_to_the_frame(batch: Batch, is_mirrored: bool) -> None:
    view = View(enlarged(batch, 128), is_mirrored)
    boxes = torch.tensor([[4.0, 5.0, 10.0, 20.0]]).expand(2, 1, 4)
    there = to_view(boxes, view, batch)
    expected = [[108.0, 10, 120, 40], [60.0, 10, 72, 40]] if is_mirrored else [[8.0, 10, 20, 40]] * 2
    assert there.squeeze(1).tolist() == expected
    torch.testing.assert_close(to_frame(there, view, batch), boxes)


@pytest.mark.parametrize("is_mirrored", [False, True])
def test_height_and_width_of_a_view_have_factors_of_their_own(batch: Batch, is_mirrored: bool) -> None:
    """The first image is 3 times as high and 2 times as wide, the second, 40 px wide, 2 and 4 times."""
    view = View(replace(batch, image_sizes=torch.tensor([[192, 128], [128, 160]], dtype=torch.int32)), is_mirrored)
    boxes = torch.tensor([[[4.0, 5, 10, 20]], [[1.0, 2, 3, 4]]])
    there = [[8.0, 15, 20, 60], [4.0, 4, 12, 8]]
    if is_mirrored:
        there = [[108.0, 15, 120, 60], [148.0, 4, 156, 8]]
    assert to_view(boxes, view, batch).squeeze(1).tolist() == there
    torch.testing.assert_close(to_frame(torch.tensor(there)[:, None], view, batch), boxes)


def test_a_mirrored_image_is_found_the_mirror_image(network: MaskRCNN, batch: Batch) -> None:
    """With both sides seen, an image and its mirror image give detections that mirror one another, masks too."""
    flipped = EvaluateConfig(flip=True)
    with torch.inference_mode():
        plain = detect_views(network, [batch], flipped)
        turned = detect_views(network, [mirrored(batch)], flipped)
    assert plain.num_detections.min() > 0
    boxes = to_frame(turned.boxes, View(batch, True), batch)
    is_real = torch.arange(boxes.shape[1]) < turned.num_detections[:, None]
    back = replace(turned, boxes=boxes * is_real[..., None], mask_probs=turned.mask_probs.flip(3))
    for name in ("num_detections", "labels", "scores"):
        torch.testing.assert_close(getattr(plain, name), getattr(back, name), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain.boxes, back.boxes, rtol=0, atol=1e-2)
    torch.testing.assert_close(plain.mask_probs[is_real], back.mask_probs[is_real], rtol=0, atol=1e-3)


def test_masks_are_the_mean_over_the_scales(network: MaskRCNN, batch: Batch) -> None:
    large = enlarged(batch, 128)
    with torch.inference_mode():
        found = detect_views(network, [batch, large], EvaluateConfig(scales=(1.0, 2.0)))
        by_view = []
        for view in (batch, large):
            pyramid = network.backbone(network.normalize(view))[:4]
            boxes = to_view(found.boxes, View(view, False), batch)
            pooled = network.roi_heads.pool(pyramid, boxes, view, 14)
            by_view.append(network.roi_heads.mask_logits(pooled, found.labels).sigmoid())
    torch.testing.assert_close(found.mask_probs, (by_view[0] + by_view[1]) / 2)


def test_soft_nms_keeps_what_nms_drops(network: MaskRCNN, batch: Batch) -> None:
    network.roi_heads.config = network.roi_heads.config.model_copy(update={"nms_iou": 0.1, "detections_per_image": 60})
    with torch.inference_mode():
        hard = detect_views(network, [batch], EvaluateConfig())
        soft = detect_views(network, [batch], EvaluateConfig(soft_nms="linear"))
    assert (soft.num_detections >= hard.num_detections).all()
    assert soft.num_detections.sum() > hard.num_detections.sum()
    assert torch.equal(soft.scores[:, 0], hard.scores[:, 0])


def test_the_sigma_of_soft_nms_is_that_of_the_configuration(network: MaskRCNN, batch: Batch) -> None:
    """So wide a bell takes no score from any box, as NMS that lets all overlaps pass; a narrow one takes much."""
    network.roi_heads.config = network.roi_heads.config.model_copy(update={"nms_iou": 1.0, "detections_per_image": 60})
    with torch.inference_mode():
        hard = detect_views(network, [batch], EvaluateConfig())
        wide, half, narrow = (
            detect_views(network, [batch], EvaluateConfig(soft_nms="gaussian", soft_nms_sigma=sigma)).scores.sum()
            for sigma in (1e6, 0.5, 0.05)
        )
    assert wide == pytest.approx(hard.scores.sum().item(), rel=1e-4)
    assert narrow < 0.95 * half < 0.9 * wide


def test_prediction_leaves_the_mode_as_it_was(network: MaskRCNN, batch: Batch) -> None:
    network.train()
    ((source, detections),) = predict_views(network, [(batch,)], EvaluateConfig(flip=True), CPU, "float32")
    assert source is batch
    assert detections.num_detections.shape == (2,)
    assert network.training


@pytest.mark.parametrize("changes", [{"scales": (0.5,)}, {"flip": True}, {"soft_nms": "gaussian"}])
def test_any_option_of_test_time_is_noticed(changes: dict[str, Any]) -> None:
    assert is_plain(EvaluateConfig())
    assert not is_plain(EvaluateConfig(**changes))
