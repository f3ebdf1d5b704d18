"""Images enlarged in whole numbers, so that every backend gives the same bits.

Shapes: h × w the image, H × W the larger one.
"""

from typing import Any

import torch
from torch import Tensor

from cuda_ops import examples
from cuda_ops.checks import kind, require, require_whole
from cuda_ops.declaration import Kernel, Operator

__all__ = ["enlarge_bilinear"]

ONE = 2**15  # a weight of 1; one less is as much as the kernels' 16 bits hold, and rounds to all of it


def enlarge_bilinear(image: Tensor, size: tuple[int, int], is_mirrored: bool = False) -> Tensor:
    """Enlarge an image, each pixel a mixture of the four around its centre.

    Args:
        image: [h, w, 3] uint8, at least 2 × 2.
        size: (height, width), neither smaller than the image's.
        is_mirrored: left becomes right, at no cost.

    Returns:
        [height, width, 3] uint8; within 2 of Pillow's BILINEAR, and mostly equal. The same bits from every backend.

    Raises:
        ValueError: if a shape, dtype or size is not as above.
    """
    op = "enlarge_bilinear"
    is_image = image.dim() == 3 and image.shape[2] == 3 and min(image.shape) >= 2 and image.dtype == torch.uint8
    require(is_image, op, "image", "[h, w, 3] uint8, at least 2 × 2", kind(image))
    is_larger = size[0] >= image.shape[0] and size[1] >= image.shape[1]
    require(is_larger, op, "size", f"at least {list(image.shape[:2])}", size)
    require_whole(op, size=size)
    return OPERATOR.on(image.device)(image, size, is_mirrored)


@torch.no_grad()
def _reference(image: Tensor, size: tuple[int, int], is_mirrored: bool = False) -> Tensor:
    wide = _mix_neighbours(image, size[1], dim=1)
    return _mix_neighbours(wide.flip(1) if is_mirrored else wide, size[0], dim=0)


def _mix_neighbours(image: Tensor, outputs: int, dim: int) -> Tensor:
    """Each output is what lies at its centre on the line between two inputs, rounded."""
    size = image.shape[dim]
    centre = (torch.arange(outputs, dtype=torch.float64, device=image.device) + 0.5) * (size / outputs) - 0.5
    centre = centre.clamp(0.0, size - 1.0)
    first = centre.floor().long().clamp(max=size - 2)
    weight = ((1.0 - (centre - first)) * ONE + 0.5).floor().clamp(max=ONE - 1).int()
    one, two = (image.index_select(dim, idx).int() for idx in (first, first + 1))
    weight = weight.view(-1, *[1] * (image.dim() - 1 - dim))
    return (two + (((one - two) * weight + ONE // 2) >> 15)).to(torch.uint8)


def _compiled(image: Tensor, size: tuple[int, int], is_mirrored: bool = False) -> Tensor:
    if image.device.type != "cpu":  # images are loaded by the host, so there is no kernel for other devices
        return _reference(image, size, is_mirrored)
    return torch.ops.cuda_ops.enlarge_bilinear(image, *size, is_mirrored)


def _fake(image: Tensor, height: int, width: int, is_mirrored: bool) -> Tensor:
    return image.new_empty(height, width, 3)


def _example(device: torch.device) -> dict[str, Any]:
    image = (examples.uniform(20, 30, 3, device=device) * 255).to(torch.uint8)
    return {"image": image, "size": (47, 61), "is_mirrored": True}


OPERATOR = Operator(
    function=enlarge_bilinear,
    reference=_reference,
    compiled=_compiled,
    kernels=(Kernel("enlarge_bilinear(Tensor image, int height, int width, bool is_mirrored) -> Tensor", fake=_fake),),
    example=_example,
    has_cuda_kernel=False,
)
