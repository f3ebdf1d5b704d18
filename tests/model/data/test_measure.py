"""Opening images: what is found wrong, and which way up they are."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.data.annotations import ImageRecord
from model.data.findings import Finding
from model.data.measure import ImageFacts, measure_image, measure_images


def record(name: str, height: int = 16, width: int = 24) -> ImageRecord:
    return ImageRecord(id=1, file_name=name, height=height, width=width)


def save_turned(path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (24, 16)).save(path, exif=exif)


def fault(folder: Path, name: str) -> Finding:
    result = measure_image(folder, record(name))
    assert isinstance(result, Finding)
    return result


def test_a_missing_file_is_named(tmp_path: Path):
    assert fault(tmp_path, "gone.jpg") == Finding("missing file", f"{tmp_path / 'gone.jpg'} does not exist")


def test_a_truncated_jpeg_is_found(tmp_path: Path):
    noise = np.random.default_rng(0).integers(0, 255, (16, 24, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(content[:-200])
    assert fault(tmp_path, "a.jpg").kind == "unreadable file"
    assert "truncated" in fault(tmp_path, "a.jpg").text


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\x89PNG\r\n\x1a\n\x00\x00\x00\x0dIHDRgarbage"])
def test_a_file_that_is_no_image_is_found(tmp_path: Path, content: bytes):
    (tmp_path / "a.png").write_bytes(content)
    assert fault(tmp_path, "a.png").kind == "unreadable file"


def test_a_size_that_disagrees_tells_both(tmp_path: Path):
    Image.new("RGB", (30, 16)).save(tmp_path / "a.png")
    assert fault(tmp_path, "a.png").text.endswith("is 16 × 30 (height × width), its annotations say 16 × 24")


@pytest.mark.parametrize(
    ("orientation", "size", "applied"),
    [(1, (16, 24), True), (3, (16, 24), True), (6, (24, 16), True), (6, (16, 24), False)],
)
def test_exif_is_applied_where_the_annotated_size_is_the_turned_one(tmp_path: Path, orientation, size, applied):
    save_turned(tmp_path / "a.jpg", orientation)
    facts = measure_image(tmp_path, record("a.jpg", *size))
    assert isinstance(facts, ImageFacts)
    assert facts.apply_exif is applied


def test_results_come_in_order_and_the_hash_is_of_the_content(tmp_path: Path):
    for name, colour in (("a.png", 1), ("ü 图.png", 2), ("copy.png", 1)):
        Image.new("L", (24, 16), colour).save(tmp_path / name)
    records = [record("a.png"), record("ü 图.png"), record("gone.png"), record("copy.png")]
    first, second, third, fourth = measure_images(tmp_path, records, threads=3)
    assert first == fourth
    assert second != first
    assert isinstance(third, Finding)
