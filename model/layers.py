"""Norms, and convolutions with what follows them: the layers that body, pyramid and heads are made of."""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Callable[[int], nn.Module]


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


def head_norm(name: str) -> Norm | None:
    """The norm of FPN and of convolutional heads: group norm where `model.norm` is, else none."""
    return norm_layer(name) if name == "group_norm" else None


def conv_norm(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """Convolve and normalise. A frozen norm costs a product with the kernel instead of two passes over the activations."""
    if isinstance(norm, FrozenBatchNorm2d):
        scale, shift = norm.scale_and_shift()
        weight = conv.weight * scale[:, None, None, None]
        return F.conv2d(x, weight, shift, conv.stride, conv.padding, conv.dilation, conv.groups)
    return norm(conv(x))


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
