"""Anchors: torchvision's, bit for bit."""

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from cuda_ops import generate_anchors


def torchvision_anchors(feature_sizes, image_size, sizes, ratios):
    generator = AnchorGenerator(tuple((size,) for size in sizes), (tuple(ratios),) * len(sizes))
    images = ImageList(torch.zeros(1, 3, *image_size), [image_size])
    return generator(images, [torch.zeros(1, 1, *size) for size in feature_sizes])[0]


def test_one_cell_has_one_anchor_of_each_ratio_about_its_corner():
    anchors = generate_anchors([(1, 2)], (16, 32), sizes=[8], aspect_ratios=[1.0, 4.0])
    assert anchors.tolist() == [[-4, -4, 4, 4], [-2, -8, 2, 8], [12, -4, 20, 4], [14, -8, 18, 8]]


@pytest.mark.parametrize("image_size", [(800, 1344), (1344, 800), (96, 128), (100, 37)])
def test_pyramid_anchors_equal_those_of_torchvision(image_size):
    feature_sizes = [(-(-image_size[0] // stride), -(-image_size[1] // stride)) for stride in (4, 8, 16, 32, 64)]
    arguments = (feature_sizes, image_size, (32, 64, 128, 256, 512), (0.5, 1.0, 2.0))
    assert torch.equal(generate_anchors(*arguments), torchvision_anchors(*arguments))


@pytest.mark.parametrize("seed", range(100))
def test_anchors_of_odd_sizes_and_ratios_equal_those_of_torchvision(seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = (torch.rand(2, generator=generator) * 300 + 1).tolist()
    ratios = (torch.rand(3, generator=generator) * 4 + 0.1).tolist()
    feature_sizes = [tuple(size) for size in torch.randint(1, 9, (2, 2), generator=generator).tolist()]
    image_size = tuple(torch.randint(16, 99, (2,), generator=generator).tolist())
    arguments = (feature_sizes, image_size, sizes, ratios)
    assert torch.equal(generate_anchors(*arguments), torchvision_anchors(*arguments))
