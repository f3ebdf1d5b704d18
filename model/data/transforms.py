"""Image transforms: decoding, resizing, flipping, turning. Only here boxes are converted from original pixels.

Images are [h, w, 3] uint8 RGB; boxes [n, 4] float32 (x1, y1, x2, y2); outlines [v, 2] float32 (x, y); sizes
(height, width). Training, evaluation and prediction all decode and resize here, so they see the same pixels.
"""

import struct
from collections.abc import Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps
from torch.nn.functional import interpolate

from cuda_ops import enlarge_bilinear
from model.files import require_file

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]
Size = tuple[int, int]

# Raised by Pillow, and its decoders, on damaged images.
UNREADABLE = (
    *(OSError, ValueError, SyntaxError, RuntimeError, EOFError, LookupError, struct.error),
    Image.DecompressionBombError,
)
DARKEST = 255 / 16  # an image without a brighter pixel looks black
_UPRIGHT = 1


def read_image(source: Path | BytesIO, *, apply_exif: bool = True, pixel_range: Sequence[float] = ()) -> Pixels:
    """Decode any image that Pillow reads; ordinary JPEGs with libjpeg-turbo directly: the same bits in less time.

    Args:
        source: path or content of an image file.
        apply_exif: apply the EXIF orientation.
        pixel_range: data.pixel_range.

    Returns:
        [h, w, 3] uint8 RGB; transparency is dropped.

    Raises:
        OSError: if the file is missing, truncated, not an image, a pipe or a device. Some damage raises another of
            `UNREADABLE`.
    """
    if isinstance(source, Path):
        require_file(source)
    with Image.open(source) as image:
        if _is_ordinary_jpeg(image) and not (apply_exif and _is_turned(image)):
            # A damaged file goes on to Pillow, which repairs it or raises an exact error.
            with suppress(ValueError):
                encoded = source.read_bytes() if isinstance(source, Path) else source.getvalue()
                return simplejpeg.decode_jpeg(encoded, "RGB")
        image.load()
        turned = ImageOps.exif_transpose(image) if apply_exif else image
        return to_rgb(turned, pixel_range)


def _is_ordinary_jpeg(image: Image.Image) -> bool:
    return image.format == "JPEG" and image.mode in ("RGB", "L")  # not CMYK, which only Pillow converts


def _is_turned(image: Image.Image) -> bool:
    return image.getexif().get(ExifTags.Base.Orientation, _UPRIGHT) != _UPRIGHT


def to_rgb(image: Image.Image, pixel_range: Sequence[float] = ()) -> Pixels:
    """Convert a decoded image of any mode to [h, w, 3] uint8 RGB.

    Args:
        pixel_range: values of a deep image that become 0 and 255; by default 16-bit values keep their upper byte, and
            floats are cut to 0 … 255.
    """
    if is_deep(image) and pixel_range:
        low, high = pixel_range
        fractions = (np.asarray(image, dtype=np.float64) - low) / (high - low)
        gray = (255 * np.clip(np.nan_to_num(fractions), 0, 1)).round()
    elif image.mode.startswith("I"):  # Pillow's conversion would clip it at 255
        gray = np.clip(np.asarray(image), 0, 65535) >> 8
    else:
        if isinstance(image.info.get("transparency"), bytes):  # a palette: Pillow warns that it is lost
            image = image.convert("RGBA")
        return np.array(image.convert("RGB"))
    return np.repeat(gray.astype(np.uint8)[..., None], 3, axis=2)


def is_deep(image: Image.Image) -> bool:
    """Tell if the image has values of more than 8 bits, integers or floats, which Pillow reads as gray."""
    return image.mode.startswith("I") or image.mode == "F"


