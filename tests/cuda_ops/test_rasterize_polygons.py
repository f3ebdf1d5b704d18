"""Filled polygons: pycocotools', bit for bit."""

import json
from dataclasses import dataclass, replace

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch
from torch import Tensor

import cuda_ops
from cuda_ops import rasterize_polygons
from cuda_ops.operators import rasterize_polygons as implementation

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # within pycocotools


@dataclass(frozen=True)
class Packed:
    """The fields that the operator needs; padding beyond the real rows repeats the last offset."""

    xy: Tensor
    part_offsets: Tensor
    instance_offsets: Tensor
    max_vertices: int
    max_parts: int

    def to(self, device):
        return Packed(*(value.to(device) if isinstance(value, Tensor) else value for value in vars(self).values()))


def pack(instances, padding=0):
    """Instances: lists of parts [v, 2]."""
    parts = [np.asarray(part, np.float32) for instance in instances for part in instance]
    vertices = [sum(len(part) for part in instance) for instance in instances]
    part_offsets = np.cumsum([0] + [len(part) for part in parts] + [0] * padding)
    instance_offsets = np.cumsum([0] + [len(instance) for instance in instances])
    return Packed(
        torch.from_numpy(np.concatenate([*parts, np.zeros((padding, 2), np.float32)])),
        torch.tensor(part_offsets, dtype=torch.int32),
        torch.tensor(instance_offsets, dtype=torch.int32),
        max(vertices) + padding,
        max(len(instance) for instance in instances) + padding,
    )


def coco_filled(box, parts, size):
    """detectron2's recipe on pycocotools."""
    if not len(parts):
        return np.zeros((size, size))
    x1, y1, x2, y2 = np.asarray(box, np.float64)
    scale = size / np.maximum([x2 - x1, y2 - y1], 0.1)
    scaled = [((np.asarray(part, np.float64) - [x1, y1]) * scale).reshape(-1) for part in parts]
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(scaled, size, size)))


def random_part(rng, decimals):
    spread = rng.choice([1, 30, 100])
    part = rng.normal(0, spread, (rng.integers(3, 20), 2)) + rng.uniform(0, 250, 2)
    return part.round(decimals).astype(np.float32)


def assert_filled_as_coco(boxes, idxs, instances, size, packed):
    masks = rasterize_polygons(torch.from_numpy(boxes), torch.from_numpy(idxs), packed, size)
    rows = len(instances) // len(boxes)
    assert masks.shape == (*boxes.shape[:2], size, size)
    assert masks.dtype == torch.float32
    for n, r in np.ndindex(idxs.shape):
        expected = coco_filled(boxes[n, r], instances[n * rows + idxs[n, r]], size)
        np.testing.assert_array_equal(masks[n, r].numpy(), expected, err_msg=f"image {n}, box {r}: {boxes[n, r]}")


def test_a_square_in_the_middle_of_its_box():
    square = [[1, 1], [3, 1], [3, 3], [1, 3]]
    masks = rasterize_polygons(torch.tensor([[[0.0, 0.0, 4.0, 4.0]]]), torch.tensor([[0]]), pack([[square]]), 4)
    assert masks[0, 0].tolist() == [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]


def test_parts_unite_where_they_overlap():
    square, whole = [[1, 1], [3, 1], [3, 3], [1, 3]], [[0, 0], [4, 0], [4, 4], [0, 4]]
    packed = pack([[square, whole]])
    assert rasterize_polygons(torch.tensor([[[0.0, 0.0, 4.0, 4.0]]]), torch.tensor([[0]]), packed, 4).all()


def test_random_polygons_are_filled_as_pycocotools_fills_them(seeds):
    """Self-crossing, of several parts or none, of every size, in boxes that cut them, miss them, or have no area."""
    for seed in seeds(200):
        rng = np.random.default_rng(seed)
        num_images, num_rows, num_boxes = 1 + seed % 2, 1 + seed % 4, 1 + seed % 6
        size = [28, 14, 1, 5, 28, 56][seed % 6]
        instances = [[random_part(rng, seed % 4) for _ in range(seed % 3)] for _ in range(num_images * num_rows - 1)]
        instances.append([random_part(rng, seed % 4)])
        start = rng.uniform(-50, 300, (num_images, num_boxes, 2))
        side = rng.choice([0, 3, 20, 300], start.shape) * rng.uniform(0.5, 1, start.shape)
        boxes = np.concatenate((start, start + side), axis=-1)
        boxes = (boxes.round() if seed % 2 else boxes).astype(np.float32)
        idxs = rng.integers(0, num_rows, (num_images, num_boxes))
        assert_filled_as_coco(boxes, idxs, instances, size, pack(instances, padding=seed % 3))


