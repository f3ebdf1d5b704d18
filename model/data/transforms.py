"""From a file to network input: decoding, resizing, flipping. The one place where boxes leave original pixels.

Images are [h, w, 3] uint8 RGB; boxes [n, 4] float32 (x1, y1, x2, y2), outlines [v, 2] float32 (x, y); sizes (height, width).
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]
Size = tuple[int, int]


def read_image(path: Path, *, apply_exif: bool = True) -> Pixels:
    """Decode any image that Pillow reads.

    Args:
        apply_exif: turn the image as its EXIF orientation says.

    Returns:
        [h, w, 3] uint8 RGB. 16-bit values keep their upper byte; transparency is dropped.

    Raises:
        OSError: if the file is absent, truncated or no image.
    """
    with Image.open(path) as image:
        image.load()
        turned = ImageOps.exif_transpose(image) if apply_exif else image
        return to_rgb(turned)


def to_rgb(image: Image.Image) -> Pixels:
    """The pixels of a decoded image of any mode: [h, w, 3] uint8 RGB."""
    if image.mode.startswith("I"):  # 16 bits of gray, which Pillow's own conversion would clip at 255
        gray = np.clip(np.asarray(image), 0, 65535) >> 8
        return np.repeat(gray.astype(np.uint8)[..., None], 3, axis=2)
    return np.asarray(image.convert("RGB"))


def resized_size(size: Size, min_size_px: int, max_size_px: int) -> Size:
    """The size at which the shorter side is min_size_px, or less where the longer side would exceed max_size_px.

    The other side is rounded down, as in torchvision's GeneralizedRCNNTransform, but in whole numbers, so without its
    float32 rounding (which can take one pixel from the side that should be exact).
    """
    short, long = min(size), max(size)
    numerator, denominator = min_size_px, short
    if min_size_px * long > max_size_px * short:
        numerator, denominator = max_size_px, long
    height, width = (max(side * numerator // denominator, 1) for side in size)
    return height, width


def resize_image(pixels: Pixels, size: Size) -> Pixels:
    """Bilinear, antialiased when shrinking: [h, w, 3] uint8 of the given size."""
    if pixels.shape[:2] == size:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR))


def scale_boxes(boxes: Floats, old: Size, new: Size) -> Floats:
    """Boxes of an image of size `old` in its resized copy of size `new`."""
    return scale_xy(boxes.reshape(-1, 2), old, new).reshape(-1, 4)


def scale_xy(xy: Floats, old: Size, new: Size) -> Floats:
    """Points of an image of size `old` in its resized copy of size `new`."""
    factors = np.array([new[1] / old[1], new[0] / old[0]], dtype=np.float32)
    return xy * factors


def flip_image(pixels: Pixels) -> Pixels:
    """Left becomes right."""
    return pixels[:, ::-1]


def flip_boxes(boxes: Floats, width: int) -> Floats:
    """Boxes in the mirror image of the given width."""
    x1, y1, x2, y2 = boxes.T
    return np.stack([width - x2, y1, width - x1, y2], axis=1)


def flip_xy(xy: Floats, width: int) -> Floats:
    """Points in the mirror image of the given width."""
    return np.stack([width - xy[:, 0], xy[:, 1]], axis=1)
