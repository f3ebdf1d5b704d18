"""Feature pyramid network. Source: FPN (arXiv:1612.03144); modules carry torchvision's names."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.network.layers import ConvLayer, head_norm


class FPN(nn.Module):
    """C2 … C5 → P2 … P6: lateral 1×1, nearest-neighbour top-down sum, 3×3; P6 is every other cell of P5."""

    def __init__(self, in_channels: Sequence[int], config: ModelConfig) -> None:
        super().__init__()
        norm, out = head_norm(config.norm_of_heads), config.fpn_channels
        self.inner_blocks = nn.ModuleList(ConvLayer(channels, out, 1, norm) for channels in in_channels)
        self.layer_blocks = nn.ModuleList(ConvLayer(out, out, 3, norm) for _ in in_channels)
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