def test_vertices_on_the_grid_and_slopes_of_whole_fifths_are_filled_as_pycocotools_fills_them(seeds):
    """Where rounding meets ties: vertices at fifths of a cell, many edges steep, flat, diagonal, or of no length."""
    for seed in seeds(20):
        rng = np.random.default_rng(seed)
        part = (rng.integers(-10, 80, (40, 2)) / 5).astype(np.float32)
        part[1::4] = part[0::4]
        part[2::4, 0] = part[1::4, 0]
        boxes = np.array([[[0, 0, 14, 14], [-3, 2, 11, 16]]], np.float32)
        assert_filled_as_coco(boxes, np.zeros((1, 2), np.int64), [[part]], 14, pack([[part]]))


@pytest.mark.parametrize("size", [28, 14, 33])
def test_triangles_and_boxes_of_whole_pixels_are_filled_as_pycocotools_fills_them(size):
    """Many of their vertices lie on the edge of a fifth of a cell, where any rounding more than pycocotools' shows."""
    rng = np.random.default_rng(size)
    triangles = rng.integers(0, 200, (300, 3, 2)).astype(np.float32)
    boxes = np.concatenate((triangles.min(1), triangles.max(1)), axis=-1)[None]
    instances = [[triangle] for triangle in triangles]
    assert_filled_as_coco(boxes, np.arange(len(instances))[None], instances, size, pack(instances))


@pytest.mark.parametrize(("split", "size"), [("train", 28), ("val", 28), ("val", 33)])
def test_outlines_of_coco_are_filled_as_pycocotools_fills_them(either_coco, split, size):
    annotations = json.loads((either_coco / f"annotations/instances_{split}2017.json").read_text())["annotations"]
    annotations = [annotation for annotation in annotations if not annotation["iscrowd"]][:250]
    assert len(annotations) >= 200
    instances = [
        [np.reshape(part, (-1, 2)).astype(np.float32) for part in annotation["segmentation"]]
        for annotation in annotations
    ]
    boxes = np.array([annotation["bbox"] for annotation in annotations], np.float32)
    boxes[:, 2:] += boxes[:, :2]
    boxes[1::2] += np.random.default_rng(0).normal(0, 10, boxes[1::2].shape)
    boxes = np.sort(boxes.reshape(-1, 2, 2), axis=1).astype(np.float32).reshape(1, -1, 4)
    assert_filled_as_coco(boxes, np.arange(len(instances))[None], instances, size, pack(instances))


def test_degenerate_outlines_are_filled_as_pycocotools_fills_them(seeds):
    """Vertices twice or on one line, in tiny boxes, in boxes far away, and in boxes within the outline."""
    for seed in seeds(100):
        rng = np.random.default_rng(seed)
        part = random_part(rng, 1)
        part = part[np.sort(rng.integers(0, len(part), 9))]
        line = np.repeat(rng.uniform(0, 200, (1, 2)), 5, axis=0) + np.arange(5)[:, None] * rng.integers(-3, 4, (1, 2))
        centre = part.mean(0)
        boxes = np.array(
            [[*centre, *centre + 0.01], [*centre - 2, *centre + 2], [*centre + 9999, *centre + 10020]], np.float32
        )
        boxes = np.concatenate([boxes, [[*part.min(0), *part.max(0)]]]).astype(np.float32)[None]
        instances = [[part, line.astype(np.float32)]]
        assert_filled_as_coco(boxes, np.zeros((1, 4), np.int64), instances, [28, 14, 40][seed % 3], pack(instances))


