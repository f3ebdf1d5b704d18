"""The compiled operators in a network's program as standard ONNX operators.

Shapes: N images, R rows or RoIs, K boxes of a row, L levels, C channels, O bins on an axis.
Source: ONNX operators NonMaxSuppression-11, TopK-11 and RoiAlign-16; conventions as in `cuda_ops`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset18

from cuda_ops.boxes import MAX_LOG_SCALE
from cuda_ops.roi_sampling import CANONICAL_LEVEL, CANONICAL_SIZE_PX

Value = Any  # onnx_ir.Value: a tensor of the graph
op: Any = opset18  # its functions are declared for tensors' protocols, not for values of a graph
LOWEST = float(np.finfo(np.float32).min)


def _ints(*values: int) -> Value:
    return op.Constant(value=ir.tensor(list(values), dtype=ir.DataType.INT64))


def _int(value: int) -> Value:
    return op.Constant(value=ir.tensor(value, dtype=ir.DataType.INT64))


def _float(value: float) -> Value:
    return op.Constant(value=ir.tensor(value, dtype=ir.DataType.FLOAT))


def sort(values: Value, stable: bool = True, dim: int = -1, descending: bool = False) -> Value:
    """Translate `torch.sort`: TopK of all; of equals it too takes the first first."""
    return op.TopK(values, op.Shape(values, start=dim, end=dim + 1), axis=dim, largest=int(descending))


def select_proposals(
    objectness: Value,
    box_deltas: Value,
    anchors: Value,
    image_sizes: Value,
    level_sizes: Sequence[int],
    pre_nms_top_n: int,
    min_size: float,
) -> tuple[Value, Value]:
    """Translate `cuda_ops.select_proposals`: [N, L, K, 4] boxes and [N, L, K] scores."""
    most = min(pre_nms_top_n, max(level_sizes))  # K
    limits = op.Unsqueeze(op.Gather(image_sizes, _ints(1, 0), axis=1), _ints(1))  # [N, 1, 2]: (width, height)
    nothing = _float(-math.inf)
    boxes, scores, first = [], [], 0
    for size in level_sizes:
        taken = min(pre_nms_top_n, size)
        level = op.Slice(objectness, _ints(first), _ints(first + size), _ints(1))
        logits, idxs = op.TopK(level, _ints(taken), axis=1)
        idxs = op.Add(idxs, _int(first))
        deltas = op.GatherND(box_deltas, op.Unsqueeze(idxs, _ints(2)), batch_dims=1)  # [N, taken, 4]
        decoded = _decode(deltas, op.Gather(anchors, idxs), limits)
        sides = op.Sub(*reversed(op.Split(decoded, num_outputs=2, axis=2)))
        is_large = op.GreaterOrEqual(op.ReduceMin(sides, _ints(2), keepdims=0), _float(min_size))
        level_scores = op.Where(is_large, op.Sigmoid(logits), nothing)
        boxes.append(op.Unsqueeze(op.Pad(decoded, _ints(0, 0, 0, 0, most - taken, 0)), _ints(1)))
        scores.append(op.Unsqueeze(op.Pad(level_scores, _ints(0, 0, 0, most - taken), nothing), _ints(1)))
        first += size
    return op.Concat(*boxes, axis=1), op.Concat(*scores, axis=1)


def _decode(deltas: Value, anchors: Value, limits: Value) -> Value:
    """Boxes [N, R, 4] of anchors moved by deltas, within limits [N, 1, 2]: `cuda_ops.decode_boxes`, clipped."""
    low, high = op.Split(anchors, num_outputs=2, axis=2)
    shift, log_scale = op.Split(deltas, num_outputs=2, axis=2)
    size = op.Sub(high, low)
    centre = op.Add(op.Mul(shift, size), op.Add(low, op.Mul(size, _float(0.5))))
    half = op.Mul(op.Mul(op.Exp(op.Min(log_scale, _float(MAX_LOG_SCALE))), size), _float(0.5))
    corners = (op.Min(op.Max(corner, _float(0.0)), limits) for corner in (op.Sub(centre, half), op.Add(centre, half)))
    return op.Concat(*corners, axis=2)


def batched_nms(
    boxes: Value, scores: Value, iou_threshold: float, max_output: int, groups: Value = None
) -> tuple[Value, Value]:
    """Translate `cuda_ops.batched_nms`: the standard operator's classes are the groups."""
    nothing = _float(-math.inf)
    # Rows of max_output boxes that are never kept, so that no row is empty and TopK has enough.
    boxes = op.Pad(boxes, _ints(0, 0, 0, 0, max_output, 0))
    scores = op.Pad(scores, _ints(0, 0, 0, max_output), nothing)
    by_class = op.Unsqueeze(scores, _ints(1))  # [R, 1, K]
    if groups is not None:
        groups = op.Pad(groups, _ints(0, 0, 0, max_output))
        classes = op.Range(_int(0), op.Add(op.ReduceMax(groups, keepdims=0), _int(1)), _int(1))
        is_own = op.Equal(op.Unsqueeze(groups, _ints(1)), op.Unsqueeze(classes, _ints(1)))
        by_class = op.Where(is_own, by_class, nothing)
    selected = op.NonMaxSuppression(boxes, by_class, _ints(max_output), _float(iou_threshold), _float(LOWEST))
    places = op.Gather(selected, _ints(0, 2), axis=1)  # (row, box) of (row, class, box)
    kept = op.ScatterND(op.Expand(nothing, op.Shape(scores)), places, op.GatherND(scores, places))
    best, idxs = op.TopK(kept, _ints(max_output), axis=1)
    is_kept = op.Greater(best, nothing)
    counts = op.ReduceSum(op.Cast(is_kept, to=ir.DataType.INT64), _ints(1), keepdims=0)
    return op.Where(is_kept, idxs, _int(0)), counts


