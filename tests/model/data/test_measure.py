"""Opening images: what is found wrong, and which way up they are."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from model.config import DataConfig
from model.data.annotations import ImageRecord
from model.data.file_names import FileNames
from model.data.findings import Finding
from model.data.measure import ImageFacts, measure_image, measure_images


def record(name: str, height: int = 16, width: int = 24) -> ImageRecord:
    return ImageRecord(id=1, file_name=name, height=height, width=width)


def save_turned(path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (24, 16)).save(path, exif=exif)


def measured(folder: Path, of: ImageRecord, **settings: Any) -> ImageFacts | Finding:
    return measure_image(folder, FileNames(folder), DataConfig(**settings), of)


def facts(folder: Path, of: ImageRecord, **settings: Any) -> ImageFacts:
    result = measured(folder, of, **settings)
    assert isinstance(result, ImageFacts), result
    return result


def fault(folder: Path, name: str) -> Finding:
    result = measured(folder, record(name))
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


def test_a_size_that_disagrees_tells_both(tmp_path: Path):
    Image.new("RGB", (30, 16)).save(tmp_path / "a.png")
    assert fault(tmp_path, "a.png").text.endswith("is 16 × 30 (height × width), its annotations say 16 × 24")


@pytest.mark.parametrize(
    ("orientation", "size", "applied"),
    [(1, (16, 24), True), (3, (16, 24), True), (6, (24, 16), True), (6, (16, 24), False)],
)
def test_exif_is_applied_where_the_annotated_size_is_the_turned_one(tmp_path: Path, orientation, size, applied):
    save_turned(tmp_path / "a.jpg", orientation)
    assert facts(tmp_path, record("a.jpg", *size)).apply_exif is applied


def test_exif_is_applied_to_all_or_to_none_if_asked(tmp_path: Path):
    for orientation in (3, 6):
        save_turned(tmp_path / f"{orientation}.jpg", orientation)
    for exif, applied, annotated in (("apply", True, (24, 16)), ("ignore", False, (16, 24))):
        assert facts(tmp_path, record("3.jpg"), exif=exif).apply_exif is applied
        assert facts(tmp_path, record("6.jpg", *annotated), exif=exif).apply_exif is applied
        other = measured(tmp_path, record("6.jpg", *annotated[::-1]), exif=exif)
        assert isinstance(other, Finding)
        assert other.kind == "wrong size"
        assert other.text.endswith(f"data.exif is {exif}")
    rotations = [
        facts(tmp_path, record(name, *size)).rotation
        for name, size in (("3.jpg", (16, 24)), ("6.jpg", (24, 16)), ("6.jpg", (16, 24)))
    ]
    assert rotations == ["unknown", "turned", "stored"]


NEAR = {  # name in the annotations: (file, whether it is taken with on_invalid=mend)
    "sub\\a.jpg": ("sub/a.jpg", True),
    "A.JPG": ("a.jpg", True),
    "cafe\u0301.jpg": ("caf\u00e9.jpg", True),
    "caf\u00e9.jpg": ("cafe\u0301.jpg", True),
    "images/a.jpg": ("a.jpg", True),
    "./images_train/a.jpg": ("a.jpg", True),
    "C:\\data\\Images\\a.jpg": ("a.jpg", True),
    "/home/me/train/sub/a.jpg": ("sub/a.jpg", True),
    "val/a.jpg": ("a.jpg", False),  # another picture, more likely
    "a.jpg": ("sub/a.jpg", False),
    "a.png": ("a.jpg", False),
    "a": ("a.jpg", False),
    "a.b": ("a.b.jpg", False),
    "two%20words.jpg": ("two words.jpg", False),
}


@pytest.mark.parametrize("name", NEAR)
def test_a_name_that_nearly_fits_shows_the_file_that_it_means(tmp_path: Path, name: str):
    file, is_safe = NEAR[name]
    folder = tmp_path / "images_train"
    (folder / file).parent.mkdir(parents=True)
    Image.new("RGB", (24, 16), "red").save(folder / file)
    Image.new("RGB", (24, 16), "red").save(folder / "another.jpg")
    text = fault(folder, name).text
    assert f"does not exist; it probably means {file}" in text
    assert text.endswith("data.on_invalid=mend takes it") is is_safe
    result = measured(folder, record(name), on_invalid="mend")
    if is_safe:
        assert isinstance(result, ImageFacts)
        assert result.file_name == file
        assert [(one.kind, one.severity) for one in result.findings] == [("file name", "repaired")]
    else:
        assert isinstance(result, Finding)


def test_a_name_that_fits_several_files_is_not_repaired(tmp_path: Path):
    for name in ("a.JPG", "A.jpg", "x/b.jpg", "y/b.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (24, 16)).save(tmp_path / name)
    assert "probably means A.jpg or a.JPG" in fault(tmp_path, "a.jpg").text
    assert "probably means x/b.jpg or y/b.jpg" in fault(tmp_path, "z/b.jpg").text
    assert isinstance(measured(tmp_path, record("a.jpg"), on_invalid="mend"), Finding)


def test_a_file_that_vanishes_after_its_folder_was_listed_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Image.new("RGB", (24, 16)).save(tmp_path / "a.jpg")
    names = FileNames(tmp_path)
    assert names.near("a.jpg") is not None
    (tmp_path / "a.jpg").unlink()
    for name in ("a.jpg", "A.JPG", "images/a.jpg"):
        for on_invalid in ("mend", "error"):
            result = measure_image(tmp_path, names, DataConfig(on_invalid=on_invalid), record(name))
            assert result == Finding("missing file", f"{tmp_path / name} does not exist"), (name, on_invalid)
    monkeypatch.setattr(Path, "is_file", lambda path: True)  # it vanishes once it was seen
    result = measure_image(tmp_path, names, DataConfig(on_invalid="mend"), record("a.jpg"))
    assert result == Finding("missing file", f"{tmp_path / 'a.jpg'} does not exist")


def iso(brand: bytes) -> bytes:
    return b"\0\0\0\x18ftyp" + brand + b"\0" * 20


KINDS = {  # content: what the error says
    b"": r"it is empty \(0 bytes\)",
    bytes(100): "its 100 bytes are all zero",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n": "Git LFS pointer.*`git lfs pull`",
    b"/annex/objects/SHA256E-s1--0.jpg\n": "git-annex pointer",
    b"\n<!DOCTYPE html><html>404</html>": "an HTML page",
    b'<?xml version="1.0"?><svg/>': "an SVG drawing",
    b'{"error": "no access"}': "a text file .JSON or XML.*server's error",
    iso(b"heic"): "a HEIC file.*convert it to JPEG",
    iso(b"mif1"): "a HEIC file",
    iso(b"isom"): "a video; ffmpeg",
    b"\xff\x0a\0\0": "a JPEG XL file",
    b"RIFF\0\0\0\0AVI LIST": "a video or sound file",
    b"\0" * 127 + b"\1DICM" + b"\0" * 99: "a DICOM file.*pydicom",
    b"PK\x03\x04zip": "a zip archive",
    b"\x89PNG\r\n\x1a\n\x00\x00\x00\x0dIHDRgarbage": "a PNG file, but damaged",
    b"\xff\xd8\xff\xe0garbage": "a JPEG file, but damaged",
    b"GIF89a": "a GIF file, but damaged",
    b"hello": r"no image that Pillow knows \(it starts with b'hello'\)",
}


@pytest.mark.parametrize("content", KINDS)
def test_a_file_that_is_no_image_is_called_what_it_is(tmp_path: Path, content: bytes):
    (tmp_path / "a.jpg").write_bytes(content)
    assert re.search("a.jpg cannot be decoded: .*" + KINDS[content], fault(tmp_path, "a.jpg").text)
    assert "BytesIO" not in fault(tmp_path, "a.jpg").text


@pytest.mark.skipif(not features.check("avif"), reason="needs a Pillow that decodes AVIF")
def test_a_damaged_avif_is_called_damaged(tmp_path: Path):
    noise = np.random.default_rng(0).integers(0, 255, (16, 24, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.avif")
    content = (tmp_path / "a.avif").read_bytes()
    start = content.index(b"mdat") + 4
    (tmp_path / "a.avif").write_bytes(content[:start] + bytes(len(content) - start))
    assert re.search("it is an AVIF file, but damaged: .*; copy or download", fault(tmp_path, "a.avif").text)


def test_a_dds_texture_of_an_unknown_kind_is_unreadable(tmp_path: Path):
    Image.new("RGB", (24, 16)).save(tmp_path / "a.dds")
    content = (tmp_path / "a.dds").read_bytes()
    (tmp_path / "a.dds").write_bytes(content[:80] + bytes(4) + content[84:])  # no flag of a pixel format
    assert fault(tmp_path, "a.dds").kind == "unreadable file"


def test_a_file_of_too_many_pixels_is_not_called_damaged(tmp_path: Path):
    (tmp_path / "a.pgm").write_bytes(b"P5 20000 20000 255\n")
    text = fault(tmp_path, "a.pgm").text
    assert re.search(
        r"too large: Image size \(400000000 pixels\) exceeds limit of \d+ pixels; maskrcnn predict reads it with",
        text,
    )
    assert "no image" not in text


def test_a_file_that_cannot_be_read_has_the_systems_reason(tmp_path: Path):
    assert fault(tmp_path, "x" * 300 + ".jpg").text.endswith("cannot be read: File name too long")
    (tmp_path / "loop.jpg").symlink_to("nowhere.jpg")
    assert fault(tmp_path, "loop.jpg").text.endswith("links to a file that does not exist")
    (tmp_path / "folder.jpg").mkdir()
    assert fault(tmp_path, "folder.jpg") == Finding("missing file", f"{tmp_path / 'folder.jpg'} is a folder")
    (tmp_path / "device.jpg").symlink_to("/dev/null")
    assert fault(tmp_path, "device.jpg").text.endswith("cannot be read: must be a file, but is a device")
    assert fault(tmp_path, "nul\0.jpg").kind == "unreadable file"


def test_images_that_turn_black_or_white_are_found(tmp_path: Path):
    gray = np.linspace(0, 250, 16 * 24, dtype=np.uint8).reshape(16, 24)
    deep = gray.astype(np.uint16)
    cases: list[tuple[Any, tuple[float, ...], str]] = [
        (deep, (), "dark"),
        (deep * 16, (), "dark"),  # 12 of 16 bits
        (deep * 256, (), ""),
        (deep * 16, (0, 4095), ""),
        (deep * 256, (0, 4095), "cut"),
        (gray.astype(np.float32) / 255, (), "dark"),
        (gray.astype(np.float32) / 255, (0, 1), ""),
        (gray.astype(np.float32), (), ""),
        (gray.astype(np.float32) * 9, (), "cut"),
        (gray.astype(np.int32) * 256 - 9000, (), "cut"),
        (gray // 20, (), "dark"),
        (gray, (0, 1), ""),  # the range is of deep images
    ]
    for pixels, pixel_range, flaw in cases:
        Image.fromarray(pixels).save(tmp_path / "a.tif")
        found = facts(tmp_path, record("a.tif"), pixel_range=pixel_range)
        assert found.flaw == flaw, (pixels.dtype, pixels.max(), pixel_range)
        assert (found.values is None) is (pixels.dtype == np.uint8)


def test_results_come_in_order_and_the_hash_is_of_the_content(tmp_path: Path):
    for name, colour in (("a.png", 1), ("ü 图.png", 2), ("copy.png", 1)):
        Image.new("L", (24, 16), colour).save(tmp_path / name)
    records = [record("a.png"), record("ü 图.png"), record("gone.png"), record("copy.png")]
    first, second, third, fourth = measure_images(tmp_path, records, DataConfig(workers=3))
    assert isinstance(first, ImageFacts)
    assert isinstance(second, ImageFacts)
    assert isinstance(fourth, ImageFacts)
    assert [one.file_name for one in (first, second, fourth)] == ["a.png", "ü 图.png", "copy.png"]
    assert first.sha256 == fourth.sha256 != second.sha256
    assert isinstance(third, Finding)
