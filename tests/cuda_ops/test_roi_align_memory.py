"""RoIAlign where its buffers are tightest: levels of few cells, each in its own layout, and boxes turned inside out.

Run by `make sanitize` too, where any byte beyond a buffer is a failure.
"""

from itertools import product

import pytest
import torch

import cuda_ops
from cuda_ops import multilevel_roi_align_heads

compiled_only = pytest.mark.parametrize("backend", ["compiled"], indirect=True)
IMAGE_SIZE = (128, 128)
LEVEL_SHAPES = (((4, 4), (2, 2)), ((1, 1), (1, 1)), ((4, 1), (2, 3), (1, 1)), ((2, 19), (1, 4)), ((40, 1),))
CORNERS = (0.0, 128.0, -60.0)
SAMPLINGS = ((14, 2, True), (7, 0, True), (3, 5, False), (1, 16, True))  # output size, sampling ratio, aligned


def make_level(seed, channels, shape, layout, dtype):
    level = torch.randn(1, channels, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    level = level.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else level
    return level.requires_grad_()


def pooled_and_gradients(shapes, layouts, channels, sampling, dtype):
    """Two heads of boxes with every pair of corners: with and without area, turned inside out on one axis or both."""
    output_size, sampling_ratio, aligned = sampling
    features = [
        make_level(seed, channels, shape, layout, dtype)
        for seed, (shape, layout) in enumerate(zip(shapes, layouts, strict=True))
    ]
    boxes = torch.tensor(list(product(CORNERS, repeat=4)), dtype=dtype)[None]
    pooled = multilevel_roi_align_heads(
        features,
        [boxes[:, :50], boxes[:, 50:]],
        image_size=IMAGE_SIZE,
        output_sizes=[output_size, 2],
        sampling_ratio=sampling_ratio,
        aligned=aligned,
    )
    directions = [torch.linspace(-1, 1, head.numel(), dtype=dtype).view(head.shape) for head in pooled]
    return [*pooled, *torch.autograd.grad(pooled, features, directions)]


def cases():
    for shapes, sampling in product(LEVEL_SHAPES, SAMPLINGS):
        for row, layouts in enumerate(product(("planes", "channels_last"), repeat=len(shapes))):
            yield shapes, layouts, (16, 5)[row % 2], sampling, (torch.float32, torch.float64)[row // 2 % 2]


@compiled_only
def test_small_levels_of_any_layouts_and_boxes_turned_inside_out_pool_as_in_plain_torch():
    for case in cases():
        with cuda_ops.backend("reference"):
            expected = pooled_and_gradients(*case)
        tolerance = 0.1 if case[-1] == torch.float32 else 1e-9  # a thousand bins on a cell cancel out
        for result, wanted in zip(pooled_and_gradients(*case), expected, strict=True):
            torch.testing.assert_close(
                result, wanted, rtol=tolerance, atol=tolerance, msg=lambda text, of=case: f"{of}: {text}"
            )
