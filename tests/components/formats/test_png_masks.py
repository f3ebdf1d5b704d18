"""PNG masks: numbers, colors and files of objects."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from model.errors import UserError


@pytest.fixture
def numbers(tmp_path: Path, exports: ModuleType) -> Path:
    return exports.png_numbers(tmp_path / "src")


@pytest.mark.parametrize(("names", "expected"), [(None, "object"), ("cell\n", "cell")])
def test_with_one_class_each_value_is_an_object(
    take: Callable[..., Any], numbers: Path, exports: ModuleType, names: str | None, expected: str
):
    if names:
        (numbers / "classes.txt").write_text(names)
    else:
        (numbers / "classes.txt").unlink()
    exports.save_indices(numbers / "masks" / "0.png", np.where(exports.instances(0) == 1, 255, 0))  # no void here
    found = take("png-masks", numbers)
    assert [label for label, _ in found.masks("0.png")] == [expected]
    assert [label for label, _ in found.masks("1.png")] == [expected, expected]


def test_each_color_is_an_object(take: Callable[..., Any], numbers: Path, exports: ModuleType):
    (numbers / "classes.txt").unlink()
    colors = np.array([[0, 0, 0], [0, 0, 9], [9, 0, 0]], dtype=np.uint8)[exports.instances(0)]
    Image.fromarray(colors).save(numbers / "masks" / "0.png")
    assert [mask.sum() for _, mask in take("png-masks", numbers).masks("0.png")] == [
        (exports.instances(0) == number).sum() for number in (1, 2)
    ]


def test_images_without_masks_and_masks_without_an_image_are_counted(take: Callable[..., Any], numbers: Path):
    (numbers / "masks" / "0.png").rename(numbers / "masks" / "other.png")
    found = take("png-masks", numbers)
    assert found.counts("warning") == {"image without masks": 1, "mask without an image": 1}
    assert len(found.files("train") + found.files("val")) == 4


def test_an_object_of_a_file_may_have_a_name_with_underscores_and_any_value(
    tmp_path: Path, exports: ModuleType, take: Callable[..., Any]
):
    src = exports.png_objects(tmp_path / "src")
    (src / "masks" / "0" / "car_0.png").unlink()
    mask = np.zeros((*exports.SIZE, 3), dtype=np.uint8)
    mask[2:4, 5:9, 1] = 7
    Image.fromarray(mask).save(src / "masks" / "0" / "big_red_car_12.png")
    found = take("png-masks", src)
    assert found.report.class_names == ["big_red_car", "car", "dog"]
    assert found.objects("0.png")[0]["bbox"] == [5, 2, 4, 2]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (
            np.full((48, 64), 3001, dtype=np.uint16),
            r"value 3001: with 2 classes a value must be class × 1000 \+ object",
        ),
        (np.full((48, 64), 7, dtype=np.uint8), "value 7: with 2 classes"),
        (np.full((9, 9), 1001, dtype=np.uint16), r"must be 48 × 64 like its image, got \(9, 9\)"),
        (np.full((48, 64, 3), 7, dtype=np.uint8), r"colors tell no classes"),
    ],
)
def test_a_faulty_mask_is_named(take: Callable[..., Any], numbers: Path, values: np.ndarray, reason: str):
    Image.fromarray(values).save(numbers / "masks" / "0.png")
    with pytest.raises(UserError, match=rf"0\.png: .*{reason}"):
        take("png-masks", numbers)


def test_a_damaged_mask_is_named(take: Callable[..., Any], numbers: Path):
    (numbers / "masks" / "0.png").write_bytes((numbers / "masks" / "0.png").read_bytes()[:60])
    with pytest.raises(UserError, match=r"masks/0\.png: .*PNG file, but damaged"):
        take("png-masks", numbers)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path, take: Callable[..., Any]):
    (tmp_path / "src" / "images").mkdir(parents=True)
    with pytest.raises(UserError, match="must have the folders images and masks, masks is not there"):
        take("png-masks", tmp_path / "src")
