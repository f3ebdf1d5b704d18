"""Anchors: torchvision's and Detectron2's, bit for bit; and the compiled operator against the reference."""

import math
import random
from functools import partial

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from cuda_ops import generate_anchors, reference

compiled_only = pytest.mark.parametrize("backend", ["compiled"], indirect=True)
BITS = {torch.float16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
CASE = ([(2, 3), (1, 2)], (32, 48), ((8.0,), (15.0,)), (0.5, 1.0, 2.0))

rounded_anchors = partial(generate_anchors, conventions="torchvision")


def torchvision_anchors(feature_sizes, image_size, sizes, ratios):
    generator = AnchorGenerator(tuple(map(tuple, sizes)), (tuple(ratios),) * len(sizes))
    images = ImageList(torch.zeros(1, 3, *image_size), [image_size])
    return generator(images, [torch.zeros(1, 1, *size) for size in feature_sizes])[0]


def test_one_cell_has_one_anchor_of_each_ratio_about_its_corner():
    anchors = rounded_anchors([(1, 2)], (16, 32), sizes=[[8]], aspect_ratios=[1.0, 4.0])
    assert anchors.tolist() == [[-4, -4, 4, 4], [-2, -8, 2, 8], [12, -4, 20, 4], [14, -8, 18, 8]]


@pytest.mark.parametrize("image_size", [(800, 1344), (1344, 800), (96, 128), (100, 37)])
def test_pyramid_anchors_equal_those_of_torchvision(image_size):
    feature_sizes = [(-(-image_size[0] // stride), -(-image_size[1] // stride)) for stride in (4, 8, 16, 32, 64)]
    arguments = (feature_sizes, image_size, ((32,), (64,), (128,), (256,), (512,)), (0.5, 1.0, 2.0))
    assert torch.equal(rounded_anchors(*arguments), torchvision_anchors(*arguments))


def test_anchors_of_odd_sizes_and_ratios_equal_those_of_torchvision(seeds):
    for seed in seeds(200):
        generator = torch.Generator().manual_seed(seed)
        sizes = (torch.rand(2, 1 + seed % 5, generator=generator) * 300 + 1).tolist()
        ratios = (torch.rand(3, generator=generator) * 4 + 0.1).tolist()
        feature_sizes = [tuple(size) for size in torch.randint(1, 9, (2, 2), generator=generator).tolist()]
        image_size = tuple(torch.randint(16, 99, (2,), generator=generator).tolist())
        arguments = (feature_sizes, image_size, sizes, ratios)
        assert torch.equal(rounded_anchors(*arguments), torchvision_anchors(*arguments))


def test_corners_that_are_halves_are_rounded_to_even():
    anchors = rounded_anchors([(1, 1)] * 4, (1, 1), sizes=[[1], [3], [5], [7]], aspect_ratios=[1.0])
    assert anchors.tolist() == [[-side, -side, side, side] for side in (0, 2, 2, 4)]


def random_case(seed):
    draw = random.Random(seed)
    num_levels = draw.randint(1, 5)
    num_sizes = draw.randint(1, 3)
    sizes = [
        [draw.choice([draw.randint(1, 64), draw.uniform(0.01, 1000)]) for _ in range(num_sizes)]
        for _ in range(num_levels)
    ]
    ratios = [draw.choice([1.0, 0.5, draw.uniform(0.01, 10)]) for _ in range(draw.randint(1, 4))]
    feature_sizes = [(draw.randint(1, 30), draw.randint(1, 30)) for _ in range(num_levels)]
    image_size = (draw.randint(1, 2000), draw.randint(1, 2000))  # where it is less than a level, that has stride 0
    return feature_sizes, image_size, sizes, ratios


conventions_of_both = pytest.mark.parametrize("conventions", ["torchvision", "detectron2"])


@conventions_of_both
@compiled_only
@pytest.mark.parametrize("dtype", BITS)
def test_compiled_anchors_equal_those_of_the_reference_in_every_bit(seeds, dtype, conventions):
    for seed in seeds(100):
        case = random_case(seed)
        anchors, expected = (
            generate(*case, dtype=dtype, conventions=conventions)
            for generate in (generate_anchors, reference.generate_anchors)
        )
        assert torch.equal(anchors.view(BITS[dtype]), expected.view(BITS[dtype]))


@conventions_of_both
@compiled_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_anchors_of_cuda_equal_those_of_the_reference_in_every_bit(seeds, dtype, conventions, cuda):
    for seed in seeds(20):
        case = random_case(seed)
        anchors = generate_anchors(*case, device=cuda, dtype=dtype, conventions=conventions)
        expected = reference.generate_anchors(*case, dtype=dtype, conventions=conventions)
        assert torch.equal(anchors.cpu().view(BITS[dtype]), expected.view(BITS[dtype]))


def test_anchors_are_made_on_the_device_and_in_the_dtype_asked_for():
    anchors = generate_anchors(*CASE, device="meta", dtype=torch.float64)
    assert (anchors.device.type, anchors.dtype, anchors.shape) == ("meta", torch.float64, (24, 4))


def detectron2_anchors(feature_sizes, strides, sizes, ratios):
    """Detectron2's DefaultAnchorGenerator, its lines by its own names."""
    levels = []
    for (grid_height, grid_width), stride, level_sizes in zip(feature_sizes, strides, sizes, strict=True):
        cell_anchors = []
        for size in level_sizes:
            area = size**2.0
            for aspect_ratio in ratios:
                w = math.sqrt(area / aspect_ratio)
                h = aspect_ratio * w
                cell_anchors.append([-w / 2.0, -h / 2.0, w / 2.0, h / 2.0])
        shifts_x = torch.arange(0, grid_width * stride, step=stride, dtype=torch.float32)
        shifts_y = torch.arange(0, grid_height * stride, step=stride, dtype=torch.float32)
        shift_y, shift_x = torch.meshgrid(shifts_y, shifts_x, indexing="ij")
        shifts = torch.stack(
            (shift_x.reshape(-1), shift_y.reshape(-1), shift_x.reshape(-1), shift_y.reshape(-1)), dim=1
        )
        levels.append((shifts.view(-1, 1, 4) + torch.tensor(cell_anchors).view(1, -1, 4)).reshape(-1, 4))
    return torch.cat(levels)


@pytest.mark.parametrize("image_size", [(800, 1344), (1344, 800), (96, 128), (32, 2016)])
def test_pyramid_anchors_equal_those_of_detectron2(image_size):
    strides = (4, 8, 16, 32, 64)
    feature_sizes = [(-(-image_size[0] // stride), -(-image_size[1] // stride)) for stride in strides]
    sizes, ratios = ((32,), (64,), (128,), (256,), (512,)), (0.5, 1.0, 2.0)
    expected = detectron2_anchors(feature_sizes, strides, sizes, ratios)
    assert torch.equal(generate_anchors(feature_sizes, image_size, sizes, ratios, conventions="detectron2"), expected)


@pytest.mark.parametrize("stride", [16, 32])
def test_several_sizes_on_one_level_equal_those_of_detectron2(stride):
    feature_sizes = [(800 // stride, 1088 // stride)]
    sizes, ratios = ((32, 64, 128, 256, 512),), (0.5, 1.0, 2.0)
    anchors = generate_anchors(feature_sizes, (800, 1088), sizes, ratios, conventions="detectron2")
    assert torch.equal(anchors, detectron2_anchors(feature_sizes, (stride,), sizes, ratios))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sizes": ((8,),)}, r"sizes must be one a level, 2, got 1"),
        ({"sizes": ((8,), (16, 32))}, r"sizes must be as many for each level"),
        ({"feature_sizes": [(4, 0), (2, 2)]}, r"feature_sizes must be positive, got \[\(4, 0\)"),
        ({"aspect_ratios": ()}, r"aspect_ratios must be positive, at least one, got \[\]"),
        ({"image_size": (0, 64)}, r"image_size and sizes must be positive"),
        ({"conventions": "torchvison"}, r"conventions must be detectron2 or torchvision, got 'torchvison'$"),
        ({"conventions": "Detectron2"}, r"conventions must be detectron2 or torchvision, got 'Detectron2'$"),
        ({"conventions": ""}, r"conventions must be detectron2 or torchvision, got ''$"),
    ],
)
def test_wrong_input_is_named(wrong, message):
    case = dict(zip(("feature_sizes", "image_size", "sizes", "aspect_ratios"), CASE, strict=True))
    with pytest.raises(ValueError, match=f"^generate_anchors: {message}"):
        generate_anchors(**case | wrong)
