"""Suppression of overlapping candidates: all but the best are dropped (NMS) or lose score (soft-NMS).

Shapes: N images, Q candidates, D detections. Boxes are (x1, y1, x2, y2) in pixels. Classes are independent.
Sources: Faster R-CNN (arXiv:1506.01497); Soft-NMS (arXiv:1704.04503).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import cuda_ops

SOFT_NMS_MIN_SCORE = 1e-3  # candidates that decay below it are dropped, as in the authors' code


@dataclass(frozen=True)
class Candidates:
    """Scored boxes, one class each; a score of -inf marks padding."""

    boxes: Tensor  # [N, Q, 4] float32
    scores: Tensor  # [N, Q] float32
    labels: Tensor  # [N, Q] int64, 1 … classes


Kept = tuple[Tensor, Tensor, Tensor, Tensor]  # boxes [N, D, 4], scores [N, D], labels [N, D], their number [N]


def keep_best(candidates: Candidates, nms_iou: float, max_detections: int) -> Kept:
    """Non-maximum suppression within each class: at most max_detections per image, best first, padded with 0."""
    boxes, scores, labels = candidates.boxes, candidates.scores, candidates.labels
    most = min(max_detections, scores.shape[1])
    idxs, counts = cuda_ops.batched_nms(boxes, scores, nms_iou, most, groups=labels)
    return _gather(boxes, scores.gather(1, idxs), labels, idxs, counts)


@torch.no_grad()
def soften(candidates: Candidates, method: str, *, nms_iou: float, sigma: float, max_detections: int) -> Kept:
    """Soft-NMS within each class; the result is as for `keep_best`, with the decayed scores at selection.

    The best candidate is selected, the others of its class lose score by their overlap with it, and so on. Scores only
    decrease, so the first max_detections selected are the best of all, and D steps over [N, Q] suffice.

    Args:
        method: `linear` multiplies by 1 - IoU where the IoU exceeds nms_iou; `gaussian` by exp(-IoU² / sigma) always.
    """
    boxes, labels = candidates.boxes, candidates.labels
    scores = candidates.scores.clone()
    most = min(max_detections, scores.shape[1])
    idxs = torch.zeros(len(scores), most, dtype=torch.int64, device=scores.device)
    taken = torch.full((len(scores), most), -torch.inf, dtype=scores.dtype, device=scores.device)
    for rank in range(most):
        taken[:, rank : rank + 1], best = scores.max(1, keepdim=True)
        idxs[:, rank : rank + 1] = best
        iou = cuda_ops.box_iou(boxes.gather(1, best[..., None].expand(-1, -1, 4)), boxes).squeeze(1)  # [N, Q]
        decay = (-iou.square() / sigma).exp() if method == "gaussian" else torch.where(iou > nms_iou, 1 - iou, 1.0)
        scores = scores.clamp(min=0) * torch.where(labels == labels.gather(1, best), decay, 1.0)
        scores = scores.scatter(1, best, 0.0)
        scores = scores.masked_fill(scores < SOFT_NMS_MIN_SCORE, -torch.inf)
    counts = (taken > -torch.inf).sum(1)
    return _gather(boxes, taken, labels, idxs, counts)


def rows_needed(counts: Tensor, limit: int) -> int:
    """Number of rows needed for counts [N]: their maximum, for which the host waits for the device.

    Results go to the host anyway, and tight shapes cost less than those of the worst case. An exported program has
    fixed shapes and takes the worst case, `limit`.
    """
    return limit if torch.compiler.is_exporting() else int(counts.max())


def _gather(boxes: Tensor, scores: Tensor, labels: Tensor, idxs: Tensor, counts: Tensor) -> Kept:
    """Gather the candidates at idxs [N, D] with scores [N, D], cut to the largest count of an image."""
    most = rows_needed(counts, idxs.shape[1])
    idxs, scores = idxs[:, :most], scores[:, :most]
    is_kept = torch.arange(most, device=idxs.device) < counts[:, None]
    boxes = boxes.gather(1, idxs[..., None].expand(-1, -1, 4)) * is_kept[..., None]
    scores = scores.masked_fill(~is_kept, 0.0)
    return boxes, scores, labels.gather(1, idxs) * is_kept, counts
