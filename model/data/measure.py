"""Check of every image file of a data set: it must decode and have the annotated size; its content is hashed."""

import hashlib
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import ExifTags, Image

from model.data.annotations import ImageRecord
from model.data.findings import Finding
from model.data.transforms import UNREADABLE

EXIF_QUARTER_TURNS = (5, 6, 7, 8)


@dataclass(frozen=True)
class ImageFacts:
    """Facts about one readable image file."""

    apply_exif: bool  # True if the annotated size is that after applying the EXIF orientation
    sha256: str
    findings: tuple[Finding, ...] = ()  # warnings and repairs


def measure_images(folder: Path, records: Sequence[ImageRecord], threads: int) -> Iterator[ImageFacts | Finding]:
    """Measure the file of each record, in order.

    Args:
        folder: folder that file names are relative to.
        threads: at least 1. Threads suffice: reading, decoding and hashing release the GIL.
    """
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(partial(measure_image, folder), records)


def measure_image(folder: Path, record: ImageRecord) -> ImageFacts | Finding:
    """Decode the whole file, so that truncation is found, and compare its size with the record's.

    Returns:
        The facts, or the reason why the file cannot be used; its caller adds to all findings where they were made.
    """
    path = folder / record.file_name
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            width, height = image.size
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except FileNotFoundError:
        return Finding("missing file", f"{path} does not exist")
    except UNREADABLE as error:
        return Finding("unreadable file", f"{path} cannot be decoded: {error}")
    annotated = (record.height, record.width)
    turned = (width, height) if orientation in EXIF_QUARTER_TURNS else (height, width)
    if annotated not in (turned, (height, width)):
        return Finding(
            "wrong size",
            f"{path} is {height} × {width} (height × width), its annotations say {record.height} × {record.width}",
        )
    return ImageFacts(apply_exif=annotated == turned, sha256=hashlib.sha256(content).hexdigest())
