"""The heads' fixed shapes, and what padding may not change."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import cuda_ops
from model.config import ModelConfig
from model.network.mask_head import MaskPredictor
from model.network.mask_rcnn import MaskRCNN
from model.network.roi_heads import RoIHeads, SampledRois
from model.structures import Batch


def losses_and_gradients(model: MaskRCNN, batch: Batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    losses = model(batch)
    torch.stack(list(losses.values())).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: loss.detach() for name, loss in losses.items()} | gradients


def test_padding_of_mask_rois_changes_neither_losses_nor_gradients(
    tiny_config: Callable[..., ModelConfig], shapes_batch: Callable[..., Batch], monkeypatch: Any
) -> None:
    """On the CPU the mask head sees the positives alone, on a GPU a fixed number of rows."""
    torch.manual_seed(0)
    model, batch = MaskRCNN(tiny_config(), 3).train(), shapes_batch(images=3)
    assert batch.targets is not None
    seen: list[torch.Tensor] = []
    model.roi_heads.mask_head.register_forward_hook(lambda module, args, output: seen.append(output))
    alone = losses_and_gradients(model, batch)
    monkeypatch.setattr(model.roi_heads, "_num_mask_rois", lambda is_positive: 32 // 4)
    padded = losses_and_gradients(model, batch)
    assert int(batch.targets.num_gt.max()) * 3 <= len(seen[0]) < len(seen[1]) == 3 * 8
    assert alone["mask"] > 0
    torch.testing.assert_close(alone, padded)


def test_a_step_has_one_gradient_of_the_pyramid(
    tiny_config: Callable[..., ModelConfig], shapes_batch: Callable[..., Batch]
) -> None:
    """Box head and mask head are pooled at once; a pyramid each, and their sum, would cost a GPU 2 ms a step of 16
    images.
    """
    model, batch = MaskRCNN(tiny_config(), 3).train(), shapes_batch(images=2)
    with cuda_ops.backend("reference"), torch.profiler.profile() as trace:
        assert "mask" in losses_and_gradients(model, batch)
    assert [event.name for event in trace.events()].count("aten::_embedding_bag_backward") == 1


@pytest.mark.parametrize(("num_positives", "expected"), [([3, 5], 5), ([0, 0], 1)])
def test_mask_rois_on_the_cpu_are_the_most_positives(
    tiny_config: Callable[..., ModelConfig], num_positives: list[int], expected: int
) -> None:
    heads = MaskRCNN(tiny_config(), 3).roi_heads
    is_positive = torch.arange(32) < torch.tensor(num_positives)[:, None]
    assert heads._num_mask_rois(is_positive) == expected
    assert heads._num_mask_rois(is_positive.to("meta")) == 32 // 4


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_mask_logits_are_those_of_the_layers_in_full(memory_format: torch.memory_format) -> None:
    """A transposed convolution and all classes' logits, of which one is picked: the same values and gradients."""
    torch.manual_seed(0)
    predictor = MaskPredictor(8, 6, num_classes=4).double()
    torch.nn.init.normal_(predictor.conv5_mask.bias)
    torch.nn.init.normal_(predictor.mask_fcn_logits.bias)
    x = torch.randn(5, 8, 3, 4, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    labels = torch.tensor([1, 4, 0, 2, 2])
    every_class = predictor.mask_fcn_logits(F.relu(predictor.conv5_mask(x)))  # [5, 1 + 4, 6, 8]
    expected = every_class.gather(1, labels[:, None, None, None].expand(-1, 1, 6, 8)).squeeze(1)
    got = predictor(x, labels)
    torch.testing.assert_close(got, expected.float())
    weights = (torch.arange(got.numel()) % 5 - 2.0).view_as(
        got
    )  # whole numbers: the logits' float32 adds no error to gradients
    inputs = [x, *predictor.parameters()]
    gradients = torch.autograd.grad((got * weights).sum(), inputs)
    for mine, other in zip(gradients, torch.autograd.grad((expected * weights).sum(), inputs), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


def test_no_rois_have_no_mask_logits() -> None:
    predictor = MaskPredictor(8, 6, num_classes=4)
    assert predictor(torch.zeros(0, 8, 3, 4), torch.zeros(0, dtype=torch.int64)).shape == (0, 6, 8)


@pytest.mark.parametrize("aligned", [True, False])
def test_c4_heads_are_torchvisions_blocks_on_torchvisions_roi_align(
    tiny_config: Callable[..., ModelConfig], aligned: bool
) -> None:
    """RoIAlign, res5, mean, predictors: step by step from torchvision's parts with our weights."""
    torch.manual_seed(0)
    conventions = "detectron2" if aligned else "torchvision"
    config = tiny_config(
        backbone="resnet50", norm="batch_norm", features="c4", box_head="res5", conventions=conventions,
        box_pool_size=14, mask_pool_size=14, mask_head_convs=0,
    )  # fmt: skip
    heads = MaskRCNN(config, 3).roi_heads.eval()
    theirs = torchvision.models.resnet50(weights=None).layer4.eval()
    theirs.load_state_dict(heads.res5.state_dict())
    features, corners = torch.randn(2, 1024, 6, 8), torch.rand(2, 5, 2) * 40
    boxes = torch.cat([corners, corners + torch.rand(2, 5, 2) * 60 + 5], 2)
    labels = torch.tensor([[1, 2, 3, 1, 2], [3, 2, 1, 3, 2]])
    batch = Batch(torch.zeros(2, 3, 96, 128), *[torch.tensor([[96, 128]] * 2)] * 2, torch.arange(2), torch.arange(2))
    with torch.no_grad():
        logits, deltas = heads.box_logits(heads.pool([features], boxes, batch, 14))
        masks = heads.mask_logits(heads.pool([features], boxes, batch, 14), labels)
        sampling = -1 if aligned else 2
        pooled = theirs(torchvision.ops.roi_align(features, list(boxes), 14, 1 / 16, sampling, aligned))
        vectors = pooled.mean((2, 3))
        torch.testing.assert_close(logits.flatten(0, 1), heads.box_predictor.cls_score(vectors), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            deltas.flatten(0, 1).flatten(1), heads.box_predictor.bbox_pred(vectors), rtol=1e-4, atol=1e-4
        )
        upsampled = F.relu(heads.mask_predictor.conv5_mask(pooled))
        every_class = heads.mask_predictor.mask_fcn_logits(upsampled)  # [10, 4, 14, 14]
        expected = every_class[torch.arange(10), labels.flatten()]
        torch.testing.assert_close(masks.flatten(0, 1), expected, rtol=1e-4, atol=1e-4)


def test_c4_masks_learn_from_the_features_of_the_boxes(
    tiny_config: Callable[..., ModelConfig], shapes_batch: Callable[..., Batch]
) -> None:
    """res5 runs once a step: the mask loss is that of features pooled anew, for the same RoIs."""
    torch.manual_seed(0)
    model = MaskRCNN(
        tiny_config(features="c4", box_head="res5", box_pool_size=4, mask_pool_size=4, mask_head_convs=0), 3
    ).train()
    batch, heads = shapes_batch(images=2), model.roi_heads
    runs: list[int] = []
    heads.res5.register_forward_hook(lambda module, args, output: runs.append(len(output)))
    features = model.backbone(model.normalize(batch))
    proposals, _ = model.rpn(features, batch)
    _, losses = heads(features, proposals, batch)
    assert runs == [2 * 32]
    rois = heads.sample(proposals, batch.targets, batch.seeds)
    share = rois.num_mask_rois
    pooled = heads.pool(features, rois.boxes[:, :share], batch, heads.config.mask_pool_size)
    logits = heads.mask_logits(pooled, rois.labels[:, :share])
    gt_masks = cuda_ops.rasterize_polygons(rois.boxes[:, :share], rois.gt_rows[:, :share], batch.targets.polygons, 4)
    of_pixels = F.binary_cross_entropy_with_logits(logits, gt_masks, reduction="none").mean((2, 3))
    is_positive = (rois.labels[:, :share] > 0).float()
    expected = ((of_pixels * is_positive).sum(1) / is_positive.sum(1).clamp(min=1)).mean()
    torch.testing.assert_close(losses["mask"], expected)


def test_rois_without_a_loss_do_not_count_in_batch_norms(
    tiny_config: Callable[..., ModelConfig], shapes_batch: Callable[..., Batch]
) -> None:
    """A GPU has a fixed number of mask RoIs, most of them background; statistics are those of the positives alone."""
    torch.manual_seed(0)
    heads = RoIHeads(
        tiny_config(norm="batch_norm", head_norm="batch_norm", box_head="conv", box_head_convs=1), 3
    ).train()
    alone, targets = copy.deepcopy(heads), shapes_batch(images=2).targets
    assert targets is not None
    images, rows = targets.gt_labels.shape
    is_real = targets.gt_labels > 0
    assert 0 < is_real[0].sum() != is_real[1].sum() < rows
    gt_rows = torch.arange(rows).expand(images, rows)
    rois = SampledRois(targets.gt_boxes, targets.gt_labels, gt_rows, is_real.float(), rows)
    box_features, mask_features = (torch.randn(images, rows, 32, side, side) for side in (7, 14))
    losses = heads.box_losses(box_features, rois, targets) | heads.mask_losses(mask_features, rois, targets)
    assert len(losses) == 3
    alone.box_head(box_features[is_real])
    alone.mask_head(mask_features[is_real])
    statistics = {name: value for name, value in alone.named_buffers() if "running" in name}
    assert {name.split(".")[0] for name in statistics} == {"box_head", "mask_head"}
    for name, value in statistics.items():
        torch.testing.assert_close(heads.get_buffer(name), value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])  # blocks of either kind
def test_padding_among_the_rois_does_not_count_in_the_batch_norms_of_res5(
    backbone: str, tiny_config: Callable[..., ModelConfig], shapes_batch: Callable[..., Batch]
) -> None:
    """The losses, statistics and gradients are those of torch's own batch norm on the real RoIs alone."""
    torch.manual_seed(0)
    c4 = {"features": "c4", "box_head": "res5", "box_pool_size": 4, "mask_pool_size": 4, "mask_head_convs": 0}
    heads = RoIHeads(tiny_config(backbone=backbone, norm="batch_norm", **c4), 3).train()
    alone, batch = copy.deepcopy(heads.res5), shapes_batch(images=2)
    for module in alone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = nn.BatchNorm2d
    assert batch.targets is not None
    is_real = batch.targets.gt_labels > 0
    assert 0 < is_real.sum() < is_real.numel()
    gt_rows = torch.arange(is_real.shape[1]).expand_as(is_real)
    rois = SampledRois(batch.targets.gt_boxes, batch.targets.gt_labels, gt_rows, is_real.float(), is_real.shape[1])
    features = torch.randn(2, 256 if backbone == "resnet18" else 1024, 8, 8)
    box_features, mask_features = heads.pool_rois([features], rois, batch)
    pooled = heads.pool_heads([features], [rois.boxes], batch, [4])[0]
    expected = alone(pooled[is_real])
    for found in (box_features, mask_features):
        torch.testing.assert_close(found[is_real], expected, rtol=1e-4, atol=1e-4)
    weights = torch.randn_like(expected)
    (box_features[is_real] * weights).sum().backward()
    (expected * weights).sum().backward()
    for (name, ours), theirs in zip(heads.res5.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3, msg=name)
    for (name, statistic), theirs in zip(heads.res5.named_buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(statistic, theirs, rtol=1e-5, atol=1e-6, msg=name)
