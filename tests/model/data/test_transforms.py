"""Decoding, resizing, flipping."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from model.data.transforms import (
    flip_boxes,
    flip_image,
    flip_xy,
    read_image,
    resize_image,
    resized_size,
    scale_boxes,
    scale_xy,
    to_rgb,
)

GRAY = np.array([[0, 100, 200]], dtype=np.uint8)


def saved(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "I;16"])
def test_every_mode_of_png_becomes_rgb(tmp_path: Path, mode: str):
    image = Image.fromarray(GRAY)
    image = Image.fromarray(GRAY.astype(np.uint16) * 256 + 7) if mode == "I;16" else image.convert(mode)
    pixels = read_image(saved(tmp_path / "image.png", image))
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, np.repeat(GRAY[..., None], 3, axis=2))


def test_16_bits_in_a_wider_type_keep_their_upper_byte():
    wide = Image.fromarray(np.array([[0, 0x6400, 0xFFFF]], dtype=np.int32))
    assert wide.mode == "I"
    assert to_rgb(wide)[..., 0].tolist() == [[0, 100, 255]]


def test_cmyk_and_gray_jpegs_become_rgb(tmp_path: Path):
    gray = Image.fromarray(np.full((16, 24), 120, dtype=np.uint8))
    for mode in ("L", "CMYK"):
        pixels = read_image(saved(tmp_path / f"{mode}.jpg", gray.convert("RGB").convert(mode), quality=95))
        assert pixels.shape == (16, 24, 3)
        assert np.abs(pixels.astype(int) - 120).max() <= 2


def test_exif_turns_the_image_only_where_asked(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter to the right to see it upright
    path = saved(tmp_path / "image.jpg", Image.new("RGB", (24, 16)), exif=exif)
    assert read_image(path).shape == (24, 16, 3)
    assert read_image(path, apply_exif=False).shape == (16, 24, 3)


def test_a_truncated_image_is_an_error(tmp_path: Path, coco_tiny: Path):
    content = next((coco_tiny / "val2017").iterdir()).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(OSError, match="truncated"):
        read_image(tmp_path / "cut.jpg")


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (800, 1066)),
        ((640, 480), (1066, 800)),
        ((427, 640), (800, 1199)),
        ((200, 1000), (266, 1333)),
        ((800, 800), (800, 800)),
    ],
)
def test_the_shorter_side_becomes_800_unless_the_longer_would_exceed_1333(size, expected):
    assert resized_size(size, 800, 1333) == expected


def test_sizes_are_torchvisions_but_for_its_rounding():
    transform = GeneralizedRCNNTransform(800, 1333, [0.0] * 3, [1.0] * 3, size_divisible=1)
    rng = np.random.default_rng(0)
    for height, width in rng.integers(30, 120, (12, 2)).tolist():
        images, _ = transform([torch.zeros(3, height, width)])
        ours = resized_size((height, width), 800, 1333)
        assert np.abs(np.subtract(ours, images.image_sizes[0])).max() <= 1


def test_resizing_gives_the_size_and_keeps_the_content():
    pixels = np.zeros((10, 20, 3), dtype=np.uint8)
    pixels[:, 10:] = 200
    large = resize_image(pixels, (20, 60))
    assert large.shape == (20, 60, 3)
    assert (large[:, :25] == 0).all()
    assert (large[:, 35:] == 200).all()


def test_boxes_and_points_follow_the_image():
    boxes = np.array([[1, 2, 3, 4]], dtype=np.float32)
    assert scale_boxes(boxes, (10, 10), (20, 30)).tolist() == [[3, 4, 9, 8]]
    assert scale_xy(boxes.reshape(-1, 2), (10, 10), (20, 30)).tolist() == [[3, 4], [9, 8]]
    assert flip_boxes(boxes, 10).tolist() == [[7, 2, 9, 4]]
    assert flip_xy(boxes.reshape(-1, 2), 10).tolist() == [[9, 2], [7, 4]]


def test_a_flipped_box_holds_the_flipped_pixels():
    pixels = np.zeros((4, 9, 3), dtype=np.uint8)
    pixels[1:3, 2:5] = 255
    x1, y1, x2, y2 = flip_boxes(np.array([[2, 1, 5, 3]], dtype=np.float32), 9)[0].astype(int)
    flipped = flip_image(pixels)
    assert flipped[y1:y2, x1:x2].min() == 255
    assert flipped.sum() == flipped[y1:y2, x1:x2].sum()


def test_no_box_stays_no_box():
    none = np.zeros((0, 4), dtype=np.float32)
    assert flip_boxes(none, 9).shape == scale_boxes(none, (1, 1), (2, 2)).shape == (0, 4)
