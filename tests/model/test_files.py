"""Files that are written whole or not at all."""

import os
from pathlib import Path

import pytest

from model.files import make_folder, replacing, write_atomically


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
