"""Test-time augmentation: images are predicted at several scales and mirrored, and the results are merged.

A view is a batch of the same images at another scale or mirrored; detections are in the frame of the first view.
Boxes of all views compete in one suppression; the mask of a detection is the mean over the views.
Shapes: N images, H × W a view's bucket, Q candidates of a view, D detections, M the mask's side.
Boxes are (x1, y1, x2, y2) in pixels.
Source: Mask R-CNN (arXiv:1703.06870), appendix A; the box and mask heuristics of Detectron's test-time augmentation.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.config import EvaluateConfig, ModelConfig
from model.engine.precision import autocast, set_float32_products, without_kernel_search
from model.errors import UserError
from model.network.mask_rcnn import MaskRCNN
from model.network.roi_heads import RoIHeads
from model.network.suppression import Candidates, Kept, keep_best, soften
from model.structures import Batch, Detections


@dataclass(frozen=True)
class View:
    """One scaled or mirrored version of a batch."""

    batch: Batch
    is_mirrored: bool


def is_plain(evaluate: EvaluateConfig) -> bool:
    """True if no test-time augmentation is configured."""
    return evaluate.scales == (1.0,) and not evaluate.flip and evaluate.soft_nms == "off"


def predict_views(
    model: MaskRCNN, scales: Iterable[Sequence[Batch]], evaluate: EvaluateConfig, device: torch.device, dtype: str
) -> Iterator[tuple[Batch, Detections]]:
    """Yield the first scale's batch, unchanged, with the detections of all views; see `model.inference.predict`."""
    set_float32_products(device, dtype)
    was_training = model.training
    model.eval()
    try:
        for batches in scales:
            with torch.inference_mode(), without_kernel_search(), autocast(device, dtype):
                detections = detect_views(model, [batch.to(device, non_blocking=True) for batch in batches], evaluate)
            yield batches[0], detections
    finally:
        model.train(was_training)


def detect_views(model: MaskRCNN, scales: Sequence[Batch], evaluate: EvaluateConfig) -> Detections:
    """Detect on all views with a model in evaluation mode; detections are in the frame of the first scale.

    The features of all views are kept until the masks are computed, so memory grows with the number of views; lower
    evaluate.batch_size to compensate.

    Raises:
        UserError: if the network only makes proposals.
    """
    heads, frame = model.roi_heads, scales[0]
    if heads is None:
        raise UserError(
            "evaluate: scales, flip and soft_nms need a network with RoI heads, got model.task=proposals; leave them "
            "at their defaults"
        )
    views = [View(batch, False) for batch in scales]
    if evaluate.flip:
        views += [View(mirrored(batch), True) for batch in scales]
    pyramids, found = [], []
    for view in views:
        features = model.backbone(model.normalize(view.batch))
        proposals, _ = model.rpn(features, view.batch)
        pyramids.append(features[:4])
        candidates = heads.candidates(pyramids[-1], proposals, view.batch)
        found.append(replace(candidates, boxes=to_frame(candidates.boxes, view, frame)))
    boxes, scores, labels, num_detections = _suppress(_united(found), heads.config, evaluate)
    mask_probs = None
    if heads.has_masks:
        probs = [
            _mask_probs(heads, pyramid, view, to_view(boxes, view, frame), labels)
            for pyramid, view in zip(pyramids, views, strict=True)
        ]
        mask_probs = torch.stack(probs).mean(0)
    return Detections(boxes, scores, labels, num_detections, mask_probs)


def mirrored(batch: Batch) -> Batch:
    """Mirror each image left to right; padding stays on the right."""
    column = torch.arange(batch.images.shape[3], device=batch.images.device)
    width = batch.image_sizes[:, 1:]  # [N, 1]
    source = torch.where(column < width, width - 1 - column, column)  # [N, W]
    images = batch.images.gather(3, source[:, None, None].expand(batch.images.shape))
    return replace(batch, images=images.contiguous(memory_format=torch.channels_last))


def to_frame(boxes: Tensor, view: View, frame: Batch) -> Tensor:
    """Convert boxes [N, R, 4] from a view to the frame."""
    return _mirror(boxes, view) * _ratios(view.batch, frame)


def to_view(boxes: Tensor, view: View, frame: Batch) -> Tensor:
    """Convert boxes [N, R, 4] from the frame to a view."""
    return _mirror(boxes * _ratios(frame, view.batch), view)


def _ratios(old: Batch, new: Batch) -> Tensor:
    """Ratios of widths and heights in turn: [N, 1, 4]."""
    return (new.image_sizes.float() / old.image_sizes.float()).flip(1).repeat(1, 2)[:, None]


def _mirror(boxes: Tensor, view: View) -> Tensor:
    if not view.is_mirrored:
        return boxes
    width = view.batch.image_sizes[:, 1:]  # [N, 1]
    x1, y1, x2, y2 = boxes.unbind(2)
    return torch.stack([width - x2, y1, width - x1, y2], 2)


def _united(found: Sequence[Candidates]) -> Candidates:
    boxes, scores, labels = (torch.cat([getattr(c, name) for c in found], 1) for name in ("boxes", "scores", "labels"))
    return Candidates(boxes, scores, labels)


def _suppress(candidates: Candidates, config: ModelConfig, evaluate: EvaluateConfig) -> Kept:
    if evaluate.soft_nms == "off":
        return keep_best(candidates, config.nms_iou, config.detections_per_image)
    return soften(
        candidates,
        evaluate.soft_nms,
        nms_iou=config.nms_iou,
        sigma=evaluate.soft_nms_sigma,
        max_detections=config.detections_per_image,
    )


def _mask_probs(heads: RoIHeads, pyramid: list[Tensor], view: View, boxes: Tensor, labels: Tensor) -> Tensor:
    """Mask probabilities [N, D, M, M] of boxes [N, D, 4] in the view, mirrored back."""
    pooled = heads.pool(pyramid, boxes, view.batch, heads.config.mask_pool_size)
    probs = heads.mask_logits(pooled, labels).sigmoid()
    return probs.flip(3) if view.is_mirrored else probs
