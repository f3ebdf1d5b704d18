"""Files that are written whole or not at all."""

import os
import threading
from pathlib import Path

import pytest
from pydantic import BaseModel

from model.errors import UserError
from model.files import SlowFileError, make_folder, read_json, replacing, require_file, within, write_atomically


def test_a_file_has_its_old_content_until_the_new_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "scores.pth"
    path.write_text("old")
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
        assert (partial.parent, partial.suffix) == (tmp_path, ".pth")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "scores.pth"
    path.write_text("old")

    def half() -> None:
        with replacing(path) as partial:
            partial.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_text_is_written_as_utf_8(tmp_path: Path) -> None:
    write_atomically(tmp_path / "names.json", "Möwe\n")
    assert (tmp_path / "names.json").read_bytes() == b"M\xc3\xb6we\n"


def test_what_is_to_outlast_a_power_cut_is_synced_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    sync, replace = os.fsync, Path.replace

    def watched_sync(descriptor: int) -> None:
        sync(descriptor)
        synced.append(os.fstat(descriptor).st_ino)

    def watched_replace(source: Path, target: Path) -> Path:
        assert synced == [source.stat().st_ino], "the name would be there before the content"
        return replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_sync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    path = tmp_path / "pointer"
    write_atomically(path, "step_1.pt\n", sync=True)
    assert synced == [path.stat().st_ino, tmp_path.stat().st_ino]
    synced.clear()
    make_folder(tmp_path / "runs" / "demo")
    assert synced == [tmp_path.stat().st_ino, (tmp_path / "runs").stat().st_ino]  # where the two new names stand
    synced.clear()
    make_folder(tmp_path / "runs" / "demo")
    assert not synced


class Point(BaseModel):
    x: int
    next: "Point | None" = None


def test_json_of_another_shape_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "point.json"
    path.write_text('{"x": 1, "more": [1.5]}')
    assert read_json(path, Point, "delete it") == {"x": 1, "more": [1.5]}
    for content, reason in (
        (b"[]", "must hold an object, got list"),
        (b"3", "must hold an object, got int"),
        (b"{}", "x is missing"),
        (b'{"x": "1"}', "x: Input should be a valid integer, got '1'"),
        (b'{"x": 1, "next": {"x": null}}', "next.x: Input should be a valid integer, got None"),
        (b'{"x"', "not JSON (Expecting ':' delimiter: line 1 column 5 (char 4))"),
        (b"\xff", "not JSON ('utf-8' codec can't decode byte 0xff in position 0: invalid start byte)"),
        (b'{"x": ' + b"[" * 100_000, "not JSON ("),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            read_json(path, Point, "delete it")
        assert str(error.value).startswith(f"{path}: {reason}"), content
        assert str(error.value).endswith("; delete it")
    path.write_text("{}")
    with pytest.raises(UserError, match="must hold a list, got dict; delete it"):
        read_json(path, list[Point], "delete it")


def test_only_files_are_opened(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    require_file(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="must be a file, but is a named pipe"):
        require_file(tmp_path / "pipe")
    with pytest.raises(IsADirectoryError, match=r"Is a directory: .*/"):
        require_file(tmp_path)


def test_reading_ends_with_the_content_the_error_or_the_limit(tmp_path: Path) -> None:
    never = threading.Event()

    def refuse() -> None:
        raise TimeoutError("the file's own")

    assert within(9, tmp_path, lambda: "content") == "content"
    with pytest.raises(TimeoutError, match="the file's own"):
        within(9, tmp_path, refuse)
    with pytest.raises(SlowFileError, match=rf"{tmp_path}: could not be read within 0\.01 s"):
        within(0.01, tmp_path, never.wait)
    never.set()
