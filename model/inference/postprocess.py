"""Conversion of detections to COCO results: the only place where boxes return from input pixels to original pixels.

Boxes are (x1, y1, x2, y2) until they are written as COCO's (x, y, width, height).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import cuda_ops
from model.config import Conventions
from model.structures import Batch, Detections

Result = dict[str, Any]


def original_boxes(batch: Batch, detections: Detections) -> Tensor:
    """Boxes [N, D, 4] in the pixels of the original images."""
    ratios = batch.original_sizes.float() / batch.image_sizes.float()  # [N, 2]: height, width
    return detections.boxes * ratios.flip(1).repeat(1, 2)[:, None].to(detections.boxes.device)


def to_coco_results(
    batch: Batch, detections: Detections, category_ids: Sequence[int], conventions: Conventions
) -> tuple[list[Result], list[Result]]:
    """Convert detections to COCO's two lists of results, boxes and masks.

    Args:
        category_ids: COCO's id of label k at index k - 1.
        conventions: model.conventions, which defines mask pasting.

    Returns:
        Boxes: image_id, category_id, bbox (x, y, width, height), score. Masks: image_id, category_id, score and
        segmentation, a compressed run-length encoding of the whole image with text counts, as JSON needs; empty if the
        network has no masks.
    """
    all_boxes = original_boxes(batch, detections).cpu()
    scores, labels = detections.scores.cpu(), detections.labels.cpu()
    counts = detections.num_detections.tolist()
    bbox_results: list[Result] = []
    segm_results: list[Result] = []
    for n, (image_id, (height, width)) in enumerate(
        zip(batch.image_ids.tolist(), batch.original_sizes.tolist(), strict=True)
    ):
        count = counts[n]
        boxes = all_boxes[n, :count]
        masks = None
        if detections.mask_probs is not None:
            masks = encode(detections.mask_probs[n, :count], boxes, (height, width), conventions)
        boxes_xywh = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()
        for i, (score, label) in enumerate(zip(scores[n, :count].tolist(), labels[n, :count].tolist(), strict=True)):
            common = {"image_id": image_id, "category_id": category_ids[label - 1], "score": score}
            bbox_results.append(common | {"bbox": boxes_xywh[i]})
            if masks is not None:
                segm_results.append(common | {"segmentation": masks[i]})
    return bbox_results, segm_results


def encode(mask_probs: Tensor, boxes: Tensor, size: tuple[int, int], conventions: Conventions) -> list[Result]:
    """Encode masks [D, M, M] in boxes [D, 4] of an image of `size` (height, width) as COCO RLE with text counts."""
    codes = cuda_ops.encode_masks(mask_probs, boxes.to(mask_probs.device), size, conventions=conventions)
    return [{"size": list(size), "counts": code["counts"].decode("ascii")} for code in codes]
