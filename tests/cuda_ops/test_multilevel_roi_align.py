"""RoIAlign, forward and backward: torchvision's MultiScaleRoIAlign and, aligned or adaptive, its RoIAlign of one level."""

import random
from contextlib import contextmanager

import pytest
import torch
from torchvision import ops
from torchvision.ops import MultiScaleRoIAlign

import cuda_ops
from cuda_ops import multilevel_roi_align, multilevel_roi_align_heads
from cuda_ops.operators import multilevel_roi_align as implementation
from cuda_ops.roi_sampling import assign_levels

IMAGE_SIZE = (128, 192)
STRIDES = (4, 8, 16, 32)
LAYOUTS = ("planes", "channels_last", "mixed", "slices", "columns")
compiled_only = pytest.mark.parametrize("backend", ["compiled"], indirect=True)


def make_features(seed, num_images=2, channels=3, strides=STRIDES, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(num_images, channels, IMAGE_SIZE[0] // stride, IMAGE_SIZE[1] // stride) for stride in strides]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def make_boxes(seed, num_boxes, num_images=2):
    """Of every size, some reaching out of the image, the first without area."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(num_images, num_boxes, 2, generator=generator) * 210 - 10
    half_side = torch.exp(torch.rand(num_images, num_boxes, 2, generator=generator) * 5) * 1.5
    boxes = torch.cat((centre - half_side, centre + half_side), dim=-1)
    boxes[:, :1, 2:] = boxes[:, :1, :2]
    return boxes


def torchvision_pooled(features, boxes, output_size, sampling_ratio):
    names = [str(level) for level in range(len(features))]
    pool = MultiScaleRoIAlign(names, output_size, sampling_ratio)
    pooled = pool(dict(zip(names, features, strict=True)), list(boxes), [IMAGE_SIZE] * len(boxes))
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


def pool(features, boxes, output_size=3, sampling_ratio=2, aligned=False):
    return multilevel_roi_align(
        features,
        boxes,
        image_size=IMAGE_SIZE,
        output_size=output_size,
        sampling_ratio=sampling_ratio,
        aligned=aligned,
    )


def test_a_constant_feature_map_pools_to_the_constant():
    features = [torch.full((1, 2, 32, 48), 5.0)]
    pooled = pool(features, torch.tensor([[[10.0, 20.0, 60.0, 70.0]]]))
    torch.testing.assert_close(pooled, torch.full((1, 1, 2, 3, 3), 5.0))


def laid_out(features, layout):
    """The same values in other places in memory; gradients flow to `features`."""

    def place(level, row):
        if layout == "channels_last" or (layout == "mixed" and row % 2):
            return level.contiguous(memory_format=torch.channels_last)
        if layout == "slices":
            return torch.nn.functional.pad(level, (1, 2, 3, 1, 2, 1))[:, 2:-1, 3:-1, 1:-2]
        return level.transpose(2, 3).contiguous().transpose(2, 3) if layout == "columns" else level

    return [place(level, row) for row, level in enumerate(features)]


def random_case(seed, device="cpu"):
    """Features, boxes and arguments with awkward shapes."""
    draw = random.Random(seed)
    num_images, channels = draw.choice((0, 1, 2, 3)), draw.choice((1, 2, 5, 8, 17, 36))
    num_boxes = draw.choice((0, 1, 7, 13))
    dtype = draw.choice((torch.float32, torch.float64))
    features = make_features(seed, num_images, channels, STRIDES[: draw.randint(1, 4)], dtype)
    boxes = make_boxes(seed, num_boxes, num_images).to(draw.choice((torch.float32, torch.float64)))
    if draw.random() < 0.3:
        boxes = (boxes / 16).round() * 16
    if draw.random() < 0.3:
        boxes = boxes.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    if draw.random() < 0.3:
        boxes[:, 1::3] = boxes[:, 1::3].flip(-1)  # turned inside out, with x and y changing places
    features = [level.detach().to(device).requires_grad_() for level in features]
    output_size, sampling_ratio = draw.choice(
        ((7, 2), (14, 2), (1, 1), (3, 3), (5, 1), (2, 4), (7, 0), (14, 0), (3, 0))
    )
    return features, boxes.to(device), draw.choice(LAYOUTS), output_size, sampling_ratio, draw.random() < 0.5


@contextmanager
def repeatable(is_asked):
    """Within it results must be the same each time, if that is asked."""
    torch.use_deterministic_algorithms(is_asked)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def pooled_and_gradients(features, boxes, layout, output_size, sampling_ratio, aligned=False):
    pooled = pool(laid_out(features, layout), boxes, output_size, sampling_ratio, aligned)
    # Drawn in float32: for another dtype torch may draw other numbers.
    direction = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(0)).to(pooled)
    direction[:, ::3] = 0
    return pooled, *torch.autograd.grad(pooled, features, direction)


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


def pool_heads(features, boxes, layout, output_sizes, sampling_ratio=2, aligned=False, at_once=True):
    """Output of each head, by one call or by a call a head."""
    levels, how = laid_out(features, layout), {"image_size": IMAGE_SIZE, "sampling_ratio": sampling_ratio}
    if at_once:
        return multilevel_roi_align_heads(levels, boxes, output_sizes=output_sizes, aligned=aligned, **how)
    return [pool(levels, *head, sampling_ratio, aligned) for head in zip(boxes, output_sizes, strict=True)]


def gradients_of(pooled, features):
    """The gradient of all heads."""
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(out.shape, generator=generator).to(out) for out in pooled]
    return torch.autograd.grad(pooled, features, directions)


def heads_and_gradients(features, *case, at_once=True):
    pooled = pool_heads(features, *case, at_once=at_once)
    return pooled, gradients_of(pooled, features)


def heads_case(seed, dtype=torch.float32, device="cpu"):
    """Like a box head and a mask head, whose boxes are the first of the other's; then any two or four."""
    features = [level.detach().to(device, dtype).requires_grad_() for level in make_features(seed, channels=36)]
    boxes = make_boxes(seed, 13).to(device)
    if seed % 2:
        return features, [boxes, boxes[:, :4]], LAYOUTS[seed % 5], (7, 14), *((2, False), (0, True))[seed % 3 % 2]
    heads = [boxes, boxes[:, :0], boxes.flip(1).double(), boxes.flip(-1)]
    return features, heads, LAYOUTS[seed % 5], (3, 7, 5, 1), *((0, True), (2, False))[seed % 3 % 2]


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
def test_torch_is_told_all_about_the_operators(layout, dtype):
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


def test_boxes_get_no_gradient():
    boxes = make_boxes(0, 4).requires_grad_()
    pool(make_features(0), boxes).sum().backward()
    assert boxes.grad is None


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_gradients_of_many_boxes_add_up_in_low_precision(dtype):
    boxes = torch.tensor([40.0, 40.0, 100.0, 100.0]).expand(1, 8000, 4)
    wide = [level.detach().requires_grad_() for level in make_features(10, num_images=1, channels=2)]
    narrow = [level.detach().to(dtype).requires_grad_() for level in wide]
    expected, results = (torch.autograd.grad(pool(levels, boxes).float().sum(), levels) for levels in (wide, narrow))
    assert max(level.max() for level in expected) > 1000
    for gradient, exact in zip(results, expected, strict=True):
        torch.testing.assert_close(gradient, exact.to(dtype), rtol=0.01, atol=0)


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
