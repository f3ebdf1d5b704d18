"""Pascal VOC's folders: masks by number, classes of XML and of colors, boxes from 1, lists."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from model.errors import UserError


def test_without_masks_boxes_are_read_which_count_pixels_from_1(
    tmp_path: Path, exports: ModuleType, take: Callable[..., Any]
):
    found = take("voc", exports.voc(tmp_path / "src", masks=False))
    rows, columns = np.nonzero(exports.mask_of(exports.outlines(2)[0][1]))
    box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
    assert [(one["label"], one.get("segmentation")) for one in found.objects("2.jpg")] == [("car", None), ("dog", None)]
    assert found.objects("2.jpg")[0]["bbox"] == box
    assert found.files("val") == ["2007_000004.jpg"]


def test_without_xml_the_classes_are_those_of_vocs_colors(
    tmp_path: Path, exports: ModuleType, take: Callable[..., Any]
):
    found = take("voc", exports.voc(tmp_path / "src", texts=False))
    assert found.report.class_names == ["car", "dog"]
    assert np.array_equal(found.masks("3.jpg")[1][1], exports.mask_of(exports.outlines(3)[1][1]))


def test_the_classes_of_a_labelmap_keep_its_order_and_those_without_an_object(
    tmp_path: Path, exports: ModuleType, take: Callable[..., Any]
):
    src = exports.cvat_masks(tmp_path / "src")
    lines = ["background:0,0,0::", "dog:51,221,255::", "owl:1,2,3::", "car:250,50,83::"]
    (src / "labelmap.txt").write_text("\n".join(lines) + "\n")
    found = take("voc", src)
    assert found.report.class_names == ["dog", "owl", "car"]
    assert [entry["name"] for entry in found.trees["train"]["categories"]] == ["dog", "owl", "car"]


def test_other_classes_in_xml_and_in_the_colors_are_an_error(
    tmp_path: Path, exports: ModuleType, take: Callable[..., Any]
):
    src = exports.voc(tmp_path / "src")
    text = src / "Annotations" / "2007_000001.xml"
    text.write_text(text.read_text().replace("<name>car", "<name>cow"))
    with pytest.raises(UserError, match=r"2007_000001.png: object 1 is 'cow' in XML, but 'car' in SegmentationClass"):
        take("voc", src)
    shutil.rmtree(src / "SegmentationClass")
    assert take("voc", src).report.class_names == ["car", "cow", "dog"]


def test_a_mask_without_a_class_is_an_error(tmp_path: Path, exports: ModuleType, take: Callable[..., Any]):
    src = exports.voc(tmp_path / "src", texts=False)
    shutil.rmtree(src / "SegmentationClass")
    with pytest.raises(UserError, match=r"000000.png: object 1 has no <object> in XML, and no class in Segm"):
        take("voc", src)


def test_images_without_masks_and_in_no_list_are_counted(tmp_path: Path, exports: ModuleType, take: Callable[..., Any]):
    src = exports.voc(tmp_path / "src")
    (src / "SegmentationObject" / "2007_000000.png").unlink()
    (src / "ImageSets" / "Segmentation" / "train.txt").write_text("2007_000001\n2007_000002 1\n")
    found = take("voc", src)
    assert found.counts("warning") == {"image in no list": 1, "image without masks": 1}
    assert found.files("train") == ["2007_000001.jpg", "2007_000002.jpg"]


def test_an_image_of_two_lists_is_an_error(tmp_path: Path, exports: ModuleType, take: Callable[..., Any]):
    src = exports.voc(tmp_path / "src")
    (src / "ImageSets" / "Segmentation" / "val.txt").write_text("2007_000001\n")
    with pytest.raises(UserError, match=r"val.txt: 2007_000001 is also in train.txt"):
        take("voc", src)


def test_roboflows_folders_and_polygons_are_read(tmp_path: Path, exports: ModuleType, take: Callable[..., Any]):
    """Images and XML lie side by side; a polygon has x1, y1, x2, y2, …, from 1 as its box."""
    for number in range(exports.COUNT):
        folder = tmp_path / "src" / ("valid" if number == 4 else "train")
        exports.save_picture(folder / f"{number}.jpg", number)
        corners = "<x1>11</x1><y1>6</y1><x2>31</x2><y2>6</y2><x3>31</x3><y3>26</y3>"
        (folder / f"{number}.xml").write_text(
            f"<annotation><filename>{number}.jpg</filename><object><name>car</name><polygon>{corners}</polygon>"
            "</object></annotation>"
        )
    found = take("voc", tmp_path / "src")
    assert found.objects("0.jpg")[0]["segmentation"] == [[10, 5, 30, 5, 30, 25]]
    assert found.files("val") == ["4.jpg"]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("<annotation>", "<annotation", "1.xml: not XML"),
        ("annotation>", "annotations>", "1.xml: its root must be <annotation>, got <annotations>; it is CVAT's XML"),
        ("<name>car</name>", "<name> </name>", "1.xml: object 1: an object must have a <name>"),
        ("<xmin>", "<xmin>a", "1.xml: object 1: <bndbox>: xmin must be a number, got 'a"),
        ("bndbox", "box", "1.xml: object 1: object 'car' must have a <bndbox>"),
        ("000001.jpg", "7.jpg", "1.xml: image '2007_7.jpg' is not below"),
    ],
)
def test_a_faulty_file_is_named(
    tmp_path: Path, exports: ModuleType, take: Callable[..., Any], old: str, new: str, reason: str
):
    src = exports.voc(tmp_path / "src", masks=False)
    path = src / "Annotations" / "2007_000001.xml"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UserError, match=reason):
        take("voc", src)


def test_a_mask_of_another_size_is_an_error(tmp_path: Path, exports: ModuleType, take: Callable[..., Any]):
    src = exports.voc(tmp_path / "src")
    exports.save_indices(src / "SegmentationObject" / "2007_000001.png", np.ones((4, 4)))
    with pytest.raises(
        UserError, match=r"SegmentationObject/2007_000001.png: must be 48 × 64 like its image, got \(4, 4\)"
    ):
        take("voc", src)
