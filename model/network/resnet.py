"""ResNet: the body of every network here, complete or without its last stage.

Stages are res2 … res5, as in the detection literature; their modules have torchvision's names, layer1 … layer4, so that
its state dicts load unchanged. Shapes: C_k, the output of stage res_k, is [N, C, H / 2^k, W / 2^k]. Memory is
channels-last.
Sources: ResNet (arXiv:1512.03385), ResNeXt (arXiv:1611.05431), Wide-ResNet (arXiv:1605.07146); Detectron2 for
dilation, in every block of the stage.
"""

from dataclasses import dataclass
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.network.layers import Norm, conv_norm, norm_layer

DEPTHS = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnext50_32x4d": (3, 4, 6, 3),
    "resnext101_32x8d": (3, 4, 23, 3),
    "wide_resnet50_2": (3, 4, 6, 3),
}
# Groups of the 3×3 convolutions, and channels of each in res2 if the stem has 64; 1 and 64 if not listed.
GROUPS = {"resnext50_32x4d": (32, 4), "resnext101_32x8d": (32, 8), "wide_resnet50_2": (1, 128)}
STAGES = ("layer1", "layer2", "layer3", "layer4")


@dataclass(frozen=True)
class BlockOptions:
    """Options of a block, except for its width."""

    stride: int = 1
    dilation: int = 1
    groups: int = 1
    width_per_group: int = 64  # in res2, if the stem has 64 channels
    stride_in_1x1: bool = False


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut (ResNet-18 and -34)."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, options: BlockOptions, norm: Norm) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, width, options.stride, options)
        self.bn1 = norm(width)
        self.conv2 = _conv3x3(width, width, 1, options)
        self.bn2 = norm(width)
        self.downsample = _shortcut(in_channels, width, options.stride, norm)

    def forward(self, x: Tensor, is_real: Tensor | None = None) -> Tensor:
        out = F.relu_(conv_norm(self.conv1, self.bn1, x, is_real))
        out = conv_norm(self.conv2, self.bn2, out, is_real)
        return F.relu_(out.add_(_apply_shortcut(self.downsample, x, is_real)))


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 and a shortcut (ResNet-50, …); the 3×3 is grouped for ResNeXt, wider for Wide-ResNet."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, options: BlockOptions, norm: Norm) -> None:
        super().__init__()
        stride_1x1, stride_3x3 = (options.stride, 1) if options.stride_in_1x1 else (1, options.stride)
        inner = width * options.width_per_group // 64 * options.groups
        self.conv1 = nn.Conv2d(in_channels, inner, 1, stride_1x1, bias=False)
        self.bn1 = norm(inner)
        self.conv2 = _conv3x3(inner, inner, stride_3x3, options)
        self.bn2 = norm(inner)
        self.conv3 = nn.Conv2d(inner, width * 4, 1, bias=False)
        self.bn3 = norm(width * 4)
        self.downsample = _shortcut(in_channels, width * 4, options.stride, norm)

    def forward(self, x: Tensor, is_real: Tensor | None = None) -> Tensor:
        out = F.relu_(conv_norm(self.conv1, self.bn1, x, is_real))
        out = F.relu_(conv_norm(self.conv2, self.bn2, out, is_real))
        out = conv_norm(self.conv3, self.bn3, out, is_real)
        return F.relu_(out.add_(_apply_shortcut(self.downsample, x, is_real)))


class Stage(nn.Sequential):
    """The blocks of one stage: [R, …, H, W] → [R, …, H / 2, W / 2]; `is_real` as in `conv_norm`."""

    def forward(self, x: Tensor, is_real: Tensor | None = None) -> Tensor:
        for block in self:
            x = block(x, is_real)
        return x


def _conv3x3(in_channels: int, out_channels: int, stride: int, options: BlockOptions) -> nn.Conv2d:
    padding = dilation = options.dilation
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding, dilation, groups=options.groups, bias=False)


def _shortcut(in_channels: int, out_channels: int, stride: int, norm: Norm) -> nn.Sequential | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), norm(out_channels))


def _apply_shortcut(shortcut: nn.Sequential | None, x: Tensor, is_real: Tensor | None) -> Tensor:
    return x if shortcut is None else conv_norm(cast(nn.Conv2d, shortcut[0]), shortcut[1], x, is_real)


def stage_channels(config: ModelConfig) -> list[int]:
    """Numbers of channels of C2 … C5."""
    return [config.stem_channels * _block(config).expansion << stage for stage in range(4)]


def make_stage(config: ModelConfig, stage: int) -> Stage:
    """Make the blocks of one stage, 0 for res2 to 3 for res5."""
    block, norm, width = _block(config), norm_layer(config.norm), config.stem_channels << stage
    dilation = config.res5_dilation if stage == 3 else 1
    groups = GROUPS.get(config.backbone, (1, 64))
    channels = stage_channels(config)[stage - 1] if stage else config.stem_channels
    blocks: list[nn.Module] = []
    for i in range(DEPTHS[config.backbone][stage]):
        stride = 2 if stage and not i and dilation == 1 else 1
        options = BlockOptions(stride, dilation, *groups, config.stride_in_1x1)
        blocks.append(block(channels, width, options, norm))
        channels = width * block.expansion
    layers = Stage(*blocks)
    for module in layers.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return layers


def _block(config: ModelConfig) -> type[BasicBlock] | type[Bottleneck]:
    return BasicBlock if config.backbone in ("resnet18", "resnet34") else Bottleneck


class ResNet(nn.Module):
    """ResNet body: [N, 3, H, W] → C2 … C5, or C2 … C4 with features c4."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, config.stem_channels, 7, 2, 3, bias=False)
        self.bn1 = norm_layer(config.norm)(config.stem_channels)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.stages = STAGES[:3] if config.features == "c4" else STAGES
        for stage, name in enumerate(self.stages):
            self.add_module(name, make_stage(config, stage))
        self.frozen_modules = self._freeze(config.frozen_stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.relu_(conv_norm(self.conv1, self.bn1, x))
        x = F.max_pool2d(x, 3, 2, 1)
        features = []
        for name in self.stages:
            x = self.get_submodule(name)(x)
            features.append(x)
        return features

    def layers(self) -> list[list[nn.Module]]:
        """The stem and each block, first to last, as `train.layer_decay` counts them."""
        blocks = [[block] for name in self.stages for block in self.get_submodule(name).children()]
        return [[self.conv1, self.bn1], *blocks]

    def train(self, mode: bool = True) -> "ResNet":
        """Set the mode of all but frozen stages, whose batch norms keep their statistics."""
        super().train(mode)
        for module in self.frozen_modules:
            module.eval()
        return self

    def _freeze(self, stages: int) -> list[nn.Module]:
        modules: list[nn.Module] = [self.conv1, self.bn1] if stages else []
        modules += [self.get_submodule(name) for name in STAGES[: max(0, stages - 1)]]
        for module in modules:
            module.requires_grad_(False)
        return modules
