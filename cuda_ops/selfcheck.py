"""Each compiled operator beside its reference on a small random case: what `python -m cuda_ops` runs on a user's machine.

Boxes are (x1, y1, x2, y2) in pixels of a 256 × 320 image.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cuda_ops import ops
from cuda_ops.library import backend

IMAGE_SIZE = (256, 320)
LEVEL_SHAPES = ((64, 80), (32, 40), (16, 20))
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Squares:
    """Polygons for `rasterize_polygons`: two images of two instances, a square each."""

    xy: Tensor
    part_offsets: Tensor
    instance_offsets: Tensor
    max_vertices: int = 4
    max_parts: int = 1


def _random(*shape: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.rand(*shape, generator=generator).to(device)


def _boxes(*shape: int, device: torch.device) -> Tensor:
    start = _random(*shape, 2, device=device) * 200
    return torch.cat((start, start + 1 + _random(*shape, 3, device=device)[..., 1:] * 90), -1)


def _squares(device: torch.device) -> Squares:
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]], device=device)
    xy = (corners[None] * 60 + _random(4, 1, 2, device=device) * 100).reshape(-1, 2)
    offsets = torch.arange(5, dtype=torch.int32, device=device)
    return Squares(xy, offsets * 4, offsets)


def _anchors(device: torch.device) -> Tensor:
    return ops.generate_anchors(LEVEL_SHAPES, IMAGE_SIZE, ((32,), (64,), (128,)), (0.5, 1.0, 2.0), device)


def _select_proposals(device: torch.device) -> tuple[Tensor, Tensor]:
    sizes = [3 * height * width for height, width in LEVEL_SHAPES]
    logits, deltas = _random(2, sum(sizes), device=device), _random(2, sum(sizes), 4, device=device) - 0.5
    image_sizes = torch.tensor([IMAGE_SIZE] * 2, device=device)
    return ops.select_proposals(logits, deltas, _anchors(device), image_sizes, sizes, 100)


def _roi_align(device: torch.device) -> Tensor:
    features = [_random(2, 8, height, width, device=device) for height, width in LEVEL_SHAPES]
    return ops.multilevel_roi_align(
        features, _boxes(2, 50, device=device), image_size=IMAGE_SIZE, output_size=7, sampling_ratio=2
    )


def _batched_nms(device: torch.device) -> tuple[Tensor, Tensor]:
    return ops.batched_nms(_boxes(2, 300, device=device), _random(2, 300, device=device), 0.5, 100)


def _match_boxes(device: torch.device) -> Tensor:
    num_gt = torch.tensor([5, 0], device=device)
    return ops.match_boxes(_anchors(device), _boxes(2, 5, device=device), num_gt, 0.7, 0.3, low_quality=True)


def _rasterize(device: torch.device) -> Tensor:
    rows = torch.arange(40, device=device).view(2, 20) % 2
    return ops.rasterize_polygons(_boxes(2, 20, device=device), rows, _squares(device), 28)


def _encode(device: torch.device) -> Any:
    return ops.encode_masks(_random(20, 28, 28, device=device), _boxes(20, device=device), IMAGE_SIZE)


def _enlarge(device: torch.device) -> Tensor:
    image = (_random(20, 30, 3, device=device) * 255).to(torch.uint8)
    return ops.enlarge_bilinear(image, (47, 61), is_mirrored=True)


CHECKS: dict[str, Callable[[torch.device], Any]] = {
    "batched_nms": _batched_nms,
    "box_iou": lambda device: ops.box_iou(_boxes(50, device=device), _boxes(20, device=device)),
    "encode_masks": _encode,
    "enlarge_bilinear": _enlarge,
    "generate_anchors": _anchors,
    "match_boxes": _match_boxes,
    "multilevel_roi_align": _roi_align,
    "rasterize_polygons": _rasterize,
    "select_proposals": _select_proposals,
}


def differences(name: str, device: torch.device) -> str | None:
    """How the compiled operator's result differs from the reference's on this device; None where it does not."""
    results = []
    for implementation in ("compiled", "reference"):
        with backend(implementation):
            results.append(CHECKS[name](device))
    compiled, reference = results
    if not isinstance(compiled, Tensor | tuple):
        return None if compiled == reference else "differs from its reference"
    try:
        torch.testing.assert_close(compiled, reference, rtol=TOLERANCE, atol=TOLERANCE)
    except AssertionError as error:
        return str(error).splitlines()[0]
    return None
