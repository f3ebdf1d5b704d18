"""The command `maskrcnn import`: what it prints, and the commands that come next."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from components.import_ import main


@pytest.fixture
def src(tmp_path: Path) -> Path:
    """Five images with labels in YOLO's format, and one more without an image."""
    for number in range(5):
        for folder in ("images", "labels"):
            (tmp_path / "src" / folder).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "src" / "images" / f"{number}.png")
        (tmp_path / "src" / "labels" / f"{number}.txt").write_text("0 0.1 0.1 0.5 0.1 0.5 0.5\n")
    (tmp_path / "src" / "labels" / "9.txt").write_text("")
    (tmp_path / "src" / "classes.txt").write_text("cat\n")
    return tmp_path / "src"


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if "ing " not in line[:9]]  # progress


def test_counts_what_was_left_out_and_the_next_commands_are_printed(
    src: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(src.parent)
    main(["yolo", "src", "my set", "--val-fraction", "0.4", "--seed", "1"])
    assert lines_of(capsys) == [
        "my set: 1 classes (cat); 0.4 of the images are val, by file names and seed 1",
        "train: 3 images, 3 objects",
        "val: 2 images, 2 objects",
        "warning: 1 × labels without an image, such as src/labels/9.txt: no image of this name is in the data set",
        "my set/problems.csv has all of them",
        "next:",
        "  maskrcnn recipe finetune_small 'data.raw_dir=my set'",
        "  maskrcnn prepare",
    ]


@pytest.mark.parametrize("mixed", [False, True])
def test_boxes_are_told_from_masks(src: Path, capsys: pytest.CaptureFixture[str], mixed: bool):
    for path in sorted((src / "labels").glob("*.txt"))[mixed:5]:
        path.write_text("0 0.5 0.5 0.5 0.5\n")
    main(["yolo", str(src), str(src.parent / "dst")])
    lines = lines_of(capsys)
    assert any("of them boxes without masks" in line for line in lines)
    assert any("train for boxes alone; for masks, import into another folder" in line for line in lines) == mixed
    assert lines[-2].endswith("model.task=box data.augment.copy_paste=0")


def test_images_without_labels_are_counted(src: Path, capsys: pytest.CaptureFixture[str]):
    """The labels of two were named otherwise; one is empty, as those of an image without objects are."""
    for number, name in enumerate(("a.txt", "b.TXT")):
        (src / "labels" / f"{number}.txt").rename(src / "labels" / name)
    (src / "labels" / "2.txt").write_text("")
    main(["yolo", str(src), str(src.parent / "dst"), "--val-fraction", "0.4", "--seed", "1"])
    lines = lines_of(capsys)
    found = [
        re.fullmatch(r"(train|val): \d images \((\d) of them without objects\), \d objects", line) for line in lines
    ]
    assert sum(int(match[2]) for match in found if match) == 3
    (warning,) = [line for line in lines if "image without labels" in line]
    assert warning.startswith(f"warning: 2 × image without labels, such as {src}/images/0")
    assert warning.endswith("no file of labels belongs to it, so it counts as background")


@pytest.mark.parametrize("fraction", ["0", "1", "1.5", "-0.1", "abc", "nan"])
def test_a_fraction_that_leaves_a_split_empty_is_refused(src: Path, capsys: pytest.CaptureFixture[str], fraction: str):
    with pytest.raises(SystemExit) as end:
        main(["yolo", str(src), str(src.parent / "dst"), f"--val-fraction={fraction}"])
    assert end.value.code == 2
    assert f"must be a number above 0 and below 1, got {fraction}" in capsys.readouterr().err
    assert not (src.parent / "dst").exists()


def test_an_error_ends_with_status_2_and_names_the_file(src: Path, capsys: pytest.CaptureFixture[str]):
    (src / "labels" / "3.txt").write_text("1 0.5 0.5 0.5 0.5\n")
    with pytest.raises(SystemExit) as end:
        main(["yolo", str(src), str(src.parent / "dst")])
    assert end.value.code == 2
    assert "labels/3.txt: line 1: the class must be from 0 to 0, got 1" in capsys.readouterr().err
    assert not (src.parent / "dst").exists()
