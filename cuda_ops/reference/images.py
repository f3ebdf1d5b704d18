"""Images enlarged in whole numbers, so that every backend gives the same bits.

Shapes: h × w the image, H × W the larger one.
"""

import torch
from torch import Tensor

ONE = 2**15  # a weight of 1; one less is as much as the kernels' 16 bits hold, and rounds to all of it


@torch.no_grad()
def enlarge_bilinear(image: Tensor, size: tuple[int, int], is_mirrored: bool = False) -> Tensor:
    """See `cuda_ops.enlarge_bilinear`."""
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
