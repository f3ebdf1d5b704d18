"""Frozen norms, and convolutions with norm and ReLU: the building blocks of body, pyramid and heads."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.network.batch_norm import BatchNorm2d, SyncBatchNorm2d

Norm = Callable[[int], nn.Module]


@dataclass(frozen=True)
class Folded:
    """Cached scale and shift of a frozen norm, and the state of the tensors they were computed from."""

    state: tuple[Any, ...]  # versions, storages and strides of the tensors
    storages: tuple[torch.UntypedStorage, ...]  # kept alive so that no other storage gets the same address
    factor: Tensor  # scale [C, 1, 1, 1], or, if the kernel is frozen, the kernel times the scale
    shift: Tensor  # [C]


class FrozenBatchNorm2d(nn.Module):
    """Batch norm with statistics and affine parameters as buffers; `conv_norm` folds it into the preceding convolution.

    Values derived from buffers and from a frozen kernel are cached, and recomputed when one of these tensors is
    changed, replaced or moved. Writing through `.data` goes unnoticed, since torch does not count it as a change.
    """

    eps = 1e-5

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self._folded: dict[torch.dtype | None, Folded] = {}  # autocast dtype → cached values

    def __getstate__(self) -> dict[str, Any]:
        """State for copies and pickles, without the cache."""
        return {**self.__dict__, "_folded": {}}

    def fold(self, kernel: Tensor) -> tuple[Tensor, Tensor]:
        """Fold this layer into `kernel` [C, …]: return a kernel and a bias, in autocast's dtype if frozen."""
        buffers = tuple(self.buffers(recurse=False))
        tensors = buffers if kernel.requires_grad else (*buffers, kernel)
        if torch.compiler.is_compiling() or any(tensor.is_inference() for tensor in tensors):
            scale, shift = self.scale_and_shift()  # compilers fuse it; inference tensors have no version
            return kernel * scale[:, None, None, None], shift
        device = kernel.device.type
        is_autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # not on meta
        dtype = torch.get_autocast_dtype(device) if is_autocast else None
        storages = tuple(tensor.untyped_storage() for tensor in tensors)
        state = tuple((t._version, s._cdata, t.stride()) for t, s in zip(tensors, storages, strict=True))
        folded = self._folded.get(dtype)
        if folded is None or folded.state != state:
            with torch.inference_mode(False), torch.no_grad():
                scale, shift = self.scale_and_shift()
                factor = scale[:, None, None, None]
                if not kernel.requires_grad:
                    factor = (kernel * factor).to(dtype or kernel.dtype)
                folded = Folded(state, storages, factor, shift.to(dtype or shift.dtype))
            self._folded[dtype] = folded
        return kernel * folded.factor if kernel.requires_grad else folded.factor, folded.shift

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Scale [C] and shift [C] equivalent to this layer."""
        weight, bias, mean, var = (
            cast(Tensor, b) for b in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        scale = weight * (var + self.eps).rsqrt()
        return scale, bias - mean * scale

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        state_dict.pop(f"{prefix}num_batches_tracked", None)  # trained batch norms have it; unused here
        super()._load_from_state_dict(state_dict, prefix, *args)


def norm_layer(name: str) -> Norm:
    """Constructor for `model.norm`, and for a `model.head_norm` that is not none."""
    if name == "group_norm":
        return lambda channels: nn.GroupNorm(32, channels)
    return {"frozen_batch_norm": FrozenBatchNorm2d, "batch_norm": BatchNorm2d, "sync_batch_norm": SyncBatchNorm2d}[name]


def head_norm(name: str) -> Norm | None:
    """Constructor for `ModelConfig.norm_of_heads`; None for none."""
    return None if name == "none" else norm_layer(name)


def conv_norm(conv: nn.Conv2d, norm: nn.Module, x: Tensor, is_real: Tensor | None = None) -> Tensor:
    """Convolve and normalise; a frozen norm is folded into the kernel, which saves two passes over the activations.

    Args:
        is_real: [R] bool, the rows of x that count in the statistics of a batch norm in training; None: all.
    """
    if isinstance(norm, FrozenBatchNorm2d):
        kernel, bias = norm.fold(conv.weight)
        return F.conv2d(x, kernel, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    return norm(conv(x), is_real) if isinstance(norm, BatchNorm2d) else norm(conv(x))


class ConvLayer(nn.Sequential):
    """A convolution, then the norm (unless None), then ReLU (if `relu`), numbered from 0 without what is left out."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, norm: Norm | None, *, relu: bool = False
    ) -> None:
        conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=norm is None)
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
        super().__init__(conv, *([norm(out_channels)] if norm else []), *([nn.ReLU(inplace=True)] if relu else []))
        self.has_norm = norm is not None

    def forward(self, x: Tensor, is_real: Tensor | None = None) -> Tensor:
        """Apply the layer to [R, in_channels, H, W]; `is_real` as in `conv_norm`."""
        if not self.has_norm:
            return super().forward(x)
        x = conv_norm(cast(nn.Conv2d, self[0]), self[1], x, is_real)
        return F.relu_(x) if len(self) == 3 else x


class HeadLayers(nn.Sequential):
    """Layers of a head for RoIs, of which some may be padding: those do not count in its batch norms."""

    def forward(self, x: Tensor, is_real: Tensor | None = None) -> Tensor:
        """Apply the layers to [R, …]; `is_real` as in `conv_norm`."""
        for layer in self:
            x = layer(x, is_real) if isinstance(layer, ConvLayer) else layer(x)
        return x
