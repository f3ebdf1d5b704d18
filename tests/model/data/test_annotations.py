"""Reading COCO JSON: what is accepted, and what each fault is called."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from model.data.annotations import CocoFile, read_coco
from model.data.coco_json import AnnotationError

TRIANGLE = [[1, 1, 7, 1, 7, 7]]


def image(**changes: Any) -> dict[str, Any]:
    return {"id": 1, "file_name": f"{changes.get('id', 1)}.jpg", "height": 8, "width": 10, **changes}


def annotation(**changes: Any) -> dict[str, Any]:
    return {
        "id": 5,
        "image_id": 1,
        "category_id": 3,
        "bbox": [1, 1, 6, 6],
        "segmentation": TRIANGLE,
        "iscrowd": 0,
        **changes,
    }


def tree(images: list | None = None, annotations: list | None = None, categories: list | None = None) -> dict[str, Any]:
    return {
        "images": [image()] if images is None else images,
        "annotations": [annotation()] if annotations is None else annotations,
        "categories": [{"id": 3, "name": "cat"}, {"id": 90, "name": "chien"}] if categories is None else categories,
    }


def read(tmp_path: Path, content: Any, limit: int = 0) -> CocoFile:
    path = tmp_path / "instances.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_coco(path, limit)


def test_a_good_file_has_no_problem(tmp_path: Path):
    coco = read(tmp_path, tree())
    (instance,) = coco.instances[1]
    assert coco.findings == []
    assert coco.categories == {3: "cat", 90: "chien"}
    assert (instance.category_id, instance.box, instance.is_crowd) == (3, (1, 1, 7, 7), False)
    assert np.array_equal(instance.polygons[0], [(1, 1), (7, 1), (7, 7)])


def test_every_annotation_of_coco_is_accepted(either_coco: Path):
    path = either_coco / "annotations" / "instances_val2017.json"
    coco, oracle = read_coco(path), COCO(str(path))
    assert coco.findings == []
    assert sorted(coco.images) == sorted(oracle.imgs)
    assert {i: len(coco.instances[i]) for i in coco.images} == {i: len(oracle.getAnnIds([i])) for i in oracle.imgs}


def test_categories_come_in_the_order_of_their_ids(tmp_path: Path):
    categories = [{"id": 90, "name": "b"}, {"id": 3, "name": "ü 猫"}]
    assert list(read(tmp_path, tree(categories=categories)).categories.items()) == [(3, "ü 猫"), (90, "b")]


def test_an_image_without_annotation_is_kept(tmp_path: Path):
    coco = read(tmp_path, tree(images=[image(), image(id=2)]))
    assert coco.instances[2] == []
    assert coco.findings == []


def test_the_limit_takes_the_first_images_by_id(tmp_path: Path):
    images = [image(id=i) for i in (9, 4, 7)]
    annotations = [annotation(id=i, image_id=i) for i in (9, 4, 7)]
    coco = read(tmp_path, tree(images, annotations), limit=2)
    assert list(coco.images) == [4, 7]
    assert [len(coco.instances[i]) for i in (4, 7)] == [1, 1]
    assert coco.findings == []


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("crowd", [0, 1])
def test_an_rle_is_accepted_packed_or_not(tmp_path: Path, packed: bool, crowd: int):
    mask = np.zeros((8, 10), dtype=np.uint8)
    mask[2:5, 3:9] = 1
    mask[3, 4] = 0
    rle = coco_mask.encode(np.asfortranarray(mask))
    columns = mask.T.ravel()
    runs = np.diff([0, *(np.flatnonzero(np.diff(columns)) + 1), columns.size]).tolist()
    segmentation = {"size": [8, 10], "counts": rle["counts"].decode() if packed else runs}
    coco = read(tmp_path, tree(annotations=[annotation(segmentation=segmentation, iscrowd=crowd)]))
    (instance,) = coco.instances[1]
    assert instance.is_crowd == bool(crowd)
    if crowd:
        assert instance.polygons == []
    else:
        parts = coco_mask.frPyObjects([polygon.ravel().tolist() for polygon in instance.polygons], 8, 10)
        assert np.array_equal(coco_mask.decode(coco_mask.merge(parts)), mask)


@pytest.mark.parametrize(
    ("bbox", "box", "was_clipped"),
    [
        ([2, 2, 8, 6], (2, 2, 10, 8), False),
        ([-1, 2, 5, 5], (0, 2, 4, 7), True),
        ([5, 5, 100, 100], (5, 5, 10, 8), True),
        ([2, 2, 8.0000001, 6], (2, 2, 10, 8), False),
    ],
)
def test_a_box_is_clipped_to_the_frame(tmp_path: Path, bbox, box, was_clipped):
    (instance,) = read(tmp_path, tree(annotations=[annotation(bbox=bbox)])).instances[1]
    assert (instance.box, instance.was_clipped) == (box, was_clipped)


def test_a_polygon_out_of_the_frame_is_kept_as_it_is(tmp_path: Path):
    (instance,) = read(tmp_path, tree(annotations=[annotation(segmentation=[[-5, -5, 20, 0, 5, 20]])])).instances[1]
    assert np.array_equal(instance.polygons[0], [(-5, -5), (20, 0), (5, 20)])


NAN = float("nan")
FAULTS = {
    "no area": ({"bbox": [1, 1, 0, 5]}, "box without area", r"bbox \[1, 1, 0, 5\] has no area"),
    "negative": ({"bbox": [1, 1, 5, -2]}, "box without area", "width and height must be > 0"),
    "outside": ({"bbox": [10, 1, 5, 5]}, "box outside the image", r"the image of 10 × 8 \(width × height\)"),
    "three numbers": ({"bbox": [1, 1, 5]}, "bad box", "four finite numbers"),
    "box nan": ({"bbox": [1, 1, NAN, 5]}, "bad box", "four finite numbers"),
    "no box": ({"bbox": None}, "bad box", "got None"),
    "category": ({"category_id": 4}, "unknown category", "category_id 4 is not among the categories"),
    "image": ({"image_id": 77}, "unknown image id", "image_id 77 is not among"),
    "image list": ({"image_id": [1]}, "unknown image id", "must be an integer"),
    "iscrowd": ({"iscrowd": 2}, "bad iscrowd", "must be 0 or 1, got 2"),
    "no segmentation": ({"segmentation": []}, "no segmentation", r"must be polygons or an RLE, got \[\]"),
    "two points": ({"segmentation": [[1, 1, 2, 2]]}, "bad polygon", "at least 6, got 4"),
    "odd": ({"segmentation": [[1, 1, 2, 2, 3, 3, 4]]}, "bad polygon", "even number of coordinates"),
    "nan": ({"segmentation": [[1, 1, 2, 2, 3, NAN]]}, "bad polygon", "finite numbers"),
    "text": ({"segmentation": [[1, 1, 2, 2, 3, "x"]]}, "bad polygon", "finite numbers"),
    "rle size": (
        {"segmentation": {"size": [10, 8], "counts": [80]}},
        "bad RLE",
        r"must be the image's \[8, 10\], got \[10, 8\]",
    ),
    "rle sum": (
        {"segmentation": {"size": [8, 10], "counts": [40, 20]}},
        "bad RLE",
        r"add up to 8 × 10 \(height × width\) pixels, got 60",
    ),
    "rle text": ({"segmentation": {"size": [8, 10], "counts": "`"}}, "bad RLE", "end within a number"),
    "rle counts": ({"segmentation": {"size": [8, 10]}}, "bad RLE", "a string or a list, got a NoneType"),
    "rle crowd": ({"segmentation": {"size": [8, 10], "counts": [1]}, "iscrowd": 1}, "bad RLE", "add up to"),
    "rle empty": ({"segmentation": {"size": [8, 10], "counts": [80]}}, "empty mask", "no pixel"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_annotation_is_reported_with_file_id_and_reason(tmp_path: Path, name: str):
    changes, kind, reason = FAULTS[name]
    coco = read(tmp_path, tree(annotations=[annotation(**changes), annotation(id=6)]))
    (problem,) = coco.findings
    assert problem.kind == kind
    assert str(problem).startswith(
        f"{tmp_path / 'instances.json'}: annotation 5 of image {changes.get('image_id', 1)}: "
    )
    assert re.search(reason, problem.text)
    assert len(coco.instances[1]) == len(coco.raw[1]) == 1


def test_annotations_are_numbered_where_two_have_one_id(tmp_path: Path):
    coco = read(
        tmp_path,
        tree(annotations=[annotation(), annotation(bbox=[2, 1, 5, 6]), annotation(id=None, bbox=[1, 1, 6, 5])]),
    )
    assert [entry["id"] for entry in coco.raw[1]] == [1, 2, 3]
    first, second = coco.findings
    assert str(first).startswith(f"{tmp_path / 'instances.json'}: annotation 5 of image 1: id must be a unique integer")
    assert (first.kind, second.kind) == ("duplicate annotation id", "no annotation id")
    assert first.severity == second.severity == "repaired"


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"id": 1}, "duplicate image id"),
        ({"id": "x"}, "no id"),
        ({"id": -2}, "no id"),
        ({"id": 2, "file_name": ""}, "no file name"),
        ({"id": 2, "width": 0}, "no size"),
        ({"id": 2, "height": 8.5}, "no size"),
    ],
)
def test_a_faulty_image_is_a_problem(tmp_path: Path, changes: dict[str, Any], kind: str):
    coco = read(tmp_path, tree(images=[image(), image(**changes)]))
    assert [problem.kind for problem in coco.findings] == [kind]
    assert list(coco.images) == [1]


def test_an_id_of_two_files_takes_no_annotations_to_either(tmp_path: Path):
    images = [image(), image(id=2), image(file_name="other.jpg"), image(id=2)]
    annotations = [annotation(), annotation(id=6, image_id=2)]
    coco = read(tmp_path, tree(images, annotations))
    assert (list(coco.images), coco.num_instances) == ([2], 1)
    assert [(one.kind, one.severity) for one in coco.findings] == [("duplicate image id", "error")] * 3
    assert "id is that of 2 files, ['1.jpg', 'other.jpg']" in coco.findings[0].text


def test_broken_json_tells_the_position(tmp_path: Path):
    with pytest.raises(AnnotationError, match=r"instances.json: line 2, column 13 \(byte 14\): not JSON"):
        read(tmp_path, '{\n "images": [}')


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([], "COCO's instances format"),
        ({"images": [], "categories": []}, "a list under 'annotations'"),
        (tree(categories=[]), "must list at least one category"),
        (tree(categories=[{"id": 1}]), "must have an integer id ≥ 0 and a name"),
        (tree(categories=[{"id": "1", "name": "a"}]), "data.on_invalid=mend repairs it"),
        (tree(categories=[{"id": -1, "name": "a"}]), "id must be an integer from 0 .* got -1"),
        (tree(categories=[{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]), "category id 1 occurs twice"),
    ],
)
def test_a_file_that_is_not_cocos_form_is_an_error(tmp_path: Path, content: Any, reason: str):
    with pytest.raises(AnnotationError, match=reason):
        read(tmp_path, content)


def test_a_missing_file_is_an_error(tmp_path: Path):
    with pytest.raises(AnnotationError, match=r"gone.json: no such annotation file; set data.train_annotations"):
        read_coco(tmp_path / "gone.json")


def test_a_file_that_is_no_text_is_an_error(tmp_path: Path):
    (tmp_path / "a.json").write_bytes(b'{"images": "\xff"}')
    with pytest.raises(AnnotationError, match="byte 12: not UTF-8"):
        read_coco(tmp_path / "a.json")


NO_JSON = {  # content of the annotation file: what the error says
    b"": r"it is empty \(0 bytes\)",
    bytes(50): "its 50 bytes are all zero",
    b"\x1f\x8b\x08\0\0": "it is a gzip archive; unpack it",
    b"PK\x03\x04zip": "it is a zip archive; unpack it",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n": "a Git LFS pointer .*; `git lfs pull`",
    b"\n<!DOCTYPE html><html>404</html>": "an HTML page, .*; download it again",
    b"\xff\xd8\xff\xe0JFIF": "it is a JPEG file$",
    json.dumps(tree()).encode()[:-40]: "the file ends before its JSON does",
    b'{"images": [}': r"line 1, column 13 \(byte 12\): not JSON: Expecting value$",
    '{"name": "K\u00e4fer"}'.encode("latin-1"): "byte 11: not UTF-8 text; save it as UTF-8",
}


@pytest.mark.parametrize("content", NO_JSON)
def test_an_annotation_file_that_is_no_json_is_called_what_it_is(tmp_path: Path, content: bytes):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(AnnotationError, match=f"a.json: .*{NO_JSON[content]}"):
        read_coco(tmp_path / "a.json")


def test_a_key_that_occurs_twice_with_different_values_is_told(tmp_path: Path):
    text = json.dumps(tree())
    coco = read(tmp_path, text.replace('"iscrowd": 0', '"bbox": [1, 1, 6, 6.5], "iscrowd": 0, "iscrowd": 0'))
    (finding,) = coco.findings
    assert (finding.kind, finding.severity, coco.raw[1][0]["bbox"]) == ("key twice", "warning", [1, 1, 6, 6.5])
    assert "'bbox' occurs twice in one object" in finding.text
    with pytest.raises(AnnotationError, match="'annotations' occurs twice, with different lists; join them"):
        read(tmp_path, text[:-1] + ', "annotations": []}')


def test_an_area_far_from_that_of_its_object_is_a_warning(tmp_path: Path):
    big = tree([image(height=64, width=96)], categories=[{"id": 3, "name": "cat"}])
    square = {"bbox": [10, 10, 40, 40], "segmentation": [[10, 10, 50, 10, 50, 50]]}  # the mask has half of the box
    for area, is_told in ((800, False), (1600, False), (300, False), (0.13, True), (1e-300, True), (6144, True)):
        coco = read(tmp_path, {**big, "annotations": [annotation(**square, area=area)]})
        assert [(one.kind, one.severity) for one in coco.findings] == [("area not of its object", "warning")] * is_told
        assert coco.raw[1][0]["area"] == area
