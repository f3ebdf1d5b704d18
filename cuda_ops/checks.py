"""Checks of arguments: what must be and what was given, in one sentence that names operator and argument."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

Conventions = Literal["detectron2", "torchvision"]
CONVENTIONS: tuple[str, ...] = get_args(Conventions)
KERNEL_DTYPES = (torch.float32, torch.float64)  # plain torch serves the others that an operator takes
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)  # torch computes little with others
MAX_PYRAMID_LEVELS = 8  # kMaxLevels of csrc/roi_align.h


def require_one_device(op: str, **arguments: Tensor | None) -> None:
    """Check that all tensors are on one device: kernels read the memory of each.

    Raises:
        ValueError: if they are not; the message names the devices.
    """
    devices = {name: str(tensor.device) for name, tensor in arguments.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        raise ValueError(f"{op}: {' and '.join(devices)} must be on one device, got {devices}")


def require_conventions(op: str, conventions: str) -> None:
    """Raise a ValueError unless these are known conventions."""
    require(conventions in CONVENTIONS, op, "conventions", " or ".join(CONVENTIONS), repr(conventions))


def require_boxes(boxes: Tensor, op: str, argument: str, dims: tuple[int, ...] = ()) -> None:
    """Check that boxes are […, boxes, 4] of a floating type.

    Args:
        op: name of the operator, for the message.
        argument: name of the argument, for the message.
        dims: allowed numbers of dimensions; empty: 2 or more.

    Raises:
        ValueError: if they are not.
    """
    is_shaped = boxes.dim() >= 2 and boxes.shape[-1] == 4 and (not dims or boxes.dim() in dims)
    expected = " or ".join(f"[{'…, ' * (dim - 2)}boxes, 4]" for dim in dims) or "[…, boxes, 4]"
    require(is_shaped and boxes.is_floating_point(), op, argument, f"{expected} float", kind(boxes))


def require_pyramid(features: Sequence[Tensor], op: str) -> None:
    """Raise a ValueError unless these are 1 to MAX_PYRAMID_LEVELS levels [N, C, H_l, W_l] of one N, C and dtype."""
    require(0 < len(features) <= MAX_PYRAMID_LEVELS, op, "features", f"1 to {MAX_PYRAMID_LEVELS} levels", len(features))
    layouts = [(level.dim(), *level.shape[:2], level.dtype) for level in features]
    is_uniform = layouts == layouts[:1] * len(layouts) and features[0].dim() == 4 and features[0].is_floating_point()
    require(
        is_uniform and all(min(level.shape[1:]) > 0 for level in features),
        op,
        "features",
        "[N, C, H_l, W_l] float with the same N, C and dtype, and C, H_l and W_l at least 1",
        [kind(level) for level in features],
    )


def require(condition: bool, op: str, argument: str, must: object, got: object) -> None:
    """Raise a ValueError that names operator and argument, unless a condition holds.

    Args:
        must: requirement, as the end of a sentence: "box_iou: boxes1 must be …".
        got: what was given instead.
    """
    if not condition:
        got = list(got) if isinstance(got, torch.Size) else got
        raise ValueError(f"{op}: {argument} must be {must}, got {got}")


def require_whole(op: str, **arguments: object) -> None:
    """Raise a ValueError if an argument, or an entry of one, is a float: kernels would cut it."""
    for name, value in arguments.items():
        entries = value if isinstance(value, Sequence) else [value]
        require(not any(isinstance(entry, float) for entry in entries), op, name, "whole", value)


def is_integer(tensor: Tensor) -> bool:
    """True for the integer types in INTEGERS; not for bool."""
    return tensor.dtype in INTEGERS


def kind(tensor: Tensor) -> str:
    """Shape and dtype of a tensor, for messages."""
    return f"{list(tensor.shape)} {tensor.dtype}"
