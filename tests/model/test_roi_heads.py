"""The heads' fixed shapes, and what padding may not change."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from model.config import ModelConfig
from model.mask_head import MaskPredictor
from model.mask_rcnn import MaskRCNN
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
