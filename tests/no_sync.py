"""A mode that refuses whatever makes the host wait for the device, so that a CPU test can prove a path free of it.

Two layers, since neither sees everything: dispatched operators (whose result's shape or Python value depends on data),
and Python methods that read memory without an operator (`tolist`, `numpy`), or that copy to the host (`cpu`, free of
charge here). Where tensors are on a GPU, fake as it may be (tests/fake_cuda.py), copies between it and the host show
too.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

SYNCING_OPERATORS = frozenset(
    {
        "_local_scalar_dense",
        "_unique",
        "_unique2",
        "allclose",
        "argwhere",
        "bincount",
        "equal",
        "is_nonzero",
        "item",
        "masked_select",
        "nonzero",
        "nonzero_numpy",
        "unique_consecutive",
        "unique_dim",
        "unique_dim_consecutive",
    }
)
SYNCING_METHODS = frozenset({torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__})
INDEXING_OPERATORS = frozenset({"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"})
COPIES = frozenset({"_to_copy", "copy_"})


class SyncError(AssertionError):
    """Something in the path would make the host wait."""


class NoSync(TorchDispatchMode):
    """While it is entered, an operator that would synchronise raises SyncError. Backward passes count too."""

    def __enter__(self) -> "NoSync":
        self._methods = _NoSyncMethods()
        self._methods.__enter__()
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self._methods.__exit__(*exc)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[-1]
        if name in SYNCING_OPERATORS:
            raise SyncError(f"{func} makes the host wait: its result depends on data")
        if name in INDEXING_OPERATORS and any(_is_mask(index) for index in args[1]):
            raise SyncError(f"{func} with a boolean mask makes the host wait: the number of rows depends on data")
        if name in INDEXING_OPERATORS and any(_is_elsewhere(index, args[0].device) for index in args[1]):
            raise SyncError(f"{func} with indices from another device makes the host wait: they are copied")
        if name in COPIES and _waits(func, args, kwargs):
            raise SyncError(f"{func} between host and device makes the host wait: it must be non_blocking")
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            raise SyncError(f"{func} without output_size makes the host wait")
        return func(*args, **kwargs)


class _NoSyncMethods(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in SYNCING_METHODS:
            raise SyncError(f"Tensor.{func.__name__} makes the host wait")
        return func(*args, **(kwargs or {}))


def _waits(func: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a copy crosses between host and device, and the host waits for it."""
    if func._schema.name == "aten::copy_":
        target, source = args[0].device, args[1].device
        is_blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
    else:
        source, target = args[0].device, kwargs.get("device") or args[0].device
        is_blocking = not kwargs.get("non_blocking", False)
    return {source.type, target.type} == {"cpu", "cuda"} and is_blocking


def _is_elsewhere(index: Any, device: torch.device) -> bool:
    return isinstance(index, torch.Tensor) and index.device != device


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)
