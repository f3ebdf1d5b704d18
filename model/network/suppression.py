"""From candidates to detections: of boxes that overlap, the best stays; the others go (NMS) or lose score (soft-NMS).

Shapes: N images, Q candidates, D detections. Boxes are (x1, y1, x2, y2) in pixels. Candidates of different classes never meet.
Sources: Faster R-CNN (arXiv:1506.01497); Soft-NMS (arXiv:1704.04503).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import cuda_ops

SOFT_NMS_MIN_SCORE = 1e-3  # a decayed score below it ends the search, as in the authors' code


@dataclass(frozen=True)
class Candidates:
    """Scored boxes, one class each; -inf marks no candidate."""

    boxes: Tensor  # [N, Q, 4] float32
    scores: Tensor  # [N, Q] float32
    labels: Tensor  # [N, Q] int64, 1 … classes


Kept = tuple[Tensor, Tensor, Tensor, Tensor]  # boxes [N, D, 4], scores [N, D], labels [N, D], their number [N]


def keep_best(candidates: Candidates, nms_iou: float, max_detections: int) -> Kept:
    """Non-maximum suppression within each class: at most max_detections an image, best first, padded with 0."""
    boxes, scores, labels = candidates.boxes, candidates.scores, candidates.labels
    most = min(max_detections, scores.shape[1])
    idxs, counts = cuda_ops.batched_nms(boxes, scores, nms_iou, most, groups=labels)
    return _gather(boxes, scores.gather(1, idxs), labels, idxs, counts)


@torch.no_grad()
def soften(candidates: Candidates, method: str, *, nms_iou: float, sigma: float, max_detections: int) -> Kept:
    """Soft-NMS within each class: like `keep_best`, with the scores as they were when a candidate was taken.

    The best candidate is taken; the others of its class lose score by their overlap with it; and so on. Scores only fall, so
    the first max_detections taken are the best of all, and D steps over [N, Q] suffice.

    Args:
        method: `linear` multiplies by 1 - IoU where the IoU exceeds nms_iou; `gaussian` by exp(-IoU² / sigma) always.
    """
    boxes, labels = candidates.boxes, candidates.labels
    scores = candidates.scores.clone()
    most = min(max_detections, scores.shape[1])
    idxs = torch.zeros(len(scores), most, dtype=torch.int64, device=scores.device)
    taken = torch.full((len(scores), most), -torch.inf, dtype=scores.dtype, device=scores.device)
    for place in range(most):
        taken[:, place : place + 1], best = scores.max(1, keepdim=True)
        idxs[:, place : place + 1] = best
        iou = cuda_ops.box_iou(boxes.gather(1, best[..., None].expand(-1, -1, 4)), boxes).squeeze(1)  # [N, Q]
        decay = (-iou.square() / sigma).exp() if method == "gaussian" else torch.where(iou > nms_iou, 1 - iou, 1.0)
        scores = scores.clamp(min=0) * torch.where(labels == labels.gather(1, best), decay, 1.0)
        scores = scores.scatter(1, best, 0.0)
        scores = scores.masked_fill(scores < SOFT_NMS_MIN_SCORE, -torch.inf)
    counts = (taken > -torch.inf).sum(1)
    return _gather(boxes, taken, labels, idxs, counts)


def rows_needed(counts: Tensor, limit: int) -> int:
    """How many rows hold counts [N] of things: the most of them, for which the host asks the device.

    Results go to the host anyway, and shapes that fit cost less than those of the worst case. An exported program, whose shapes are
    fixed, takes the worst case: `limit`.
    """
    return limit if torch.compiler.is_exporting() else int(counts.max())


def _gather(boxes: Tensor, scores: Tensor, labels: Tensor, idxs: Tensor, counts: Tensor) -> Kept:
    """The candidates at idxs [N, D], whose scores are [N, D], cut to the most that an image has."""
    most = rows_needed(counts, idxs.shape[1])
    idxs, scores = idxs[:, :most], scores[:, :most]
    is_kept = torch.arange(most, device=idxs.device) < counts[:, None]
    boxes = boxes.gather(1, idxs[..., None].expand(-1, -1, 4)) * is_kept[..., None]
    scores = scores.masked_fill(~is_kept, 0.0)
    return boxes, scores, labels.gather(1, idxs) * is_kept, counts
