"""ConvNeXt and Swin: bodies with layer norm, built of torchvision's modules and with their names.

C_k, the output of stage k - 1, is [N, C, H / 2^k, W / 2^k], k = 2 … 5, as for ResNets, and in channels-last memory. It
is the value after the last block of the stage: the norm that some detectors put behind each stage is left out, since
torchvision publishes no weights for it. Stochastic depth is off, so that a resumed run equals an unbroken one.
Sources: ConvNeXt (arXiv:2201.03545), Swin Transformer (arXiv:2103.14030).
"""

from torch import Tensor, nn

from model.config import ModelConfig

CHANNELS = 96  # width of C2 in each of these bodies; each stage has twice the width of the one before
STAGES = 4


class LayerNormBody(nn.Module):
    """Stem and four stages of torchvision's network: [N, 3, H, W] → C2 … C5."""

    def __init__(self, config: ModelConfig) -> None:
        from torchvision.models import get_model  # more than a second, which ResNets need not pay
        from torchvision.ops import StochasticDepth

        super().__init__()
        # The stem, then in turn a stage and, before the next one, a layer that halves the resolution.
        self.features: nn.Sequential = get_model(config.backbone, weights=None).features
        self._is_swin = config.backbone.startswith("swin")
        for module in self.modules():
            if isinstance(module, StochasticDepth):
                module.p = 0.0
        for part in self.features[: max(config.frozen_stages, 2 * config.frozen_stages - 2)]:
            part.requires_grad_(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for number, part in enumerate(self.features):
            x = part(x)
            if number % 2:
                features.append(x.permute(0, 3, 1, 2) if self._is_swin else x)  # Swin computes on [N, H, W, C]
        return features

    def layers(self) -> list[list[nn.Module]]:
        """The stem and each block, first to last, as `train.layer_decay` counts them."""
        layers: list[list[nn.Module]] = [[self.features[0]]]
        for stage in range(STAGES):
            before, blocks = self.features[2 * stage], list(self.features[2 * stage + 1].children())
            first = [before, blocks[0]] if stage else [blocks[0]]
            layers += [first, *([block] for block in blocks[1:])]
        return layers


def layer_norm_channels() -> list[int]:
    """Numbers of channels of C2 … C5."""
    return [CHANNELS << stage for stage in range(STAGES)]
