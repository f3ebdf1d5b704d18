"""RoIAlign: torchvision's MultiScaleRoIAlign and, aligned or adaptive, its RoIAlign of one level.
Inputs of every kind.
"""

import pytest
import torch
from torchvision import ops
from torchvision.ops import MultiScaleRoIAlign

import cuda_ops
from cuda_ops import multilevel_roi_align
from cuda_ops.operators import multilevel_roi_align as implementation
from cuda_ops.roi_sampling import assign_levels

from .roi_cases import (
    IMAGE_SIZE,
    STRIDES,
    image_size,
    laid_out,
    make_boxes,
    make_features,
    pool,
    pooled_and_gradients,
    random_case,
    repeatable,
)

compiled_only = pytest.mark.parametrize("backend", ["compiled"], indirect=True)


def torchvision_pooled(features, boxes, output_size, sampling_ratio):
    names = [str(level) for level in range(len(features))]
    pool = MultiScaleRoIAlign(names, output_size, sampling_ratio)
    pooled = pool(dict(zip(names, features, strict=True)), list(boxes), [image_size(features)] * len(boxes))
    return pooled.unflatten(0, boxes.shape[:2])


def roi_aligned(features, boxes, output_size, sampling_ratio, aligned):
    """torchvision's RoIAlign of one level, which knows `aligned` and adaptive sampling, on the level of each box."""
    scales = [1 / stride for stride in STRIDES[: len(features)]]
    levels = assign_levels(boxes.flatten(0, 1), scales)
    image = torch.arange(len(boxes)).repeat_interleave(boxes.shape[1])
    rois = torch.cat((image[:, None].to(boxes), boxes.flatten(0, 1)), 1)
    pooled = features[0].new_zeros(len(rois), features[0].shape[1], output_size, output_size)
    for level, (feature, scale) in enumerate(zip(features, scales, strict=True)):
        rows = (levels == level).nonzero().flatten()
        of_level = ops.roi_align(feature, rois[rows], output_size, scale, sampling_ratio or -1, aligned)
        pooled = pooled.index_put((rows,), of_level)
    return pooled.unflatten(0, boxes.shape[:2])


def test_a_constant_feature_map_pools_to_the_constant():
    features = [torch.full((1, 2, 32, 48), 5.0)]
    pooled = pool(features, torch.tensor([[[10.0, 20.0, 60.0, 70.0]]]))
    torch.testing.assert_close(pooled, torch.full((1, 1, 2, 3, 3), 5.0))


@compiled_only
def test_compiled_output_and_gradient_equal_those_of_plain_torch(seeds):
    for seed in seeds(200):
        case = random_case(seed)
        with cuda_ops.backend("reference"):
            expected = pooled_and_gradients(*case)
        results = pooled_and_gradients(*case)
        torch.testing.assert_close(results, expected, rtol=1e-4, atol=1e-5)
        assert results[0].stride() == expected[0].stride()