def random_case(seed):
    """Boxes, rows and polygons of every size and dtype, some of whole pixels, not contiguous, some instances empty."""
    rng = np.random.default_rng(seed)
    num_images, num_rows, num_boxes = 1 + seed % 3, 1 + seed % 4, seed % 7
    instances = [[random_part(rng, seed % 4) for _ in range(rng.integers(0, 4))] for _ in range(num_images * num_rows)]
    instances[-1].append(random_part(rng, 1))
    packed = pack(instances, padding=seed % 5)
    start = rng.uniform(-50, 300, (num_boxes, num_images, 2))
    side = rng.choice([0, 1, 20, 300], start.shape) * rng.uniform(0.5, 1, start.shape)
    boxes = torch.from_numpy(np.concatenate((start, start + side), axis=-1))
    boxes = boxes.round() if seed % 3 == 0 else boxes
    boxes = boxes.to([torch.float32, torch.float64][seed % 2]).transpose(0, 1)
    idxs = (
        torch.from_numpy(rng.integers(0, num_rows, (num_boxes, num_images)))
        .to([torch.int64, torch.int32][seed % 3 == 1])
        .t()
    )
    size = [28, 1, 2, 31, 32, 33, 56, 64, 65, 100][seed % 10]
    return boxes, idxs, replace(packed, xy=packed.xy.double()) if seed % 4 == 3 else packed, size


NO_NUMBERS = (torch.nan, torch.inf, -torch.inf, 3e38, -3e38)


def unruly_case(seed):
    """Boxes and vertices with coordinates that none should have."""
    rng = np.random.default_rng(seed)
    packed = pack([[random_part(rng, 0) for _ in range(2)]])
    boxes = torch.from_numpy(rng.uniform(-50, 300, (1, 12, 4)).astype(np.float32))
    for values, count in ((boxes.view(-1), 8), (packed.xy.view(-1), seed % 4)):
        for _ in range(count):
            values[rng.integers(len(values))] = NO_NUMBERS[rng.integers(len(NO_NUMBERS))]
    return boxes, torch.zeros(1, 12, dtype=torch.int64), packed, 14


@pytest.mark.parametrize("backend", ["compiled"], indirect=True)
def test_compiled_masks_equal_those_of_the_reference(seeds):
    for seed in seeds(200):
        boxes, idxs, packed, size = random_case(seed)
        masks = rasterize_polygons(boxes, idxs, packed, size)
        with cuda_ops.backend("reference"):
            assert torch.equal(masks, rasterize_polygons(boxes, idxs, packed, size))


@pytest.mark.parametrize("backend", ["compiled"], indirect=True)
@pytest.mark.parametrize("make_case", [random_case, unruly_case])
def test_masks_of_cuda_equal_those_of_the_reference(seeds, make_case, cuda):
    for seed in seeds(40):
        boxes, idxs, packed, size = make_case(seed)
        masks = rasterize_polygons(boxes.to(cuda), idxs.to(cuda), packed.to(cuda), size)
        with cuda_ops.backend("reference"):
            assert torch.equal(masks.cpu(), rasterize_polygons(boxes, idxs, packed, size))


@pytest.mark.parametrize("backend", ["compiled"], indirect=True)
def test_a_grid_too_large_for_the_shared_memory_of_cuda_is_filled(cuda):
    packed = pack([[np.array([[3, 2], [90, 20], [40, 90]]), np.array([[50, 50], [99, 60], [60, 99]])]])
    boxes, idxs = torch.tensor([[[0.0, 0.0, 100.0, 100.0], [30.0, 10.0, 70.0, 80.0]]]), torch.tensor([[0, 0]])
    masks = rasterize_polygons(boxes.to(cuda), idxs.to(cuda), packed.to(cuda), 500)
    with cuda_ops.backend("reference"):
        assert torch.equal(masks.cpu(), rasterize_polygons(boxes, idxs, packed, 500))


@pytest.mark.parametrize("backend", ["compiled"], indirect=True)
def test_torch_knows_enough_of_the_compiled_operator():
    boxes, idxs, packed, size = random_case(6)
    args = (boxes, idxs.long(), packed.xy, packed.part_offsets, packed.instance_offsets, size)
    assert set(torch.library.opcheck(torch.ops.cuda_ops.rasterize_polygons.default, args).values()) == {"SUCCESS"}


def test_chunks_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    instances = [[rng.uniform(0, 50, (9, 2))], [rng.uniform(0, 50, (5, 2)), rng.uniform(0, 50, (4, 2))]]
    boxes, idxs = torch.tensor([[0.0, 0.0, 50.0, 40.0]]).repeat(1, 6, 1), torch.tensor([[0, 1, 0, 1, 0, 1]])
    whole = rasterize_polygons(boxes, idxs, pack(instances), 28)
    monkeypatch.setattr(implementation, "CHUNK_CROSSINGS", 1000)
    assert torch.equal(rasterize_polygons(boxes, idxs, pack(instances), 28), whole)


