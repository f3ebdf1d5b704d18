"""labelme's shapes: polygons, rectangles, circles, masks and groups; images beside the JSON file, or within it."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from model.errors import UserError

SQUARE = [(10.0, 10.0), (20.0, 10.0), (20.0, 20.0), (10.0, 20.0)]
OTHER = [(30.0, 10.0), (40.0, 10.0), (40.0, 20.0), (30.0, 20.0)]


@pytest.fixture
def take_shapes(tmp_path: Path, exports: ModuleType, take: Callable[..., Any]) -> Callable[..., Any]:
    """Imports the set with other shapes on image 0."""

    def change(*shapes: dict[str, Any], **options: Any) -> Any:
        src = exports.labelme(tmp_path / "src")
        tree = json.loads((src / "0.json").read_text())
        (src / "0.json").write_text(json.dumps(tree | {"shapes": list(shapes)}))
        return take("labelme", src, **options)

    return change


def test_shapes_of_one_label_and_group_are_one_object(take_shapes: Callable[..., Any], exports: ModuleType):
    shape = exports.labelme_shape
    found = take_shapes(
        shape("car", SQUARE, group_id=1), shape("car", OTHER, group_id=1), shape("dog", SQUARE, group_id=1)
    )
    assert [(one["label"], len(one["segmentation"]), one["bbox"]) for one in found.objects("0.png")] == [
        ("car", 2, [10, 10, 30, 10]),
        ("dog", 1, [10, 10, 10, 10]),
    ]


def test_a_circle_is_its_outline(take_shapes: Callable[..., Any], exports: ModuleType):
    found = take_shapes(exports.labelme_shape("car", [(30.0, 20.0), (30.0, 30.0)], "circle"))
    rows, columns = np.mgrid[:48, :64] + 0.5
    disc = (rows - 20) ** 2 + (columns - 30) ** 2 < 100
    ((_, mask),) = found.masks("0.png")
    assert (mask != disc).sum() <= 0.05 * disc.sum()


def test_a_rectangle_is_a_box(take_shapes: Callable[..., Any], exports: ModuleType):
    found = take_shapes(exports.labelme_shape("car", [(20.0, 30.0), (10.0, 15.0)], "rectangle"))
    (entry,) = found.objects("0.png")
    assert (entry["bbox"], entry.get("segmentation")) == ([10, 15, 10, 15], None)


def test_a_mask_lies_at_its_corner_and_joins_a_polygon(take_shapes: Callable[..., Any], exports: ModuleType):
    cut = np.zeros((5, 8), dtype=bool)
    cut[1:, 2:] = True
    text = exports.png_text(Image.fromarray(cut))
    shape = exports.labelme_shape("car", [(30, 20), (37, 24)], "mask", mask=text, group_id=2)
    found = take_shapes(shape, exports.labelme_shape("car", SQUARE, group_id=2))
    expected = exports.mask_of(SQUARE)
    expected[21:25, 32:38] = True
    ((_, mask),) = found.masks("0.png")
    assert np.array_equal(mask, expected)


def test_a_mask_beyond_the_image_is_cut(take_shapes: Callable[..., Any], exports: ModuleType):
    text = exports.png_text(Image.fromarray(np.ones((6, 6), dtype=bool)))
    found = take_shapes(
        exports.labelme_shape("car", [(-2, -3), (3, 2)], "mask", mask=text),
        exports.labelme_shape("dog", [(60, 45), (65, 50)], "mask", mask=text),
    )
    assert [entry["bbox"] for entry in found.objects("0.png")] == [[0, 0, 4, 3], [60, 45, 4, 3]]


def test_points_and_lines_are_counted(take_shapes: Callable[..., Any], exports: ModuleType):
    shape = exports.labelme_shape
    line = [(1, 1), (2, 2)]
    found = take_shapes(shape("car", line[:1], "point"), shape("car", line, "line"), shape("__ignore__", SQUARE))
    assert found.counts("warning") == {"shape point": 1, "shape line": 1, "shape __ignore__": 1}


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ({"points": SQUARE[:2]}, "a polygon must have at least 3 points, got 2"),
        ({"points": SQUARE[:3], "shape_type": "circle"}, "a circle must have 2 points, got 3"),
        ({"points": [[1, 2, 3]] * 3}, r"points must be a list of \[x, y\]"),
        ({"points": [[1, "2"]] * 3}, r"points must be a list of \[x, y\]"),
        ({"points": None}, "points must be a list, got None"),
        ({"label": " "}, "a shape must have a label"),
        (
            {"shape_type": "blob", "points": SQUARE[:2]},
            "shape_type must be polygon, rectangle, circle or mask, got 'blob'",
        ),
        ({"shape_type": "mask", "points": SQUARE[:2], "mask": "a"}, "mask must be a PNG in base64"),
        ({"shape_type": "mask", "points": SQUARE[:2], "mask": "aaaa"}, "mask must be an image in base64"),
        ({"points": [[100, 100], [110, 100], [110, 110]]}, "cover no pixel"),
    ],
)
def test_a_faulty_shape_is_named(
    take_shapes: Callable[..., Any], exports: ModuleType, shape: dict[str, Any], reason: str
):
    with pytest.raises(UserError, match=rf"records: 1\n.*0\.json: (shape|object) 1.*: .*{reason}"):
        take_shapes(exports.labelme_shape("car", SQUARE) | shape)


def test_an_image_is_found_by_a_path_of_windows_or_taken_from_the_json_file(
    tmp_path: Path, exports: ModuleType, take: Callable[..., Any]
):
    src = exports.labelme(tmp_path / "src")
    for number, changes in enumerate(
        ({"imagePath": "..\\src\\0.png"}, {"imageData": exports.png_text(exports.picture(1))})
    ):
        tree = json.loads((src / f"{number}.json").read_text())
        (src / f"{number}.json").write_text(json.dumps(tree | changes | {"imageHeight": None}))
    content = (src / "1.png").read_bytes()
    (src / "1.png").unlink()
    found = take("labelme", src)
    assert {*found.files("train"), *found.files("val")} == {f"{number}.png" for number in range(5)}
    assert next(found.folder.glob("*/1.png")).read_bytes() == content
    assert {(one["height"], one["width"]) for one in found.trees["train"]["images"]} == {(48, 64)}


def test_a_missing_image_an_image_without_json_and_one_with_two_files_are_named(
    tmp_path: Path, exports: ModuleType, take: Callable[..., Any]
):
    src = exports.labelme(tmp_path / "src")
    (src / "0.png").rename(src / "new.png")
    (src / "copy of 1.json").write_text((src / "1.json").read_text())
    with pytest.raises(UserError) as error:
        take("labelme", src)
    assert f"{src}/0.json: image '0.png' is not below {src}" in str(error.value)
    text = "copy of 1.json: it labels 1.png, which 1.json labels, too; an image must have one file of labels"
    assert text in str(error.value).replace(f"{src}/", "")
    found = take("labelme", src, on_invalid="skip")
    assert found.counts("warning") == {"image without a JSON file": 1}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "must be an object with shapes, imagePath"),
        ('{"images": [], "annotations": [], "categories": []}', "must be an object with shapes, imagePath"),
        ('{"items": [], "categories": {}}', "it is a file of Datumaro"),
    ],
)
def test_other_json_is_named(tmp_path: Path, exports: ModuleType, take: Callable[..., Any], text: str, reason: str):
    src = exports.labelme(tmp_path / "src")
    (src / "0.json").write_text(text)
    with pytest.raises(UserError, match=rf"0\.json: .*{reason}"):
        take("labelme", src)
