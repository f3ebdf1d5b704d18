"""What torch must know of the compiled operators besides their kernels: output shapes without data, gradients, autocast.

With it they work under torch.compile, torch.export and FakeTensorMode. Imported by compiled.py once the library is loaded.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cuda_ops.library import gathers_roi_gradients


@torch.library.register_fake("cuda_ops::batched_nms")
def _batched_nms(
    boxes: Tensor, scores: Tensor, iou_threshold: float, max_output: int, groups: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    num_rows = boxes.shape[0]
    return boxes.new_empty(num_rows, max_output, dtype=torch.int64), boxes.new_empty(num_rows, dtype=torch.int64)


@torch.library.register_fake("cuda_ops::box_iou")
def _box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    return boxes1.new_empty(boxes1.shape[0], boxes1.shape[1], boxes2.shape[1])


@torch.library.register_fake("cuda_ops::generate_anchors")
def _generate_anchors(
    like: Tensor,
    feature_sizes: Sequence[int],
    strides: Sequence[int],
    sizes: Sequence[float],
    aspect_ratios: Sequence[float],
    rounded: bool,
) -> Tensor:
    levels = list(zip(feature_sizes[::2], feature_sizes[1::2], strict=True))
    cells = sum(height * width for height, width in levels)
    return like.new_empty(cells * (len(sizes) // len(levels)) * len(aspect_ratios), 4)


@torch.library.register_fake("cuda_ops::match_boxes")
def _match_boxes(
    boxes: Tensor, gt_boxes: Tensor, num_gt: Tensor, fg_iou: float, bg_iou: float, low_quality: bool
) -> Tensor:
    return gt_boxes.new_empty(gt_boxes.shape[0], boxes.shape[1], dtype=torch.int64)


@torch.library.register_fake("cuda_ops::encode_masks")
def _encode_masks(
    mask_probs: Tensor, boxes: Tensor, height: int, width: int, threshold: float, is_exact: bool
) -> tuple[Tensor, Tensor]:
    num_bytes = torch.library.get_ctx().new_dynamic_size()
    return torch.empty(num_bytes, dtype=torch.uint8), torch.empty(mask_probs.shape[0] + 1, dtype=torch.int64)


@torch.library.register_fake("cuda_ops::enlarge_bilinear")
def _enlarge_bilinear(image: Tensor, height: int, width: int, is_mirrored: bool) -> Tensor:
    return image.new_empty(height, width, 3)


@torch.library.register_fake("cuda_ops::rasterize_polygons")
def _rasterize_polygons(
    boxes: Tensor, instance_idxs: Tensor, xy: Tensor, part_offsets: Tensor, instance_offsets: Tensor, size: int
) -> Tensor:
    return boxes.new_empty(boxes.shape[0], boxes.shape[1], size, size, dtype=torch.float32)


@torch.library.register_fake("cuda_ops::select_proposals")
def _select_proposals(
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


@torch.library.register_fake("cuda_ops::multilevel_roi_align")
def _multilevel_roi_align(
    features: list[Tensor],
    boxes: list[Tensor],
    scales: list[float],
    output_sizes: list[int],
    sampling_ratio: int,
    aligned: bool,
) -> list[Tensor]:
    like, channels = features[0], features[0].shape[1]
    return [
        like.new_empty(*own.shape[:2], size, size, channels).permute(0, 1, 4, 2, 3)
        for own, size in zip(boxes, output_sizes, strict=True)
    ]


@torch.library.register_fake("cuda_ops::multilevel_roi_align_backward")
def _multilevel_roi_align_backward(
    grads: list[Tensor],
    boxes: list[Tensor],
    sizes: list[int],
    channels_last: list[bool],
    scales: list[float],
    sampling_ratio: int,
    aligned: bool,
    deterministic: bool,
) -> list[Tensor]:
    grad = grads[0]
    num_images, channels = grad.shape[0], grad.shape[2]
    return [
        grad.new_empty(num_images, height, width, channels).permute(0, 3, 1, 2)
        if is_last
        else grad.new_empty(num_images, channels, height, width)
        for height, width, is_last in zip(sizes[::2], sizes[1::2], channels_last, strict=True)
    ]


def _save_pyramid(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    """Of the features the backward pass needs the shapes and layouts alone."""
    features, boxes, ctx.scales, _, ctx.sampling_ratio, ctx.aligned = inputs
    ctx.save_for_backward(*boxes)
    ctx.sizes = [side for level in features for side in level.shape[2:]]
    ctx.channels_last = [level.stride(1) == 1 and level.stride(3) != 1 for level in features]


def _pyramid_gradients(ctx: Any, grads: list[Tensor]) -> tuple[list[Tensor], list[None], None, None, None, None]:
    """Gradients of the features in their layouts. Asked to be deterministic, it is, with another kernel, instead of an error."""
    gradients = torch.ops.cuda_ops.multilevel_roi_align_backward(
        grads,
        list(ctx.saved_tensors),
        ctx.sizes,
        ctx.channels_last,
        ctx.scales,
        ctx.sampling_ratio,
        ctx.aligned,
        gathers_roi_gradients(),
    )
    return gradients, [None] * len(grads), None, None, None, None


torch.library.register_autograd("cuda_ops::multilevel_roi_align", _pyramid_gradients, setup_context=_save_pyramid)


def _save_heads(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    grads, boxes, _, _, ctx.scales, ctx.sampling_ratio, ctx.aligned, _ = inputs
    ctx.save_for_backward(*boxes)
    ctx.output_sizes = [grad.shape[3] for grad in grads]


def _gradients_of_heads(ctx: Any, features: list[Tensor]) -> tuple[Any, ...]:
    """RoIAlign is linear in the features: what it sends back depends on what comes in as pooling does on them."""
    pooled = torch.ops.cuda_ops.multilevel_roi_align(
        features, list(ctx.saved_tensors), ctx.scales, ctx.output_sizes, ctx.sampling_ratio, ctx.aligned
    )
    return pooled, [None] * len(pooled), *[None] * 6


torch.library.register_autograd(
    "cuda_ops::multilevel_roi_align_backward", _gradients_of_heads, setup_context=_save_heads
)
