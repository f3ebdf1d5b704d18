"""Non-maximum suppression: keeps what torchvision keeps, row by row and group by group."""

import struct

import pytest
import torch
import torchvision

from cuda_ops import batched_nms, box_iou, reference

BOXES = torch.tensor([[[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 8.0], [50.0, 50.0, 60.0, 60.0]]])


def torchvision_kept(boxes, scores, threshold, groups=None):
    """Indices kept of one row, by descending score."""
    groups = torch.zeros_like(scores) if groups is None else groups
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for group in groups.unique():
        rows = torch.where((groups == group) & (scores > -torch.inf))[0]
        kept[rows[torchvision.ops.nms(boxes[rows], scores[rows], threshold)]] = True
    order = scores.sort(descending=True, stable=True).indices
    return order[kept[order]].tolist()


def kept_lists(boxes, scores, threshold, max_output, groups=None):
    indices, counts = batched_nms(boxes, scores, threshold, max_output, groups)
    assert indices.shape == (len(boxes), max_output)
    for row, count in zip(indices, counts.tolist(), strict=True):
        assert (row[count:] == 0).all()
    return [row[:count].tolist() for row, count in zip(indices, counts.tolist(), strict=True)]


def test_a_worse_box_goes_and_a_far_one_stays():
    assert kept_lists(BOXES, torch.tensor([[0.5, 0.9, 0.7]]), 0.7, 3) == [[1, 2]]


def test_an_iou_equal_to_the_threshold_does_not_suppress():
    scores = torch.tensor([[0.9, 0.5, 0.1]])
    assert kept_lists(BOXES, scores, 0.8, 3) == [torchvision_kept(BOXES[0], scores[0], 0.8)]
    assert kept_lists(BOXES, scores, struct.unpack("f", struct.pack("f", 0.8))[0], 3) == [[0, 1, 2]]


@pytest.mark.parametrize("tenths", range(1, 10))
def test_the_threshold_is_compared_as_torchvision_compares_it(tenths):
    boxes = torch.tensor([[[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, float(tenths)]]])  # IoU = tenths / 10 in float32
    scores = torch.tensor([[0.9, 0.5]])
    assert kept_lists(boxes, scores, tenths / 10, 2) == [torchvision_kept(boxes[0], scores[0], tenths / 10)]


def test_of_equal_scores_the_first_wins():
    assert kept_lists(BOXES[:, [0, 0, 0]], torch.full((1, 3), 0.5), 0.5, 3) == [[0]]


def test_equal_scores_are_kept_in_the_order_of_their_indices(cuda_or_cpu):
    """Whatever their number and dtype; 0 equals -0, and what is no number equals what is none."""
    for num_boxes in (5, 17, 300, 1100):
        corner = torch.arange(float(num_boxes))[None, :, None] * 20
        boxes = (corner + torch.tensor([0.0, 0.0, 10.0, 10.0])).to(cuda_or_cpu)
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            for values in ((0.5,), (0.0, -0.0), (torch.nan,), (1.0, 0.5)):
                scores = torch.tensor(values, dtype=dtype).repeat(num_boxes)[None, :num_boxes]
                expected = [k for value in range(len(set(values))) for k in range(value, num_boxes, len(set(values)))]
                assert kept_lists(boxes, scores.to(cuda_or_cpu), 0.5, num_boxes) == [expected]


def test_different_groups_do_not_suppress_each_other():
    same = BOXES[:, [0, 0, 0]]
    assert kept_lists(same, torch.tensor([[0.9, 0.8, 0.7]]), 0.5, 3, torch.tensor([[1, 2, 1]])) == [[0, 1]]


def test_kept_boxes_equal_those_of_torchvision(seeds, random_boxes):
    for seed in seeds(200):
        num_boxes = [1, 63, 64, 65, 150, 9][seed % 6]
        boxes = random_boxes(3, num_boxes, seed=seed, whole=bool(seed % 2))
        generator = torch.Generator().manual_seed(seed)
        scores = torch.rand(3, num_boxes, generator=generator)
        scores = (scores * 20).round() / 20 if seed % 4 < 2 else scores
        scores[scores < 0.1] = -torch.inf
        groups = torch.randint(0, 3, (3, num_boxes), generator=generator) if seed % 3 else None
        threshold = [0.3, 0.5, 0.7, 0.05][seed % 4]
        rows = [None] * 3 if groups is None else groups
        expected = [torchvision_kept(*row, threshold, group) for *row, group in zip(boxes, scores, rows, strict=True)]
        assert kept_lists(boxes, scores, threshold, num_boxes + 5, groups) == expected
        assert kept_lists(boxes, scores, threshold, 3, groups) == [row[:3] for row in expected]


