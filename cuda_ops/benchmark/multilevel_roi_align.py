"""RoIAlign of one head and of two, forward and backward, beside torchvision's MultiScaleRoIAlign."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torchvision

import cuda_ops
from cuda_ops.benchmark import IMAGE_SIZE, LEVEL_SHAPES, Case, random_boxes
from cuda_ops.operators.multilevel_roi_align import BACKWARDS, VARIABLE

CHANNELS = 256
rois = 512  # an image, of the box head; __main__ sets it. The mask head has a quarter


def cases(device: torch.device) -> list[Case]:
    return [
        _case(rois, 7, torch.channels_last, device),
        _case(rois, 7, torch.contiguous_format, device),
        _case(rois, 7, torch.channels_last, device, sampling_ratio=0),
        _case(rois // 4, 14, torch.channels_last, device),
        _case(rois // 4, 14, torch.contiguous_format, device),
        *(_heads_case(way, device) for way in (BACKWARDS if device.type == "cuda" else ("scatter",))),
    ]


def _case(
    num_boxes: int, size: int, memory_format: torch.memory_format, device: torch.device, sampling_ratio: int = 2
) -> Case:
    """Forward and backward for four images; a sampling_ratio of 0 is adaptive."""
    features = [
        torch.randn(4, CHANNELS, *shape, device=device).to(memory_format=memory_format).requires_grad_()
        for shape in LEVEL_SHAPES[:4]
    ]
    boxes = random_boxes(4, num_boxes, device=device)
    pooler = torchvision.ops.MultiScaleRoIAlign(["0", "1", "2", "3"], size, sampling_ratio)
    named = {str(level): feature for level, feature in enumerate(features)}
    gradient = torch.randn(4 * num_boxes, CHANNELS, size, size, device=device)

    def ours() -> None:
        pooled = cuda_ops.multilevel_roi_align(
            features, boxes, image_size=IMAGE_SIZE, output_size=size, sampling_ratio=sampling_ratio
        )
        torch.autograd.grad(pooled.flatten(0, 1), features, gradient)

    def theirs() -> None:
        torch.autograd.grad(pooler(named, list(boxes), [IMAGE_SIZE] * 4), features, gradient)

    layout = "channels-last" if memory_format == torch.channels_last else "NCHW"
    name = f"multilevel_roi_align, 4 × {num_boxes} at {size}×{size}, {layout}{'' if sampling_ratio else ', adaptive'}"
    return Case(name, ours, "MultiScaleRoIAlign", theirs)


@contextmanager
def _backward_by(way: str) -> Iterator[None]:
    """Have a GPU scatter or gather the gradient within the context."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = way
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def _heads_case(way: str, device: torch.device) -> Case:
    """The pooling of a training step, forward and backward: the box head's RoIs, and the first of them for masks."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32  # torchvision's kernel takes no bfloat16
    features = [
        torch.randn(4, CHANNELS, *shape, device=device, dtype=dtype)
        .to(memory_format=torch.channels_last)
        .requires_grad_()
        for shape in LEVEL_SHAPES[:4]
    ]
    boxes, sizes = random_boxes(4, rois, device=device), (7, 14)
    heads = [boxes, boxes[:, : rois // 4]]
    gradients = [
        torch.randn(4 * own.shape[1], CHANNELS, size, size, device=device, dtype=dtype)
        for own, size in zip(heads, sizes, strict=True)
    ]
    poolers = [torchvision.ops.MultiScaleRoIAlign(["0", "1", "2", "3"], size, 2) for size in sizes]
    named = {str(level): feature for level, feature in enumerate(features)}

    def ours() -> None:
        pooled = cuda_ops.multilevel_roi_align_heads(
            features, heads, image_size=IMAGE_SIZE, output_sizes=sizes, sampling_ratio=2
        )
        with _backward_by(way):
            torch.autograd.grad([out.flatten(0, 1) for out in pooled], features, gradients)

    def theirs() -> None:
        # Their boxes have the features' dtype.
        pooled = [
            pooler(named, list(own.to(dtype)), [IMAGE_SIZE] * 4) for pooler, own in zip(poolers, heads, strict=True)
        ]
        torch.autograd.grad(pooled, features, gradients)

    name = f"multilevel_roi_align_heads, 4 × ({rois} at 7×7, {rois // 4} at 14×14), {dtype}".replace("torch.", "")
    return Case(f"{name}{', ' + way if device.type == 'cuda' else ''}", ours, "MultiScaleRoIAlign", theirs)
