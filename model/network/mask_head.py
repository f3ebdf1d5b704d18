"""Mask head: from the pooled features of a RoI to a mask of its class.

Shapes: R RoIs, C classes without background, O the side of the features, 14 with FPN, 7 after res5.
Modules carry torchvision's names.
Source: Mask R-CNN (arXiv:1703.06870), figure 4.
"""

import itertools
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.network.layers import ConvLayer, HeadLayers, head_norm


def make_mask_head(config: ModelConfig, in_channels: int) -> tuple[HeadLayers, int]:
    """Make the 3×3 convolutions, [R, …, O, O] → [R, channels, O, O]; return them (maybe none) and these channels."""
    widths = [in_channels] + [config.mask_head_channels] * config.mask_head_convs
    norm = head_norm(config.norm_of_heads)
    layers = [ConvLayer(i, o, 3, norm, relu=True) for i, o in itertools.pairwise(widths)]
    for layer in layers:
        weight = layer.get_submodule("0").weight
        nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")  # type: ignore[arg-type]
    return HeadLayers(*layers), widths[-1]


class MaskPredictor(nn.Module):
    """Twofold upsampling, then one logit per pixel for the given class; logits of other classes are never computed."""

    def __init__(self, in_channels: int, channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv5_mask = nn.ConvTranspose2d(in_channels, channels, 2, 2)
        self.mask_fcn_logits = nn.Conv2d(channels, 1 + num_classes, 1)
        for module in (self.conv5_mask, self.mask_fcn_logits):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """Features [R, in_channels, O, O] and labels [R] int64 → logits [R, 2·O, 2·O].

        A transposed convolution without overlap is a matrix product per cell, which is faster forward and backward; the
        four new cells are arranged only once they are logits.
        """
        height, width = x.shape[-2:]
        cells = x.permute(0, 2, 3, 1).flatten(1, 2)  # [R, O², in_channels], a view of channels-last memory
        weight = self.conv5_mask.weight.permute(2, 3, 1, 0).flatten(0, 2)  # [4·channels, channels]: dy, dx, channel
        bias = cast(Tensor, self.conv5_mask.bias).repeat(4)
        x = F.relu_(F.linear(cells, weight, bias)).unflatten(2, (4, -1)).flatten(1, 2)  # [R, 4·O², channels]
        kernels = F.embedding(labels, self.mask_fcn_logits.weight.flatten(1)).to(x.dtype)  # [R, channels]
        class_bias = F.embedding(labels, cast(Tensor, self.mask_fcn_logits.bias)[:, None])  # [R, 1]
        logits = torch.matmul(x, kernels[..., None]).squeeze(2) + class_bias  # [R, 4·O²]: y, x, dy, dx
        logits = logits.float().unflatten(1, (height, width, 2, 2))
        return logits.transpose(2, 3).flatten(3).flatten(1, 2)