def resized_size(size: Size, min_size_px: int, max_size_px: int) -> Size:
    """Size at which the shorter side is min_size_px, or less if the longer side would exceed max_size_px.

    The other side is rounded down, as in torchvision's GeneralizedRCNNTransform, but in integer arithmetic, so without
    its float32 rounding (which can take one pixel from the side that should be exact).
    """
    short, long = min(size), max(size)
    numerator, denominator = min_size_px, short
    if min_size_px * long > max_size_px * short:
        numerator, denominator = max_size_px, long
    height, width = (max(side * numerator // denominator, 1) for side in size)
    return height, width


def fitted_size(size: Size, frame: Size, factor: float) -> Size:
    """Largest size of the same aspect ratio within factor × `frame`: large-scale jitter (arXiv:2012.07177)."""
    scale = factor * min(frame[0] / size[0], frame[1] / size[1])
    return max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)


def resize_image(pixels: Pixels, size: Size, *, flip: bool = False) -> Pixels:
    """Resize bilinearly, antialiased when shrinking, then mirror if `flip`: [h, w, 3] uint8 of the given size.

    Values are within 2 of Pillow's resize, mostly equal, and the same on every processor.
    """
    height, width = pixels.shape[:2]
    if (height, width) == size:
        return flip_image(pixels) if flip else pixels
    image = torch.from_numpy(np.ascontiguousarray(pixels))
    if size[0] >= height >= 2 and size[1] >= width >= 2:
        return enlarge_bilinear(image, size, flip).numpy()
    # The explicit batch stride marks the image as channels-last, so that torch resizes it without a copy.
    image = image.as_strided((1, 3, height, width), (pixels.size, 1, 3 * width, 3))
    resized = interpolate(image, size, mode="bilinear", antialias=True)[0].permute(1, 2, 0).contiguous().numpy()
    return flip_image(resized) if flip else resized


def scale_boxes(boxes: Floats, old: Size, new: Size) -> Floats:
    """Boxes of an image of size `old` in its resized copy of size `new`."""
    return scale_xy(boxes.reshape(-1, 2), old, new).reshape(-1, 4)


def scale_xy(xy: Floats, old: Size, new: Size) -> Floats:
    """Points of an image of size `old` in its resized copy of size `new`."""
    factors = np.array([new[1] / old[1], new[0] / old[0]], dtype=np.float32)
    return xy * factors


def flip_image(pixels: Pixels) -> Pixels:
    """Mirror left and right: a copy. torch moves whole vectors of pixels, NumPy single bytes."""
    return torch.from_numpy(pixels).flip(1).numpy()


def flip_image_vertically(pixels: Pixels) -> Pixels:
    """Turn upside down: a copy."""
    return torch.from_numpy(pixels).flip(0).numpy()


def flip_boxes(boxes: Floats, width: int) -> Floats:
    """Boxes in the mirror image of the given width."""
    x1, y1, x2, y2 = boxes.T
    return np.stack([width - x2, y1, width - x1, y2], axis=1)


def flip_xy(xy: Floats, width: int) -> Floats:
    """Points in the mirror image of the given width."""
    return np.stack([width - xy[:, 0], xy[:, 1]], axis=1)


def flip_boxes_vertically(boxes: Floats, height: int) -> Floats:
    """Boxes upside down in an image of the given height."""
    x1, y1, x2, y2 = boxes.T
    return np.stack([x1, height - y2, x2, height - y1], axis=1)


def flip_xy_vertically(xy: Floats, height: int) -> Floats:
    """Points upside down in an image of the given height."""
    return np.stack([xy[:, 0], height - xy[:, 1]], axis=1)


def turn_image(pixels: Pixels, quarter_turns: int) -> Pixels:
    """Turn counterclockwise: a copy, unless there is no turn."""
    return torch.from_numpy(pixels).rot90(quarter_turns).contiguous().numpy() if quarter_turns % 4 else pixels


def turn_size(size: Size, quarter_turns: int) -> Size:
    """Size of an image after quarter turns."""
    return size[::-1] if quarter_turns % 2 else size


def turn_xy(xy: Floats, size: Size, quarter_turns: int) -> Floats:
    """Points of an image of `size` after quarter turns counterclockwise."""
    for turn in range(quarter_turns % 4):
        _height, width = turn_size(size, turn)
        xy = np.stack([xy[:, 1], width - xy[:, 0]], axis=1)
    return xy


def turn_boxes(boxes: Floats, size: Size, quarter_turns: int) -> Floats:
    """Boxes of an image of `size` after quarter turns counterclockwise."""
    corners = turn_xy(boxes.reshape(-1, 2), size, quarter_turns).reshape(-1, 2, 2)  # opposite ones
    return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
