"""Box heads: from the pooled features of a RoI to its class and box.

Shapes: R RoIs, C classes without background, O the side of pooled features. Modules carry torchvision's names.
Sources: FPN (arXiv:1612.03144) for two fully connected layers; Group Normalization (arXiv:1803.08494) and Detectron2's
FastRCNNConvFCHead for four convolutions and one such layer; Mask R-CNN (arXiv:1703.06870), figure 4 left, for res5.
"""

import itertools

import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.network.layers import ConvLayer, HeadLayers, head_norm


class MLPHead(nn.Module):
    """Two fully connected layers: [R, in_channels, O, O] → [R, box_head_channels]."""

    def __init__(self, config: ModelConfig, in_channels: int) -> None:
        super().__init__()
        self.fc6 = nn.Linear(in_channels * config.box_pool_size**2, config.box_head_channels)
        self.fc7 = nn.Linear(config.box_head_channels, config.box_head_channels)

    def forward(self, x: Tensor, is_real: Tensor | None = None) -> Tensor:
        """Apply the layers; there is no norm for `is_real`."""
        return F.relu_(self.fc7(F.relu_(self.fc6(x.flatten(1)))))


def make_box_head(config: ModelConfig, in_channels: int) -> tuple[nn.Module, int]:
    """Make the head named by `model.box_head`; return it and the channels of its output [R, channels]."""
    if config.box_head == "res5":  # RoIHeads has applied it already
        return HeadLayers(nn.AdaptiveAvgPool2d(1), nn.Flatten()), in_channels
    if config.box_head == "mlp":
        return MLPHead(config, in_channels), config.box_head_channels
    widths = [in_channels] + [config.box_head_conv_channels] * config.box_head_convs
    norm = head_norm(config.norm_of_heads)
    layers: list[nn.Module] = [ConvLayer(i, o, 3, norm, relu=True) for i, o in itertools.pairwise(widths)]
    for layer in layers:
        weight = layer.get_submodule("0").weight
        nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")  # type: ignore[arg-type]
    linear = nn.Linear(widths[-1] * config.box_pool_size**2, config.box_head_channels)
    return HeadLayers(*layers, nn.Flatten(), linear, nn.ReLU(inplace=True)), config.box_head_channels


class BoxPredictor(nn.Module):
    """Class logits [R, 1 + C] and box deltas per class [R, 1 + C, 4], or [R, 1, 4] if class-agnostic."""

    def __init__(self, channels: int, num_classes: int, *, class_agnostic: bool) -> None:
        super().__init__()
        self.cls_score = nn.Linear(channels, 1 + num_classes)
        self.bbox_pred = nn.Linear(channels, 4 if class_agnostic else (1 + num_classes) * 4)
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.normal_(self.bbox_pred.weight, std=0.001)
        nn.init.zeros_(self.cls_score.bias)
        nn.init.zeros_(self.bbox_pred.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_score(x).float(), self.bbox_pred(x).unflatten(1, (-1, 4)).float()
