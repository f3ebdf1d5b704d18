"""Random inputs for the operators' examples: small cases that `python -m cuda_ops` and the tests run on every backend.

Boxes are (x1, y1, x2, y2) in pixels of a 256 × 320 image.
"""

import torch
from torch import Tensor

IMAGE_SIZE = (256, 320)
LEVEL_SHAPES = ((64, 80), (32, 40), (16, 20))


def uniform(*shape: int, device: torch.device) -> Tensor:
    """Numbers from 0 to 1, the same for each shape on every device."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.rand(*shape, generator=generator).to(device)


def boxes(*shape: int, device: torch.device) -> Tensor:
    """Boxes [*shape, 4] of 1 to 91 px, within the image but for the largest."""
    start = uniform(*shape, 2, device=device) * 200
    return torch.cat((start, start + 1 + uniform(*shape, 3, device=device)[..., 1:] * 90), -1)