def test_a_suppressed_box_without_height_does_not_shield_later_ones(random_boxes):
    boxes = random_boxes(1, 130, seed=0)
    boxes[:, 1::2, 3] = boxes[:, 1::2, 1]
    scores = torch.linspace(1, 0.5, 130)[None]
    scores[:, 1:60:2] = -torch.inf
    assert kept_lists(boxes, scores, 0.2, 130) == [torchvision_kept(boxes[0], scores[0], 0.2)]


def test_marked_boxes_are_not_kept_even_if_they_are_no_numbers():
    boxes = torch.cat((BOXES, torch.full((1, 1, 4), torch.nan)), dim=1)
    assert kept_lists(boxes, torch.tensor([[0.9, 0.1, 0.5, -torch.inf]]), 0.5, 4) == [[0, 2]]
    assert kept_lists(boxes, torch.full((1, 4), -torch.inf), 0.5, 2) == [[]]


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
def test_no_rows_or_no_boxes_keep_nothing(shape):
    indices, counts = batched_nms(torch.zeros(*shape, 4), torch.zeros(shape), 0.5, 3)
    assert indices.shape == (shape[0], 3)
    assert counts.tolist() == [0] * shape[0]


def test_nothing_asked_for_is_nothing_kept():
    assert kept_lists(BOXES, torch.rand(1, 3), 0.5, 0) == [[]]


def test_strides_do_not_matter(random_boxes):
    boxes, scores = random_boxes(2, 70, seed=1), torch.rand(2, 70, generator=torch.Generator().manual_seed(1))
    strided = boxes.permute(2, 1, 0).contiguous().permute(2, 1, 0), scores.t().contiguous().t()
    assert kept_lists(*strided, 0.4, 70) == kept_lists(boxes, scores, 0.4, 70)


SIZES = [0, 1, 2, 31, 63, 64, 65, 127, 129, 255, 257, 400]


