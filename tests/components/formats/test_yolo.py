"""YOLO's files: data.yaml in its forms, lines, images without labels."""

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from model.errors import UserError


@pytest.fixture
def yolo(tmp_path: Path, exports: ModuleType) -> Path:
    return exports.yolo(tmp_path / "src")


def test_lists_of_images_and_of_folders_are_followed_and_test_is_left_out(take: Callable[..., Any], yolo: Path):
    (yolo / "train.txt").write_text("./images/train/0.png\n\nimages/train/1.png\n")
    (yolo / "data.yaml").write_text(
        f"path: {yolo}\ntrain: [train.txt]\nval: [images/val]\ntest: images/train/\nnames: [car, dog]\n"
    )
    found = take("yolo", yolo)
    assert (found.files("train"), found.files("val")) == (["0.png", "1.png"], ["4.png"])
    assert found.report.rule == "the split is that of the source; 4 images of test are left out"


def test_paths_of_windows_are_followed_and_a_test_that_is_not_there_is_none(take: Callable[..., Any], yolo: Path):
    (yolo / "train.txt").write_text(".\\images\\train\\0.png\nimages\\train\\1.png\n")
    (yolo / "data.yaml").write_text("train: train.txt\nval: images\\val\ntest: ../test/images\nnames: [car, dog]\n")
    found = take("yolo", yolo)
    assert (found.files("train"), found.files("val")) == (["0.png", "1.png"], ["4.png"])


def test_an_image_without_labels_has_no_objects_and_both_without_the_other_are_counted(
    take: Callable[..., Any], yolo: Path
):
    (yolo / "labels" / "train" / "0.txt").rename(yolo / "labels" / "train" / "nothing.txt")
    found = take("yolo", yolo)
    assert "0.png" in found.files("train")
    warned = {"image without labels": 1, "labels without an image": 1}
    assert (found.objects("0.png"), found.counts("warning")) == ([], warned)


def test_labels_of_a_turned_photo_are_fractions_of_it_as_displayed(take: Callable[..., Any], yolo: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (40, 20)).save(yolo / "images" / "train" / "0.png", exif=exif)
    (yolo / "labels" / "train" / "0.txt").write_text("0 0 0 1 0 1 1\n")
    found = take("yolo", yolo)
    assert found.objects("0.png")[0]["segmentation"] == [[0, 0, 20, 0, 20, 40]]
    assert found.trees["train"]["images"][0] == {"id": 1, "file_name": "0.png", "height": 40, "width": 20}