@pytest.mark.parametrize("deterministic", [False, True])
@compiled_only
def test_output_and_gradient_on_cuda_equal_those_of_plain_torch(seeds, deterministic, cuda):
    for seed in seeds(80):
        with cuda_ops.backend("reference"):
            expected = pooled_and_gradients(*random_case(seed))
        with repeatable(deterministic):
            results = pooled_and_gradients(*random_case(seed, cuda))
        torch.testing.assert_close([result.cpu() for result in results], list(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("deterministic", "width", "dtype"), [(False, 400, torch.float64), (True, 780, torch.float32)])
@compiled_only
def test_a_level_whose_taps_exceed_shared_memory_is_pooled_on_cuda_as_in_plain_torch(deterministic, width, dtype, cuda):
    """With adaptive sampling, of which a box over the whole level takes as many as the level is wide."""
    level = torch.randn(1, 1, 23, width, generator=torch.Generator().manual_seed(0), dtype=dtype)
    boxes = torch.tensor([[[900.0, 0.0, 903.0, 12.0], [0.0, 9.0, 4.0 * width, 40.0], [1500.0, -9.0, 20.0, 12.0]]])
    for layout in ("planes", "channels_last"):
        with cuda_ops.backend("reference"):
            expected = pooled_and_gradients([level.clone().requires_grad_()], boxes, layout, 7, 0, True)
        with repeatable(deterministic):
            results = pooled_and_gradients([level.to(cuda).requires_grad_()], boxes.to(cuda), layout, 7, 0, True)
        torch.testing.assert_close([part.cpu() for part in results], list(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@compiled_only
def test_boxes_may_lie_anywhere_in_memory_on_cuda(dtype, cuda):
    """Kernels read a box at once, for which it must lie at a multiple of its size."""
    features, boxes = make_features(5), make_boxes(5, 6).to(dtype)
    with cuda_ops.backend("reference"):
        expected = pool(features, boxes)
    odd = torch.cat((boxes.new_zeros(1), boxes.flatten())).to(cuda)[1:].view(boxes.shape)
    assert odd.data_ptr() % 16
    pooled = pool([level.to(cuda) for level in features], odd)
    torch.testing.assert_close(pooled.cpu(), expected)
    pooled.sum().backward()


def test_output_and_gradient_equal_those_of_torchvision(seeds):
    for seed in seeds(200):
        output_size, sampling_ratio = [(7, 2), (1, 1), (3, 3), (5, 2)][seed % 4]
        features, boxes = make_features(seed), make_boxes(seed, 1 + seed % 12)
        ours = pool(features, boxes, output_size, sampling_ratio)
        theirs = torchvision_pooled(features, boxes, output_size, sampling_ratio)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(seed))
        for our_gradient, their_gradient in zip(
            torch.autograd.grad(ours, features, direction),
            torch.autograd.grad(theirs, features, direction),
            strict=True,
        ):
            torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("aligned", [False, True])
def test_aligned_and_adaptive_output_and_gradient_equal_those_of_torchvision(seeds, aligned, sampling_ratio):
    for seed in seeds(24):
        output_size = (7, 1, 3, 14)[seed % 4]
        features, boxes = make_features(seed), make_boxes(seed, 1 + seed % 12)
        boxes = boxes.clamp(min=0).minimum(torch.tensor([192.0, 128.0]).repeat(2))  # as proposals are
        ours = pool(features, boxes, output_size, sampling_ratio, aligned)
        theirs = roi_aligned(features, boxes, output_size, sampling_ratio, aligned)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(seed))
        for our_gradient, their_gradient in zip(
            torch.autograd.grad(ours, features, direction),
            torch.autograd.grad(theirs, features, direction),
            strict=True,
        ):
            torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-4, atol=1e-4)


def test_an_aligned_box_over_whole_cells_pools_these_cells():
    """Half a pixel matters: without `aligned` each bin would mix its cell with the next one."""
    (level,) = features = make_features(0, num_images=1, strides=(4,))
    boxes = torch.tensor([[[8.0, 16.0, 20.0, 28.0]]])  # cells 2 to 4 of rows 4 to 6
    pooled = pool(features, boxes, output_size=3, sampling_ratio=1, aligned=True)
    torch.testing.assert_close(pooled[0, 0], level[0, :, 4:7, 2:5])


def test_adaptive_sampling_takes_a_sample_a_cell():
    """A bin of 4 × 4 cells is their mean; two samples on either axis would see just some of them."""
    (level,) = features = make_features(1, num_images=1, strides=(4,))
    boxes = torch.tensor([[[0.0, 0.0, 48.0, 48.0]]])
    expected = torch.nn.functional.avg_pool2d(level[0, :, :12, :12], 4)
    torch.testing.assert_close(pool(features, boxes, sampling_ratio=0, aligned=True)[0, 0], expected)


