"""The border of the operators: wrong input is named, and nothing but `encode_masks` makes the host wait."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

import cuda_ops

BOXES = torch.tensor([[[0.0, 0.0, 8.0, 8.0], [0.0, 0.0, 8.0, 6.0], [20.0, 20.0, 30.0, 28.0]]] * 2)  # [2, 3, 4]
SCORES = torch.tensor([[0.9, 0.8, 0.7], [0.1, 0.5, -torch.inf]])
COUNTS = torch.tensor([3, 0])
FEATURES = [torch.arange(2.0 * 3 * side * side).view(2, 3, side, side) for side in (16, 8)]
POLYGONS = SimpleNamespace(
    xy=torch.tensor([[0.0, 0.0], [8.0, 0.0], [8.0, 8.0], [1.0, 1.0], [5.0, 1.0], [3.0, 6.0]]),
    part_offsets=torch.tensor([0, 3, 6], dtype=torch.int32),
    instance_offsets=torch.tensor([0, 1, 2, 2, 2], dtype=torch.int32),
    max_vertices=3,
    max_parts=1,
)
POOL = {"image_size": (64, 64), "output_size": 2, "sampling_ratio": 2}
HEADS = {"image_size": (64, 64), "output_sizes": (2, 3), "sampling_ratio": 2}

# What each operator is given by every test here.
CALLS = {
    "generate_anchors": (([(4, 4), (2, 2)], (64, 64), ((8,), (16,)), (0.5, 2.0)), {"conventions": "detectron2"}),
    "box_iou": ((BOXES, BOXES), {}),
    "match_boxes": ((BOXES[0], BOXES, COUNTS, 0.7, 0.3), {"low_quality": True}),
    "select_proposals": ((SCORES, BOXES / 99, BOXES[0], torch.tensor([[64, 64], [32, 64]]), (2, 1), 2), {}),
    "batched_nms": ((BOXES, SCORES, 0.5, 3, COUNTS[:, None].expand(2, 3)), {}),
    "multilevel_roi_align": ((FEATURES, BOXES), POOL),
    "multilevel_roi_align_heads": ((FEATURES, [BOXES, BOXES[:, :2]]), HEADS),
    "rasterize_polygons": ((BOXES, torch.tensor([[0, 1, 0], [0, 1, 1]]), POLYGONS, 4), {}),
    "encode_boxes": ((BOXES, BOXES), {}),
    "decode_boxes": ((BOXES, BOXES), {}),
}


def moved(value, device):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, SimpleNamespace):
        return SimpleNamespace(**{name: moved(field, device) for name, field in vars(value).items()})
    return [moved(entry, device) for entry in value] if isinstance(value, list) else value


@contextmanager
def errors_of_waiting():
    """Within it a GPU's driver refuses what makes the host wait."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def tensors_of(result):
    return list(result) if isinstance(result, tuple | list) else [result]


@pytest.mark.parametrize("name", CALLS)
def test_the_host_never_waits(name, no_sync):
    """Under the mode that refuses what waits, each operator still computes what it computes without it."""
    args, kwargs = CALLS[name]
    expected = tensors_of(getattr(cuda_ops, name)(*args, **kwargs))
    with no_sync():
        results = tensors_of(getattr(cuda_ops, name)(*args, **kwargs))
    assert all(torch.equal(result, wanted) for result, wanted in zip(results, expected, strict=True))


def test_the_host_does_not_wait_in_the_backward_pass_of_roi_align(no_sync):
    features = [level.clone().requires_grad_() for level in FEATURES]
    with no_sync():
        cuda_ops.multilevel_roi_align(features, BOXES, **POOL).sum().backward()
    assert all(level.grad is not None for level in features)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x[x > 1],
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 1),
        lambda x: x.cpu(),
        lambda x: bool((x > 1).any()),
        lambda x: x.unique(),
        lambda x: x.repeat_interleave(x.long()),
    ],
)
def test_the_mode_that_proves_it_refuses_what_waits(wait, no_sync):
    with pytest.raises(AssertionError, match="wait"), no_sync():
        wait(torch.arange(3.0))


