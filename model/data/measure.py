"""Check of every image file of a data set: it must decode and have the annotated size; its content is hashed."""

import hashlib
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import ExifTags, Image

from model.config import DataConfig
from model.data.annotations import ImageRecord
from model.data.file_kinds import why_unreadable
from model.data.file_names import FileNames
from model.data.findings import Finding
from model.data.transforms import DARKEST, UNREADABLE, Size, is_deep, to_rgb
from model.files import SlowFileError, require_file, within

EXIF_QUARTER_TURNS = (5, 6, 7, 8)
_TURNS = {  # EXIF orientation → what displays the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_UPRIGHT = 1
THUMBNAIL_PX = 16
_MIN_CONTRAST = 32  # between a thumbnail's darkest and brightest value; flatter ones are all alike

# Evidence that a size gives about an EXIF orientation. turned: it was applied before annotating; stored: it was not.
Rotation = Literal["none", "turned", "stored", "unknown"]

# Flaws of an image as it is decoded. dark: no pixel exceeds 1/16 of white; cut: values exceed the range.
Flaw = Literal["", "dark", "cut"]


@dataclass(frozen=True)
class ImageFacts:
    """Facts about one readable image file."""

    file_name: str  # the record's, or of the file that it means
    apply_exif: bool  # True if the annotated size is that after applying the EXIF orientation
    sha256: str
    rotation: Rotation = "none"
    values: tuple[float, float] | None = None  # least and greatest of an image of more than 8 bits
    flaw: Flaw = ""
    thumbnail: bytes = b""  # THUMBNAIL_PX² gray values of the picture, to find copies of it; empty if it is flat
    findings: tuple[Finding, ...] = ()  # warnings and repairs


def measure_images(folder: Path, records: Sequence[ImageRecord], data: DataConfig) -> Iterator[ImageFacts | Finding]:
    """Measure the file of each record, in order.

    Args:
        folder: folder that file names are relative to.
        data: exif, pixel_range, on_invalid; and workers, the number of threads. Threads suffice: reading, decoding and
            hashing release the GIL.
    """
    with ThreadPoolExecutor(max(data.workers, 1)) as pool:
        yield from pool.map(partial(measure_image, folder, FileNames(folder), data), records)


def measure_image(folder: Path, names: FileNames, data: DataConfig, record: ImageRecord) -> ImageFacts | Finding:
    """Decode the whole file, so that truncation is found, and compare its size with the record's.

    Args:
        names: the files below the folder.

    Returns:
        The facts, or the reason why the file cannot be used; its caller adds to all findings where they were made.

    Raises:
        SlowFileError: if it cannot be read in time.
    """
    return _measure(folder, data, record) or _measure_near(folder, names, data, record)


def _measure(folder: Path, data: DataConfig, record: ImageRecord) -> ImageFacts | Finding | None:
    """Measure the file of exactly this name; None if there is none."""
    path = folder / record.file_name
    try:
        content = within(data.timeout_s, path, partial(_bytes_of, path))
    except SlowFileError:
        raise
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except (OSError, ValueError) as error:  # no permission; a name that is too long or has a NUL
        return Finding("unreadable file", f"{path} cannot be read: {getattr(error, 'strerror', None) or error}")
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            orientation = image.getexif().get(ExifTags.Base.Orientation, _UPRIGHT)
            values = _extremes(image)
            flaw = _flaw(image, values, data.pixel_range)
            thumbnail = _thumbnail(image, data.pixel_range)
    except UNREADABLE as error:
        return Finding("unreadable file", f"{path} cannot be decoded: {why_unreadable(content, error)}")
    stored = image.height, image.width
    rotation = _rotation(orientation, stored, (record.height, record.width))
    turned = stored[::-1] if orientation in EXIF_QUARTER_TURNS else stored
    allowed = {"auto": {stored, turned}, "apply": {turned}, "ignore": {stored}}[data.exif]
    if (record.height, record.width) not in allowed:
        size, rule = (turned, "after its EXIF rotation") if data.exif == "apply" and turned != stored else (stored, "")
        return Finding(
            "wrong size",
            f"{path} is {size[0]} × {size[1]} (height × width){rule and f' {rule}'}, its annotations say "
            f"{record.height} × {record.width}" + (f"; data.exif is {data.exif}" if turned != stored else ""),
        )
    apply_exif = data.exif == "apply" or (data.exif == "auto" and rotation != "stored")
    return ImageFacts(
        file_name=record.file_name,
        apply_exif=apply_exif,
        sha256=hashlib.sha256(content).hexdigest(),
        rotation=rotation,
        values=values,
        flaw=flaw,
        thumbnail=_gray_values(thumbnail, orientation if apply_exif else _UPRIGHT),
    )


def _bytes_of(path: Path) -> bytes:
    require_file(path)
    return path.read_bytes()


def _measure_near(folder: Path, names: FileNames, data: DataConfig, record: ImageRecord) -> ImageFacts | Finding:
    """Measure the file that a name means which has no file; or say which file it probably means."""
    path = folder / record.file_name
    fault = "links to a file that does not exist" if path.is_symlink() else "does not exist"
    fault = "is a folder" if path.is_dir() else fault
    near = names.near(record.file_name)
    if near is None or not (folder / near.names[0]).is_file():  # gone since the folder was listed
        return Finding("missing file", f"{path} {fault}")
    if not near.is_safe or data.on_invalid != "mend":
        text = f"{path} {fault}; it probably means {near}"
        return Finding("missing file", text + ("; data.on_invalid=mend takes it" if near.is_safe else ""))
    facts = _measure(folder, data, replace(record, file_name=near.names[0]))
    if not isinstance(facts, ImageFacts):
        return facts or Finding("missing file", f"{path} {fault}")
    repair = Finding("file name", f"{record.file_name} is {near}", severity="repaired")
    return replace(facts, findings=(*facts.findings, repair))


def _rotation(orientation: int, stored: Size, annotated: Size) -> Rotation:
    if orientation == _UPRIGHT or orientation not in range(2, 9):
        return "none"
    if orientation not in EXIF_QUARTER_TURNS or stored[0] == stored[1]:
        return "unknown"
    return "stored" if annotated == stored else "turned"


def _thumbnail(image: Image.Image, pixel_range: Sequence[float]) -> Image.Image:
    picture = image if image.mode in ("L", "RGB") else Image.fromarray(to_rgb(image, pixel_range))
    size = (THUMBNAIL_PX, THUMBNAIL_PX)
    return picture.resize(size, Image.Resampling.BOX, reducing_gap=2.0).convert("L")  # the gap makes it thrice as fast


def _gray_values(thumbnail: Image.Image, orientation: int) -> bytes:
    """Gray values of a thumbnail as its image is displayed; empty if it is flat."""
    values = thumbnail.tobytes()
    if max(values) - min(values) < _MIN_CONTRAST:
        return b""
    method = _TURNS.get(orientation)
    return values if method is None else thumbnail.transpose(method).tobytes()


def _extremes(image: Image.Image) -> tuple[float, float] | None:
    """Least and greatest value of a deep image; nan counts as 0."""
    if not is_deep(image):
        return None
    values = np.nan_to_num(np.asarray(image))
    return float(values.min()), float(values.max())


def _flaw(image: Image.Image, values: tuple[float, float] | None, pixel_range: Sequence[float]) -> Flaw:
    is_plain = image.mode in ("L", "RGB")
    if np.max(image.getextrema() if is_plain else to_rgb(image, pixel_range)) < DARKEST:
        return "dark"
    low, high = pixel_range or ((0, 255) if image.mode == "F" else (0, 65535))
    return "cut" if values is not None and (values[0] < low or values[1] > high) else ""