def multilevel_roi_align(
    features: Sequence[Value],
    boxes: Sequence[Value],
    scales: Sequence[float],
    output_sizes: Sequence[int],
    sampling_ratio: int,
    aligned: bool,
) -> list[Value]:
    """Translate `cuda_ops.multilevel_roi_align_heads`: each level pools its own boxes."""
    return [
        _pool(features, own, scales, size, sampling_ratio, aligned)
        for own, size in zip(boxes, output_sizes, strict=True)
    ]


def _pool(
    features: Sequence[Value], boxes: Value, scales: Sequence[float], size: int, sampling_ratio: int, aligned: bool
) -> Value:
    shape = op.Shape(boxes, end=2)  # (N, R)
    images = op.Range(_int(0), op.Squeeze(op.Shape(boxes, end=1)), _int(1))
    images = op.Reshape(op.Expand(op.Unsqueeze(images, _ints(1)), shape), _ints(-1))
    boxes = op.Reshape(boxes, _ints(-1, 4))
    level = _levels(boxes, scales)
    pooled, places = [], []
    for number, (feature, scale) in enumerate(zip(features, scales, strict=True)):
        own = op.Reshape(op.NonZero(op.Equal(level, _float(number))), _ints(-1))
        places.append(own)
        pooled.append(
            op.RoiAlign(
                feature,
                op.Gather(boxes, own),
                op.Gather(images, own),
                coordinate_transformation_mode="half_pixel" if aligned else "output_half_pixel",
                output_height=size,
                output_width=size,
                sampling_ratio=sampling_ratio,
                spatial_scale=scale,
            )
        )
    place = op.Concat(*places, axis=0)
    rank = op.Range(_int(0), op.Squeeze(op.Shape(place)), _int(1))
    pooled = op.Concat(*pooled, axis=0)
    pooled = op.Gather(pooled, op.ScatterElements(rank, place, rank))
    return op.Reshape(pooled, op.Concat(shape, op.Shape(pooled, start=1), axis=0))


def _levels(boxes: Value, scales: Sequence[float]) -> Value:
    """Level of each box [R, 4] counted from the finest, as a float: `cuda_ops.roi_sampling.assign_levels`."""
    finest, coarsest = (int(-math.log2(scale)) for scale in (scales[0], scales[-1]))
    x1, y1, x2, y2 = op.Split(boxes, num_outputs=4, axis=1)
    area = op.Relu(op.Mul(op.Sub(x2, x1), op.Sub(y2, y1)))
    octaves = op.Div(op.Log(op.Div(op.Sqrt(area), _float(CANONICAL_SIZE_PX))), _float(math.log(2)))
    level = op.Floor(op.Add(op.Add(octaves, _float(CANONICAL_LEVEL)), _float(1e-6)))
    return op.Reshape(op.Sub(op.Clip(level, _float(finest), _float(coarsest)), _float(finest)), _ints(-1))


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The table for `torch.onnx.export`."""
    return {
        torch.ops.aten.sort.stable: sort,
        torch.ops.cuda_ops.select_proposals.default: select_proposals,
        torch.ops.cuda_ops.batched_nms.default: batched_nms,
        torch.ops.cuda_ops.multilevel_roi_align.default: multilevel_roi_align,
    }