def awkward_case(seed, random_boxes):
    """Boxes, scores, threshold, max_output, groups: ties, marks, odd sizes and strides, ids and dtypes of any kind."""
    generator = torch.Generator().manual_seed(seed)
    num_rows, num_boxes = 1 + seed % 4, SIZES[seed % len(SIZES)]
    boxes = random_boxes(num_boxes, num_rows, seed=seed, whole=seed % 2 == 0).transpose(0, 1)
    boxes = boxes.double() if seed % 5 == 0 else boxes
    scores = torch.randn(num_rows, num_boxes, generator=generator)
    scores = (scores * 4).round() / 4 if seed % 3 else scores  # -0 and 0 among them
    scores[torch.rand(scores.shape, generator=generator) < 0.1] = [-torch.inf, torch.inf, torch.nan][seed % 3]
    scores = scores.to([torch.float32, torch.float64, torch.bfloat16][seed // 3 % 3])
    ids = torch.tensor([-(2**40), 7, 2**40])[torch.randint(0, 3, scores.shape, generator=generator)]
    groups = [None, ids, (ids % 251).int()][seed // 2 % 3]
    max_output = [0, 1, 5, num_boxes, num_boxes + 70][seed // 7 % 5]
    return boxes, scores, [0.0, 0.3, 0.5, 0.7, 0.95, 1.0][seed % 6], max_output, groups


def test_every_element_equals_that_of_the_reference(seeds, random_boxes):
    for seed in seeds(240):
        case = awkward_case(seed, random_boxes)
        for got, expected in zip(batched_nms(*case), reference.batched_nms(*case), strict=True):
            assert got.dtype == expected.dtype == torch.int64
            assert torch.equal(got, expected)


def test_every_element_of_cuda_equals_that_of_the_reference(seeds, random_boxes, cuda):
    for seed in seeds(60):
        boxes, scores, threshold, max_output, groups = awkward_case(seed, random_boxes)
        ids = None if groups is None else groups.to(cuda)
        on_cuda = batched_nms(boxes.to(cuda), scores.to(cuda), threshold, max_output, ids)
        expected = reference.batched_nms(boxes, scores, threshold, max_output, groups)
        for got, of_cpu in zip(on_cuda, expected, strict=True):
            assert torch.equal(got.cpu(), of_cpu)


@pytest.mark.parametrize(("num_boxes", "max_output"), [(1024, 1024), (1100, 1100), (1100, 300), (2100, 100)])
def test_rows_longer_than_a_panel_keep_on_cuda_what_plain_torch_keeps(num_boxes, max_output, random_boxes, cuda):
    boxes = random_boxes(2, num_boxes, seed=num_boxes, extent=600.0)
    scores = torch.rand(2, num_boxes, generator=torch.Generator().manual_seed(0))
    groups = torch.arange(num_boxes).expand(2, -1) % 3
    for ids in (None, groups):
        expected = reference.batched_nms(boxes, scores, 0.5, max_output, ids)
        on_cuda = batched_nms(boxes.to(cuda), scores.to(cuda), 0.5, max_output, None if ids is None else ids.to(cuda))
        assert torch.equal(on_cuda[0].cpu(), expected[0])
        assert torch.equal(on_cuda[1].cpu(), expected[1])


def test_ious_at_the_threshold_and_next_to_it_are_decided_on_cuda_as_on_the_cpu(random_boxes, cuda):
    for dtype in (torch.float32, torch.float64):
        boxes = random_boxes(1, 40, seed=6, extent=40.0).to(dtype)
        scores = torch.linspace(1, 0.5, 40, dtype=dtype)[None]
        ious = box_iou(boxes[0], boxes[0]).triu(1)
        answers = set()
        for iou in ious[ious > 0.2][::12]:
            below, above = (torch.nextafter(iou, iou.new_tensor(limit)).item() for limit in (0.0, 1.0))
            for threshold in (below, iou.item(), above):
                kept, count = batched_nms(boxes.to(cuda), scores.to(cuda), threshold, 40)
                expected = torchvision_kept(boxes[0], scores[0], threshold)
                assert kept[0, : count.item()].tolist() == expected
                answers.add((iou.item(), *expected))
        assert len(answers) > len(ious[ious > 0.2][::12])  # some depend on the last bit of the threshold


def test_an_iou_that_rounds_to_zero_does_not_exceed_a_threshold_of_zero(cuda):
    boxes = torch.tensor([[[-1e19, -1e19, 1e-22, 1e-22], [0.0, 0.0, 1e19, 1e19]]])  # 1e-44 px² of 2e38 px² in common
    scores = torch.tensor([[0.9, 0.5]])
    assert torchvision_kept(boxes[0], scores[0], 0.0) == [0, 1]
    assert batched_nms(boxes.to(cuda), scores.to(cuda), 0.0, 2)[1].tolist() == [2]


def test_on_cuda_a_box_is_kept_if_what_would_suppress_it_is_suppressed_itself(cuda):
    """Boxes in a row, each of which overlaps the next by more than the threshold: every other one stays."""
    start = torch.arange(150.0)[None, :, None].expand(1, 150, 2)
    boxes = torch.cat(
        (start, start + torch.tensor([3.0, 1000.0])), dim=-1
    )  # IoU 1 / 2 with the next, 1 / 5 with that after
    scores = torch.linspace(1, 0.5, 150)[None]
    for max_output in (150, 20, 33):
        indices, counts = batched_nms(boxes.to(cuda), scores.to(cuda), 0.4, max_output)
        expected = list(range(0, 150, 2))[:max_output]
        assert indices[0, : counts.item()].tolist() == expected


@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_long_row_keeps_what_torchvision_keeps_whatever_the_threads(num_threads, random_boxes):
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        boxes = random_boxes(1, 5000, seed=4, extent=2000.0)
        scores = torch.rand(1, 5000, generator=torch.Generator().manual_seed(4)).sort(descending=True).values
        assert kept_lists(boxes, scores, 0.6, 5000) == [torchvision_kept(boxes[0], scores[0], 0.6)]
    finally:
        torch.set_num_threads(before)


def test_low_precision_boxes_keep_what_they_keep_by_the_reference(random_boxes):
    boxes, scores = (
        random_boxes(2, 80, seed=2).bfloat16(),
        torch.rand(2, 80, generator=torch.Generator().manual_seed(2)),
    )
    expected = reference.batched_nms(boxes, scores, 0.5, 80)
    assert torch.equal(batched_nms(boxes, scores, 0.5, 80)[0], expected[0])


def test_boxes_that_are_no_numbers_neither_suppress_nor_are_suppressed():
    boxes = torch.cat((torch.full((1, 1, 4), torch.nan), BOXES[:, [0, 0]], torch.full((1, 1, 4), torch.nan)), dim=1)
    assert kept_lists(boxes, torch.tensor([[0.9, 0.8, 0.7, 0.6]]), 0.5, 4) == [[0, 1, 3]]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_box_that_is_no_number_shields_none_of_those_that_come_much_later(value, random_boxes):
    """More than a block later, where plain torch no longer compares pair by pair."""
    boxes, scores = random_boxes(1, 200, seed=3), torch.linspace(1, 0.5, 200)[None]
    boxes[..., 2:] += 20
    boxes[:, 5:60:9, 3] = value
    expected = torchvision_kept(boxes[0], scores[0], 0.3)
    assert 0 < len(expected) < 100
    assert kept_lists(boxes, scores, 0.3, 200) == [expected]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_boxes_in_low_precision_keep_what_they_keep_in_float32(dtype, random_boxes):
    """Their areas are more than 65,504 px², which float16 does not hold."""
    boxes = (random_boxes(1, 90, seed=4, extent=500.0) + torch.tensor([0, 0, 300, 300])).to(dtype)
    scores = torch.linspace(1, 0.5, 90)[None]
    for threshold in (0.1, 0.3, 0.5):
        expected = kept_lists(boxes.float(), scores, threshold, 90)
        assert 0 < len(expected[0]) < 80
        assert kept_lists(boxes, scores, threshold, 90) == expected


def test_inputs_that_require_gradients_are_served_without_them(random_boxes):
    boxes = random_boxes(1, 9, seed=1).requires_grad_()
    indices, counts = batched_nms(boxes, torch.rand(1, 9).requires_grad_(), 0.5, 9)
    assert not indices.requires_grad
    assert not counts.requires_grad


@pytest.mark.parametrize("backend", ["compiled"], indirect=True)
@pytest.mark.parametrize("shape", [(2, 9), (0, 9), (2, 0)])
def test_the_compiled_operator_is_a_good_citizen(shape, random_boxes):
    boxes, scores = random_boxes(*shape, seed=3), torch.rand(shape)
    groups = torch.arange(shape[1]).expand(shape) % 2
    for ids in (None, groups):
        checks = torch.library.opcheck(torch.ops.cuda_ops.batched_nms.default, (boxes, scores, 0.5, 4, ids))
        assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"boxes": BOXES[0]}, r"boxes must be \[…, boxes, 4\] float, got \[3, 4\]"),
        ({"scores": torch.zeros(1, 2)}, r"scores must be \[1, 3\], got \[1, 2\]"),
        ({"iou_threshold": 1.5}, r"iou_threshold must be 0 to 1, got 1.5"),
        ({"max_output": -1}, r"max_output must be 0 or more, got -1"),
        ({"max_output": 2.0}, r"max_output must be whole, got 2.0"),
        ({"groups": torch.tensor([3])}, r"groups must be \[1, 3\] int, got \[1\]"),
        ({"groups": torch.zeros(1, 3)}, r"groups must be \[1, 3\] int, got \[1, 3\] torch.float32"),
        ({"groups": torch.zeros(1, 3).bool()}, r"groups must be \[1, 3\] int, got \[1, 3\] torch.bool"),
        ({"scores": torch.zeros(1, 3).long()}, r"scores must be float, got torch.int64"),
    ],
)
def test_wrong_input_is_named(wrong, message):
    right = {"boxes": BOXES, "scores": torch.zeros(1, 3), "iou_threshold": 0.5, "max_output": 3}
    with pytest.raises(ValueError, match=f"^batched_nms: {message}"):
        batched_nms(**right | wrong)
