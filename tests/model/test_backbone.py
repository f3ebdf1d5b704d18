"""ResNet-FPN against torchvision's: values, sizes, what is frozen."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torchvision.models.detection import MaskRCNN as TorchvisionMaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from model.backbone import Backbone
from model.config import ModelConfig
from model.layers import FrozenBatchNorm2d
from model.mask_rcnn import MaskRCNN
from model.structures import Batch


def shaken(module: nn.Module) -> nn.Module:
    """Statistics and affine parameters away from the identity."""
    for name, buffer in module.named_buffers():
        if name.endswith(("running_var", "weight")):
            buffer.uniform_(0.5, 1.0)
        elif name.endswith(("running_mean", "bias")):
            buffer.normal_(0, 0.1)
    return module


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101"])
def test_pyramid_and_gradients_are_torchvisions(name: str) -> None:
    torch.manual_seed(0)
    theirs = shaken(resnet_fpn_backbone(backbone_name=name, weights=None, trainable_layers=3)).double()
    ours = Backbone(ModelConfig(backbone=name, weights="none", freeze_stages=2)).double()  # type: ignore[arg-type]
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    ours_out, theirs_out = ours(images), list(theirs(images).values())
    assert [f.shape for f in ours_out] == [f.shape for f in theirs_out]
    for mine, other in zip(ours_out, theirs_out, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-7, atol=1e-9)
    sum(f.square().mean() for f in ours_out).backward()
    sum(f.square().mean() for f in theirs_out).backward()
    others = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        assert (parameter.grad is None) == (others[key].grad is None), key
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, others[key].grad, rtol=1e-6, atol=1e-9, msg=key)


def test_the_network_has_torchvisions_parameters() -> None:
    theirs = TorchvisionMaskRCNN(resnet_fpn_backbone(backbone_name="resnet50", weights=None), 91)
    ours = MaskRCNN(ModelConfig(weights="none"), 90)
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}


def test_frozen_stages_do_not_learn_and_keep_their_statistics(tiny_config: Callable[..., ModelConfig]) -> None:
    model = MaskRCNN(tiny_config(norm="batch_norm", freeze_stages=2), 3).train()
    body = model.backbone.body
    learning = {name for name, p in body.named_parameters() if p.requires_grad}
    assert not any(name.startswith(("conv1", "bn1", "layer1")) for name in learning)
    assert any(name.startswith("layer2") for name in learning)
    before = body.bn1.running_mean.clone()  # type: ignore[operator]
    model.backbone(torch.randn(1, 3, 64, 64))
    assert torch.equal(body.bn1.running_mean, before)  # type: ignore[arg-type]
    assert not torch.equal(body.layer2[0].bn1.running_mean, torch.zeros(128))  # type: ignore[index, union-attr, arg-type]


def test_two_stages_are_frozen_with_pretrained_weights_and_none_from_scratch() -> None:
    assert ModelConfig(weights="imagenet").frozen_stages == 2
    assert ModelConfig(weights="none").frozen_stages == 0
    assert ModelConfig(weights="imagenet", freeze_stages=3).frozen_stages == 3


def test_frozen_norm_ignores_the_batch_counter_of_a_trained_one() -> None:
    norm = FrozenBatchNorm2d(4)
    norm.load_state_dict(nn.BatchNorm2d(4).state_dict())
    assert "num_batches_tracked" not in norm.state_dict()


@pytest.mark.parametrize("is_training", [True, False])
def test_activations_are_channels_last(
    tiny_config: Callable[..., ModelConfig], shapes_batch: Callable[..., Batch], is_training: bool
) -> None:
    model = MaskRCNN(tiny_config(norm="batch_norm"), 3).to_device(torch.device("cpu")).train(is_training)
    for level in model.backbone(model.normalize(shapes_batch(size=64)))[:4]:
        assert level.is_contiguous(memory_format=torch.channels_last)
