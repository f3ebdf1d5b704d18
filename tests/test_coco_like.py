"""The drawn data set holds all that other tests count on, and is the same each time."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

SPLITS = ("train", "val")
by_split = pytest.mark.parametrize("split", SPLITS)


@pytest.fixture(scope="module")
def documents(coco_like: Path) -> dict[str, dict[str, Any]]:
    return {
        split: json.loads((coco_like / "annotations" / f"instances_{split}2017.json").read_text()) for split in SPLITS
    }


def files(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*.*")}


def test_it_is_the_same_each_time_and_another_seed_gives_another(tmp_path: Path, coco_like_module: ModuleType) -> None:
    few = {"train": 4, "val": 1}
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        coco_like_module.write(tmp_path / name, few, seed)
    assert files(tmp_path / "one") == files(tmp_path / "again")
    assert not set(files(tmp_path / "one").values()) & set(files(tmp_path / "other").values())


@by_split
def test_ids_are_cocos_in_kind(documents: dict[str, dict[str, Any]], split: str) -> None:
    document = documents[split]
    assert [category["id"] for category in document["categories"]][:13] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 14]
    assert (len(document["categories"]), document["categories"][-1]["id"]) == (80, 90)
    for kind in ("images", "annotations"):
        ids = [record["id"] for record in document[kind]]
        assert len(set(ids)) == len(ids)
        assert max(ids) > 3 * len(ids)
        assert ids != sorted(ids)
    assert len({annotation["category_id"] for annotation in document["annotations"]}) > 50


@by_split
def test_there_is_something_of_everything(documents: dict[str, dict[str, Any]], split: str) -> None:
    annotations = documents[split]["annotations"]
    ordinary = [annotation for annotation in annotations if not annotation["iscrowd"]]
    areas = np.array([annotation["area"] for annotation in ordinary])
    middle = (areas > 32**2) & (areas < 96**2)
    assert min((areas < 32**2).sum(), middle.sum(), (areas > 96**2).sum()) >= 40
    parts = np.array([len(annotation["segmentation"]) for annotation in ordinary])
    assert min((parts == 2).sum(), (parts == 3).sum()) >= 3
    vertices = [len(part) // 2 for annotation in ordinary for part in annotation["segmentation"]]
    assert (min(vertices) < 6, max(vertices) > 30) == (True, True)
    per_image = np.unique([annotation["image_id"] for annotation in annotations], return_counts=True)[1]
    assert (per_image.min() <= 3, per_image.max() >= 40) == (True, True)
    assert len(per_image) < len(documents[split]["images"])  # some show nothing
    crowds = [annotation for annotation in annotations if annotation["iscrowd"]]
    assert {type(annotation["segmentation"]["counts"]) for annotation in crowds} == {str, list}


@by_split
def test_files_are_of_all_kinds_and_as_large_as_told(
    documents: dict[str, dict[str, Any]], coco_like: Path, split: str
) -> None:
    kinds, shapes = set(), set()
    for record in documents[split]["images"]:
        with Image.open(coco_like / f"{split}2017" / record["file_name"]) as image:
            assert image.size == (record["width"], record["height"])
            kinds.add((image.format, image.mode, "progressive" in image.info))
        shapes.add(record["width"] > record["height"])
    assert {("JPEG", "RGB", False), ("JPEG", "RGB", True), ("JPEG", "L", False), ("PNG", "RGB", False)} <= kinds
    assert ("PNG", "L", False) in kinds
    assert shapes == {True, False}


def outlines(coco: COCO) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    for annotation in coco.anns.values():
        yield annotation, coco.annToMask(annotation)


def has_hole(mask: np.ndarray) -> bool:
    """Whether water poured round it, seen at 40 × 40, leaves a dry place inside."""
    (rows,), (columns,) = np.nonzero(mask.any(1)), np.nonzero(mask.any(0))
    seen = Image.fromarray(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]).resize((40, 40))
    picture = Image.new("L", (42, 42))
    picture.paste(seen, (1, 1))
    ImageDraw.floodfill(picture, (0, 0), 2)
    return int((np.asarray(picture) == 0).sum()) > 20


@by_split
def test_boxes_and_areas_are_those_of_the_masks_and_some_have_holes(coco_like: Path, split: str) -> None:
    """Where an outline is so thin that it holds no middle of a pixel, its mask tells less."""
    coco = COCO(str(coco_like / "annotations" / f"instances_{split}2017.json"))
    holes = {0: 0, 1: 0}
    for annotation, mask in outlines(coco):
        x, y, width, height = annotation["bbox"]
        rows, columns = np.nonzero(mask)
        assert len(rows) > 0
        assert x - 1 <= columns.min() < columns.max() + 1 <= x + width + 1
        assert y - 1 <= rows.min() < rows.max() + 1 <= y + height + 1
        if annotation["area"] > 400:
            assert mask.sum() == pytest.approx(annotation["area"], rel=0.1)
            holes[annotation["iscrowd"]] += has_hole(mask)
    assert holes[0] >= 3
    assert holes[1] == sum(annotation["iscrowd"] for annotation in coco.anns.values()) > 5


@by_split
def test_objects_can_be_told_from_what_is_around_them(coco_like: Path, split: str) -> None:
    """By their mean colour beside that of a ring round them, in images of three channels; few may fail."""
    coco = COCO(str(coco_like / "annotations" / f"instances_{split}2017.json"))
    differences = []
    for image_id, record in list(coco.imgs.items())[:12]:
        pixels = np.asarray(Image.open(coco_like / f"{split}2017" / record["file_name"]).convert("RGB"), dtype=float)
        for annotation in coco.imgToAnns[image_id]:
            mask = coco.annToMask(annotation).astype(bool)
            x, y, width, height = (int(value) for value in annotation["bbox"])
            around = np.zeros_like(mask)
            around[max(y - 8, 0) : y + height + 8, max(x - 8, 0) : x + width + 8] = True
            if not annotation["iscrowd"] and mask.sum() > 100:
                differences.append(np.linalg.norm(pixels[mask].mean(0) - pixels[around & ~mask].mean(0)))
    assert len(differences) > 30
    assert np.mean(np.array(differences) > 15) > 0.8


def test_crowds_packed_and_unpacked_agree(documents: dict[str, dict[str, Any]]) -> None:
    for annotation in documents["val"]["annotations"]:
        if annotation["iscrowd"]:
            code = annotation["segmentation"]
            packed = coco_mask.frPyObjects(code, *code["size"]) if isinstance(code["counts"], list) else code
            assert coco_mask.area(packed) == annotation["area"]
