"""Each operator at its real size, beside its reference and beside what a user would otherwise call; see __main__.py.

A file an operator, with a function `cases`. Sizes are those of a batch of 800 × 1344 images: 268,569 anchors, 512 RoIs
an image, 100 detections. Boxes are (x1, y1, x2, y2) in pixels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor

import cuda_ops

IMAGE_SIZE = (800, 1344)
LEVEL_SHAPES = ((200, 336), (100, 168), (50, 84), (25, 42), (13, 21))
ANCHOR_SIZES = (32.0, 64.0, 128.0, 256.0, 512.0)
RATIOS = (0.5, 1.0, 2.0)

Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One operator at one size: a row of the table."""

    name: str
    ours: Call
    rival_name: str
    rival: Call


def cases_of(operator: str, device: torch.device) -> list[Case]:
    """The rows of one operator; making them allocates what it works on."""
    return import_module(f"{__name__}.{operator}").cases(device)


def random_boxes(*shape: int, device: torch.device) -> Tensor:
    """Boxes of 8 to 400 px, log-uniform, anywhere in the image."""
    generator = torch.Generator().manual_seed(math.prod(shape))
    height, width = IMAGE_SIZE
    side = 8 * torch.exp(torch.rand(*shape, 2, generator=generator) * math.log(50))
    start = torch.rand(*shape, 2, generator=generator) * (torch.tensor([width, height]) - side).clamp(min=0)
    return torch.cat((start, start + side), -1).to(device)


def anchors(device: torch.device) -> Tensor:
    """The anchors that torchvision's generator makes."""
    sizes = [(size,) for size in ANCHOR_SIZES]
    return cuda_ops.generate_anchors(LEVEL_SHAPES, IMAGE_SIZE, sizes, RATIOS, device, conventions="torchvision")
