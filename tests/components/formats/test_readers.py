"""Every format: masks come out as they were drawn, with the class names and the split of the source."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from components.config import Config
from components.prepare import run as prepare
from model.config import DataConfig
from model.data.index import CocoIndex

# Format, imitation, name of the image file of a number, and whether the export has a split.
IMPORTS = [
    ("yolo", "yolo", "{}.png", True),
    ("yolo", "roboflow_yolo", "{0}_png.rf.{0:032x}.jpg", True),
    ("yolo", "label_studio_yolo", "a1b2c3d4-{}.png", False),
    ("voc", "voc", "2007_{:06}.jpg", True),
    ("voc", "cvat_masks", "{}.png", False),
    ("labelme", "labelme", "{}.png", False),
    ("cvat", "cvat", "{}.png", False),
    ("datumaro", "datumaro", "{}.png", True),
    ("png-masks", "png_numbers", "{}.png", False),
    ("png-masks", "png_objects", "{}.png", False),
]


@pytest.mark.parametrize(("kind", "export", "name", "has_split"), IMPORTS, ids=[one[1] for one in IMPORTS])
def test_masks_classes_and_split_come_out_as_they_went_in(
    tmp_path: Path, exports: ModuleType, take: Callable[..., Any], kind: str, export: str, name: str, has_split: bool
):
    src = getattr(exports, export)(tmp_path / "src")
    before = {path: path.read_bytes() for path in src.rglob("*") if path.is_file()}
    found = take(kind, src)
    for number in range(exports.COUNT):
        masks = dict(found.masks(name.format(number)))
        assert list(masks) == ["car", "dog"]
        for label, points in exports.outlines(number):
            assert np.array_equal(masks[label], exports.mask_of(points)), (number, label)
    own = {name.format(number) for number in range(exports.COUNT) if exports.part_of(number) == "val"}
    assert len(found.files("val")) == 1
    assert set(found.files("train")).isdisjoint(found.files("val"))
    assert (found.report.rule == "the split is that of the source") == has_split
    assert set(found.files("val")) == own or not has_split
    images = {path.name: path.read_bytes() for path in found.folder.glob("images_*/*")}
    masks_of = ("masks", "SegmentationObject", "SegmentationClass")
    pictures = {path.name: content for path, content in before.items() if path.parent.name not in masks_of}
    assert images == {name: pictures[name] for name in images}
    assert {path: path.read_bytes() for path in src.rglob("*") if path.is_file()} == before


# Layout lines of docs/data.md for exports that are COCO JSON already.
LAYOUTS = {
    "roboflow_coco": {
        "train_images": "train",
        "train_annotations": "train/_annotations.coco.json",
        "val_images": "valid",
        "val_annotations": "valid/_annotations.coco.json",
    },
    "cvat_coco": {
        "train_images": "images/default",
        "train_annotations": "annotations/instances_default.json",
        "val_fraction": 0.2,
    },
    "label_studio_coco": {"train_images": ".", "train_annotations": "result.json", "val_fraction": 0.2},
    "fiftyone_coco": {"train_images": "data", "train_annotations": "labels.json", "val_fraction": 0.2},
}


@pytest.mark.parametrize("export", LAYOUTS)
def test_exports_in_coco_json_need_a_layout_only(tmp_path: Path, exports: ModuleType, export: str):
    src = getattr(exports, export)(tmp_path / "src")
    data = DataConfig(source="custom", raw_dir=src, prepared_dir=tmp_path / "prepared", workers=0, **LAYOUTS[export])
    result = prepare(Config(data=data))
    assert [(report.images, report.instances) for report in result.splits.values()] == [(4, 8), (1, 2)]
    assert not any(report.warnings or report.repaired or report.dropped for report in result.splits.values())
    assert set(CocoIndex.open(data.prepared_dir, "train").class_names) >= {"car", "dog"}


def test_an_imported_folder_is_prepared_without_a_finding(
    tmp_path: Path, exports: ModuleType, take: Callable[..., Any]
):
    found = take("cvat", exports.cvat(tmp_path / "src"))
    data = DataConfig(source="custom", raw_dir=found.folder, prepared_dir=tmp_path / "prepared", workers=0)
    splits = prepare(Config(data=data)).splits
    assert [(report.images, report.instances) for report in splits.values()] == [(4, 8), (1, 2)]
    assert not any(report.warnings or report.repaired or report.dropped for report in splits.values())
