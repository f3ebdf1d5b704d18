"""Unpacking of zips that are damaged or cannot be used, and stamps that cannot be read."""

import io
import random
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from components.datasets.archives import Archive, missing_archives, unpack, was_begun
from components.datasets.transfer import DownloadError

FILES = {"train/1.jpg": random.Random(0).randbytes(300), "ann.json": b'{"a": 1}' * 200}
DIRECTORY = b"PK\1\2"  # begins a record of the directory, which the zip ends with


def zipped(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def altered(content: bytes, *changes: tuple[int, int]) -> bytes:
    """Set bytes, by (offset, value)."""
    data = bytearray(content)
    for offset, value in changes:
        data[offset] = value
    return bytes(data)


def unpack_error(content: bytes, folder: Path) -> str:
    """Message of the error that unpacking must end with."""
    archive = folder / "a.zip"
    archive.write_bytes(content)
    with pytest.raises(DownloadError) as error:
        unpack(archive, folder)
    return str(error.value)


def test_a_zip_that_cannot_be_used_is_a_clear_error_and_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    good = zipped(FILES)
    record = good.index(DIRECTORY)
    packed = 30 + len("train/1.jpg")  # offset of the first file's bytes
    bz2, lzma = (zipped(FILES, method) for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    damaged = {
        "no zip": b"<html>Please log in</html>",
        "empty": b"",
        "cut": good[:-10],
        "wrong byte": altered(good, (packed + 100, good[packed + 100] ^ 1)),
        "wrong byte, bz2": altered(bz2, (packed + 20, bz2[packed + 20] ^ 255)),
        "wrong byte, lzma": altered(lzma, (packed + 20, lzma[packed + 20] ^ 255)),
        "unknown method": altered(good, (8, 99), (record + 10, 99)),
        "encrypted": altered(good, (6, 1), (record + 8, 1)),
        "files begin behind the end": altered(good, (record + 42, 255), (record + 43, 255)),
        "files begin before the start": altered(good, (len(good) - 4, 1)),
        "huge file": altered(good, (record + 27, 255)),  # room for it must not be asked for
        "size too small": altered(good, (record + 24, 100), (record + 25, 0)),
        "size too large": altered(good, (record + 24, 45), (record + 25, 1)),
    }
    for name, content in damaged.items():
        message = unpack_error(content, tmp_path)
        assert f"{tmp_path / 'a.zip'}: " in message, name
        assert "damaged" in message, (name, message)
        assert "the zip was deleted. Run `maskrcnn download` to fetch it again" in message, name
        assert list(tmp_path.iterdir()) == [], name
    names = {
        "must not have a file and a folder of one name, got 'a'": ("a", "a/b"),
        "must not have a file and a folder of one name, got 'c'": ("c/", "c"),
        "got '.', no name": (".",),
        "got 'a/../../b', a path outside": ("a/../../b",),
        "got '.Download/a.zip.json', a name that the download uses": (".Download/a.zip.json",),
        "got '.unpack-b/1.jpg', a name that the download uses": ("c", ".unpack-b/1.jpg"),
        "got 'a.zip', a name that the download uses": ("a.zip",),  # unpacked in its own place, and deleted
        "got 'b.zip.part', a name that the download uses": ("b.zip.part",),
    }
    for message, files in names.items():
        assert message in unpack_error(zipped(dict.fromkeys(files, b"x")), tmp_path)
        assert list(tmp_path.iterdir()) == [], message
    (tmp_path / "a.zip").write_bytes(
        zipped({"train/b.zip": b"x", "train/.download": b"x"})
    )  # no place of the download's
    assert set(unpack(tmp_path / "a.zip", tmp_path)) == {"train/b.zip", "train/.download"}


def test_no_altered_byte_of_a_zip_ends_in_anything_but_its_files_or_a_clear_error(tmp_path: Path):
    good, draw = zipped(FILES), random.Random(1)
    archive = tmp_path / "a.zip"
    for seed in range(100):
        archive.write_bytes(altered(good, (draw.randrange(len(good)), draw.randrange(256))))
        try:
            names = unpack(archive, tmp_path)
        except DownloadError:
            assert not archive.exists(), seed
        else:
            assert {name: (tmp_path / name).stat().st_size for name in names} == names, seed


def test_a_place_that_is_taken_is_named_and_keeps_the_zip(tmp_path: Path):
    (tmp_path / "1" / "ann.json").mkdir(parents=True)
    (tmp_path / "2").mkdir()
    (tmp_path / "2" / "train").touch()
    for folder, taken in ((tmp_path / "1", "ann.json"), (tmp_path / "2", "train")):
        message = unpack_error(zipped(FILES), folder)
        assert f"{folder / taken}: must be readable and writable" in message
        assert "move away what has that name" in message
        path = folder / taken
        path.rmdir() if path.is_dir() else path.unlink()
        assert unpack(folder / "a.zip", folder) == {name: len(content) for name, content in FILES.items()}
        assert {name: (folder / name).read_bytes() for name in FILES} == FILES


def test_a_stamp_that_cannot_be_read_is_as_none(tmp_path: Path):
    archive = Archive("zips/a.zip", "0" * 32, 1.0)
    stamp = tmp_path / ".download" / "a.zip.json"
    stamp.parent.mkdir()
    texts = (
        b"",
        b'{"url": "http://x", "files": {"a": 1',
        b"[]",
        b'{"files": []}',
        b'{"files": {"a": null}}',
        b"\xff",
        b"[" * 100_000,
    )
    for text in texts:
        stamp.write_bytes(text)
        assert missing_archives([archive], tmp_path) == [archive], text[:40]
        assert not was_begun([archive], tmp_path), text[:40]
    stamp.write_text('{"files": {"a": 1}}')
    assert was_begun([archive], tmp_path)
    (tmp_path / "a").write_text("x")
    assert missing_archives([archive], tmp_path) == []
