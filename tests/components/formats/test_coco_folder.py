"""The folder that an import writes: whole or not there, each image in one part, what is left out is counted."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from components.formats.options import ImportOptions
from components.import_ import run
from model.errors import UserError


@pytest.fixture
def yolo(tmp_path: Path, exports: ModuleType) -> Path:
    return exports.yolo(tmp_path / "src")


def test_a_fraction_splits_anew_and_always_in_the_same_way(tmp_path: Path, take: Callable[..., Any], yolo: Path):
    found = take("yolo", yolo, val_fraction=0.4)
    assert "0.4 of the images are val" in found.report.rule
    assert (len(found.files("train")), len(found.files("val"))) == (3, 2)
    texts = [(found.folder / f"instances_{part}.json").read_bytes() for part in ("train", "val")]
    shutil.move(tmp_path / "src", tmp_path / "elsewhere")
    again = tmp_path / "again"
    run("yolo", tmp_path / "elsewhere", again, ImportOptions(val_fraction=0.4))
    assert [(again / f"instances_{part}.json").read_bytes() for part in ("train", "val")] == texts
    run("yolo", tmp_path / "elsewhere", tmp_path / "other", ImportOptions(val_fraction=0.4, seed=3))
    assert {path.name for path in (tmp_path / "other" / "images_val").iterdir()} != {*found.files("val")}


def test_equal_files_are_in_one_part(tmp_path: Path, exports: ModuleType, take: Callable[..., Any]):
    src = exports.label_studio_yolo(tmp_path / "src")
    for number in range(exports.COUNT):
        shutil.copy(src / "images" / f"a1b2c3d4-{number}.png", src / "images" / f"copy-{number}.png")
    found = take("yolo", src, val_fraction=0.4)
    numbers = [{name[-5] for name in found.files(part)} for part in ("train", "val")]
    assert numbers[0].isdisjoint(numbers[1])
    assert [len(found.files(part)) for part in ("train", "val")] == [6, 4]


def test_an_image_of_both_parts_of_the_source_is_an_error_or_left_out_of_train(
    tmp_path: Path, take: Callable[..., Any], yolo: Path
):
    shutil.copy(yolo / "images" / "val" / "4.png", yolo / "images" / "train" / "same.png")
    with pytest.raises(UserError, match=r"same\.png: it is in train and in val, .*--val-fraction 0.2"):
        take("yolo", yolo)
    found = take("yolo", yolo, on_invalid="skip")
    assert found.counts("error") == {"image in both parts": 1}
    assert "same.png" not in found.files("train") + found.files("val")


def test_one_folder_for_train_and_val_is_named_and_can_be_split(take: Callable[..., Any], yolo: Path):
    text = (yolo / "data.yaml").read_text()
    (yolo / "data.yaml").write_text(text.replace("val: images/val", "val: images/train"))
    with pytest.raises(UserError, match="unusable records: 4"):
        take("yolo", yolo)
    found = take("yolo", yolo, val_fraction=0.25)
    assert [len(found.files(part)) for part in ("train", "val")] == [3, 1]


def test_after_an_error_there_is_no_trace_of_the_destination(
    tmp_path: Path, take: Callable[..., Any], yolo: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shutil, "copyfile", lambda *paths: os.close(-1))  # the disk fails
    with pytest.raises(OSError, match="Bad file descriptor"):
        take("yolo", yolo)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


@pytest.mark.parametrize("present", ["folder", "file", "link"])
def test_a_destination_that_exists_is_refused(tmp_path: Path, take: Callable[..., Any], yolo: Path, present: str):
    dst = tmp_path / "imported"
    if present == "folder":
        dst.mkdir()
    elif present == "file":
        dst.touch()
    else:
        dst.symlink_to("nowhere")
    with pytest.raises(UserError, match="imported: must not exist"):
        take("yolo", yolo)


def test_a_destination_within_the_source_is_refused(yolo: Path):
    with pytest.raises(UserError, match=r"must lie outside of .*src, which stays as it is"):
        run("yolo", yolo, yolo / "coco")


def test_images_are_copied_or_linked(take: Callable[..., Any], yolo: Path, tmp_path: Path):
    found = take("yolo", yolo)
    assert not any(path.is_symlink() for path in found.folder.rglob("*"))
    run("yolo", yolo, tmp_path / "linked", ImportOptions(link=True))
    link = tmp_path / "linked" / "images_val" / "4.png"
    assert link.readlink() == (yolo / "images" / "val" / "4.png").resolve()


def test_names_that_occur_twice_get_their_folders(take: Callable[..., Any], yolo: Path):
    for kind, end in (("images", "png"), ("labels", "txt")):
        shutil.move(yolo / kind / "train" / f"3.{end}", yolo / kind / "train" / f"4.{end}")
    found = take("yolo", yolo)
    assert found.files("train") == ["0.png", "1.png", "2.png", "images__train__4.png"]
    assert found.files("val") == ["images__val__4.png"]


def test_errors_are_listed_with_their_files_or_counted(take: Callable[..., Any], yolo: Path):
    for number in range(4):
        lines = [f"{9 + i + 4 * number} 0.1 0.1 0.5 0.1 0.5 0.5\n" for i in range(4)]
        (yolo / "labels" / "train" / f"{number}.txt").write_text("".join(lines) + "0 nothing\n")
    with pytest.raises(UserError) as error:
        take("yolo", yolo)
    lines = str(error.value).splitlines()
    assert (lines[0], len(lines)) == (f"{yolo}: unusable records: 20", 13)
    assert "train/0.txt: line 1: the class must be from 0 to 1, got 9" in lines[1]
    assert f"4 × must be numbers, got '0 nothing'; the first: {yolo}/labels/train/0.txt: line 5" in lines
    assert lines[-2] == "… and 7 more"
    with pytest.raises(
        UserError, match="must have an object in train, has none in 4 images, 16 × unknown class, 4 × bad"
    ):
        take("yolo", yolo, on_invalid="skip")
    (yolo / "labels" / "train" / "0.txt").write_text("9 0.1 0.1 0.5 0.1 0.5 0.5\n0 0.1 0.1 0.5 0.1 0.5 0.5\n")
    found = take("yolo", yolo, on_invalid="skip")
    assert found.counts("error") == {"unknown class": 13, "bad line": 3}
    assert len((found.folder / "problems.csv").read_text().splitlines()) == 17


@pytest.mark.parametrize(
    ("boxes", "segmentation"), [("keep", None), ("mask", [[16.0, 12.0, 48.0, 12.0, 48.0, 36.0, 16.0, 36.0]])]
)
def test_a_box_stays_one_or_becomes_a_mask(
    take: Callable[..., Any], yolo: Path, boxes: str, segmentation: list[list[float]] | None
):
    (yolo / "labels" / "train" / "0.txt").write_text("1 0.5 0.5 0.5 0.5\n")
    found = take("yolo", yolo, boxes=boxes)
    (entry,) = found.objects("0.png")
    assert (entry["label"], entry["bbox"], entry["area"]) == ("dog", [16, 12, 32, 24], 768)
    assert entry.get("segmentation") == segmentation
    assert found.report.parts["train"].boxes == (boxes == "keep")


def test_boxes_can_be_left_out(take: Callable[..., Any], yolo: Path):
    (yolo / "labels" / "train" / "0.txt").write_text("1 0.5 0.5 0.5 0.5\n")
    found = take("yolo", yolo, boxes="skip")
    assert (found.objects("0.png"), found.counts("warning")) == ([], {"box without a mask": 1})


def test_a_set_of_which_nothing_can_be_used_is_refused_with_the_reasons(take: Callable[..., Any], yolo: Path):
    for path in yolo.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(
        UserError, match=r"must have labelled images, has none, 5 × unreadable image; the first: .*\.png"
    ):
        take("yolo", yolo, on_invalid="skip")
