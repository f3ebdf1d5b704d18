"""From objectness and deltas to the boxes that go into non-maximum suppression.

Shapes: N images, A anchors of one image over all levels, L levels, K proposals of one level.
Boxes are (x1, y1, x2, y2) in input pixels. Source: FPN (arXiv:1612.03144), section 4.1; order of steps is torchvision's.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cuda_ops.reference.boxes import decode_boxes


@torch.no_grad()
def select_proposals(
    objectness: Tensor,
    box_deltas: Tensor,
    anchors: Tensor,
    image_sizes: Tensor,
    level_sizes: Sequence[int],
    pre_nms_top_n: int,
    min_size: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    """See `cuda_ops.select_proposals`."""
    num_images, num_levels = objectness.shape[0], len(level_sizes)
    top_n = min(pre_nms_top_n, max(level_sizes))
    all_boxes = anchors.new_zeros(num_images, num_levels, top_n, 4)
    all_scores = anchors.new_full((num_images, num_levels, top_n), -torch.inf)
    limits = image_sizes.flip(-1).to(anchors.dtype)[:, None]  # [N, 1, 2]: (width, height)
    first = 0
    for level, size in enumerate(level_sizes):
        logits, idx = objectness[:, first : first + size].topk(min(top_n, size), dim=1)  # [N, k]
        idx = idx + first
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
