"""From objectness and deltas to the boxes that go into non-maximum suppression.

Shapes: N images, A anchors of one image over all levels, L levels, K proposals of one level.
Boxes are (x1, y1, x2, y2) in input pixels. Source: FPN (arXiv:1612.03144), section 4.1; order of steps is
torchvision's.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cuda_ops import examples
from cuda_ops.boxes import decode_boxes
from cuda_ops.checks import KERNEL_DTYPES, require, require_boxes, require_one_device, require_whole
from cuda_ops.declaration import Kernel, Operator
from cuda_ops.operators import generate_anchors

__all__ = ["select_proposals"]

MAX_LEVELS = 32  # kMaxLevels of csrc/cuda/select_proposals.cu


def select_proposals(
    objectness: Tensor,
    box_deltas: Tensor,
    anchors: Tensor,
    image_sizes: Tensor,
    level_sizes: Sequence[int],
    pre_nms_top_n: int,
    min_size: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    """Take the boxes with the highest objectness of each level, decode and clip them, for non-maximum suppression.

    Args:
        objectness: [N, A] float logits, levels one after another.
        box_deltas: [N, A, 4] float.
        anchors: [A, 4] float; its dtype is that of the result.
        image_sizes: [N, 2] (height, width) inside the padding, in pixels.
        level_sizes: anchors of each level, 1 to 32 levels; they sum to A.
        pre_nms_top_n: boxes to take of a level, at most.
        min_size: shortest side of a box in pixels; boxes with a shorter one are marked.

    Returns:
        boxes [N, L, K, 4] with K = min(pre_nms_top_n, largest level), and scores [N, L, K] (probabilities), by
        descending objectness, of equals the lowest anchor first; nan counts as the highest. -inf marks boxes shorter
        than min_size and, where a level has fewer than K anchors, padding. No gradient flows.

    Raises:
        ValueError: if a shape or dtype is not as above, or pre_nms_top_n < 1.

    Source: FPN (arXiv:1612.03144); the steps of torchvision's RegionProposalNetwork.filter_proposals before its NMS.
    """
    op = "select_proposals"
    require_boxes(box_deltas, op, "box_deltas", dims=(3,))
    require_boxes(anchors, op, "anchors", dims=(2,))
    num_images, num_anchors = box_deltas.shape[:2]
    require(
        objectness.shape == (num_images, num_anchors), op, "objectness", [num_images, num_anchors], objectness.shape
    )
    require(objectness.is_floating_point(), op, "objectness", "float", objectness.dtype)
    require(len(anchors) == num_anchors, op, "anchors", f"{num_anchors} as box_deltas", len(anchors))
    require(image_sizes.shape == (num_images, 2), op, "image_sizes", [num_images, 2], image_sizes.shape)
    require(len(level_sizes) <= MAX_LEVELS, op, "level_sizes", f"at most {MAX_LEVELS} levels", len(level_sizes))
    is_split = sum(level_sizes) == num_anchors > 0 and min(level_sizes) >= 0
    require(is_split, op, "level_sizes", f"a split of {num_anchors}", list(level_sizes))
    require(pre_nms_top_n > 0, op, "pre_nms_top_n", "positive", pre_nms_top_n)
    require_whole(op, level_sizes=level_sizes, pre_nms_top_n=pre_nms_top_n)
    require_one_device(op, objectness=objectness, box_deltas=box_deltas, anchors=anchors, image_sizes=image_sizes)
    return OPERATOR.on(box_deltas.device)(
        objectness, box_deltas, anchors, image_sizes, level_sizes, pre_nms_top_n, min_size
    )


@torch.no_grad()
def _reference(
    objectness: Tensor,
    box_deltas: Tensor,
    anchors: Tensor,
    image_sizes: Tensor,
    level_sizes: Sequence[int],
    pre_nms_top_n: int,
    min_size: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    num_images, num_levels = objectness.shape[0], len(level_sizes)
    top_n = min(pre_nms_top_n, max(level_sizes))
    all_boxes = anchors.new_zeros(num_images, num_levels, top_n, 4)
    all_scores = anchors.new_full((num_images, num_levels, top_n), -torch.inf)
    limits = image_sizes.flip(-1).to(anchors.dtype)[:, None]  # [N, 1, 2]: (width, height)
    first = 0
    for level, size in enumerate(level_sizes):
        # topk would take any of equals: a sort that is stable takes the first.
        logits, idx = objectness[:, first : first + size].sort(dim=1, descending=True, stable=True)
        logits, idx = logits[:, :top_n], idx[:, :top_n] + first  # [N, k]
        deltas = box_deltas.gather(1, idx[..., None].expand(-1, -1, 4)).to(anchors.dtype)
        boxes = _clip_boxes(decode_boxes(deltas, anchors[idx]), limits)
        scores = logits.to(anchors.dtype).sigmoid_()
        is_large = (boxes[..., 2:] - boxes[..., :2] >= min_size).all(-1)
        all_boxes[:, level, : idx.shape[1]] = boxes
        all_scores[:, level, : idx.shape[1]] = scores.masked_fill_(~is_large, -torch.inf)
        first += size
    return all_boxes, all_scores


def _clip_boxes(boxes: Tensor, limits: Tensor) -> Tensor:
    """Boxes [N, k, 4] cut to 0 … limits [N, 1, 2] (width, height)."""
    corners = boxes.unflatten(-1, (2, 2)).clamp_(min=0)  # a view: [N, k, corner, xy]
    torch.minimum(corners, limits[:, :, None], out=corners)
    return boxes


@torch.no_grad()
def _compiled(
    objectness: Tensor,
    box_deltas: Tensor,
    anchors: Tensor,
    image_sizes: Tensor,
    level_sizes: Sequence[int],
    pre_nms_top_n: int,
    min_size: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    if anchors.dtype not in KERNEL_DTYPES or objectness.dtype == torch.float64:
        return _reference(objectness, box_deltas, anchors, image_sizes, level_sizes, pre_nms_top_n, min_size)
    deltas, image_sizes = box_deltas.to(anchors.dtype), image_sizes.to(anchors.dtype)
    return torch.ops.cuda_ops.select_proposals(
        objectness.float(), deltas, anchors, image_sizes, list(level_sizes), pre_nms_top_n, min_size
    )


def _fake(
    objectness: Tensor,
    box_deltas: Tensor,
    anchors: Tensor,
    image_sizes: Tensor,
    level_sizes: Sequence[int],
    pre_nms_top_n: int,
    min_size: float,
) -> tuple[Tensor, Tensor]:
    shape = (objectness.shape[0], len(level_sizes), min(pre_nms_top_n, max(level_sizes)))
    return anchors.new_empty(*shape, 4), anchors.new_empty(shape)


def _example(device: torch.device) -> dict[str, Any]:
    sizes = [3 * height * width for height, width in examples.LEVEL_SHAPES]
    return {
        "objectness": examples.uniform(2, sum(sizes), device=device),
        "box_deltas": examples.uniform(2, sum(sizes), 4, device=device) - 0.5,
        "anchors": generate_anchors.OPERATOR.of_example(device),
        "image_sizes": torch.tensor([examples.IMAGE_SIZE] * 2, device=device),
        "level_sizes": sizes,
        "pre_nms_top_n": 100,
    }


OPERATOR = Operator(
    function=select_proposals,
    reference=_reference,
    compiled=_compiled,
    kernels=(
        Kernel(
            "select_proposals(Tensor objectness, Tensor box_deltas, Tensor anchors, Tensor image_sizes,"
            " int[] level_sizes, int pre_nms_top_n, float min_size) -> (Tensor boxes, Tensor scores)",
            fake=_fake,
        ),
    ),
    example=_example,
)