def test_strides_do_not_matter():
    instances = [[np.array([[0, 0], [9, 0], [4, 9]])]] * 4
    boxes = torch.tensor([[[0.0, 0.0, 9.0, 9.0], [2.0, 1.0, 7.0, 5.0]]] * 2)
    idxs = torch.tensor([[0, 1], [1, 0]])
    strided = boxes.permute(2, 1, 0).contiguous().permute(2, 1, 0), idxs.t().contiguous().t()
    expected = rasterize_polygons(boxes, idxs, pack(instances), 7)
    assert torch.equal(rasterize_polygons(*strided, pack(instances), 7), expected)


@pytest.mark.parametrize("num_vertices", [0, 3])
def test_images_without_any_polygon_give_zeros(num_vertices):
    """Vertices that belong to no part are padding."""
    no_part, no_parts = torch.zeros(1, dtype=torch.int32), torch.zeros(5, dtype=torch.int32)
    packed = Packed(torch.zeros(num_vertices, 2), no_part, no_parts, 1, 1)
    masks = rasterize_polygons(torch.rand(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64), packed, 4)
    assert masks.shape == (2, 3, 4, 4)
    assert not masks.any()


SQUARE, ROOF = np.array([[0, 0], [4, 0], [4, 4], [0, 4]]), np.array([[0, 4], [2, 0], [4, 4]])


def test_a_row_that_no_instance_has_is_empty(cuda_or_cpu):
    packed = pack([[SQUARE], [ROOF], [ROOF], [SQUARE]])
    idxs = torch.tensor([[0, 1, -1, 2, 10**9], [-(2**62), 1, 0, 2**62, -3]])
    boxes = torch.tensor([0.0, 0.0, 4.0, 4.0]).expand(2, 5, 4)
    masks = rasterize_polygons(boxes.to(cuda_or_cpu), idxs.to(cuda_or_cpu), packed.to(cuda_or_cpu), 4).cpu()
    assert masks.any(-1).any(-1).tolist() == [[True, True, False, False, False], [False, True, True, False, False]]
    known = rasterize_polygons(boxes, idxs.clamp(0, 1), packed, 4)
    assert torch.equal(masks, known * ((idxs == 0) | (idxs == 1))[..., None, None])


def test_images_without_instances_have_empty_rows(cuda_or_cpu):
    packed = replace(pack([[SQUARE]]), instance_offsets=torch.zeros(1, dtype=torch.int32)).to(cuda_or_cpu)
    boxes, idxs = torch.tensor([[[0.0, 0.0, 4.0, 4.0]]]).to(cuda_or_cpu), torch.zeros(1, 1).long().to(cuda_or_cpu)
    assert not rasterize_polygons(boxes, idxs, packed, 4).any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_offsets_beyond_the_end_count_as_the_end_and_none_falls(dtype, cuda_or_cpu):
    """The same masks in every implementation: of the offsets that the wrong ones count as."""
    whole = pack([[SQUARE], [ROOF, SQUARE + 1]])  # vertices 0, 4, 7, 11; parts 0, 1, 3
    cases = (
        ({"part_offsets": [0, 4, 7, 400_000_000]}, {}),
        ({"part_offsets": [-(2**31), 4, 7, 2**31 - 1]}, {}),
        ({"part_offsets": [0, 4, 50, 11]}, {"part_offsets": [0, 4, 11, 11]}),
        ({"part_offsets": [4, 0, 7, 11]}, {"part_offsets": [4, 4, 7, 11]}),
        ({"part_offsets": [0, 7, 4, 11]}, {"part_offsets": [0, 7, 7, 11]}),
        ({"instance_offsets": [0, 1, 2**31 - 1]}, {}),
        ({"instance_offsets": [-5, 1, 3]}, {}),
        ({"instance_offsets": [0, 9, 2]}, {"instance_offsets": [0, 3, 3]}),
        ({"instance_offsets": [3, 1, 0]}, {"instance_offsets": [3, 3, 3]}),
    )
    boxes, idxs = (
        torch.tensor([[[0.0, 0.0, 4.0, 4.0], [1.0, 0.0, 5.0, 6.0]]]).repeat(1, 2, 1),
        torch.tensor([[0, 0, 1, 1]]),
    )
    for wrong, right in cases:
        expected = replace(
            whole, max_vertices=11, max_parts=3, **{key: torch.tensor(value) for key, value in right.items()}
        )
        packed = replace(expected, **{key: torch.tensor(value, dtype=dtype) for key, value in wrong.items()})
        masks = rasterize_polygons(boxes.to(cuda_or_cpu), idxs.to(cuda_or_cpu), packed.to(cuda_or_cpu), 6).cpu()
        with cuda_ops.backend("reference"):
            assert torch.equal(masks, rasterize_polygons(boxes, idxs, expected, 6)), wrong


