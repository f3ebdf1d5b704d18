"""What torch must know of the compiled operators besides their kernels: output shapes without data, gradients, autocast.

With it they work under torch.compile, torch.export and FakeTensorMode. Imported by compiled.py once the library is loaded.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


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
    image_size: Sequence[int],
    sizes: Sequence[float],
    aspect_ratios: Sequence[float],
) -> Tensor:
    cells = sum(height * width for height, width in zip(feature_sizes[::2], feature_sizes[1::2], strict=True))
    return like.new_empty(cells * len(aspect_ratios), 4)


@torch.library.register_fake("cuda_ops::match_boxes")
def _match_boxes(
    boxes: Tensor, gt_boxes: Tensor, num_gt: Tensor, fg_iou: float, bg_iou: float, low_quality: bool
) -> Tensor:
    return gt_boxes.new_empty(gt_boxes.shape[0], boxes.shape[1], dtype=torch.int64)


@torch.library.register_fake("cuda_ops::encode_masks")
def _encode_masks(
    mask_probs: Tensor, boxes: Tensor, height: int, width: int, threshold: float
) -> tuple[Tensor, Tensor]:
    num_bytes = torch.library.get_ctx().new_dynamic_size()
    return torch.empty(num_bytes, dtype=torch.uint8), torch.empty(mask_probs.shape[0] + 1, dtype=torch.int64)


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
