"""Backbone: from an image to a feature pyramid, a ResNet body and an FPN.

Shapes: N images of H × W; level l of P2 … P6 is [N, C, H / 2^l, W / 2^l], C = model.fpn_channels. Memory is channels-last.
Modules carry torchvision's names, so its state dicts load as they are.
Source: ResNet (arXiv:1512.03385), stride in the 3×3 convolution as torchvision has it; FPN (arXiv:1612.03144).
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig

Norm = Callable[[int], nn.Module]
BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}
STAGES = ("stem", "layer1", "layer2", "layer3", "layer4")


class FrozenBatchNorm2d(nn.Module):
    """Batch norm whose statistics and affine parameters are buffers; `conv_norm` folds it into the convolution before it."""

    eps = 1e-5

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """The [C] factor and [C] summand that this layer is."""
        weight, bias, mean, var = (
            cast(Tensor, b) for b in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        scale = weight * (var + self.eps).rsqrt()
        return scale, bias - mean * scale

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        state_dict.pop(f"{prefix}num_batches_tracked", None)  # a trained batch norm counts batches; nothing here does
        super()._load_from_state_dict(state_dict, prefix, *args)


def norm_layer(name: str) -> Norm:
    """The constructor that `model.norm` names."""
    if name == "group_norm":
        return lambda channels: nn.GroupNorm(32, channels)
    return FrozenBatchNorm2d if name == "frozen_batch_norm" else nn.BatchNorm2d


def conv_norm(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """Convolve and normalise. A frozen norm costs a product with the kernel instead of two passes over the activations."""
    if isinstance(norm, FrozenBatchNorm2d):
        scale, shift = norm.scale_and_shift()
        return F.conv2d(x, conv.weight * scale[:, None, None, None], shift, conv.stride, conv.padding)
    return norm(conv(x))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut (ResNet-18 and -34)."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, 1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = norm(width)
        self.downsample = _shortcut(in_channels, width, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu_(conv_norm(self.conv1, self.bn1, x))
        out = conv_norm(self.conv2, self.bn2, out)
        return F.relu_(out.add_(_apply_shortcut(self.downsample, x)))


class Bottleneck(nn.Module):
    """1×1, 3×3 (strided), 1×1 and a shortcut (ResNet-50 and -101)."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = norm(width)
        self.conv3 = nn.Conv2d(width, width * 4, 1, bias=False)
        self.bn3 = norm(width * 4)
        self.downsample = _shortcut(in_channels, width * 4, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu_(conv_norm(self.conv1, self.bn1, x))
        out = F.relu_(conv_norm(self.conv2, self.bn2, out))
        out = conv_norm(self.conv3, self.bn3, out)
        return F.relu_(out.add_(_apply_shortcut(self.downsample, x)))


def _shortcut(in_channels: int, out_channels: int, stride: int, norm: Norm) -> nn.Sequential | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), norm(out_channels))


def _apply_shortcut(shortcut: nn.Sequential | None, x: Tensor) -> Tensor:
    return x if shortcut is None else conv_norm(cast(nn.Conv2d, shortcut[0]), shortcut[1], x)


class ResNet(nn.Module):
    """The body: [N, 3, H, W] → C2 … C5, strides 4 to 32."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        block = BasicBlock if config.backbone in ("resnet18", "resnet34") else Bottleneck
        norm = norm_layer(config.norm)
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = norm(64)
        channels = 64
        for stage, depth in enumerate(BLOCKS[config.backbone]):
            width, blocks = 64 << stage, []
            for i in range(depth):
                stride = 2 if stage and not i else 1
                blocks.append(block(channels, width, stride, norm))
                channels = width * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.out_channels = [64 * block.expansion << stage for stage in range(4)]
        self.frozen_modules = self._freeze(config.frozen_stages)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.relu_(conv_norm(self.conv1, self.bn1, x))
        x = F.max_pool2d(x, 3, 2, 1)
        features = []
        for name in STAGES[1:]:
            x = self.get_submodule(name)(x)
            features.append(x)
        return features

    def train(self, mode: bool = True) -> "ResNet":
        """Frozen stages stay in evaluation mode: their batch norms keep their statistics."""
        super().train(mode)
        for module in self.frozen_modules:
            module.eval()
        return self

    def _freeze(self, stages: int) -> list[nn.Module]:
        modules: list[nn.Module] = [self.conv1, self.bn1] if stages else []
        modules += [self.get_submodule(name) for name in STAGES[1:stages]]
        for module in modules:
            module.requires_grad_(False)
        return modules


class FPN(nn.Module):
    """C2 … C5 → P2 … P6: lateral 1×1, nearest-neighbour top-down sum, 3×3; P6 is every other cell of P5."""

    def __init__(self, in_channels: Sequence[int], config: ModelConfig) -> None:
        super().__init__()
        grouped = norm_layer("group_norm") if config.norm == "group_norm" else None
        out = config.fpn_channels
        self.inner_blocks = nn.ModuleList(conv_layer(channels, out, 1, grouped) for channels in in_channels)
        self.layer_blocks = nn.ModuleList(conv_layer(out, out, 3, grouped) for _ in in_channels)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        inner = self.inner_blocks[-1](features[-1])
        pyramid = [self.layer_blocks[-1](inner)]
        for feature, lateral, smooth in zip(
            features[-2::-1], list(self.inner_blocks)[-2::-1], list(self.layer_blocks)[-2::-1], strict=True
        ):
            top_down = F.interpolate(inner, size=feature.shape[-2:], mode="nearest")
            inner = lateral(feature).add_(top_down)
            pyramid.insert(0, smooth(inner))
        return [*pyramid, F.max_pool2d(pyramid[-1], 1, 2)]


def conv_layer(
    in_channels: int, out_channels: int, kernel: int, norm: Norm | None, relu: bool = False
) -> nn.Sequential:
    """Convolution, then the norm where there is one, then ReLU where wanted."""
    layers: list[nn.Module] = [nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=norm is None)]
    layers += [norm(out_channels)] if norm else []
    layers += [nn.ReLU(inplace=True)] if relu else []
    for layer in layers:
        if isinstance(layer, nn.Conv2d) and layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class Backbone(nn.Module):
    """[N, 3, H, W] float, H and W multiples of 32 → P2 … P6, each [N, fpn_channels, H / 2^l, W / 2^l]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.body = ResNet(config)
        self.fpn = FPN(self.body.out_channels, config)

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.fpn(self.body(images))
