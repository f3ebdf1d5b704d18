"""Pixels of whatever a caller has for an image."""

import os
from collections.abc import Sequence
from io import BytesIO
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


def pixels_of(image: Any, pixel_range: Sequence[float] = ()) -> NDArray[np.uint8]:
    """Pixels [H, W, 3] uint8 RGB of a path, the bytes of a file, a picture of Pillow, an array or a tensor.

    Args:
        pixel_range: data.pixel_range of the network's training, for deep images.

    Raises:
        ValueError: if it is none of these, or an array of another shape or type.
        UserError: if a file cannot be read as an image.
    """
    from PIL import Image
    from torch import Tensor

    if isinstance(image, str | PathLike):
        return _of_file(image, pixel_range)
    if isinstance(image, bytes | bytearray):
        return _of_bytes(bytes(image), pixel_range)
    if isinstance(image, Image.Image):
        return _of_picture(image, pixel_range)
    if isinstance(image, Tensor):
        return _of_tensor(image)
    if isinstance(image, np.ndarray):
        return _of_array(image)
    raise ValueError(f"images: must be a path, bytes, a Pillow image, an array or a tensor, got {type(image).__name__}")


def _of_file(path: "str | PathLike[str]", pixel_range: Sequence[float]) -> NDArray[np.uint8]:
    from components.inference.images import input_path
    from model.data.file_kinds import why_path_unreadable
    from model.data.transforms import UNREADABLE, read_image
    from model.errors import UserError

    path = input_path(os.fsdecode(path))
    if not path.exists():
        raise UserError(f"{path}: must be an image, but does not exist")
    try:
        return read_image(path, pixel_range=pixel_range)
    except UNREADABLE as error:
        raise UserError(f"{path}: must be an image, but {why_path_unreadable(path, error)}") from error


def _of_picture(picture: "Image", pixel_range: Sequence[float]) -> NDArray[np.uint8]:
    from PIL import ImageOps

    from model.data.transforms import UNREADABLE, to_rgb
    from model.errors import UserError

    if 0 in picture.size:
        raise ValueError(f"images: a picture must have a pixel, got one of {picture.width} × {picture.height} px")
    try:
        return to_rgb(ImageOps.exif_transpose(picture), pixel_range)
    except UNREADABLE as error:  # Pillow reads the file of a picture when its pixels are needed
        name = getattr(picture, "filename", "") or f"a picture of mode {picture.mode}"
        raise UserError(f"images: {name} must be a picture that can be read as RGB, but {error}") from error


def _of_bytes(content: bytes, pixel_range: Sequence[float]) -> NDArray[np.uint8]:
    from model.data.file_kinds import why_unreadable
    from model.data.transforms import UNREADABLE, read_image
    from model.errors import UserError

    try:
        return read_image(BytesIO(content), pixel_range=pixel_range)
    except UNREADABLE as error:
        raise UserError(f"images: must be the bytes of an image file, but {why_unreadable(content, error)}") from error


def _of_array(array: NDArray[Any]) -> NDArray[np.uint8]:
    is_gray = array.ndim == 2
    has_channels = array.ndim == 3 and array.shape[2] in (3, 4)
    if array.dtype != np.uint8 or not (is_gray or has_channels) or 0 in array.shape:
        is_float = np.issubdtype(array.dtype, np.floating)
        raise ValueError(
            "images: an array must be [height, width, 3 or 4] or [height, width] uint8, RGB or RGBA, got "
            f"{[*array.shape]} {array.dtype}; "
            + (
                "floats from 0 to 1 become uint8 by (255 * image).round().astype(np.uint8)"
                if is_float
                else "OpenCV's BGR becomes RGB by image[..., ::-1]"
            )
        )
    # A copy: callers reuse their arrays for the next frame, before this one is predicted.
    return np.repeat(array[..., None], 3, 2) if is_gray else np.array(array[..., :3], order="C")


def _of_tensor(tensor: "Tensor") -> NDArray[np.uint8]:
    import torch

    is_image = tensor.ndim == 3 and tensor.shape[0] == 3 and tensor.numel() > 0
    if not is_image or not (tensor.dtype == torch.uint8 or tensor.is_floating_point()):
        raise ValueError(
            f"images: a tensor must be [3, height, width], uint8 or float from 0 to 1, RGB, got {[*tensor.shape]} "
            f"{tensor.dtype}"
        )
    if tensor.is_floating_point():
        low, high = tensor.min().item(), tensor.max().item()
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"images: a tensor of floats must have values from 0 to 1, got {low:g} to {high:g}; give the image as "
                "it is before it is normalised"
            )
        tensor = tensor.mul(255).round().to(torch.uint8)
    return np.array(tensor.permute(1, 2, 0).cpu().numpy(), order="C")  # a copy, as of an array
