"""CVAT's XML: turned boxes, ellipses, masks and groups; subsets; videos."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from model.errors import UserError


@pytest.fixture
def take_extra(tmp_path: Path, exports: ModuleType, take: Callable[..., Any]) -> Callable[..., Any]:
    """Imports the set with more shapes on image 0, and returns those."""

    def add(extra: str, **options: Any) -> tuple[Any, list[dict[str, Any]]]:
        found = take("cvat", exports.cvat(tmp_path / "src", extra=extra), **options)
        return found, found.objects("0.png")[2:]

    return add


def test_boxes_are_boxes_and_a_turned_one_is_its_outline(take_extra: Callable[..., Any]):
    box = '<box label="{}" xtl="20" ytl="10" xbr="40" ybr="20"{} z_order="0"><attribute name="a">b</attribute></box>'
    _, (plain, turned) = take_extra(box.format("car", "") + box.format("dog", ' rotation="90.0"'))
    assert (plain["bbox"], plain.get("segmentation")) == ([20, 10, 20, 10], None)
    assert np.allclose(turned["segmentation"], [[35, 5, 35, 25, 25, 25, 25, 5]])  # clockwise about (30, 15)


def test_an_ellipse_is_its_outline(take_extra: Callable[..., Any], exports: ModuleType):
    found, _ = take_extra('<ellipse label="car" cx="30" cy="24" rx="20" ry="10" rotation="30"></ellipse>')
    x, y = np.meshgrid(np.arange(64) + 0.5 - 30, np.arange(48) + 0.5 - 24)
    cos, sin = np.cos(np.radians(30)), np.sin(np.radians(30))
    disc = ((x * cos + y * sin) / 20) ** 2 + ((y * cos - x * sin) / 10) ** 2 < 1
    mask = found.masks("0.png")[2][1]
    assert (mask != disc).sum() <= 0.05 * disc.sum()


def test_shapes_of_one_label_and_group_are_one_object(take_extra: Callable[..., Any], exports: ModuleType):
    square = np.zeros(exports.SIZE, dtype=bool)
    square[2:6, 50:60] = True
    polygon = '<polygon label="car" points="50,30;60,30;60,40;50,40" group_id="3"></polygon>'
    box = '<box label="car" xtl="0" ytl="0" xbr="64" ybr="48" group_id="3"></box>'
    found, entries = take_extra(exports.cvat_mask("car", square, group_id="3") + polygon + box)
    square[30:40, 50:60] = True
    assert len(entries) == 1
    assert np.array_equal(found.masks("0.png")[2][1], square)


def test_a_mask_that_begins_inside_is_read(take_extra: Callable[..., Any]):
    mask = '<mask label="car" rle="0, 2, 1, 1, 2" left="3" top="4" width="3" height="2"></mask>'
    found, (entry,) = take_extra(mask)
    assert np.argwhere(found.masks("0.png")[2][1]).tolist() == [[4, 3], [4, 4], [5, 3]]
    assert (entry["bbox"], entry["area"]) == ([3, 4, 2, 2], 3)


def test_what_is_no_object_is_counted(take_extra: Callable[..., Any]):
    found, entries = take_extra(
        '<polyline label="car" points="1,1;2,2"/><points label="car" points="1,1"/><tag label="a"/>'
    )
    assert (entries, found.counts("warning")) == ([], {"shape polyline": 1, "shape points": 1, "shape tag": 1})
    assert found.report.class_names == ["car", "dog"]


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ('<polygon label="car" points="1,1;2"/>', "points must be x,y;x,y;…, got '1,1;2'"),
        ('<polygon label="car" points="1,1;2,2"/>', "even number of coordinates, at least 6, got 4"),
        ('<polygon points="1,1;9,1;9,9"/>', "a polygon must have a label"),
        ('<box label="car" xtl="1" ytl="1" xbr="9"/>', "ybr must be a number, got None"),
        (
            '<mask label="car" rle="1,2" left="1" top="1" width="2" height="2"/>',
            "runs add up .* got 2 × 2 at 1, 1 and 3 pixels",
        ),
        (
            '<mask label="car" rle="0,4" left="63" top="1" width="2" height="2"/>',
            "a mask must lie in the image of 64 × 48",
        ),
        ('<mask label="car" rle="a" left="1" top="1" width="2" height="2"/>', "rle must be runs like 3,2,5, got 'a'"),
        ('<box label="car" xtl="nan" ytl="1" xbr="9" ybr="9"/>', "xtl must be a number, got 'nan'"),
        ('<blob label="car"/>', "<blob> must be one of polygon, box, ellipse, mask"),
    ],
)
def test_a_faulty_shape_is_named(take_extra: Callable[..., Any], shape: str, reason: str):
    with pytest.raises(UserError, match=rf"annotations\.xml: (image '0\.png'|object 3).*: .*{reason}"):
        take_extra(shape)


def test_a_size_that_no_image_has_is_an_error(tmp_path: Path, exports: ModuleType, take: Callable[..., Any]):
    path = exports.cvat(tmp_path / "src") / "annotations.xml"
    path.write_text(path.read_text().replace('height="48"', 'height="9999999"', 1))
    with pytest.raises(UserError, match=r"image '0\.png': height and width must be at most 268,435,456 pixels"):
        take("cvat", path.parent)


def test_subsets_of_a_project_are_the_split(tmp_path: Path, exports: ModuleType, take: Callable[..., Any]):
    src = exports.cvat(tmp_path / "src")
    path = src / "annotations.xml"
    text = (
        path.read_text()
        .replace("<image ", '<image subset="Train" ')
        .replace('subset="Train" id="1"', 'subset="Validation" id="1"')
    )
    path.write_text(text)
    (src / "images" / "Train").mkdir()
    (src / "images" / "0.png").rename(src / "images" / "Train" / "0.png")
    found = take("cvat", src)
    assert (found.files("train"), found.files("val")) == (
        ["2.png", "3.png", "4.png", "0.png"],
        ["1.png"],
    )


def test_a_video_has_a_shape_for_each_frame_in_which_a_track_is_seen(
    tmp_path: Path, exports: ModuleType, take: Callable[..., Any]
):
    """CVAT for video 1.1; `outside` is a frame that the object has left."""
    for frame in range(4):
        exports.save_picture(tmp_path / "src" / "images" / f"frame_{frame:06}.PNG", frame)
    shapes = "".join(
        f'<polygon frame="{frame}" outside="{int(frame == 3)}" keyframe="1" points="{frame},0;{frame + 9},0;9,9"/>'
        for frame in range(4)
    )
    size = "<task><original_size><width>64</width><height>48</height></original_size></task>"
    (tmp_path / "src" / "annotations.xml").write_text(
        f'<annotations><meta>{size}</meta><track id="0" label="car">{shapes}</track>'
        f'<track id="1" label="dog"><box frame="0" outside="0" xtl="1" ytl="1" xbr="9" ybr="9"/></track></annotations>'
    )
    found = take("cvat", tmp_path / "src", val_fraction=0.3)
    assert sorted(found.files("train") + found.files("val")) == [f"frame_00000{frame}.PNG" for frame in range(3)]
    assert [one["label"] for one in found.objects("0.PNG")] == ["car", "dog"]
    assert found.objects("2.PNG")[0]["segmentation"] == [[2, 0, 11, 0, 9, 9]]


def test_tracks_of_one_label_and_group_are_one_object(tmp_path: Path, exports: ModuleType, take: Callable[..., Any]):
    for frame in range(2):
        exports.save_picture(tmp_path / "src" / "images" / f"frame_{frame:06}.png", frame)
    tracks = "".join(
        f'<track id="{x}" label="car" {group}>'
        + "".join(f'<polygon frame="{i}" outside="0" points="{x},0;{x + 9},0;{x},9"/>' for i in range(2))
        + "</track>"
        for x, group in ((0, 'group_id="4"'), (20, 'group_id="4"'), (40, ""))
    )
    (tmp_path / "src" / "annotations.xml").write_text(f"<annotations>{tracks}</annotations>")
    found = take("cvat", tmp_path / "src", val_fraction=0.5)
    for frame in range(2):
        assert [len(one["segmentation"]) for one in found.objects(f"{frame}.png")] == [2, 1]


def test_a_folder_without_xml_is_named(tmp_path: Path, take: Callable[..., Any]):
    (tmp_path / "src").mkdir()
    with pytest.raises(UserError, match=r"src: must have CVAT's annotations.xml, has no XML file"):
        take("cvat", tmp_path / "src")
