"""Operators of the detector: what torch and torchvision lack, or do slower or with waiting. Imports torch only.

Shapes: N images, A anchors or boxes, G ground-truth rows (padded), L levels, K boxes of a row, R rows or RoIs, M mask
side. Boxes are (x1, y1, x2, y2) in pixels; sizes are (height, width). Apart from `encode_masks`, output shapes follow
from input shapes and no operator makes the host wait for the device.
"""

from typing import TYPE_CHECKING

from cuda_ops import operators
from cuda_ops import reference as reference
from cuda_ops.boxes import decode_boxes, encode_boxes
from cuda_ops.library import LibraryError, backend

if TYPE_CHECKING:  # for type checkers and editors: they do not see what the next statement adds
    from cuda_ops.operators.batched_nms import batched_nms as batched_nms
    from cuda_ops.operators.box_iou import box_iou as box_iou
    from cuda_ops.operators.encode_masks import encode_masks as encode_masks
    from cuda_ops.operators.enlarge_bilinear import enlarge_bilinear as enlarge_bilinear
    from cuda_ops.operators.generate_anchors import generate_anchors as generate_anchors
    from cuda_ops.operators.match_boxes import BACKGROUND as BACKGROUND
    from cuda_ops.operators.match_boxes import IGNORE as IGNORE
    from cuda_ops.operators.match_boxes import match_boxes as match_boxes
    from cuda_ops.operators.multilevel_roi_align import multilevel_roi_align as multilevel_roi_align
    from cuda_ops.operators.multilevel_roi_align import multilevel_roi_align_heads as multilevel_roi_align_heads
    from cuda_ops.operators.rasterize_polygons import rasterize_polygons as rasterize_polygons
    from cuda_ops.operators.select_proposals import select_proposals as select_proposals

globals().update(operators.PUBLIC)

__all__ = ["LibraryError", "backend", "decode_boxes", "encode_boxes", *operators.PUBLIC]
