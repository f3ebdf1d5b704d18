"""ResNet-FPN against torchvision's: values, sizes, what is frozen."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection import MaskRCNN as TorchvisionMaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import BasicBlock
from torchvision.models.resnet import Bottleneck as TheirBottleneck

from model.config import ModelConfig
from model.network.backbone import Backbone
from model.network.layers import FrozenBatchNorm2d
from model.network.mask_rcnn import MaskRCNN
from model.network.resnet import ResNet
from model.structures import Batch
from model.weights.load import load_weights
from model.weights.names import body_name


def shaken(module: nn.Module) -> nn.Module:
    """Statistics and affine parameters away from the identity."""
    for name, buffer in module.named_buffers():
        if name.endswith(("running_var", "weight")):
            buffer.uniform_(0.5, 1.0)
        elif name.endswith(("running_mean", "bias")):
            buffer.normal_(0, 0.1)
    return module


# Blocks of both kinds; more of them are slow.
DEPTHS = ["resnet18", "resnet50", *(pytest.param(name, marks=pytest.mark.slow) for name in ("resnet34", "resnet101"))]


@pytest.mark.parametrize("name", DEPTHS)
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


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("resnet50", {"features": "c4", "box_head": "res5", "box_pool_size": 14}),
        pytest.param(
            "resnet101", {"features": "c4", "box_head": "res5", "box_pool_size": 14}, marks=pytest.mark.slow
        ),  # as above, but deeper
        ("resnet50", {"features": "c5"}),
        ("resnet50", {"features": "c5", "res5_dilation": 2}),
        ("resnet50", {"stride_in_1x1": True}),
        ("resnext50_32x4d", {}),
        ("wide_resnet50_2", {}),
        pytest.param("resnext101_32x8d", {}, marks=pytest.mark.slow),  # as resnext50_32x4d, but deeper and wider
    ],
)
def test_each_stage_is_torchvisions(name: str, changes: dict[str, Any]) -> None:
    """Layer by layer, with shared weights; strides and dilation that torchvision's constructors do not offer are set on
    its blocks.
    """
    torch.manual_seed(0)
    theirs = shaken(getattr(torchvision.models, name)(weights=None)).double().eval()
    if changes.get("stride_in_1x1"):
        for stage in (theirs.layer2, theirs.layer3, theirs.layer4):
            stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    if changes.get("res5_dilation") == 2:
        theirs.layer4[0].conv2.stride = theirs.layer4[0].downsample[0].stride = (1, 1)
        for block in theirs.layer4:
            block.conv2.dilation = block.conv2.padding = (2, 2)
    config = ModelConfig(backbone=name, weights="none", **changes)  # type: ignore[arg-type]
    ours = MaskRCNN(config, 3).double().eval()
    state = {body_name(key, config): value for key, value in theirs.state_dict().items() if not key.startswith("fc.")}
    loaded = ours.load_state_dict(
        {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, strict=False
    )
    assert not loaded.unexpected_keys
    with torch.no_grad():
        x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
        features = ours.backbone.body(x)
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
        for stage, feature in zip((theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4), features, strict=False):
            x = stage(x)
            torch.testing.assert_close(feature, x, rtol=1e-7, atol=1e-9)
        assert len(features) == (3 if config.features == "c4" else 4)
        if config.features == "c4":
            assert ours.roi_heads is not None
            assert ours.roi_heads.res5 is not None
            pooled = torch.randn(5, 1024, 14, 14, dtype=torch.float64)
            torch.testing.assert_close(ours.roi_heads.res5(pooled), theirs.layer4(pooled), rtol=1e-7, atol=1e-9)


class Narrow(torchvision.models.ResNet):
    """torchvision's ResNet with half its channels, which its constructor does not offer."""

    def _make_layer(self, block: Any, planes: int, blocks: int, stride: int = 1, dilate: bool = False) -> nn.Sequential:
        if planes == 64:
            self.inplanes, self.conv1, self.bn1 = 32, nn.Conv2d(3, 32, 7, 2, 3, bias=False), nn.BatchNorm2d(32)
        return super()._make_layer(block, planes // 2, blocks, stride, dilate)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("resnet18", lambda: Narrow(BasicBlock, [2, 2, 2, 2])),
        ("resnext50_32x4d", lambda: Narrow(TheirBottleneck, [3, 4, 6, 3], groups=32, width_per_group=4)),
    ],
)
def test_a_resnet_of_half_the_channels_is_torchvisions(name: str, theirs: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    body = shaken(theirs()).double().eval()
    config = ModelConfig(backbone=name, weights="none", stem_channels=32)  # type: ignore[arg-type]
    ours = ResNet(config).double().eval()
    ours.load_state_dict({key: value for key, value in body.state_dict().items() if key in ours.state_dict()})
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        features = ours(x)
        x = body.maxpool(body.relu(body.bn1(body.conv1(x))))
        for stage, feature in zip((body.layer1, body.layer2, body.layer3, body.layer4), features, strict=True):
            x = stage(x)
            torch.testing.assert_close(feature, x, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["convnext_tiny", "swin_t", pytest.param("convnext_small", marks=pytest.mark.slow)])
def test_a_body_with_layer_norm_is_torchvisions_loaded_from_its_file(name: str, tmp_path: Path) -> None:
    """Also in training, since nothing in it is random; sides that no window of 7 × 7 cells divides."""
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(name, weights=None).eval()
    for key, parameter in theirs.named_parameters():
        if parameter.dim() == 1 or "layer_scale" in key:  # biases, norms, scales: away from 0, 1 and 1e-6
            nn.init.uniform_(parameter, 0.5, 1.0)
    torch.save(theirs.state_dict(), tmp_path / "body.pth")
    narrow: dict[str, Any] = {"fpn_channels": 32, "box_head_channels": 32}
    config = ModelConfig(backbone=name, weights=str(tmp_path / "body.pth"), **narrow)  # type: ignore[arg-type]
    model = MaskRCNN(config, 2).to_device(torch.device("cpu")).train()
    report = load_weights(model, config, ["cat", "dog"], [1, 2])
    assert {key.split(".")[0] for key in report.unused} == ({"norm", "head"} if name == "swin_t" else {"classifier"})
    assert set(report.unused.values()) == {"not needed for detection here"}
    assert not any(key.startswith("backbone.body.") for key in report.initialised)
    stages = create_feature_extractor(theirs, {f"features.{2 * stage + 1}": str(stage) for stage in range(4)})
    images = torch.randn(2, 3, 64, 96).to(memory_format=torch.channels_last)
    with torch.no_grad():
        expected, found = list(stages(images).values()), model.backbone.body(images)
    if name == "swin_t":
        expected = [feature.permute(0, 3, 1, 2) for feature in expected]
    sizes = [(2, 96 << stage, 64 >> stage + 2, 96 >> stage + 2) for stage in range(4)]
    assert [tuple(feature.shape) for feature in found] == sizes
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
        assert mine.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("name", "blocks"), [("convnext_tiny", (3, 3, 9, 3)), ("swin_t", (2, 2, 6, 2))])
