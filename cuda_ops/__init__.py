"""Operators of the detector: what torch and torchvision lack, or do slower or with waiting. Imports torch only."""

from cuda_ops.library import LibraryError, backend
from cuda_ops.ops import (
    batched_nms,
    box_iou,
    encode_masks,
    enlarge_bilinear,
    generate_anchors,
    match_boxes,
    multilevel_roi_align,
    multilevel_roi_align_heads,
    rasterize_polygons,
    select_proposals,
)
from cuda_ops.reference import BACKGROUND, IGNORE, decode_boxes, encode_boxes

__all__ = [
    "BACKGROUND",
    "IGNORE",
    "LibraryError",
    "backend",
    "batched_nms",
    "box_iou",
    "decode_boxes",
    "encode_boxes",
    "encode_masks",
    "enlarge_bilinear",
    "generate_anchors",
    "match_boxes",
    "multilevel_roi_align",
    "multilevel_roi_align_heads",
    "rasterize_polygons",
    "select_proposals",
]
