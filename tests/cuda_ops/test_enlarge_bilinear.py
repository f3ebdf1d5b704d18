"""Enlarging: bits of the reference, pixels of Pillow."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from cuda_ops import enlarge_bilinear, reference

compiled_only = pytest.mark.parametrize("backend", ["compiled"], indirect=True)


def noise(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def case(seed: int) -> tuple[torch.Tensor, tuple[int, int], bool]:
    """An image of awkward size, noise or nothing but extremes, and a size from its own to many times larger."""
    draw = random.Random(seed)
    height, width = draw.choice([2, 3, 4, 5, 31, 40]), draw.choice([2, 3, 9, 32, 57])
    image = noise(height, width, seed)
    if draw.random() < 0.3:
        image = (image > 127).to(torch.uint8) * 255
    size = (height + draw.choice([0, 1, 7, 300]), width + draw.choice([0, 1, 13, 250]))
    return image, size, draw.random() < 0.5


def by_pillow(image: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    return np.array(Image.fromarray(image.numpy()).resize(size[::-1], Image.Resampling.BILINEAR))


@compiled_only
def test_compiled_pixels_equal_those_of_the_reference(seeds):
    for seed in seeds(200):
        image, size, is_mirrored = case(seed)
        assert torch.equal(
            enlarge_bilinear(image, size, is_mirrored), reference.enlarge_bilinear(image, size, is_mirrored)
        )


def test_pixels_are_pillows_within_2_and_most_are_equal(seeds):
    for seed in seeds(60):
        image, size, _ = case(seed)
        difference = np.abs(enlarge_bilinear(image, size).numpy().astype(int) - by_pillow(image, size))
        assert difference.max() <= 2
        assert (difference <= 1).mean() >= 0.999


def test_of_a_smooth_image_999_in_1000_pixels_are_pillows():
    image = torch.from_numpy(by_pillow(noise(30, 40), (480, 640)))
    assert (enlarge_bilinear(image, (800, 1066)).numpy() == by_pillow(image, (800, 1066))).mean() >= 0.999


@pytest.mark.parametrize("size", [(20, 30), (23, 30), (20, 97), (64, 48)])
def test_mirrored_is_the_mirror_image(size: tuple[int, int]):
    image = noise(20, 30)
    assert torch.equal(enlarge_bilinear(image, size, True), enlarge_bilinear(image, size).flip(1))


def test_of_its_own_size_an_image_stays_as_it_is():
    assert torch.equal(enlarge_bilinear(noise(20, 30), (20, 30)), noise(20, 30))


def test_between_two_pixels_lies_their_mean_and_beyond_the_last_only_itself():
    image = torch.tensor([[[0] * 3, [200] * 3]] * 2, dtype=torch.uint8)
    assert enlarge_bilinear(image, (2, 4))[0, :, 0].tolist() == [0, 50, 150, 200]


def test_strides_do_not_matter():
    planes = noise(20, 30).permute(2, 0, 1).contiguous()
    assert torch.equal(enlarge_bilinear(planes.permute(1, 2, 0), (40, 50)), enlarge_bilinear(noise(20, 30), (40, 50)))


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_do_not_matter(threads: int):
    before = torch.get_num_threads()
    expected = enlarge_bilinear(noise(200, 40), (800, 90))
    torch.set_num_threads(threads)
    try:
        assert torch.equal(enlarge_bilinear(noise(200, 40), (800, 90)), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.gpu
def test_on_a_gpu_pixels_are_the_same():
    assert torch.equal(
        enlarge_bilinear(noise(20, 30).cuda(), (40, 50)).cpu(), enlarge_bilinear(noise(20, 30), (40, 50))
    )


@pytest.mark.parametrize(
    ("image", "size", "message"),
    [
        (
            torch.zeros(4, 4, 3),
            (8, 8),
            r"image must be \[h, w, 3\] uint8, at least 2 × 2, got \[4, 4, 3\] torch.float32",
        ),
        (noise(1, 4), (8, 8), "image must be"),
        (noise(4, 4)[..., :2], (8, 8), "image must be"),
        (noise(4, 4), (8, 8.5), r"size must be whole, got \(8, 8.5\)"),
        (noise(4, 4), (8, 3), r"size must be at least \[4, 4\], got \(8, 3\)"),
    ],
)
def test_wrong_input_is_named(image: torch.Tensor, size: tuple[int, int], message: str):
    with pytest.raises(ValueError, match=f"enlarge_bilinear: {message}"):
        enlarge_bilinear(image, size)