def test_one_folder_for_train_and_val_is_read_once_and_a_common_fault_is_one_line(take: Callable[..., Any], yolo: Path):
    text = (yolo / "data.yaml").read_text()
    (yolo / "data.yaml").write_text(text.replace("val: images/val", "val: images/train"))
    (yolo / "images" / "train" / "3.png").write_bytes(b"no image")
    for number in range(3):
        (yolo / "labels" / "train" / f"{number}.txt").write_text("7 0.5 0.5 0.1 0.1\n0 0.2 0.2 0.2 0.2 0.2 0.2\n")
    with pytest.raises(UserError) as error:
        take("yolo", yolo, val_fraction=0.3)
    told = str(error.value)
    assert f"3 × the class must be from 0 to 1, got 7; the first: {yolo}/labels/train/0.txt: line 1" in told
    assert [told.count(word) for word in ("got 7", "3.txt", "more")] == [1, 1, 0]
    assert told.startswith(f"{yolo}: unusable records: 7\n")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("0 0.5 0.5 0.5", "4 numbers, or 6, 8, … of a polygon, got 3"),
        ("0 0.1 0.1 0.2 0.2 0.3", "got 5"),
        ("0 0.1 0.1 0.2 0.2 0.3 0.3 0.4", "got 7"),
        ("0.5 0.5 0.5 0.5 0.5", "the class must be from 0 to 1, got 0.5"),
        ("-1 0.5 0.5 0.5 0.5", "got -1"),
        ("0 0.5 0.5 nan 0.5", "fractions of the image"),
        ("0 12 20 40 50", "fractions of the image"),
        ("car 0.5 0.5 0.5 0.5", "must be numbers"),
        ("0 0.1 0.1 0.1 0.1 0.1 0.1", "cover no pixel"),
        ("0 0.5 0.5 0 0", "has no area"),
    ],
)
def test_a_faulty_line_is_named(take: Callable[..., Any], yolo: Path, line: str, reason: str):
    (yolo / "labels" / "train" / "2.txt").write_text(f"0 0.1 0.1 0.5 0.1 0.5 0.5\n{line}\n")
    with pytest.raises(UserError, match=rf"unusable records: 1\n.*2\.txt: (line|object) 2.*{reason}"):
        take("yolo", yolo)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("names: [a]\ntrain: none\n", r"train: there is no .*none; correct `path` \(\.\) or `train` \(none\)"),
        ("names: {0: a, 2: b}\n", "names must be a list, or have the numbers 0, 1, 2"),
        ("names: {car: 0}\n", "names must be a list"),
        ("names: []\n", "names must be a list"),
        ("train: images/train\n", "must have `names`"),
        ("names: [a\n", "must be the YAML of a YOLO data set"),
        ("names: [a]\nkpt_shape: [17, 3]\n", r"has keypoints \(kpt_shape\)"),
        ("names: [a, '']\ntrain: images/train\nval: images/val\n", "a class must have a name of one line.*got ''"),
    ],
)
def test_a_faulty_description_is_named(take: Callable[..., Any], yolo: Path, text: str, reason: str):
    (yolo / "data.yaml").write_text(text)
    with pytest.raises(UserError, match=reason):
        take("yolo", yolo)


def test_two_classes_of_one_name_become_one(take: Callable[..., Any], yolo: Path):
    text = (yolo / "data.yaml").read_text()
    (yolo / "data.yaml").write_text(text.replace("1: dog", "1: car"))
    found = take("yolo", yolo)
    assert (found.report.class_names, found.counts("warning")) == (["car"], {"class name twice": 1})
    assert {entry["category_id"] for entry in found.trees["train"]["annotations"]} == {1}


def test_darknets_folder_with_labels_beside_images_is_read(
    tmp_path: Path, exports: ModuleType, take: Callable[..., Any]
):
    """CVAT's YOLO 1.1 has obj.names, and images and labels in obj_train_data."""
    folder = tmp_path / "src" / "obj_train_data"
    for number in range(exports.COUNT):
        exports.save_picture(folder / f"{number}.png", number)
        (folder / f"{number}.txt").write_text("1 0.5 0.5 0.5 0.5\n")
    (tmp_path / "src" / "obj.names").write_text("car\ndog\n")
    found = take("yolo", tmp_path / "src")
    assert [part.boxes for part in found.report.parts.values()] == [4, 1]


def test_a_folder_without_names_of_classes_is_refused(tmp_path: Path, take: Callable[..., Any]):
    (tmp_path / "src").mkdir()
    with pytest.raises(UserError, match=r"must have data.yaml, classes.txt or obj.names"):
        take("yolo", tmp_path / "src")


def test_names_that_no_file_can_have_are_images_that_cannot_be_read(take: Callable[..., Any], yolo: Path):
    (yolo / "train.txt").write_text(f"images/train/0.png\nimages/train/1\0.png\n{'a' * 5000}.png\n")
    (yolo / "data.yaml").write_text("train: train.txt\nval: images/val\nnames: [car, dog]\n")
    found = take("yolo", yolo, on_invalid="skip")
    assert (found.files("train"), found.counts("error")) == (["0.png"], {"unreadable image": 2})


def test_a_name_that_is_not_utf_8_is_refused_also_where_the_split_is_drawn(take: Callable[..., Any], yolo: Path):
    image = yolo / "images" / "train" / "0.png"
    image.rename(os.fsdecode(os.fsencode(image.parent) + b"/\xff.png"))
    with pytest.raises(UserError, match=r"the name of an image must be UTF-8, got .*rename it"):
        take("yolo", yolo, val_fraction=0.5)
