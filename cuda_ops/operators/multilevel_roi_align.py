"""RoIAlign over a feature pyramid, as one weighted sum of table rows for each output bin.

Shapes: N images, R boxes an image, B = N·R, L levels of [N, C, H_l, W_l], O output size, S samples of a bin on one
axis. Heads differ in R, O and S. Boxes are (x1, y1, x2, y2) in input pixels. roi_sampling.py says where the samples
lie. In plain torch, gathering and weighing is `embedding_bag`'s work, whose backward is the gradient of the features,
of all heads in one; boxes get none.
Source: Mask R-CNN (arXiv:1703.06870), section 3; FPN (arXiv:1612.03144), equation 1; borders are torchvision's.
"""

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cuda_ops import examples
from cuda_ops.checks import (
    KERNEL_DTYPES,
    require,
    require_boxes,
    require_one_device,
    require_pyramid,
    require_whole,
)
from cuda_ops.declaration import Kernel, Operator
from cuda_ops.roi_sampling import Corners, Sampling, flatten_pyramid, sample_corners

__all__ = ["multilevel_roi_align", "multilevel_roi_align_heads"]

BACKWARDS = ("scatter", "gather")
VARIABLE = "CUDA_OPS_ROI_ALIGN_BACKWARD"
MAX_SAMPLES = 128  # samples of a bin on one axis: plain torch adds up four cells for each of its square, in float32
MAX_CHUNK_BYTES = 64 * 2**20  # indices and weights that are there at once


def multilevel_roi_align(
    features: Sequence[Tensor],
    boxes: Tensor,
    *,
    image_size: tuple[int, int],
    output_size: int,
    sampling_ratio: int,
    aligned: bool = False,
) -> Tensor:
    """Pool each box from the pyramid level that suits its size: `multilevel_roi_align_heads` for one head."""
    (pooled,) = multilevel_roi_align_heads(
        features,
        [boxes],
        image_size=image_size,
        output_sizes=[output_size],
        sampling_ratio=sampling_ratio,
        aligned=aligned,
    )
    return pooled


def multilevel_roi_align_heads(
    features: Sequence[Tensor],
    boxes: Sequence[Tensor],
    *,
    image_size: tuple[int, int],
    output_sizes: Sequence[int],
    sampling_ratio: int,
    aligned: bool = False,
) -> list[Tensor]:
    """Pool the boxes of several heads, each box from the pyramid level that suits its size.

    As many calls for one head give the same values, but each a gradient of its own of the whole pyramid, and autograd
    adds these: here the heads' gradients meet in one, which is zeroed once and, in half precision, rounded once.

    Args:
        features: one [N, C, H_l, W_l] float a level, finest first, 1 to 8 levels of one cell at least; N, C, dtype and
            device are the same everywhere. Channels-last memory is fastest.
        boxes: one [N, R, 4] float a head, input pixels; 1 to 4 heads. They get no gradient; padding (without area, even
            nan) pools finite values.
        image_size: padded (height, width) of the input in pixels; level l has scale 2 ** round(log2(H_l / height)).
        output_sizes: O of each head, bins on either axis.
        sampling_ratio: samples of a bin on either axis, 1 to 128; 0: adaptive, as many as the bin is cells long,
            rounded up, on each axis. (A box longer than its level, so one that reaches out of the image, has no more of
            them than one as long as the longest side of a level.)
        aligned: whether the centre of cell 0 lies half a cell from the image's border, as it should, rather than on it.
            Then boxes may also be less than a cell wide; else they are widened to one.

    Returns:
        One [N, R, C, O, O] a head, dtype of the features, channels-last in memory: flattened over N and R, a
        channels-last batch.

    Raises:
        ValueError: if a shape or dtype is not as above, or a number is out of range.

    Source: Mask R-CNN (arXiv:1703.06870), FPN (arXiv:1612.03144); equals torchvision's MultiScaleRoIAlign, which is not
        aligned, and with `aligned` Detectron2's ROIPooler with ROIAlignV2.
    """
    op = "multilevel_roi_align"
    has_heads = 0 < len(boxes) == len(output_sizes) <= 4
    require(has_heads, op, "boxes", "of 1 to 4 heads, with an output size each", len(boxes))
    require_pyramid(features, op)
    num_images = features[0].shape[0]  # not len(), which would fix the number in an exported program
    for own in boxes:
        require_boxes(own, op, "boxes", dims=(3,))
        require(own.shape[0] == num_images, op, "boxes", f"of {num_images} images", own.shape)
    require(min(image_size) > 0, op, "image_size", "positive", image_size)
    require(min(output_sizes) > 0, op, "output_size", "positive", min(output_sizes))
    require(0 <= sampling_ratio <= MAX_SAMPLES, op, "sampling_ratio", f"0 to {MAX_SAMPLES}", sampling_ratio)
    require_whole(op, output_size=output_sizes, sampling_ratio=sampling_ratio)
    arguments = {f"boxes[{head}]": own for head, own in enumerate(boxes)}
    arguments |= {f"features[{level}]": feature for level, feature in enumerate(features)}
    require_one_device(op, **arguments)
    return OPERATOR.on(features[0].device)(
        features,
        boxes,
        image_size=image_size,
        output_sizes=output_sizes,
        sampling_ratio=sampling_ratio,
        aligned=aligned,
    )


