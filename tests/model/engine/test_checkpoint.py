"""Checkpoints: whole or absent, found again, kept as configured."""

import os
import resource
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model.config import ModelConfig
from model.engine.checkpoint import load_model, mark_best, read_checkpoint, save_checkpoint
from model.engine.pointers import CheckpointError, find_checkpoint, last_checkpoint, require_checkpoint
from model.network.mask_rcnn import MaskRCNN


def save(run_dir: Path, step: int, keep_last: int = 0) -> Path:
    return save_checkpoint(run_dir, step, {"model": {}, "config": {}}, keep_last=keep_last)


def steps(run_dir: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step_")) for path in (run_dir / "checkpoints").glob("step_*.pt"))


def test_last_checkpoint_is_the_newest(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    save(tmp_path, 2500)
    newest = save(tmp_path, 5000)
    assert last_checkpoint(tmp_path) == newest
    assert (tmp_path / "last_checkpoint").read_text() == "checkpoints/step_0005000.pt\n"
    assert read_checkpoint(newest)["step"] == 5000


def test_only_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    save(tmp_path, 1)
    mark_best(tmp_path)
    for step in range(2, 6):
        save(tmp_path, step, keep_last=2)
    assert steps(tmp_path) == [1, 4, 5]
    assert find_checkpoint(tmp_path, "best_checkpoint") == tmp_path / "checkpoints/step_0000001.pt"


def test_a_run_may_have_no_best_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "best_checkpoint").write_text("\n")
    assert find_checkpoint(tmp_path, "best_checkpoint") is None


def test_zero_keeps_all(tmp_path: Path) -> None:
    for step in range(1, 5):
        save(tmp_path, step)
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_an_interrupted_write_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = save(tmp_path, 1)

    def cut(_state: object, file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", cut)
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path, 2)
    assert last_checkpoint(tmp_path) == good
    assert steps(tmp_path) == [1]


def test_a_pointer_to_nothing_is_an_error(tmp_path: Path) -> None:
    save(tmp_path, 1).unlink()
    (tmp_path / "runs").mkdir()
    for pointer in (None, b"", b"runs", b"\xff"):
        if pointer is not None:
            (tmp_path / "last_checkpoint").write_bytes(pointer)
        with pytest.raises(CheckpointError, match="last_checkpoint"):
            last_checkpoint(tmp_path)


def test_a_power_cut_never_leaves_a_pointer_to_a_file_that_was_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk may keep a new name at any time, but need not before its folder was synced; so, too, the content of a
    file.
    """
    run_dir = tmp_path / "runs" / "demo"
    kept: dict[int, set[str]] = {}  # by inode: the names that a folder is sure to hold, none for a file
    pointed_at: list[str] = []
    sync, replace = os.fsync, Path.replace

    def watched_sync(descriptor: int) -> None:
        sync(descriptor)
        inode = os.fstat(descriptor)
        kept[inode.st_ino] = set(os.listdir(descriptor)) if stat.S_ISDIR(inode.st_mode) else set()

    def watched_replace(source: Path, target: Path) -> Path:
        assert source.stat().st_ino in kept, f"{target} gets content that may be lost"
        if target.parent == run_dir:
            path = run_dir / source.read_text().strip()
            assert path.name in kept.get(path.parent.stat().st_ino, ()), f"{target} names a file that may be lost"
            pointed_at.append(path.name)
        return replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_sync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    save(run_dir, 1)
    save(run_dir, 2)
    mark_best(run_dir)
    assert pointed_at == ["step_0000001.pt", "step_0000002.pt", "step_0000002.pt"]
    assert {"last_checkpoint", "best_checkpoint", "checkpoints"} <= kept[run_dir.stat().st_ino]
    assert kept[run_dir.parent.stat().st_ino] == {"demo"}
    assert kept[tmp_path.stat().st_ino] == {"runs"}


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 truncated"])
def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "step_0000001.pt"
    path.write_bytes(content)
    for read in (read_checkpoint, lambda path: require_checkpoint(tmp_path, str(path))):
        with pytest.raises(CheckpointError, match="step_0000001"):
            read(path)


def test_a_checkpoint_that_was_cut_off_is_refused_without_torch(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    assert require_checkpoint(tmp_path, "last") == require_checkpoint(tmp_path, str(path)) == path
    path.write_bytes(path.read_bytes()[:-100])
    for name in ("last", str(path)):
        with pytest.raises(CheckpointError, match=r"step_0000001\.pt: not a readable checkpoint .*earlier one"):
            require_checkpoint(tmp_path, name)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return Path.touch, (tmp_path / "ran",)  # type: ignore[return-value]

    path = tmp_path / "step_0000001.pt"
    torch.save({"model": Malicious(), "config": {}, "step": 1}, path)
    with pytest.raises(CheckpointError):
        read_checkpoint(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "changes", [{}, {"norm": "batch_norm", "head_norm": "batch_norm"}, {"backbone": "swin_t", "weights": "none"}]
)
def test_a_model_comes_back_as_it_was(
    changes: dict[str, Any], tmp_path: Path, tiny_config: Callable[..., ModelConfig]
) -> None:
    config = tiny_config(**changes)
    model = MaskRCNN(config, 2)
    state = {
        "model": model.state_dict(),
        "config": {"model": config.model_dump(mode="json")},
        "class_names": ["cat", "dog"],
        "category_ids": [17, 18],
        "data_hash": "abc",
    }
    path = save_checkpoint(tmp_path, 7, state)
    loaded = load_model(path, torch.device("cpu"))
    path.write_bytes(bytes(path.stat().st_size))  # the weights are no longer the file's
    assert loaded.model.get_buffer("pixel_mean").tolist() == model.get_buffer("pixel_mean").tolist()
    assert (loaded.step, loaded.class_names, loaded.category_ids) == (7, ("cat", "dog"), (17, 18))
    assert not loaded.model.training
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value)


def test_a_full_disk_is_the_systems_error_and_leaves_the_earlier_checkpoint(tmp_path: Path):
    """A limit of file sizes stands for the disk's: the system refuses the same call."""
    state = {"model": {"weight": torch.zeros(100_000)}, "config": {}}
    saved = save_checkpoint(tmp_path, 1, state)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*step_0000002\.pt'"):
            save_checkpoint(tmp_path, 2, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert last_checkpoint(tmp_path) == saved
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
