"""Precision of a training step: float32, tf32, bfloat16 or float16 (`train.dtype`).

Weights, their gradients and their updates are always float32. bfloat16 and float16 use autocast: convolutions and
matrix products run in them, losses and boxes do not. float16 gradients can underflow, so the loss is scaled up and the
gradients are scaled down again.
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
    """Autocast context for `train.dtype`; disabled for float32 and tf32."""
    return torch.autocast(device.type, DTYPES.get(dtype, torch.bfloat16), enabled=dtype in DTYPES)


def set_float32_products(device: torch.device, dtype: str) -> None:
    """Set float32 matrix products on a GPU to exact or to tf32, for the whole process.

    Raises:
        UserError: if the device has no tf32.
    """
    if dtype == "tf32" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < TF32_CAPABILITY):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        raise UserError(
            f"dtype tf32: needs a CUDA device of compute capability {TF32_CAPABILITY[0]}.{TF32_CAPABILITY[1]} "
            f"or later, got {name}; "
            "set train.dtype or predict.dtype to float32"
        )
    products = "tf32" if dtype == "tf32" else "ieee"
    # Set the old names too: parts of torch (export, compile) still read them and require both to agree.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    torch.backends.cuda.matmul.fp32_precision = products
    torch.backends.cudnn.conv.fp32_precision = products  # type: ignore[attr-defined]
    torch.backends.cudnn.rnn.fp32_precision = products  # type: ignore[attr-defined]


@contextmanager
def without_kernel_search() -> Iterator[None]:
    """Disable cuDNN's kernel search within the context: it would run anew for each number of detections."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class LossScaler:
    """Dynamic loss scale for float16: halved by an overflow, doubled after 2,000 steps without one; 1 for other dtypes.

    Per step: `scale`, backward, `unscale_`, the optimizer's step if all is finite, `update`. Nothing waits for the
    device.
    """

    def __init__(self, device: torch.device, dtype: str) -> None:
        self._scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")

    def scale(self, loss: Tensor) -> Tensor:
        """Scale the loss before backward."""
        return self._scaler.scale(loss)

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the scale, and record whether any of them overflowed."""
        self._scaler.unscale_(optimizer)

    def update(self) -> None:
        """Adapt the scale to the overflow found by `unscale_`."""
        if self._scaler.is_enabled():
            self._scaler.update()

    @property
    def is_exhausted(self) -> Tensor | bool:
        """True if the scale is down to 1 (always so for dtypes that need none), so that it cannot cause an overflow."""
        scale = self._scaler._get_scale_async() if self._scaler.is_enabled() else None
        return scale <= 1.0 if scale is not None else not self._scaler.is_enabled()

    def state_dict(self) -> dict[str, Any]:
        """Scale, and steps since it changed; empty for dtypes that need no scale. Waits for the device."""
        return self._scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of `state_dict()`."""
        if self._scaler.is_enabled() and state:
            self._scaler.load_state_dict(state)