def _reference(
    features: Sequence[Tensor],
    boxes: Sequence[Tensor],
    *,
    image_size: tuple[int, int],
    output_sizes: Sequence[int],
    sampling_ratio: int,
    aligned: bool,
) -> list[Tensor]:
    pyramid = flatten_pyramid(features)
    longest = max(max(shape) for shape in pyramid.level_shapes)
    heads = []
    with torch.no_grad():
        for own, size in zip(boxes, output_sizes, strict=True):
            sampling = Sampling(size, sampling_ratio or -(-longest // size), sampling_ratio == 0, aligned)
            heads.append(sample_corners(pyramid, own, image_size, sampling))
    num_chunks = max(1, -(-sum(map(_bag_bytes, heads)) // MAX_CHUNK_BYTES))
    chunks = zip(*(zip(*(part.tensor_split(num_chunks) for part in head), strict=True) for head in heads), strict=True)
    pooled = [_pool(pyramid.table, chunk) for chunk in chunks]  # [chunks][heads]
    results = []
    for own, size, parts in zip(boxes, output_sizes, zip(*pooled, strict=True), strict=True):
        flat = (parts[0] if num_chunks == 1 else torch.cat(parts)).to(features[0].dtype)  # [B·O·O, C]
        results.append(flat.view(*own.shape[:2], size, size, flat.shape[1]).permute(0, 1, 4, 2, 3))
    return results


def _bag_bytes(corners: Corners) -> int:
    """Bytes of the indices and weights of all bins of a head."""
    row_idx, row_weight, column_idx, _ = corners
    taps = row_idx.shape[2] * column_idx.shape[2]
    return row_idx.shape[0] * row_idx.shape[1] ** 2 * taps * (row_idx.element_size() + row_weight.element_size())


def _pool(table: Tensor, heads: Sequence[Corners]) -> Sequence[Tensor]:
    """Weighted sums of table rows, one for each of the O × O bins of each head's boxes: [B·O·O, C] a head."""
    idxs, weights, offsets, first = [], [], [], 0
    with torch.no_grad():
        for row_idx, row_weight, column_idx, column_weight in heads:
            idx = (row_idx[:, :, None, :, None] + column_idx[:, None, :, None, :]).flatten()
            idxs.append(idx)
            weights.append((row_weight[:, :, None, :, None] * column_weight[:, None, :, None, :]).flatten())
            taps = row_idx.shape[2] * column_idx.shape[2]
            offsets.append(torch.arange(first, first + len(idx), taps, dtype=idx.dtype, device=idx.device))
            first += len(idx)
        weight = torch.cat(weights).to(table.dtype)
    bags = F.embedding_bag(torch.cat(idxs), table, torch.cat(offsets), per_sample_weights=weight, mode="sum")
    return bags.split([len(of_head) for of_head in offsets])


def _compiled(
    features: Sequence[Tensor],
    boxes: Sequence[Tensor],
    *,
    image_size: tuple[int, int],
    output_sizes: Sequence[int],
    sampling_ratio: int,
    aligned: bool,
) -> list[Tensor]:
    if any(own.dtype not in KERNEL_DTYPES for own in boxes):
        return _reference(
            features,
            boxes,
            image_size=image_size,
            output_sizes=output_sizes,
            sampling_ratio=sampling_ratio,
            aligned=aligned,
        )
    scales = [2.0 ** round(math.log2(level.shape[2] / image_size[0])) for level in features]
    rows = [own.detach() for own in boxes]
    return torch.ops.cuda_ops.multilevel_roi_align(
        list(features), rows, scales, list(output_sizes), sampling_ratio, aligned
    )


def _fake(
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


def _fake_backward(
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
    """The backward pass needs the shapes and layouts of the features, not their values."""
    features, boxes, ctx.scales, _, ctx.sampling_ratio, ctx.aligned = inputs
    ctx.save_for_backward(*boxes)
    ctx.sizes = [side for level in features for side in level.shape[2:]]
    ctx.channels_last = [level.stride(1) == 1 and level.stride(3) != 1 for level in features]


def _pyramid_gradients(ctx: Any, grads: list[Tensor]) -> tuple[list[Tensor], list[None], None, None, None, None]:
    """Gradients of the features in their layouts; where torch must be deterministic, by another kernel."""
    gradients = torch.ops.cuda_ops.multilevel_roi_align_backward(
        grads,
        list(ctx.saved_tensors),
        ctx.sizes,
        ctx.channels_last,
        ctx.scales,
        ctx.sampling_ratio,
        ctx.aligned,
        gathers_gradients(),
    )
    return gradients, [None] * len(grads), None, None, None, None


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


def gathers_gradients() -> bool:
    """Tell whether a GPU gathers the gradient cell by cell, the same bits every time, rather than scatter it by atomic
    additions.

    The environment's CUDA_OPS_ROI_ALIGN_BACKWARD says scatter (the default) or gather; where torch must be
    deterministic it gathers.

    Raises:
        ValueError: if the variable says something else.
    """
    way = os.environ.get(VARIABLE) or "scatter"
    if way not in BACKWARDS:
        raise ValueError(f"cuda_ops: {VARIABLE} must be {' or '.join(BACKWARDS)}, got {way}")
    return way == "gather" or torch.are_deterministic_algorithms_enabled()


def _example(device: torch.device) -> dict[str, Any]:
    return {
        "features": [examples.uniform(2, 8, *shape, device=device) for shape in examples.LEVEL_SHAPES],
        "boxes": examples.boxes(2, 50, device=device),
        "image_size": examples.IMAGE_SIZE,
        "output_size": 7,
        "sampling_ratio": 2,
    }


OPERATOR = Operator(
    function=multilevel_roi_align,
    reference=_reference,
    compiled=_compiled,
    kernels=(
        Kernel(
            "multilevel_roi_align(Tensor[] features, Tensor[] boxes, float[] scales, int[] output_sizes,"
            " int sampling_ratio, bool aligned) -> Tensor[]",
            fake=_fake,
            setup_context=_save_pyramid,
            backward=_pyramid_gradients,
        ),
        Kernel(
            "multilevel_roi_align_backward(Tensor[] grads, Tensor[] boxes, SymInt[] sizes, bool[] channels_last,"
            " float[] scales, int sampling_ratio, bool aligned, bool deterministic) -> Tensor[]",
            fake=_fake_backward,
            setup_context=_save_heads,
            backward=_gradients_of_heads,
        ),
    ),
    example=_example,
)
