"""The operators in plain torch: specification, fallback, and oracle of the compiled ones.

All but `encode_masks` have output shapes that follow from input shapes, never wait for the device, and run the same code on
CPU and GPU. Arguments are checked in `cuda_ops/ops.py`, not here.
"""

from cuda_ops.reference.anchors import generate_anchors
from cuda_ops.reference.boxes import box_iou, decode_boxes, encode_boxes
from cuda_ops.reference.images import enlarge_bilinear
from cuda_ops.reference.masks import encode_masks
from cuda_ops.reference.matching import BACKGROUND, IGNORE, match_boxes
from cuda_ops.reference.nms import batched_nms
from cuda_ops.reference.polygons import rasterize_polygons
from cuda_ops.reference.proposals import select_proposals
from cuda_ops.reference.roi_align import multilevel_roi_align

__all__ = [
    "BACKGROUND",
    "IGNORE",
    "batched_nms",
    "box_iou",
    "decode_boxes",
    "encode_boxes",
    "encode_masks",
    "enlarge_bilinear",
    "generate_anchors",
    "match_boxes",
    "multilevel_roi_align",
    "rasterize_polygons",
    "select_proposals",
]
