"""RoIAlign's gradients, and several heads at once, whose gradients meet in one pyramid."""

import pytest
import torch

import cuda_ops
from cuda_ops import multilevel_roi_align_heads
from cuda_ops.operators import multilevel_roi_align as implementation

from .roi_cases import (
    IMAGE_SIZE,
    LAYOUTS,
    gradients_of,
    heads_and_gradients,
    heads_case,
    laid_out,
    make_boxes,
    make_features,
    pool,
    pool_heads,
    pooled_and_gradients,
    repeatable,
)

compiled_only = pytest.mark.parametrize("backend", ["compiled"], indirect=True)


def test_heads_pooled_at_once_give_the_values_and_the_gradients_of_a_call_each(seeds):
    for seed in seeds(10):
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
            case = heads_case(seed, dtype)
            pooled, gradients = heads_and_gradients(*case)
            each, expected = heads_and_gradients(*case, at_once=False)
            assert all(torch.equal(a, b) for a, b in zip(pooled, each, strict=True))
            assert [a.stride() for a in pooled] == [b.stride() for b in each]
            torch.testing.assert_close(gradients, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("deterministic", [False, True])
@compiled_only
def test_heads_pooled_at_once_on_cuda_equal_those_of_plain_torch(seeds, deterministic, cuda):
    for seed in seeds(10):
        with cuda_ops.backend("reference"):
            expected = heads_and_gradients(*heads_case(seed))
        with repeatable(deterministic):
            results = heads_and_gradients(*heads_case(seed, device=cuda))
        for parts, wanted in zip(results, expected, strict=True):
            torch.testing.assert_close([part.cpu() for part in parts], list(wanted), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_sum_of_heads_gradients_is_rounded_once(dtype):
    """Of two calls each gradient and the sum are rounded: an error of more than half a unit in the last place."""
    features, *case = heads_case(1, dtype)
    wide = [level.detach().float().requires_grad_() for level in features]
    levels, boxes, sizes = features, case[0], case[2]

    def gradients(levels, at_once):
        _, found = heads_and_gradients(levels, boxes, "channels_last", sizes, 2, True, at_once=at_once)
        return torch.cat([gradient.float().flatten() for gradient in found])

    exact = gradients(wide, at_once=True)
    unit = torch.finfo(dtype).eps * 2.0 ** torch.frexp(exact).exponent.sub(1)
    errors = [(gradients(levels, at_once) - exact).abs() / unit for at_once in (True, False)]
    # Bins' gradients are drawn in the low type, whose rounding is the same in both.
    assert errors[0].mean() < errors[1].mean()


def test_the_gradients_of_heads_meet_in_one_pyramid(backend):
    """One zero fill, and nothing to add."""
    backward = {"compiled": "cuda_ops::multilevel_roi_align_backward", "reference": "aten::_embedding_bag_backward"}
    features, *case = heads_case(1)
    for at_once, passes in ((True, 1), (False, 2)):
        pooled = pool_heads(features, *case, at_once=at_once)
        with torch.profiler.profile() as trace:
            gradients_of(pooled, features)
        names = [event.name for event in trace.events()]
        assert names.count(backward[backend]) == passes
        assert ("aten::add_" in names or "aten::add" in names) == (passes > 1)


def test_a_head_that_nobody_learns_from_adds_nothing():
    features, boxes, *_ = heads_case(1)
    how = {"image_size": IMAGE_SIZE, "sampling_ratio": 2}
    used, _ = multilevel_roi_align_heads(features, boxes, output_sizes=(7, 14), **how)
    gradients = torch.autograd.grad(used.sum(), features)
    torch.testing.assert_close(gradients, torch.autograd.grad(pool(features, boxes[0], 7).sum(), features))


@pytest.mark.parametrize("layout", ["planes", "channels_last"])
@compiled_only
def test_a_block_on_cuda_serves_many_channels_of_its_box(layout, cuda):
    """Where there are more boxes than a GPU is busy with: the emulator has one multiprocessor, so eighty are."""
    boxes, sizes = [make_boxes(3, 40), make_boxes(4, 11)], (3, 14)
    with cuda_ops.backend("reference"):
        expected = heads_and_gradients(make_features(3, channels=104), boxes, layout, sizes)
    features = [level.detach().to(cuda).requires_grad_() for level in make_features(3, channels=104)]
    results = heads_and_gradients(features, [own.to(cuda) for own in boxes], layout, sizes)
    for parts, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close([part.cpu() for part in parts], list(wanted), rtol=1e-4, atol=1e-5)


@compiled_only
def test_the_environment_chooses_how_a_gpu_adds_gradients(emulator, monkeypatch):
    for way, deterministic, gathers in (
        (None, False, 0),
        ("scatter", False, 0),
        ("gather", False, 1),
        ("scatter", True, 1),
    ):
        monkeypatch.delenv(implementation.VARIABLE, raising=False)
        if way is not None:
            monkeypatch.setenv(implementation.VARIABLE, way)
        emulator.launches()
        with emulator.serving(), repeatable(deterministic):
            heads_and_gradients(*heads_case(1))
        assert emulator.launches().get("gather_kernel<T, W>", 0) == gathers
    monkeypatch.setenv(implementation.VARIABLE, "fast")
    with pytest.raises(ValueError, match="CUDA_OPS_ROI_ALIGN_BACKWARD must be scatter or gather, got fast"):
        heads_and_gradients(*heads_case(1))


@pytest.mark.parametrize("layout", LAYOUTS)
@compiled_only
def test_deterministic_gradient_on_cuda_repeats_in_every_bit(layout, cuda):
    features = [level.detach().to(cuda).requires_grad_() for level in make_features(0, channels=36)]
    case = (features, make_boxes(0, 20).to(cuda), layout, 7, 2)
    with repeatable(True):
        first, *others = (pooled_and_gradients(*case) for _ in range(3))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("layout", ["planes", "channels_last", "mixed"])
def test_gradient_equals_finite_differences(layout):
    features = make_features(0, num_images=1, channels=2, strides=(32, 64), dtype=torch.float64)
    boxes = torch.tensor([[[0.0, 0.0, 100.0, 90.0], [30.0, 10.0, 190.0, 120.0]]], dtype=torch.float64)
    for sampling_ratio, aligned in ((2, False), (0, True)):
        assert torch.autograd.gradcheck(
            lambda *levels, case=(2, sampling_ratio, aligned): pool(laid_out(levels, layout), boxes, *case), features
        )


@compiled_only
def test_gradients_of_gradients_equal_finite_differences():
    features = make_features(0, num_images=1, channels=2, strides=(32, 64), dtype=torch.float64)
    boxes = [torch.tensor([[[0.0, 0.0, 100.0, 90.0], [30.0, 10.0, 190.0, 120.0]]], dtype=torch.float64)]
    boxes.append(boxes[0][:, :1])
    sizes = {"image_size": IMAGE_SIZE, "output_sizes": (2, 3), "sampling_ratio": 2}
    assert torch.autograd.gradgradcheck(
        lambda *levels: tuple(cuda_ops.multilevel_roi_align_heads(levels, boxes, **sizes)), features
    )


@compiled_only
def test_gradients_come_in_the_layout_of_the_features():
    features = [level.detach().requires_grad_() for level in laid_out(make_features(1), "mixed")]
    gradients = torch.autograd.grad(pool(features, make_boxes(1, 5)).sum(), features)
    assert [gradient.stride() for gradient in gradients] == [level.stride() for level in features]


@pytest.mark.parametrize("layout", ["planes", "channels_last"])
def test_the_layout_of_the_incoming_gradient_does_not_matter(layout):
    features, boxes = make_features(2, channels=9), make_boxes(2, 20)
    pooled = pool(laid_out(features, layout), boxes)
    direction = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(0)).contiguous()
    assert direction.stride() != pooled.stride()
    expected = torch.autograd.grad(pooled, features, direction.clone().copy_(direction), retain_graph=True)
    for strided in (torch.empty_like(pooled).copy_(direction), direction.transpose(0, 2).contiguous().transpose(0, 2)):
        gradients = torch.autograd.grad(pooled, features, strided, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@compiled_only
def test_the_number_of_threads_changes_no_bit(layout):
    features, boxes, num_threads = make_features(8, channels=70), make_boxes(8, 60), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(pooled_and_gradients(features, boxes, layout, 7, 2))
    finally:
        torch.set_num_threads(num_threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_boxes_get_no_gradient():
    boxes = make_boxes(0, 4).requires_grad_()
    pool(make_features(0), boxes).sum().backward()
    assert boxes.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_low_precision_is_rounded_once_at_the_end(layout, dtype):
    features = [level.detach().to(dtype) for level in make_features(9, channels=19)]
    wide = [level.float().requires_grad_() for level in features]
    case = (make_boxes(9, 12), layout, 7, 2)
    results = pooled_and_gradients([level.requires_grad_() for level in features], *case)
    expected = pooled_and_gradients(wide, *case)
    assert torch.equal(results[0], expected[0].to(dtype))
    torch.testing.assert_close(
        results[1:], tuple(gradient.to(dtype) for gradient in expected[1:]), rtol=0.02, atol=0.02
    )


@pytest.mark.parametrize("deterministic", [False, True])
@compiled_only
def test_low_precision_on_cuda_is_rounded_once_at_the_end(deterministic, cuda):
    for dtype, layout in ((torch.float16, "channels_last"), (torch.bfloat16, "planes")):
        features = [level.detach().to(dtype) for level in make_features(9, channels=19)]
        case = (make_boxes(9, 12), layout, 7, 2)
        with cuda_ops.backend("reference"):
            expected = pooled_and_gradients([level.float().requires_grad_() for level in features], *case)
        with repeatable(deterministic):
            results = pooled_and_gradients(
                [level.to(cuda).requires_grad_() for level in features], case[0].to(cuda), *case[1:]
            )
        for part, wanted in zip(results, expected, strict=True):
            torch.testing.assert_close(part.cpu(), wanted.to(dtype), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_gradients_of_many_boxes_add_up_in_low_precision(dtype):
    boxes = torch.tensor([40.0, 40.0, 100.0, 100.0]).expand(1, 8000, 4)
    wide = [level.detach().requires_grad_() for level in make_features(10, num_images=1, channels=2)]
    narrow = [level.detach().to(dtype).requires_grad_() for level in wide]
    expected, results = (torch.autograd.grad(pool(levels, boxes).float().sum(), levels) for levels in (wide, narrow))
    assert max(level.max() for level in expected) > 1000
    for gradient, exact in zip(results, expected, strict=True):
        torch.testing.assert_close(gradient, exact.to(dtype), rtol=0.01, atol=0)


def test_the_host_never_waits_for_several_heads_or_in_the_backward_pass(no_waiting):
    features, *case = heads_case(1)
    expected, _ = heads_and_gradients(features, *case)
    with no_waiting(torch.device("cpu")):
        pooled, gradients = heads_and_gradients(features, *case)
    torch.testing.assert_close(pooled, expected)
    assert all(gradient is not None for gradient in gradients)


@compiled_only
def test_on_cuda_the_host_never_waits_for_several_heads(cuda, no_waiting):
    features, *case = heads_case(1, device=cuda)
    with no_waiting(cuda):
        pooled = pool_heads(features, *case)
    assert {head.device.type for head in pooled} == {cuda.type}


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([], "of 1 to 4 heads, with an output size each, got 0"),
        ([(2, 3, 4)], "of 1 to 4 heads, with an output size each, got 1"),
        ([(2, 3, 4), (1, 3, 4)], r"of 2 images, got \[1, 3, 4\]"),
        ([(2, 3, 4), (2, 3, 3)], r"\[…, boxes, 4\] float, got \[2, 3, 3\]"),
    ],
)
def test_wrong_boxes_of_a_head_are_named(boxes, message):
    how = {"image_size": IMAGE_SIZE, "output_sizes": (2, 3), "sampling_ratio": 2}
    with pytest.raises(ValueError, match=f"^multilevel_roi_align: boxes must be {message}"):
        multilevel_roi_align_heads(make_features(0), [torch.zeros(shape) for shape in boxes], **how)


def test_a_head_with_boxes_elsewhere_is_named():
    boxes = [torch.zeros(2, 3, 4), torch.zeros(2, 3, 4, device="meta")]
    with pytest.raises(ValueError, match=r"^multilevel_roi_align: boxes\[0\] and .* must be on one device"):
        multilevel_roi_align_heads(
            make_features(0), boxes, image_size=IMAGE_SIZE, output_sizes=(2, 3), sampling_ratio=2
        )