@pytest.mark.parametrize("name", CALLS)
def test_on_cuda_the_results_are_the_same_and_the_host_never_waits(name, cuda, no_sync):
    args, kwargs = CALLS[name]
    with cuda_ops.backend("reference"):
        expected = tensors_of(getattr(cuda_ops, name)(*args, **kwargs))
    args = [moved(value, cuda) for value in args] + ([cuda] if name == "generate_anchors" else [])
    with no_sync() if cuda.type == "cpu" else errors_of_waiting():
        results = tensors_of(getattr(cuda_ops, name)(*args, **kwargs))
    for result, wanted in zip(results, expected, strict=True):
        assert result.device.type == cuda.type
        torch.testing.assert_close(result.cpu(), wanted)


@pytest.mark.parametrize(
    ("name", "position", "wrong", "message"),
    [
        ("generate_anchors", 2, ((8,),), r"generate_anchors: sizes must be one a level, 2, got 1"),
        ("generate_anchors", 2, ((8,), (16, 32)), r"generate_anchors: sizes must be as many for each level"),
        ("generate_anchors", 0, [(4, 0), (2, 2)], r"generate_anchors: feature_sizes must be positive, got \[\(4, 0\)"),
        ("generate_anchors", 3, (), r"generate_anchors: aspect_ratios must be positive, at least one, got \[\]"),
        ("generate_anchors", 1, (0, 64), r"generate_anchors: image_size and sizes must be positive"),
        ("box_iou", 0, BOXES[..., :3], r"box_iou: boxes1 must be \[…, boxes, 4\] float, got \[2, 3, 3\] torch.float32"),
        ("box_iou", 1, BOXES.double(), r"box_iou: boxes2 must be torch.float32 as boxes1, got torch.float64"),
        ("match_boxes", 0, BOXES[:1], r"match_boxes: boxes must be of 2 images, got \[1, 3, 4\]"),
        ("match_boxes", 1, BOXES.long(), r"match_boxes: gt_boxes must be \[…, boxes, 4\] float, got .* torch.int64"),
        ("match_boxes", 2, COUNTS.float(), r"match_boxes: num_gt must be \[2\] int, got \[2\] torch.float32"),
        ("match_boxes", 4, 0.8, r"match_boxes: bg_iou must be at most fg_iou \(0.7\), got 0.8"),
        ("select_proposals", 0, SCORES[:, :2], r"select_proposals: objectness must be \[2, 3\], got \[2, 2\]"),
        ("select_proposals", 2, BOXES[0, :2], r"select_proposals: anchors must be 3 as box_deltas, got 2"),
        ("select_proposals", 3, COUNTS, r"select_proposals: image_sizes must be \[2, 2\], got \[2\]"),
        ("select_proposals", 4, (2, 2), r"select_proposals: level_sizes must be a split of 3, got \[2, 2\]"),
        ("select_proposals", 4, (4, -1), r"select_proposals: level_sizes must be a split of 3, got \[4, -1\]"),
        ("select_proposals", 5, 0, r"select_proposals: pre_nms_top_n must be positive, got 0"),
        ("batched_nms", 0, BOXES[0], r"batched_nms: boxes must be \[…, boxes, 4\] float, got \[3, 4\]"),
        ("batched_nms", 1, SCORES[:, :2], r"batched_nms: scores must be \[2, 3\], got \[2, 2\]"),
        ("batched_nms", 2, 1.5, r"batched_nms: iou_threshold must be 0 to 1, got 1.5"),
        ("batched_nms", 3, -1, r"batched_nms: max_output must be 0 or more, got -1"),
        ("batched_nms", 4, COUNTS, r"batched_nms: groups must be \[2, 3\], got \[2\]"),
        ("multilevel_roi_align", 0, [], r"multilevel_roi_align: features must be one level at least, got 0"),
        (
            "multilevel_roi_align",
            0,
            [FEATURES[0], FEATURES[1][:1]],
            r"multilevel_roi_align: features must be \[N, C, H_l, W_l\]",
        ),
        ("multilevel_roi_align", 1, BOXES[:1], r"multilevel_roi_align: boxes must be of 2 images, got \[1, 3, 4\]"),
        (
            "rasterize_polygons",
            1,
            SCORES,
            r"rasterize_polygons: instance_idxs must be \[2, 3\] int, got \[2, 3\] torch.f",
        ),
        ("rasterize_polygons", 3, 0, r"rasterize_polygons: size must be positive, got 0"),
    ],
)
def test_wrong_input_is_named(name, position, wrong, message):
    args, kwargs = CALLS[name]
    args = [*args[:position], wrong, *args[position + 1 :]]
    with pytest.raises(ValueError, match=message):
        getattr(cuda_ops, name)(*args, **kwargs)


