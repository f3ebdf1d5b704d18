"""The compiled library: whether it is there, and what it can do.

It is one file, `_C.*.so`, built by setup.py against the stable ABI of libtorch, so it serves every torch from 2.11 on and every
Python. Where it was not built, the references serve.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch

Backend = Literal["compiled", "reference"]
BACKENDS: tuple[Backend, ...] = ("compiled", "reference")
VARIABLE = "CUDA_OPS_BACKEND"
ROI_ALIGN_BACKWARDS = ("scatter", "gather")
ROI_ALIGN_VARIABLE = "CUDA_OPS_ROI_ALIGN_BACKWARD"
OPERATORS = (
    "batched_nms", "box_iou", "encode_masks", "enlarge_bilinear", "generate_anchors", "match_boxes", "multilevel_roi_align",
    "rasterize_polygons", "select_proposals",
)  # fmt: skip
BUILD = "`pip install --no-build-isolation -e .`"


class LibraryError(ImportError):
    """The compiled operators are asked for, but cannot be had."""


def _load() -> Path | None:
    """Load the library if it was built, from sources of these operators: its path, or None."""
    found = sorted(Path(__file__).parent.glob("_C*.so"))
    if not found:
        return None
    try:
        torch.ops.load_library(found[0])
    except OSError as error:
        warnings.warn(f"cuda_ops: {found[0].name} does not load, so plain torch serves: {error}", stacklevel=2)
        return None
    missing = [name for name in OPERATORS if not hasattr(torch.ops.cuda_ops, name)]
    if missing:
        warnings.warn(
            f"cuda_ops: {found[0].name} was built from older sources, without {', '.join(missing)}, so plain torch serves; run {BUILD}",
            stacklevel=2,
        )
        return None
    return found[0]


PATH = _load()
HAS_CPU = PATH is not None
HAS_CUDA = HAS_CPU and torch._C._dispatch_has_kernel_for_dispatch_key("cuda_ops::box_iou", "CUDA")
_chosen: Backend | None = None
_has_warned = False


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Within it the operators are computed by this implementation.

    Raises:
        ValueError: if there is none of that name.
        LibraryError: if it is the compiled one, and that was not built.
    """
    global _chosen
    _check(name)
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


def serves(device: torch.device) -> bool:
    """Whether the compiled operators compute what is asked for on this device; says so once where they cannot."""
    global _has_warned
    name = _chosen or os.environ.get(VARIABLE)
    if name is not None:
        _check(name)
        return name == "compiled"
    if HAS_CUDA if device.type == "cuda" else HAS_CPU and device.type == "cpu":
        return True
    if not _has_warned:
        _has_warned = True
        warnings.warn(
            f"cuda_ops: no compiled operators for {device.type}, so plain torch serves, slower; `python -m cuda_ops` tells more",
            stacklevel=3,
        )
    return False


def gathers_roi_gradients() -> bool:
    """Whether a GPU gathers RoIAlign's gradient cell by cell, the same bits every time, rather than scatter it by atomic additions.

    The environment's CUDA_OPS_ROI_ALIGN_BACKWARD says scatter (the default) or gather; where torch must be deterministic it gathers.

    Raises:
        ValueError: if the variable says something else.
    """
    way = os.environ.get(ROI_ALIGN_VARIABLE) or "scatter"
    if way not in ROI_ALIGN_BACKWARDS:
        raise ValueError(f"cuda_ops: {ROI_ALIGN_VARIABLE} must be {' or '.join(ROI_ALIGN_BACKWARDS)}, got {way}")
    return way == "gather" or torch.are_deterministic_algorithms_enabled()


def _check(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"cuda_ops: backend must be {' or '.join(BACKENDS)}, got {name}")
    if name == "compiled" and not HAS_CPU:
        raise LibraryError(f"cuda_ops: the compiled operators were not built; install a C++ compiler and run {BUILD}")