def test_boxes_and_vertices_get_no_gradient():
    packed = pack([[SQUARE]])
    boxes, xy = torch.tensor([[[0.0, 0.0, 4.0, 4.0]]]).requires_grad_(), packed.xy.requires_grad_()
    assert not rasterize_polygons(boxes, torch.zeros(1, 1).long(), replace(packed, xy=xy), 4).requires_grad


def test_no_boxes_give_no_masks():
    idxs = torch.zeros(1, 0, dtype=torch.int64)
    assert rasterize_polygons(torch.zeros(1, 0, 4), idxs, pack([[np.ones((3, 2))]]), 4).shape == (1, 0, 4, 4)


def test_a_box_of_infinite_length_cuts_out_nothing_and_nan_in_a_box_counts_as_0():
    packed = pack([[np.array([[0, 0], [4, 0], [4, 4]]), np.array([[-9, -9], [9, -9], [9, 9]])]])
    infinite = [[-torch.inf, 0, 4, 4], [0, 0, 4, torch.inf], [-torch.inf] * 2 + [torch.inf] * 2, [torch.inf] * 4]
    boxes = torch.tensor([[*infinite, [-torch.inf] * 4, [0, -torch.inf, 4, torch.inf]]])
    assert not rasterize_polygons(boxes, torch.zeros(boxes.shape[:2], dtype=torch.int64), packed, 4).any()
    boxes = torch.tensor([[[torch.nan, 0, 4, 4], [0, 0, 4, 4], [torch.nan] * 4, [0] * 4]])
    masks = rasterize_polygons(boxes, torch.zeros(1, 4, dtype=torch.int64), packed, 4)
    assert torch.equal(masks[:, ::2], masks[:, 1::2])
    assert masks[0, 0].any()


@pytest.mark.parametrize("backend", ["compiled"], indirect=True)
def test_compiled_masks_of_numbers_that_are_none_equal_those_of_the_reference(seeds):
    for seed in seeds(40):
        case = unruly_case(seed)
        with cuda_ops.backend("reference"):
            expected = rasterize_polygons(*case)
        assert ((expected == 0) | (expected == 1)).all()
        assert torch.equal(rasterize_polygons(*case), expected)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"instance_idxs": torch.zeros(2, 3)}, r"instance_idxs must be \[2, 3\] int, got \[2, 3\] torch.float32"),
        ({"instance_idxs": torch.zeros(2, 3).to(torch.uint64)}, r"instance_idxs must be .* got \[2, 3\] torch.uint64"),
        ({"size": 0}, r"size must be positive, got 0"),
        ({"size": 2.0}, r"size must be whole, got 2.0"),
        (
            {"polygons": replace(pack([[np.ones((3, 2))]] * 2), xy=torch.ones(6, 2).long())},
            r"polygons.xy must be \[V, 2\] float, got \[6, 2\] torch.int64",
        ),
        (
            {"polygons": replace(pack([[np.ones((3, 2))]] * 2), xy=torch.ones(6, 2, 1))},
            r"polygons.xy must be \[V, 2\] float, got \[6, 2, 1\] torch.float32",
        ),
        (
            {"polygons": replace(pack([[np.ones((3, 2))]] * 2), part_offsets=torch.zeros(0).int())},
            r"polygons.part_offsets must be \[1 or more\] int, got \[0\] torch.int32",
        ),
        (
            {"polygons": replace(pack([[np.ones((3, 2))]] * 2), instance_offsets=torch.zeros(3))},
            r"polygons.instance_offsets must be \[1 or more\] int, got \[3\] torch.float32",
        ),
        (
            {"polygons": pack([[np.ones((3, 2))]] * 3)},
            r"polygons must be the same number of instances for 2 images, got 3",
        ),
    ],
)
def test_wrong_input_is_named(wrong, message):
    idxs, polygons = torch.zeros(2, 3, dtype=torch.int64), pack([[np.ones((3, 2))]] * 2)
    right = {"boxes": torch.zeros(2, 3, 4), "instance_idxs": idxs, "polygons": polygons, "size": 4}
    with pytest.raises(ValueError, match=f"^rasterize_polygons: {message}"):
        rasterize_polygons(**right | wrong)