def test_stages_with_layer_norm_are_frozen_and_counted_as_those_of_a_resnet(name: str, blocks: tuple[int, ...]) -> None:
    """A stage is its blocks, with the layer before them that halves the resolution."""
    frozen = [(), ("0",), ("0", "1"), ("0", "1", "2", "3"), tuple("012345"), tuple("01234567")]
    for stages, parts in enumerate(frozen):
        with torch.device("meta"):
            config = ModelConfig(backbone=name, weights="none", freeze_stages=stages)  # type: ignore[arg-type]
            body = Backbone(config).body
        fixed = {key.split(".")[1] for key, parameter in body.named_parameters() if not parameter.requires_grad}
        learning = {key.split(".")[1] for key, parameter in body.named_parameters() if parameter.requires_grad}
        assert (fixed, learning) == (set(parts), set("01234567") - set(parts))
    layers = body.layers()
    assert [len(layer) for layer in layers] == [
        1, *(2 if stage and not block else 1 for stage, count in enumerate(blocks) for block in range(count))
    ]  # fmt: skip
    counted = [parameter for layer in layers for module in layer for parameter in module.parameters()]
    assert set(counted) == set(body.parameters())


def test_the_network_has_torchvisions_parameters() -> None:
    with torch.device("meta"):
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
    mean = body.layer2[0].bn1.running_mean  # type: ignore[index, union-attr]
    assert not torch.equal(mean, torch.zeros(128))  # type: ignore[arg-type]


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