def test_an_adaptive_bin_of_a_box_turned_inside_out_is_empty():
    boxes = torch.tensor([[[50.0, 50.0, 20.0, 20.0]]] * 2)
    pooled = pool(make_features(0), boxes, sampling_ratio=0, aligned=True)
    assert torch.equal(pooled, torch.zeros_like(pooled))


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("side", [400.0, 1e6, 1e30])
def test_a_box_far_out_of_the_image_costs_no_more_adaptive_samples(side, aligned):
    features, boxes = make_features(0), torch.tensor([[[-side, -side, side, side]]] * 2)
    assert pool(features, boxes, sampling_ratio=0, aligned=aligned).isfinite().all()


@pytest.mark.parametrize("side", [111.0, 112.0, 113.0, 223.9, 223.9999, 224.0, 447.0, 448.0, 2000.0])
def test_a_box_is_pooled_from_the_level_that_torchvision_chooses(side):
    features, boxes = make_features(0), torch.tensor([[[-20.0, -20.0, side - 20, side - 20]]] * 2)
    torch.testing.assert_close(pool(features, boxes), torchvision_pooled(features, boxes, 3, 2))


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("planes", torch.float32),
        ("channels_last", torch.float64),
        ("mixed", torch.float32),
        ("mixed", torch.float16),
        ("channels_last", torch.bfloat16),
    ],
)
@compiled_only
def test_torch_knows_the_operators(layout, dtype):
    features = [level.detach().to(dtype) for level in laid_out(make_features(0), layout)]
    scales = [1 / stride for stride in STRIDES]
    boxes = make_boxes(0, 5)
    for requires_grad in (False, True):
        leaves = [level.requires_grad_(requires_grad) for level in features]
        for sampling in ((2, False), (0, True)):
            args = (leaves, [boxes, boxes[:, :2]], scales, [3, 2], *sampling)
            torch.library.opcheck(torch.ops.cuda_ops.multilevel_roi_align.default, args)
    grads = [pool([level.detach() for level in features], own) for own in (boxes, boxes[:, :2])]
    sizes = [side for level in features for side in level.shape[2:]]
    channels_last = [level.stride(1) == 1 for level in features]
    args = (grads, [boxes, boxes[:, :2]], sizes, channels_last, scales, 2, False, False)
    results = torch.library.opcheck(torch.ops.cuda_ops.multilevel_roi_align_backward.default, args)
    assert set(results.values()) == {"SUCCESS"}


