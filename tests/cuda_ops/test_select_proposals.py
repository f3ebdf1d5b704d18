"""Selection of proposals: what torchvision's RPN hands to its NMS."""

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import clip_boxes_to_image, remove_small_boxes

from cuda_ops import decode_boxes, reference, select_proposals

compiled_only = pytest.mark.parametrize("backend", ["compiled"], indirect=True)


def torchvision_proposals(objectness, box_deltas, anchors, image_size, level_sizes, top_n, min_size):
    """Of one image: per level the (boxes, scores) left, built from torchvision's own steps."""
    levels = []
    for logits, deltas, level_anchors in zip(
        objectness.split(level_sizes), box_deltas.split(level_sizes), anchors.split(level_sizes), strict=True
    ):
        logits, idx = logits.topk(min(top_n, len(logits)))
        boxes = BoxCoder((1.0, 1.0, 1.0, 1.0)).decode_single(deltas[idx], level_anchors[idx])
        boxes = clip_boxes_to_image(boxes, image_size)
        keep = remove_small_boxes(boxes, min_size)
        levels.append((boxes[keep], logits.sigmoid()[keep]))
    return levels


@pytest.fixture
def make_case(random_boxes):
    def make(seed, level_sizes, num_images=2):
        generator = torch.Generator().manual_seed(seed)
        num_anchors = sum(level_sizes)
        objectness = torch.randn(num_images, num_anchors, generator=generator) * 3
        deltas = torch.randn(num_images, num_anchors, 4, generator=generator)
        image_sizes = torch.randint(30, 120, (num_images, 2), generator=generator, dtype=torch.int32)
        return objectness, deltas, random_boxes(num_anchors, seed=seed), image_sizes

    return make


def test_proposals_equal_those_of_torchvision(seeds, make_case):
    for seed in seeds(200):
        level_sizes = [(60, 15, 3), (7,), (12, 1, 30, 5)][seed % 3]
        objectness, deltas, anchors, image_sizes = make_case(seed, level_sizes)
        top_n, min_size = 1 + seed % 20, [1e-3, 5.0][seed % 2]
        boxes, scores = select_proposals(objectness, deltas, anchors, image_sizes, level_sizes, top_n, min_size)
        assert boxes.shape == (2, len(level_sizes), min(top_n, max(level_sizes)), 4)
        for n, image_size in enumerate(image_sizes.tolist()):
            expected = torchvision_proposals(
                objectness[n], deltas[n], anchors, image_size, level_sizes, top_n, min_size
            )
            for level, (level_boxes, level_scores) in enumerate(expected):
                keep = scores[n, level] > -torch.inf
                torch.testing.assert_close(boxes[n, level][keep], level_boxes, rtol=1e-6, atol=1e-5)
                torch.testing.assert_close(scores[n, level][keep], level_scores, rtol=1e-6, atol=0)


def test_a_box_that_is_clipped_away_is_marked(make_case):
    objectness, deltas, anchors, _ = make_case(0, (5,), num_images=1)
    _, scores = select_proposals(objectness, deltas * 0, anchors + 500, torch.tensor([[100, 100]]), (5,), 5)
    assert scores.tolist() == [[[-torch.inf] * 5]]


def test_a_level_with_few_anchors_is_padded_with_marks(make_case):
    objectness, deltas, anchors, image_sizes = make_case(1, (9, 2))
    _, scores = select_proposals(objectness, deltas * 0, anchors, image_sizes * 10, (9, 2), 4)
    assert (scores[:, 1, 2:] == -torch.inf).all()
    assert (scores[:, 1, :2] > 0).all()


def test_low_precision_logits_and_strides_do_not_matter(make_case):
    objectness, deltas, anchors, image_sizes = make_case(2, (40, 8))
    objectness, deltas = objectness.bfloat16(), deltas.bfloat16()
    expected = select_proposals(objectness.float(), deltas.float(), anchors, image_sizes, (40, 8), 6)
    strided = objectness.t().contiguous().t(), deltas.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    boxes, scores = select_proposals(*strided, anchors, image_sizes, (40, 8), 6)
    assert boxes.dtype == torch.float32
    assert torch.equal(boxes, expected[0])
    assert torch.equal(scores, expected[1])


def test_logits_that_are_not_numbers_keep_the_shape(make_case):
    objectness, deltas, anchors, image_sizes = make_case(3, (10,))
    _, scores = select_proposals(objectness * torch.nan, deltas * torch.nan, anchors, image_sizes, (10,), 4)
    assert (scores == -torch.inf).all()


