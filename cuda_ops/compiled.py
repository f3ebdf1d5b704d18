"""The compiled operators, with the signatures of `reference`. Arguments were checked in ops.py.

Each kernel lives in csrc/<operator>.cpp and .cu; what torch must know besides (shapes without data, gradients) stands in
registration.py.
"""

import math
from collections.abc import Sequence
from itertools import chain, pairwise

import torch
from torch import Tensor

import cuda_ops.registration  # noqa: F401  # tells torch of shapes and gradients
from cuda_ops import reference
from cuda_ops.reference.anchors import Conventions, anchor_strides
from cuda_ops.reference.masks import RunLengthCode
from cuda_ops.reference.polygons import PackedPolygons

_ops = torch.ops.cuda_ops
KERNEL_DTYPES = (torch.float32, torch.float64)  # where an operator takes more, the references serve the others


@torch.no_grad()
def batched_nms(
    boxes: Tensor, scores: Tensor, iou_threshold: float, max_output: int, groups: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `cuda_ops.batched_nms`."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return _ops.batched_nms(boxes, scores, iou_threshold, max_output, None if groups is None else groups.long())


def box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """See `cuda_ops.box_iou`. Where boxes learn, the reference serves: the kernel has no gradient."""
    is_learned = torch.is_grad_enabled() and (boxes1.requires_grad or boxes2.requires_grad)
    if is_learned:
        return reference.box_iou(boxes1, boxes2)
    leading = torch.broadcast_shapes(boxes1.shape[:-2], boxes2.shape[:-2])
    pairs = [
        boxes.expand(*leading, *boxes.shape[-2:]).flatten(0, -3) if leading else boxes[None]
        for boxes in (boxes1, boxes2)
    ]
    return _ops.box_iou(*pairs).view(*leading, boxes1.shape[-2], boxes2.shape[-2])


def encode_masks(
    mask_probs: Tensor, boxes: Tensor, image_size: tuple[int, int], threshold: float, conventions: Conventions
) -> list[RunLengthCode]:
    """See `cuda_ops.encode_masks`."""
    if mask_probs.dtype != boxes.dtype or mask_probs.dtype not in KERNEL_DTYPES:
        return reference.encode_masks(
            mask_probs, boxes, image_size, threshold, conventions
        )  # rounds as these dtypes do
    text, offsets = _ops.encode_masks(mask_probs, boxes, *image_size, threshold, conventions == "detectron2")
    data, places = text.numpy().tobytes(), offsets.tolist()
    return [{"size": list(image_size), "counts": data[begin:end]} for begin, end in pairwise(places)]


def enlarge_bilinear(image: Tensor, size: tuple[int, int], is_mirrored: bool = False) -> Tensor:
    """See `cuda_ops.enlarge_bilinear`. Images are loaded by the host, so there is no kernel for other devices."""
    if image.device.type != "cpu":
        return reference.enlarge_bilinear(image, size, is_mirrored)
    return _ops.enlarge_bilinear(image, *size, is_mirrored)


def generate_anchors(
    feature_sizes: Sequence[tuple[int, int]],
    image_size: tuple[int, int],
    sizes: Sequence[Sequence[float]],
    aspect_ratios: Sequence[float],
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    conventions: Conventions = "detectron2",
) -> Tensor:
    """See `cuda_ops.generate_anchors`."""
    if dtype not in KERNEL_DTYPES:
        return reference.generate_anchors(feature_sizes, image_size, sizes, aspect_ratios, device, dtype, conventions)
    like = torch.empty(0, device=device, dtype=dtype)
    strides = anchor_strides(feature_sizes, image_size, conventions)
    flat = [list(chain.from_iterable(pairs)) for pairs in (feature_sizes, strides, sizes)]
    return _ops.generate_anchors(like, *flat, aspect_ratios, conventions == "torchvision")


def match_boxes(
    boxes: Tensor, gt_boxes: Tensor, num_gt: Tensor, fg_iou: float, bg_iou: float, low_quality: bool = False
) -> Tensor:
    """See `cuda_ops.match_boxes`."""
    boxes = boxes if boxes.dim() == 3 else boxes[None]
    num_gt = num_gt if num_gt.dtype in (torch.int32, torch.int64) else num_gt.long()
    return _ops.match_boxes(boxes, gt_boxes, num_gt, fg_iou, bg_iou, low_quality)


def multilevel_roi_align(
    features: Sequence[Tensor],
    boxes: Sequence[Tensor],
    *,
    image_size: tuple[int, int],
    output_sizes: Sequence[int],
    sampling_ratio: int,
    aligned: bool,
) -> list[Tensor]:
    """See `cuda_ops.multilevel_roi_align_heads`."""
    if any(own.dtype not in KERNEL_DTYPES for own in boxes):
        return reference.multilevel_roi_align(
            features,
            boxes,
            image_size=image_size,
            output_sizes=output_sizes,
            sampling_ratio=sampling_ratio,
            aligned=aligned,
        )
    scales = [2.0 ** round(math.log2(level.shape[2] / image_size[0])) for level in features]
    rows = [own.detach() for own in boxes]
    return _ops.multilevel_roi_align(list(features), rows, scales, list(output_sizes), sampling_ratio, aligned)


def rasterize_polygons(boxes: Tensor, instance_idxs: Tensor, polygons: PackedPolygons, size: int) -> Tensor:
    """See `cuda_ops.rasterize_polygons`."""
    is_double = torch.float64 in (boxes.dtype, polygons.xy.dtype)
    dtype = torch.float64 if is_double else torch.float32  # neither loses anything
    return _ops.rasterize_polygons(
        boxes.to(dtype),
        instance_idxs.to(torch.int64),
        polygons.xy.to(dtype),
        polygons.part_offsets.to(torch.int32),
        polygons.instance_offsets.to(torch.int32),
        size,
    )


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
    if anchors.dtype not in KERNEL_DTYPES or objectness.dtype == torch.float64:
        return reference.select_proposals(
            objectness, box_deltas, anchors, image_sizes, level_sizes, pre_nms_top_n, min_size
        )
    deltas, image_sizes = box_deltas.to(anchors.dtype), image_sizes.to(anchors.dtype)
    return _ops.select_proposals(
        objectness.float(), deltas, anchors, image_sizes, list(level_sizes), pre_nms_top_n, min_size
    )
