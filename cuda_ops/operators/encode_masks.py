"""Compressed run-length codes of detected masks, from the box alone.

Shapes: D detections, M side of a mask in the frame of its box, S = M + 2 with a border of zeros. Boxes are (x1, y1, x2,
y2) in pixels of the original image. Source: Mask R-CNN (arXiv:1703.06870), section 3.1; where pixels take from is
Detectron2's or torchvision's paste_masks_in_image, by `conventions`; the text is that of COCO API's rleToString.
"""

from itertools import pairwise
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.nn import functional as F

from cuda_ops import examples
from cuda_ops.checks import (
    KERNEL_DTYPES,
    Conventions,
    kind,
    require,
    require_boxes,
    require_conventions,
    require_one_device,
    require_whole,
)
from cuda_ops.declaration import Kernel, Operator

__all__ = ["encode_masks"]

BITS = 5  # bits of a number in a character of a code
MAX_CHARACTERS = 12  # characters of a number: a run of up to 2 ** 59 pixels, and its sign
FIRST_CHARACTER = 48
FARTHEST_PX = 2**40  # no image reaches there
MAX_FRAME = 2**28  # pixels of a frame that is painted whole


class RunLengthCode(TypedDict):
    """COCO's compressed code of a mask, as pycocotools.mask.encode gives it."""

    size: list[int]  # height, width
    counts: bytes


def encode_masks(
    mask_probs: Tensor,
    boxes: Tensor,
    image_size: tuple[int, int],
    threshold: float = 0.5,
    conventions: Conventions = "detectron2",
) -> list[RunLengthCode]:
    """Run-length encode detected masks in the frame of their image. The host waits for the device here.

    Args:
        mask_probs: [D, M, M] float, 0 to 1, each in the frame of its box.
        boxes: [D, 4] float, pixels of the original image; may reach out of it. A box with a corner that is not finite,
            or with x1 > x2 or y1 > y2, has an empty mask.
        image_size: (height, width) of the original image.
        threshold: a pixel belongs to the mask if its probability is greater (torchvision), or at least this
            (detectron2).
        conventions: detectron2: a pixel has the probability at its centre, interpolated between the centres of the
            cells, 0 beyond them. torchvision: the mask is stretched over whole pixels, its box widened by two cells and
            one pixel: larger than the object, the more so the smaller it is.

    Returns:
        D dictionaries {"size": [height, width], "counts": bytes}: COCO's compressed column-major RLE.

    Raises:
        ValueError: if a shape or dtype is not as above, image_size is not positive, or the conventions are unknown.

    Source: what pycocotools.mask.encode gives for Detectron2's paste_masks_in_image, or, bit for bit, for torchvision's
        paste_masks_in_image(padding=1) > threshold; nothing is painted.
    """
    op = "encode_masks"
    require_conventions(op, conventions)
    require_boxes(boxes, op, "boxes", dims=(2,))
    is_square = mask_probs.dim() == 3 and mask_probs.shape[1] == mask_probs.shape[2] > 0
    require(is_square and mask_probs.is_floating_point(), op, "mask_probs", "[D, M, M] float", kind(mask_probs))
    require(len(mask_probs) == len(boxes), op, "boxes", f"{len(mask_probs)} as mask_probs", len(boxes))
    require(min(image_size) > 0, op, "image_size", "positive", image_size)
    require_whole(op, image_size=image_size)
    require_one_device(op, mask_probs=mask_probs, boxes=boxes)
    return OPERATOR.on(mask_probs.device)(mask_probs, boxes, image_size, threshold, conventions)


@torch.no_grad()
def _reference(
    mask_probs: Tensor, boxes: Tensor, image_size: tuple[int, int], threshold: float, conventions: Conventions
) -> list[RunLengthCode]:
    paste = _paste_exactly if conventions == "detectron2" else _paste_on_whole_pixels
    padded = F.pad(mask_probs, (1, 1, 1, 1))  # interpolation then fades out at the border of the box
    has_pixels = (boxes.isfinite().all(1) & (boxes[:, :2] <= boxes[:, 2:]).all(1)).tolist()
    nothing = torch.zeros(0, 0, dtype=torch.bool)
    return [
        _encode(*(paste(mask, box, image_size, threshold) if is_real else (nothing, 0, 0)), image_size)
        for mask, box, is_real in zip(padded, boxes, has_pixels, strict=True)
    ]


def _paste_exactly(
    padded: Tensor, box: Tensor, image_size: tuple[int, int], threshold: float
) -> tuple[Tensor, int, int]:
    """Mask [S, S] sampled at the centres of pixels: pixels that it may set, [h, w] bool; first row and column."""
    dtype = torch.promote_types(torch.promote_types(padded.dtype, box.dtype), torch.float32)
    padded, box = padded.to(dtype), box.to(dtype)
    rows, top = _exact_positions(box[1], box[3], len(padded), image_size[0])
    columns, left = _exact_positions(box[0], box[2], len(padded), image_size[1])
    return _sample(padded, rows, columns) >= threshold, top, left