LEVEL_SIZES = [(1,), (2000, 333, 17), (15, 16, 17), (5, 0, 1), (700, 31), (33, 1, 1, 640, 2)]


def awkward_case(seed, make_case):
    """Everything select_proposals takes: one to hundreds of anchors a level, other dtypes, infinite and
    missing logits.
    """
    level_sizes = LEVEL_SIZES[seed % len(LEVEL_SIZES)]
    objectness, deltas, anchors, image_sizes = make_case(seed, level_sizes, num_images=seed % 4)
    objectness[:, ::37] = [torch.inf, -torch.inf, -0.0, torch.nan][seed // 2 % 4]
    anchors = anchors.double() if seed % 5 == 0 else anchors
    objectness = objectness.t().contiguous().t() if seed % 3 == 0 else objectness
    deltas = deltas * 4 if seed % 7 == 0 else deltas  # past the largest growth
    top_n, min_size = [1, 3, 15, 16, 40, 3000][seed // 3 % 6], [1e-3, 4.0][seed % 2]
    return objectness, deltas, anchors, image_sizes, level_sizes, top_n, min_size


def first_of_equals(objectness, deltas, anchors, image_sizes, level_sizes, top_n, min_size):
    """What is specified, image by image and level by level: of equal logits the first are taken."""
    top_k = min(top_n, max(level_sizes))
    boxes = anchors.new_zeros(len(objectness), len(level_sizes), top_k, 4)
    scores = anchors.new_full(boxes.shape[:3], -torch.inf)
    for n, (height, width) in enumerate(image_sizes.tolist()):
        limits = torch.tensor([width, height, width, height])
        first = 0
        for level, size in enumerate(level_sizes):
            logits = objectness[n, first : first + size]
            idx = logits.sort(descending=True, stable=True).indices[:top_k] + first
            best = decode_boxes(deltas[n, idx].to(anchors.dtype), anchors[idx]).clamp(min=0).minimum(limits)
            is_large = (best[:, 2:] - best[:, :2] >= min_size).all(-1)
            boxes[n, level, : len(idx)] = best
            probabilities = objectness[n, idx].to(anchors.dtype).sigmoid()
            scores[n, level, : len(idx)] = torch.where(is_large, probabilities, -torch.inf)
            first += size
    return boxes, scores


def assert_same(got, expected):
    """The same boxes in the same order, within the last bits of exp."""
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-4 if one.dim() == 4 else 1e-12, equal_nan=True)


def test_boxes_and_scores_equal_those_of_the_reference(seeds, make_case):
    for seed in seeds(240):
        objectness, *case = awkward_case(seed, make_case)
        assert_same(select_proposals(objectness, *case), reference.select_proposals(objectness, *case))


def test_of_equal_logits_the_lowest_anchors_come_first():
    anchors = torch.arange(40.0)[:, None] + torch.tensor([0.0, 0.0, 8.0, 8.0])
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        objectness = torch.ones(1, 40, dtype=dtype)
        objectness[:, ::3] = 0.5
        boxes, _ = select_proposals(objectness, torch.zeros(1, 40, 4), anchors, torch.tensor([[99, 99]]), [40], 30)
        ones, halves = [k for k in range(40) if k % 3], [k for k in range(40) if k % 3 == 0]
        assert boxes[0, 0, :, 0].tolist() == (ones + halves)[:30]


def test_of_equal_logits_the_first_are_taken(seeds, make_case):
    """Also in low precision, in which a training step has thousands of equals."""
    for seed in seeds(240):
        objectness, *case, _ = awkward_case(seed, make_case)
        objectness = objectness.bfloat16() if seed % 3 == 1 else (objectness * 2).round() / 2
        results = select_proposals(objectness, *case, min_size=-1.0)  # marks nothing: only the choice is compared
        assert_same(results, first_of_equals(objectness, *case, min_size=-1.0))


def test_images_whose_size_is_no_number_have_marked_boxes_that_are_none(make_case, cuda_or_cpu):
    objectness, deltas, anchors, _ = make_case(3, (9, 4))
    image_sizes = torch.tensor([[torch.nan, 50.0], [-8.0, torch.nan]])
    case = [part.to(cuda_or_cpu) for part in (objectness, deltas, anchors, image_sizes)]
    boxes, scores = (part.cpu() for part in select_proposals(*case, (9, 4), 4))
    assert (scores == -torch.inf).all()
    assert boxes[0, ..., 1::2].isnan().all()
    assert boxes[1, ..., 0::2].isnan().all()
    assert_same((boxes, scores), first_of_equals(objectness, deltas, anchors, image_sizes, (9, 4), 4, 1e-3))


@compiled_only
def test_cuda_takes_the_boxes_that_the_cpu_takes(seeds, make_case, cuda):
    for seed in seeds(60):
        objectness, deltas, anchors, image_sizes, *rest = awkward_case(seed, make_case)
        objectness = (objectness * 2).round() / 2 if seed % 2 else objectness
        on_cuda = select_proposals(*(part.to(cuda) for part in (objectness, deltas, anchors, image_sizes)), *rest)
        assert_same([part.cpu() for part in on_cuda], first_of_equals(objectness, deltas, anchors, image_sizes, *rest))


CHUNK, SHARED_KEYS = 16384, 4096  # anchors of a block of the first launch; keys that shared memory holds in the second
LARGE_LEVELS = [
    ((CHUNK + 1, 0, 40), 7, None),
    ((5, 2 * CHUNK, 1), 1000, 0.0),
    ((20000,), SHARED_KEYS, 0.25),
    ((6000, SHARED_KEYS + 1), SHARED_KEYS + 1, 0.25),
    ((CHUNK + 300, 5000), CHUNK + 200, None),
]


@compiled_only
@pytest.mark.parametrize(("level_sizes", "top_n", "quantum"), LARGE_LEVELS)
def test_cuda_takes_the_boxes_that_the_cpu_takes_of_levels_larger_than_a_block(
    level_sizes, top_n, quantum, make_case, cuda
):
    """Levels of several chunks, more boxes than shared memory holds; logits that are all equal, or have few values."""
    objectness, *case = make_case(8, level_sizes, num_images=1)
    if quantum is not None:
        objectness = (objectness / quantum).round() * quantum if quantum else objectness * 0
        objectness[:, ::37], objectness[:, 5::1000] = -torch.inf, torch.nan
    on_cuda = select_proposals(*(part.to(cuda) for part in (objectness, *case)), level_sizes, top_n, -1.0)
    expected = first_of_equals(objectness, *case, level_sizes, top_n, -1.0)
    assert_same([part.cpu() for part in on_cuda], expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_equal_the_reference(dtype, make_case):
    objectness, deltas, anchors, image_sizes = make_case(4, (90, 20))
    case = objectness.double(), deltas.to(dtype), anchors.to(dtype), image_sizes, (90, 20), 12
    boxes, scores = select_proposals(*case)
    assert boxes.dtype == scores.dtype == dtype
    assert_same((boxes, scores), reference.select_proposals(*case))


def test_inputs_that_require_gradients_are_served_without_them(make_case):
    objectness, deltas, anchors, image_sizes = make_case(5, (9,))
    boxes, scores = select_proposals(
        objectness.requires_grad_(), deltas.requires_grad_(), anchors, image_sizes, (9,), 4
    )
    assert not boxes.requires_grad
    assert not scores.requires_grad


@compiled_only
@pytest.mark.parametrize("num_images", [0, 2])
def test_the_compiled_operator_is_a_good_citizen(num_images, make_case):
    objectness, deltas, anchors, image_sizes = make_case(6, (9, 4), num_images)
    case = objectness, deltas, anchors, image_sizes.float(), [9, 4], 5, 1e-3
    checks = torch.library.opcheck(torch.ops.cuda_ops.select_proposals.default, case)
    assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, torch.zeros(2, 2), r"objectness must be \[2, 3\], got \[2, 2\]"),
        (2, torch.zeros(2, 4), r"anchors must be 3 as box_deltas, got 2"),
        (3, torch.tensor([3, 0]), r"image_sizes must be \[2, 2\], got \[2\]"),
        (4, (2, 2), r"level_sizes must be a split of 3, got \[2, 2\]"),
        (4, (4, -1), r"level_sizes must be a split of 3, got \[4, -1\]"),
        (0, torch.zeros(2, 3).long(), r"objectness must be float, got torch.int64"),
        (4, (1,) * 33, r"level_sizes must be at most 32 levels, got 33"),
        (4, (2.0, 1.0), r"level_sizes must be whole, got \(2.0, 1.0\)"),
        (5, 0, r"pre_nms_top_n must be positive, got 0"),
        (5, 1.5, r"pre_nms_top_n must be whole, got 1.5"),
    ],
)
def test_wrong_input_is_named(position, wrong, message, make_case):
    case = [*make_case(7, (2, 1)), (2, 1), 2]
    case[position] = wrong
    with pytest.raises(ValueError, match=f"^select_proposals: {message}"):
        select_proposals(*case)
