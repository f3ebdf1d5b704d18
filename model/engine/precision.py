"""How numbers are kept during a step: float32, tf32, bfloat16 or float16 (`train.dtype`).

Weights, their gradients and their updates are float32 always. bfloat16 and float16 are autocast: convolutions and products run in them, losses
and boxes do not. float16 gradients can underflow, so its loss is scaled up and its gradients down again.
Source: Mixed Precision Training (arXiv:1710.03740).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from model.errors import UserError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
TF32_CAPABILITY = (8, 0)  # Ampere


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """The context in which a network runs; it changes nothing for float32 and tf32."""
    return torch.autocast(device.type, DTYPES.get(dtype, torch.bfloat16), enabled=dtype in DTYPES)


def set_float32_products(device: torch.device, dtype: str) -> None:
    """Let float32 products on a GPU be exact, or as tf32 does them. Holds for the whole process.

    Raises:
        UserError: if the device has no tf32.
    """
    if dtype == "tf32" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < TF32_CAPABILITY):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        raise UserError(
            f"train.dtype=tf32: needs a CUDA device of compute capability {TF32_CAPABILITY[0]}.{TF32_CAPABILITY[1]} or later, got {name}; "
            "set train.dtype to float32"
        )
    products = "tf32" if dtype == "tf32" else "ieee"
    # By the old names too: parts of torch (export, compile) still ask for those, and insist that the answers agree.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    torch.backends.cuda.matmul.fp32_precision = products
    torch.backends.cudnn.conv.fp32_precision = products  # type: ignore[attr-defined]
    torch.backends.cudnn.rnn.fp32_precision = products  # type: ignore[attr-defined]


@contextmanager
def without_kernel_search() -> Iterator[None]:
    """Let cuDNN choose kernels by rule, where training has it try them: detections are of ever new numbers, and each would be searched for."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class LossScaler:
    """float16's dynamic loss scale: halved by a step that overflows, doubled after 2,000 that do not. Other dtypes leave it at 1.

    `scale`, backward, `unscale_`, the optimizer's step where nothing is infinite, `update`: nothing of it waits for the device.
    """

    def __init__(self, device: torch.device, dtype: str) -> None:
        self._scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to call backward on."""
        return self._scaler.scale(loss)

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the scale, and note whether one of them overflowed."""
        self._scaler.unscale_(optimizer)

    def update(self) -> None:
        """Adapt the scale to what `unscale_` found."""
        if self._scaler.is_enabled():
            self._scaler.update()

    @property
    def is_exhausted(self) -> Tensor | bool:
        """Whether an overflow cannot be the scale's fault, since it has fallen to 1 (where it stays for dtypes that need none)."""
        scale = self._scaler._get_scale_async() if self._scaler.is_enabled() else None
        return scale <= 1.0 if scale is not None else not self._scaler.is_enabled()

    def state_dict(self) -> dict[str, Any]:
        """Scale and steps since it changed; empty where nothing is scaled. Waits for the device."""
        return self._scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        if self._scaler.is_enabled() and state:
            self._scaler.load_state_dict(state)