def _exact_positions(low: Tensor, high: Tensor, cells: int, extent: int) -> tuple[Tensor, int]:
    """Positions among the cells of the centres of the pixels that take from them, and the first of these pixels."""
    if low >= high:
        return low.new_zeros(0), 0
    scale = low.new_tensor(cells - 2) / (high - low)
    positions = (torch.arange(extent, device=low.device, dtype=low.dtype) + 0.5 - low) * scale + 0.5
    is_within = (positions >= 0) & (positions < cells - 1)
    return positions[is_within], int(is_within.long().argmax())


def _sample(cells: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Values [h, w] between cells [S, S], at positions rows [h] and columns [w]."""
    row, column = rows.long(), columns.long()
    next_row, next_column = row.add(1).clamp(max=len(cells) - 1), column.add(1).clamp(max=len(cells) - 1)
    row_weights, column_weights = (rows - row)[:, None], columns - column
    mixed = cells[:, column] * (1 - column_weights) + cells[:, next_column] * column_weights
    return mixed[row] * (1 - row_weights) + mixed[next_row] * row_weights


def _paste_on_whole_pixels(
    padded: Tensor, box: Tensor, image_size: tuple[int, int], threshold: float
) -> tuple[Tensor, int, int]:
    """Mask [S, S] stretched over a frame of whole pixels: as `_paste_exactly`."""
    height, width = image_size
    x1, y1, x2, y2 = _frame(box, len(padded))
    size = (max(y2 - y1 + 1, 1), max(x2 - x1 + 1, 1))
    top, left = max(y1, 0), max(x1, 0)
    bottom, right = max(min(y1 + size[0], height), top), max(min(x1 + size[1], width), left)
    if size[0] * size[1] <= MAX_FRAME:
        resized = F.interpolate(padded[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
        resized = resized[top - y1 : bottom - y1, left - x1 : right - x1]
    else:
        rows, columns = (
            ((torch.arange(begin, end, device=box.device) - origin + 0.5) * (len(padded) / side) - 0.5).clamp(min=0)
            for begin, end, origin, side in ((top, bottom, y1, size[0]), (left, right, x1, size[1]))
        )
        resized = _sample(padded, rows, columns)
    return resized > threshold, top, left


def _frame(box: Tensor, cells: int) -> list[int]:
    """First and last pixels of a box with its border, cut to whole pixels; at most FARTHEST_PX from the image."""
    half_size = (box[2:] - box[:2]) * 0.5 * (cells / (cells - 2))
    centre = (box[2:] + box[:2]) * 0.5
    corners = torch.cat((centre - half_size, centre + half_size)).nan_to_num(nan=-FARTHEST_PX)
    return corners.clamp(-FARTHEST_PX, FARTHEST_PX).long().tolist()


def _encode(crop: Tensor, top: int, left: int, image_size: tuple[int, int]) -> RunLengthCode:
    """Pixels crop [h, w] bool at (top, left) of an image."""
    counts = _run_lengths(crop, top, left, image_size)
    return {"size": list(image_size), "counts": _compress(counts)}


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
    """Counts [runs] int64 as COCO's text: five bits a character, lowest first, and a sixth: more follow."""
    numbers = counts.clone()
    numbers[3:] -= counts[1:-2]  # two before, a run of the same kind, is of about that length
    rests = numbers[:, None] >> torch.arange(MAX_CHARACTERS + 1) * BITS  # [runs, characters + 1]
    bits = rests[:, :-1] & 31
    has_more = rests[:, 1:] != torch.where(bits >= 16, -1, 0)  # a number ends with a bit that is its sign
    is_written = F.pad(has_more[:, :-1].long().cumprod(1), (1, 0), value=1).bool()
    characters = (FIRST_CHARACTER + bits + (has_more << BITS))[is_written]
    return characters.to(torch.uint8).numpy().tobytes()


def _compiled(
    mask_probs: Tensor, boxes: Tensor, image_size: tuple[int, int], threshold: float, conventions: Conventions
) -> list[RunLengthCode]:
    if mask_probs.dtype != boxes.dtype or mask_probs.dtype not in KERNEL_DTYPES:  # rounds as these dtypes do
        return _reference(mask_probs, boxes, image_size, threshold, conventions)
    text, offsets = torch.ops.cuda_ops.encode_masks(
        mask_probs, boxes, *image_size, threshold, conventions == "detectron2"
    )
    data, bounds = text.numpy().tobytes(), offsets.tolist()
    return [{"size": list(image_size), "counts": data[begin:end]} for begin, end in pairwise(bounds)]


def _fake(
    mask_probs: Tensor, boxes: Tensor, height: int, width: int, threshold: float, is_exact: bool
) -> tuple[Tensor, Tensor]:
    num_bytes = torch.library.get_ctx().new_dynamic_size()
    return torch.empty(num_bytes, dtype=torch.uint8), torch.empty(mask_probs.shape[0] + 1, dtype=torch.int64)


def _example(device: torch.device) -> dict[str, Any]:
    return {
        "mask_probs": examples.uniform(20, 28, 28, device=device),
        "boxes": examples.boxes(20, device=device),
        "image_size": examples.IMAGE_SIZE,
    }


OPERATOR = Operator(
    function=encode_masks,
    reference=_reference,
    compiled=_compiled,
    kernels=(
        Kernel(
            "encode_masks(Tensor mask_probs, Tensor boxes, int height, int width, float threshold, bool is_exact)"
            " -> (Tensor, Tensor)",
            fake=_fake,
        ),
    ),
    example=_example,
    waits=True,
)