def test_a_box_within_rounding_of_a_level_goes_where_plain_torch_puts_it():
    features = [
        torch.full((1, 1, IMAGE_SIZE[0] // stride, IMAGE_SIZE[1] // stride), float(stride)) for stride in STRIDES
    ]
    generator = torch.Generator().manual_seed(0)
    sides = 224.0 * 2.0 ** torch.randint(-3, 3, (4000, 1), generator=generator)
    start = torch.rand(4000, 2, generator=generator) * 20 - sides / 2 + 60
    sides = sides * (1 + torch.randint(-24, 25, (4000, 2), generator=generator) * 2.0**-24)
    boxes = torch.cat((start, start + sides), dim=1)
    levels = pool(features, boxes[None], output_size=1, sampling_ratio=1).flatten().log2().round().long() - 2
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    is_rounded_well = (
        area.sqrt() == area.double().sqrt().float()
    )  # torch's square root may be one off in the last place
    differs = levels != assign_levels(boxes, [1 / stride for stride in STRIDES])
    assert not (differs & is_rounded_well).any()
    assert differs.float().mean() < 0.01
    assert (levels.bincount(minlength=4) > 100).all()


def test_layout_of_features_and_strides_of_boxes_do_not_matter():
    features, boxes = make_features(2), make_boxes(2, 6)
    channels_last = [level.contiguous(memory_format=torch.channels_last) for level in features]
    strided = boxes.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert torch.equal(pool(channels_last, strided), pool(features, boxes))


def test_output_flattens_to_a_channels_last_batch_without_a_copy():
    pooled = pool(make_features(3), make_boxes(3, 6))
    batch = pooled.flatten(0, 1)
    assert batch.data_ptr() == pooled.data_ptr()
    assert batch.is_contiguous(memory_format=torch.channels_last)


def test_chunks_change_nothing(monkeypatch):
    features, boxes = make_features(4), make_boxes(4, 9)
    whole = pool(features, boxes)
    monkeypatch.setattr(implementation, "MAX_CHUNK_BYTES", 4000)
    assert torch.equal(pool(features, boxes), whole)


def test_low_precision_features_pool_to_low_precision():
    features, boxes = make_features(5), make_boxes(5, 6)
    pooled = pool([level.detach().bfloat16() for level in features], boxes)
    assert pooled.dtype == torch.bfloat16
    torch.testing.assert_close(pooled.float(), pool(features, boxes), rtol=0.02, atol=0.05)


def test_boxes_in_low_precision_are_served_too():
    features, boxes = make_features(10), make_boxes(10, 5).bfloat16()
    with cuda_ops.backend("reference"):
        expected = pool(features, boxes)
    assert torch.equal(pool(features, boxes), expected)


def test_autocast_leaves_the_precision_of_the_features():
    features, boxes = make_features(11), make_boxes(11, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pool(features, boxes).dtype == torch.float32
        assert pool([level.bfloat16() for level in features], boxes).dtype == torch.bfloat16


def test_padding_pools_finite_values():
    values = (0.0, torch.nan, torch.inf, -1e30)
    boxes = torch.tensor([[[value] * 4 for value in values]] * 2)
    for sampling in ((2, False), (0, True)):
        assert pool(make_features(6), boxes, 3, *sampling).isfinite().all()


def test_no_boxes_pool_to_nothing_and_still_give_a_gradient():
    features = make_features(7)
    pooled = pool(features, torch.zeros(2, 0, 4))
    assert pooled.shape == (2, 0, 3, 3, 3)
    pooled.sum().backward()
    assert all((level.grad == 0).all() for level in features)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"features": []}, r"features must be 1 to 8 levels, got 0"),
        ({"features": [torch.zeros(2, 3, 2, 2)] * 9}, r"features must be 1 to 8 levels, got 9"),
        ({"features": [torch.zeros(2, 3, 0, 4)]}, r"features must be .* at least 1, got \['\[2, 3, 0, 4\]"),
        ({"features": [torch.zeros(2, 3, 4, 0)]}, r"features must be .* at least 1, got \['\[2, 3, 4, 0\]"),
        ({"features": [torch.zeros(2, 0, 4, 4)]}, r"features must be .* at least 1, got \['\[2, 0, 4, 4\]"),
        ({"features": [torch.zeros(2, 3, 16, 16), torch.zeros(1, 3, 8, 8)]}, r"features must be \[N, C, H_l, W_l\]"),
        ({"boxes": torch.zeros(1, 3, 4)}, r"boxes must be of 2 images, got \[1, 3, 4\]"),
        ({"image_size": (0, 64)}, r"image_size must be positive"),
        ({"output_size": 0}, r"output_size must be positive"),
        ({"sampling_ratio": -1}, r"sampling_ratio must be 0 to 128, got -1"),
        ({"sampling_ratio": 129}, r"sampling_ratio must be 0 to 128, got 129"),
        ({"sampling_ratio": 2.5}, r"sampling_ratio must be whole, got 2.5"),
        ({"output_size": 2.5}, r"output_size must be whole, got \[2.5\]"),
    ],
)
def test_wrong_input_is_named(wrong, message):
    right = {"features": make_features(0), "boxes": torch.zeros(2, 3, 4), "image_size": IMAGE_SIZE}
    with pytest.raises(ValueError, match=f"^multilevel_roi_align: {message}"):
        multilevel_roi_align(**right | {"output_size": 2, "sampling_ratio": 2} | wrong)
