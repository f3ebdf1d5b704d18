"""Compressed run-length codes of detected masks, from the box alone.

Shapes: D detections, M side of a mask in the frame of its box. Boxes are (x1, y1, x2, y2) in pixels of the original image.
Source: Mask R-CNN (arXiv:1703.06870), section 3.1; resizing and rounding are torchvision's paste_masks_in_image; the text is
that of COCO API's rleToString.
"""

from typing import TypedDict

import torch
from torch import Tensor
from torch.nn import functional as F

BITS = 5  # of a number in a character of a code
MAX_CHARACTERS = 7  # of a number: a run of 2 ** 32 pixels, and its sign
FIRST_CHARACTER = 48


class RunLengthCode(TypedDict):
    """COCO's compressed code of a mask, as pycocotools.mask.encode gives it."""

    size: list[int]  # height, width
    counts: bytes


@torch.no_grad()
def encode_masks(
    mask_probs: Tensor, boxes: Tensor, image_size: tuple[int, int], threshold: float
) -> list[RunLengthCode]:
    """See `cuda_ops.encode_masks`."""
    side = mask_probs.shape[-1]
    padded = F.pad(mask_probs, (1, 1, 1, 1))[:, None]  # bilinear resizing then fades out at the border of the box
    frames = _expand_boxes(boxes, (side + 2) / side).tolist()
    return [_encode(mask, frame, image_size, threshold) for mask, frame in zip(padded, frames, strict=True)]


def _expand_boxes(boxes: Tensor, scale: float) -> Tensor:
    """Boxes scaled about their centres and cut to whole pixels: [D, 4] int64."""
    half_size = (boxes[:, 2:] - boxes[:, :2]) * 0.5 * scale
    centre = (boxes[:, 2:] + boxes[:, :2]) * 0.5
    return torch.cat((centre - half_size, centre + half_size), dim=1).long()


def _encode(mask: Tensor, frame: list[int], image_size: tuple[int, int], threshold: float) -> RunLengthCode:
    """Mask [1, M + 2, M + 2] laid over the pixels of frame, both ends included."""
    height, width = image_size
    x1, y1, x2, y2 = frame
    size = (max(y2 - y1 + 1, 1), max(x2 - x1 + 1, 1))
    resized = F.interpolate(mask[None], size=size, mode="bilinear", align_corners=False)[0, 0]
    top, left = max(y1, 0), max(x1, 0)
    crop = resized[top - y1 : max(height - y1, 0), left - x1 : max(width - x1, 0)] > threshold
    return {"size": [height, width], "counts": _compress(_run_lengths(crop, top, left, image_size))}


def _run_lengths(crop: Tensor, top: int, left: int, image_size: tuple[int, int]) -> Tensor:
    """Lengths of runs of 0, 1, 0, … down the columns of the image in which crop [h, w] bool lies at (top, left)."""
    height, width = image_size
    columns = F.pad(crop.t().to(torch.int8), (1, 1))  # [w, h + 2]
    column, row = torch.where(columns[:, 1:] != columns[:, :-1])  # start, end, start, end, … of the runs of 1
    changes = (column + left) * height + (row + top)
    # A run that ends at the bottom goes on at the top of the next column: the two changes are at one position.
    ends, starts = changes[1:-1:2], changes[2::2]
    is_real = torch.ones_like(changes, dtype=torch.bool)
    is_real[1:-1] = (ends != starts).repeat_interleave(2)
    edges = F.pad(changes[is_real], (1, 1))
    edges[-1] = height * width
    counts = edges.diff().cpu()
    return counts if counts[-1] else counts[:-1]  # a mask that ends with the last pixel has no run after it


def _compress(counts: Tensor) -> bytes:
    """Counts [runs] int64 as COCO's text: five bits a character, lowest first, and a sixth that says whether more follow."""
    numbers = counts.clone()
    numbers[3:] -= counts[1:-2]  # two before, a run of the same kind, is of about that length
    rests = numbers[:, None] >> torch.arange(MAX_CHARACTERS + 1) * BITS  # [runs, characters + 1]
    bits = rests[:, :-1] & 31
    has_more = rests[:, 1:] != torch.where(bits >= 16, -1, 0)  # a number ends with a bit that is its sign
    is_written = F.pad(has_more[:, :-1].long().cumprod(1), (1, 0), value=1).bool()
    characters = (FIRST_CHARACTER + bits + (has_more << BITS))[is_written]
    return characters.to(torch.uint8).numpy().tobytes()
