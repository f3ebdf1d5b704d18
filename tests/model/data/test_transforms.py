"""Decoding, resizing, flipping."""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, JpegImagePlugin
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from model.data.transforms import (
    flip_boxes,
    flip_image,
    flip_image_vertically,
    flip_xy,
    read_image,
    resize_image,
    resized_size,
    scale_boxes,
    scale_xy,
    to_rgb,
    turn_image,
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


def test_a_palette_with_transparent_entries_becomes_rgb_without_a_warning(tmp_path: Path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (4, 5, 3), dtype=np.uint8)).convert("P")
    image.save(tmp_path / "a.png", transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = read_image(tmp_path / "a.png")
    assert np.array_equal(pixels, np.asarray(image.convert("RGB")))


def test_16_bits_in_a_wider_type_keep_their_upper_byte():
    wide = Image.fromarray(np.array([[0, 0x6400, 0xFFFF]], dtype=np.int32))
    assert wide.mode == "I"
    assert to_rgb(wide)[..., 0].tolist() == [[0, 100, 255]]


def test_a_range_of_values_becomes_that_of_8_bits(tmp_path: Path):
    cases: list[tuple[Any, tuple[float, float], list[int]]] = [
        (np.array([[0, 4095, 9000]], np.uint16), (0, 4095), [0, 255, 255]),
        (np.array([[-1024, 1024, 3071]], np.int32), (-1024, 3072), [0, 128, 255]),
        (np.array([[0.0, 0.5, np.nan, np.inf]], np.float32), (0, 1), [0, 128, 0, 255]),
        (np.array([[0, 7, 255]], np.uint8), (0, 7), [0, 7, 255]),
    ]
    for values, pixel_range, expected in cases:
        path = saved(tmp_path / "image.tif", Image.fromarray(values))
        pixels = read_image(path, pixel_range=pixel_range)
        assert pixels.shape == (*values.shape, 3)
        assert pixels[0, :, 1].tolist() == expected


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


def test_a_truncated_image_is_an_error(tmp_path: Path, coco_like: Path):
    content = next((coco_like / "val2017").glob("*.jpg")).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(OSError, match="truncated"):
        read_image(tmp_path / "cut.jpg")


def by_pillow(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Blurred noise: as smooth as a photograph's, so that JPEG keeps most of it."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8))
    return np.array(coarse.resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("size", [(1, 1), (17, 31), (64, 48)])
@pytest.mark.parametrize(
    "options",
    [
        {"subsampling": 0},
        {"subsampling": 1},
        {"subsampling": 2},
        {"subsampling": 2, "progressive": True},
        {"subsampling": 2, "restart_marker_blocks": 1},
        {"quality": 100, "optimize": True},
        {"quality": 5},
        {"keep_rgb": True},
        {"mode": "L"},
        {"mode": "L", "progressive": True},
        {"mode": "CMYK"},
        {"comment": b"x" * 60000},
    ],
    ids=str,
)
def test_a_jpeg_is_decoded_as_pillow_decodes_it(tmp_path: Path, size: tuple[int, int], options: dict[str, object]):
    options = dict(options)
    image = Image.fromarray(noise(*size)).convert(str(options.pop("mode", "RGB")))
    path = saved(tmp_path / "image.jpg", image, **options)
    assert np.array_equal(read_image(path), by_pillow(path))


def test_images_of_coco_are_decoded_as_pillow_decodes_them(either_coco: Path):
    for path in sorted((either_coco / "val2017").iterdir())[:30]:
        assert np.array_equal(read_image(path), by_pillow(path))


def test_an_ordinary_jpeg_needs_no_decoding_by_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = saved(tmp_path / "image.jpg", Image.fromarray(noise(16, 24)))
    expected = by_pillow(path)
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load", None)
    assert np.array_equal(read_image(path), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_a_jpeg_as_pillow_turns_it(tmp_path: Path, orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / "image.jpg", Image.fromarray(noise(16, 24)), exif=exif)
    with Image.open(path) as image:
        turned = np.array(ImageOps.exif_transpose(image))
    assert np.array_equal(read_image(path), turned)
    assert np.array_equal(read_image(path, apply_exif=False), by_pillow(path))


def outcome(read: Callable[[Path], np.ndarray], path: Path) -> object:
    """The bytes of the pixels, or the error and its words."""
    try:
        return read(path).tobytes()
    except OSError as error:
        return type(error), str(error)


@pytest.mark.parametrize("seed", range(60))
def test_damaged_jpegs_give_pillows_pixels_or_its_error(tmp_path: Path, seed: int):
    """Some bytes changed, cut off or put in anywhere behind the first: what Pillow mends is mended alike."""
    rng = np.random.default_rng(seed)
    path = saved(tmp_path / "image.jpg", Image.fromarray(noise(40, 56)), quality=90, progressive=bool(seed % 2))
    content = bytearray(path.read_bytes())
    place = int(rng.integers(2, len(content)))
    damage = seed % 4
    if damage == 0:
        content[place] ^= int(rng.integers(1, 256))
    elif damage == 1:
        del content[place:]
    elif damage == 2:
        del content[place]
    else:
        content[place:place] = b"\xff\xd3"
    path.write_bytes(content)
    assert outcome(read_image, path) == outcome(by_pillow, path)


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\xff\xd8\xff"])
def test_a_file_that_is_no_image_is_named(tmp_path: Path, content: bytes):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(OSError, match=r"a\.jpg"):
        read_image(tmp_path / "a.jpg")


def test_a_device_is_not_read(tmp_path: Path):
    (tmp_path / "a.jpg").symlink_to("/dev/null")
    with pytest.raises(OSError, match="must be a file, but is a device"):
        read_image(tmp_path / "a.jpg")


def test_a_file_that_is_absent_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"a\.jpg"):
        read_image(tmp_path / "a.jpg")


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


def resized_by_pillow(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.array(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR))


@pytest.mark.parametrize("seed", range(100))
def test_resized_pixels_are_pillows_within_2(seed: int):
    height, width, *size = np.random.default_rng(seed).integers(1, 120, 4).tolist()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    resized = resize_image(pixels, (size[0], size[1]))
    assert resized.flags.c_contiguous
    assert np.abs(resized.astype(int) - resized_by_pillow(pixels, (size[0], size[1]))).max() <= 2


def test_almost_all_pixels_of_coco_are_pillows(either_coco: Path):
    for path in sorted((either_coco / "val2017").iterdir())[:6]:
        pixels = read_image(path)
        for short in (800, 240):
            size = resized_size((pixels.shape[0], pixels.shape[1]), short, 1333)
            difference = np.abs(resize_image(pixels, size).astype(int) - resized_by_pillow(pixels, size))
            assert (difference == 0).mean() >= 0.98
            assert (difference <= 1).mean() >= 0.9999


@pytest.mark.parametrize("size", [(30, 44), (9, 80), (70, 11), (20, 30)])
def test_a_flipped_image_mirrors_the_plain_one(size: tuple[int, int]):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    assert np.array_equal(resize_image(pixels, size, flip=True), resize_image(pixels, size)[:, ::-1])


_DIGEST = """
import hashlib, numpy as np
from model.data.transforms import resize_image
digest = hashlib.sha256()
for seed in range(20):
    rng = np.random.default_rng(seed)
    height, width, *size = rng.integers(1, 200, 4).tolist()
    digest.update(resize_image(rng.integers(0, 256, (height, width, 3), dtype=np.uint8), tuple(size)))
print(digest.hexdigest())
"""


def test_resized_pixels_do_not_depend_on_the_processor():
    digests = {
        subprocess.run(
            [sys.executable, "-c", _DIGEST],
            env={**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": str(Path(__file__).parents[3])},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for capability in ("default", torch.backends.cpu.get_cpu_capability().lower())
    }
    assert len(digests) == 1


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


def test_a_row_or_column_of_pixels_is_turned_and_flipped_as_any_picture_and_can_be_resized():
    for size in ((1, 5), (5, 1), (3, 4)):
        pixels = np.arange(size[0] * size[1] * 3, dtype=np.uint8).reshape(*size, 3)
        for turns in range(4):
            assert np.array_equal(turn_image(pixels, turns), np.rot90(pixels, turns))
            assert resize_image(turn_image(pixels, turns), (6, 7)).shape == (6, 7, 3)
        upside_down = flip_image_vertically(pixels)
        assert np.array_equal(upside_down, pixels[::-1])
        assert resize_image(upside_down, (6, 7)).shape == (6, 7, 3)


def test_no_box_stays_no_box():
    none = np.zeros((0, 4), dtype=np.float32)
    assert flip_boxes(none, 9).shape == scale_boxes(none, (1, 1), (2, 2)).shape == (0, 4)