@pytest.mark.parametrize(
    ("name", "position"),
    [
        ("box_iou", 1),
        ("match_boxes", 2),
        ("select_proposals", 2),
        ("batched_nms", 1),
        ("multilevel_roi_align", 1),
        ("rasterize_polygons", 1),
    ],
)
def test_tensors_of_two_devices_are_named(name, position):
    """A kernel that was handed memory of another device would crash, at best."""
    args, kwargs = CALLS[name]
    args = [*args[:position], args[position].to("meta"), *args[position + 1 :]]
    with pytest.raises(ValueError, match=rf"{name}: .* must be on one device, got .*('cpu'.*'meta'|'meta'.*'cpu')"):
        getattr(cuda_ops, name)(*args, **kwargs)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("image_size", (0, 64), "positive"),
        ("output_size", 0, "positive"),
        ("sampling_ratio", -1, "0 or more, got -1"),
    ],
)
def test_wrong_numbers_of_roi_align_are_named(name, value, told):
    wrong = POOL | {name: value}
    with pytest.raises(ValueError, match=f"multilevel_roi_align: {name} must be {told}"):
        cuda_ops.multilevel_roi_align(FEATURES, BOXES, **wrong)


@pytest.mark.parametrize(
    ("boxes", "told"),
    [
        ([], "of 1 to 4 heads, with an output size each, got 0"),
        ([BOXES], "of 1 to 4 heads, with an output size each, got 1"),
        ([BOXES, BOXES[:1]], r"of 2 images, got \[1, 3, 4\]"),
        ([BOXES, BOXES[..., :3]], r"\[…, boxes, 4\] float, got \[2, 3, 3\]"),
        ([BOXES, BOXES.to("meta")], "must be on one device"),
    ],
)
def test_wrong_boxes_of_a_head_are_named(boxes, told):
    with pytest.raises(ValueError, match=rf"multilevel_roi_align: .*{told}"):
        cuda_ops.multilevel_roi_align_heads(FEATURES, boxes, **HEADS)


def test_polygons_of_other_images_are_named():
    polygons = SimpleNamespace(**vars(POLYGONS) | {"instance_offsets": torch.tensor([0, 1, 2, 2], dtype=torch.int32)})
    with pytest.raises(ValueError, match="polygons must be the same number of instances for 2 images, got 3"):
        cuda_ops.rasterize_polygons(BOXES, torch.zeros(2, 3, dtype=torch.int64), polygons, 4)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            (torch.rand(3, 4, 5), BOXES[0], (9, 9)),
            r"encode_masks: mask_probs must be \[D, M, M\] float, got \[3, 4, 5\]",
        ),
        ((torch.rand(2, 4, 4), BOXES[0], (9, 9)), r"encode_masks: boxes must be 2 as mask_probs, got 3"),
        ((torch.rand(3, 4, 4), BOXES[0], (9, 0)), r"encode_masks: image_size must be positive, got \(9, 0\)"),
    ],
)
def test_wrong_input_of_encode_masks_is_named(args, message):
    with pytest.raises(ValueError, match=message):
        cuda_ops.encode_masks(*args)


@pytest.mark.parametrize("name", ["torchvison", "Detectron2", ""])
def test_unknown_conventions_are_named(name):
    calls = {
        "generate_anchors": lambda: cuda_ops.generate_anchors([(1, 1)], (8, 8), [[8]], [1.0], conventions=name),
        "encode_masks": lambda: cuda_ops.encode_masks(torch.rand(3, 4, 4), BOXES[0], (9, 9), conventions=name),
    }
    for op, call in calls.items():
        with pytest.raises(ValueError, match=f"^{op}: conventions must be detectron2 or torchvision, got '{name}'$"):
            call()
