"""Backbone: from an image to the feature maps of RPN and heads, as selected by `model.features`.

fpn: P2 … P6, each [N, fpn_channels, H / 2^l, W / 2^l]. c4: C4 alone, [N, 1024, H / 16, W / 16]. c5: C5 alone,
[N, 2048, H / 32, W / 32], or H / 16, W / 16 if dilated. (256 and 512 channels for ResNet-18 and -34.) H and W are
multiples of 32.
Source: FPN (arXiv:1612.03144); C4 and dilated C5: Mask R-CNN (arXiv:1703.06870) and Detectron2's R50-C4 and R50-DC5.
"""

from torch import Tensor, nn

from model.config import ModelConfig
from model.network.fpn import FPN
from model.network.layer_norm_body import LayerNormBody, layer_norm_channels
from model.network.resnet import ResNet, stage_channels


class Backbone(nn.Module):
    """Body and optional FPN: [N, 3, H, W] float → feature maps, finest first."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.body = ResNet(config) if config.is_resnet else LayerNormBody(config)
        channels = stage_channels(config) if config.is_resnet else layer_norm_channels()
        self.fpn = FPN(channels, config) if config.features == "fpn" else None

    def forward(self, images: Tensor) -> list[Tensor]:
        stages = self.body(images)
        return stages[-1:] if self.fpn is None else self.fpn(stages)


def feature_channels(config: ModelConfig) -> int:
    """Number of channels of each feature map."""
    if config.features == "fpn":
        return config.fpn_channels
    return stage_channels(config)[2 if config.features == "c4" else 3]
