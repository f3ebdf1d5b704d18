"""Datumaro's JSON: groups, crowds, what is no object, faults."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from model.errors import UserError


@pytest.fixture
def take_changed(tmp_path: Path, exports: ModuleType, take: Callable[..., Any]) -> Callable[..., Any]:
    """Imports the set after a change of the tree of its train subset, image 0 first."""

    def change(edit: Callable[[dict[str, Any]], object]) -> Any:
        src = exports.datumaro(tmp_path / "src")
        path = src / "annotations" / "train.json"
        tree = json.loads(path.read_text())
        edit(tree)
        path.write_text(json.dumps(tree))
        return take("datumaro", src)

    return change


def first(tree: dict[str, Any], number: int) -> dict[str, Any]:
    return tree["items"][0]["annotations"][number]


def test_polygons_of_a_group_are_one_object_and_a_crowd_stays_one(take_changed: Callable[..., Any]):
    def edit(tree: dict[str, Any]) -> None:
        polygon = first(tree, 0) | {"group": 7}
        others = [polygon | {"points": [40, 2, 50, 2, 50, 12]}, first(tree, 1) | {"attributes": {"is_crowd": True}}]
        tree["items"][0]["annotations"] = [polygon, *others]

    car, crowd = take_changed(edit).objects("0.png")
    assert (len(car["segmentation"]), car["iscrowd"], crowd["label"], crowd["iscrowd"]) == (2, 0, "dog", 1)


def test_an_image_is_found_by_a_name_in_other_letters(take_changed: Callable[..., Any]):
    def edit(tree: dict[str, Any]) -> None:
        tree["items"][0]["image"]["path"] = r"Images\Train\0.PNG"

    assert len(take_changed(edit).objects("0.png")) == 2


def test_an_ellipse_and_a_box_are_read(take_changed: Callable[..., Any]):
    def edit(tree: dict[str, Any]) -> None:
        ellipse = first(tree, 0) | {"type": "ellipse", "points": [10, 10, 30, 20]}
        tree["items"][0]["annotations"] = [ellipse, first(tree, 2)]

    ellipse, box = take_changed(edit).objects("0.png")
    assert ellipse["area"] == pytest.approx(3.14159 * 10 * 5, rel=0.05)
    assert (box["bbox"], box.get("segmentation")) == ([1, 2, 3, 4], None)


@pytest.mark.parametrize(
    ("number", "changes", "reason"),
    [
        (0, {"label_id": 2}, "label_id must be from 0 to 1, got 2"),
        (0, {"points": None}, "a polygon must have a list of points, got None"),
        (0, {"points": [1, 2, 3]}, "even number of coordinates"),
        (1, {"rle": None}, "a mask must have an rle, got None"),
        (1, {"rle": {"size": [4, 4], "counts": "0"}}, r"RLE size must be the image's \[48, 64\]"),
        (2, {"bbox": [1, 2, 3], "group": 0}, "bbox must be four numbers"),
    ],
)
def test_a_faulty_annotation_is_named(
    take_changed: Callable[..., Any], number: int, changes: dict[str, Any], reason: str
):
    with pytest.raises(UserError, match=rf"train\.json: (item '0': annotation|object) .*{reason}"):
        take_changed(lambda tree: first(tree, number).update(changes))


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (
            lambda tree: tree.pop("items"),
            r"train.json: must be a file of Datumaro: must be an object with categories, items",
        ),
        (lambda tree: tree.update(items={}), "items must be a list"),
        (lambda tree: tree.update(categories={}), "categories.label.labels must list the classes"),
        (lambda tree: tree["categories"]["label"]["labels"].pop(), "classes must be those of .*train.json; got"),
        (lambda tree: tree["items"].append(3), "item 3: an item must be an object with an id"),
        (lambda tree: tree["items"][0].pop("annotations"), "item '0': annotations must be a list"),
        (lambda tree: tree["items"][0].update(image={"path": "none.png"}), "item '0': image 'none.png' is not below"),
    ],
)
def test_a_faulty_file_is_named(take_changed: Callable[..., Any], edit: Callable[[Any], object], reason: str):
    with pytest.raises(UserError, match=reason):
        take_changed(edit)
