"""The whole grammar of COCO JSON: each field absent, null, of a wrong type, beyond its bounds, or doubled.

Whatever the file holds, it is read or refused with an AnnotationError, and what is read has sound values only, so that
pycocotools and hotcoco can score it.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hotcoco
import numpy as np
import pycocotools.mask as coco_mask
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.data.annotations import CocoFile, read_coco
from model.data.coco_json import AnnotationError
from model.scoring.backends import index_dataset

SIZE = (32, 40)
TRIANGLE = [[8, 8, 28, 8, 28, 28]]
PACKED = coco_mask.merge(coco_mask.frPyObjects([[8, 12, 28, 12, 28, 28, 8, 28]], *SIZE))
PACKED = {**PACKED, "counts": PACKED["counts"].decode()}  # with a backslash, which Python's bytes double
COUNTS = [128, 256, 896]  # columns 4 to 11
NAN, INFINITY = float("nan"), float("inf")
ABSENT = object()
# Values that no field takes; 1e400 is read as infinity.
ODD: tuple[Any, ...] = (
    *(ABSENT, None, True, False, "", "x", "1", "\ud800", "\0", [], [[]], {}, [1], [None], {"a": 1}),
    *(-1, 0, 0.5, -0.0, NAN, INFINITY, -INFINITY, 1e-320, 1e12, 1e308, 2**53, 2**63, 2**64, -(2**70), 10**400),
)
SIMPLE = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
JSON = st.recursive(SIMPLE, lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=2), inner))


SCORED: set[bytes] = set()  # what an evaluator has taken already


def sound() -> dict[str, Any]:
    """Two images; a polygon, an uncompressed RLE and a crowd."""
    rle = {"size": list(SIZE), "counts": COUNTS}
    common = {"image_id": 1, "category_id": 3, "bbox": [8, 8, 20, 20], "iscrowd": 0, "area": 200}
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": SIZE[0], "width": SIZE[1]} for i in (1, 2)],
        "annotations": [
            {"id": 1, **common, "segmentation": TRIANGLE},
            {"id": 2, **common, "bbox": [4, 0, 8, 32], "segmentation": rle},
            {"id": 3, **common, "bbox": [4, 0, 8, 32], "segmentation": rle, "iscrowd": 1},
        ],
        "categories": [{"id": 3, "name": "cat"}, {"id": 5, "name": "dog"}],
    }


def read(path: Path, tree: Any, **options: Any) -> CocoFile | None:
    """Read a tree; None if it is refused."""
    text = tree if isinstance(tree, str) else json.dumps(tree)
    path.write_text(text, encoding="utf-8")
    try:
        coco = read_coco(path, **options)
    except AnnotationError:
        return None
    require_sound(coco, masks=options.get("masks", True))
    return coco


def require_sound(coco: CocoFile, *, masks: bool) -> None:
    """Check each value, and that an evaluator takes all of them."""
    tree = {
        "images": [vars(image) for image in coco.images.values()],
        "annotations": [entry for of_image in coco.raw.values() for entry in of_image],
        "categories": [{"id": i, "name": name} for i, name in coco.categories.items()],
    }
    text = json.dumps(tree, allow_nan=False, ensure_ascii=False).encode("utf-8")
    json.dumps([vars(finding) for finding in coco.findings])
    for entry in tree["annotations"]:
        assert [type(entry[key]) for key in ("id", "image_id", "category_id", "iscrowd")] == [int] * 4
        assert max(entry["id"], entry["image_id"], entry["category_id"]) < 2**63
        assert 0 < entry["area"] <= 1e12
        assert "segmentation" in entry or not masks
    for image_id, of_image in coco.instances.items():
        height, width = coco.images[image_id].height, coco.images[image_id].width
        for instance in of_image:
            x1, y1, x2, y2 = map(np.float32, instance.box)
            assert 0 <= x1 < x2 <= width
            assert 0 <= y1 < y2 <= height
            assert all(np.isfinite(polygon).all() and polygon.shape[1] == 2 for polygon in instance.polygons)
    if tree["annotations"] and text not in SCORED:
        SCORED.add(text)
        ids = [entry["id"] for entry in tree["annotations"]]
        assert len(set(ids)) == len(ids)
        truth = hotcoco.COCO(json.loads(text))
        results = [{**entry, "score": 0.5} for entry in tree["annotations"]]
        evaluator = hotcoco.COCOeval(truth, truth.load_res(results), "segm" if masks else "bbox")
        evaluator.evaluate()
        reference = index_dataset(json.loads(text))
        if masks:
            assert all(reference.annToMask(one).any() for one in reference.anns.values())


def changed(group: str, position: int) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Each field of a record with each odd value."""
    for key in sound()[group][position]:
        for value in ODD:
            tree = sound()
            tree[group][position][key] = value
            if value is ABSENT:
                del tree[group][position][key]
            yield key, value, tree


def test_any_value_in_any_field_is_read_or_refused(tmp_path: Path):
    records = [("images", 0, {}), ("categories", 0, {}), ("annotations", 0, {}), ("annotations", 1, {})]
    records += [
        ("annotations", 0, {"repairs": True}),
        ("annotations", 0, {"masks": False}),
        ("images", 0, {"repairs": True}),
    ]
    counted = 0
    for group, position, options in records:
        for key, value, tree in changed(group, position):
            coco = read(tmp_path / "a.json", tree, **options)
            counted += 1
            others = 2 if group == "annotations" else 0
            assert coco is None or sum(map(len, coco.raw.values())) >= others, (group, key, value)
    assert counted > 1000


def test_any_value_in_a_list_is_read_or_refused(tmp_path: Path):
    for key, entry in (("bbox", [8, 8, 20, 20]), ("segmentation", TRIANGLE), ("counts", COUNTS), ("size", [*SIZE])):
        for value in ODD:
            if value is ABSENT:
                continue
            tree = sound()
            found = [value, *(entry[0] if key == "segmentation" else entry)[1:]]
            if key in ("counts", "size"):
                tree["annotations"][1]["segmentation"][key] = found
            else:
                tree["annotations"][0][key] = [found] if key == "segmentation" else found
            assert read(tmp_path / "a.json", tree) is not None


def test_any_value_for_a_whole_part_of_the_file_is_read_or_refused(tmp_path: Path):
    for key in sound():
        for value in ODD:
            for changed in (value, [value], [sound()[key][0], value]):
                if value is not ABSENT:
                    read(tmp_path / "a.json", {**sound(), key: changed})
    for text in ("", " ", "null", "[]", "1", "[" * 100_000, "1" * 5000, '{"images": NaN}', "\ufeff{}", "<html>"):
        assert read(tmp_path / "a.json", text) is None


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_arbitrary_json_is_read_or_refused(tmp_path: Path, data: st.DataObject):
    tree = sound()
    group = data.draw(st.sampled_from(sorted(tree)))
    entry = data.draw(st.sampled_from(tree[group]))
    entry[data.draw(st.sampled_from(sorted(entry)))] = data.draw(JSON)
    read(tmp_path / "a.json", tree)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_every_unicode_encoding_of_json_is_read(tmp_path: Path, encoding: str):
    (tmp_path / "a.json").write_bytes(json.dumps(sound(), ensure_ascii=False).encode(encoding))
    assert read_coco(tmp_path / "a.json").findings == []


# What changes in the sound file → kinds of errors, repairs and warnings, and the number of annotations kept.
LINE = [[4, 4, 36, 4, 20, 4]]
CASES: dict[str, tuple[dict[str, Any], list[str], int]] = {
    "sound": ({}, [], 3),
    "polygon outside": ({"segmentation": [[80, 80, 90, 80, 90, 90]]}, ["error: empty mask"], 2),
    "polygon of one point": ({"segmentation": [[1, 1] * 3]}, ["error: empty mask"], 2),
    "polygon of one line": ({"segmentation": LINE}, ["error: empty mask"], 2),
    "normalised": ({"segmentation": [[0.1, 0.1, 0.6, 0.1, 0.6, 0.6]]}, ["error: empty mask"], 2),
    "nested mask": ({"segmentation": [[0, 1] * 20] * 32}, ["error: empty mask"], 2),
    "far": ({"segmentation": [[1, 1, 1e12, 1, 1e12, 1e12]]}, ["error: bad polygon"], 2),
    "long": ({"segmentation": [[1e6, 1, -1e6, 1] * 40]}, ["error: bad polygon"], 2),
    "far box": ({"bbox": [1, 1, 1e308, 5]}, ["error: bad box"], 2),
    "thin box": ({"bbox": [1, 1, 1e-9, 5]}, ["error: box without area"], 2),
    "box of fractions": ({"bbox": [0.1, 0.1, 0.6, 0.6]}, ["error: box within one pixel"], 2),
    "stray part": ({"segmentation": [*TRIANGLE, [1, 1, 2, 2]]}, ["repaired: stray part"], 3),
    "stray point": ({"segmentation": [[1, 1], *TRIANGLE, []]}, ["repaired: stray part"], 3),
    "stray parts alone": ({"segmentation": [[1, 1, 2, 2], [3, 3]]}, ["error: bad polygon"], 2),
    "repaired in vain": ({"segmentation": [*TRIANGLE, [1, 1]], "bbox": "x"}, ["error: bad box"], 2),
    "xyxy": ({"bbox": [8, 8, 28, 28]}, ["warning: bbox as x1, y1, x2, y2"], 3),
    "elsewhere": ({"bbox": [32, 8, 8, 8]}, ["warning: bbox not around its segmentation"], 3),
    "no id": ({"id": None}, ["repaired: no annotation id"], 3),
    "text id": ({"id": "3e8f"}, ["repaired: no annotation id"], 3),
    "id of another": ({"id": 2}, ["repaired: duplicate annotation id"], 3),
    "whole numbers": ({"image_id": 1.0, "category_id": 3.0, "iscrowd": 0.0}, [], 3),
    "negative area": ({"area": -4}, ["repaired: bad area"], 3),
    "infinite area": ({"area": INFINITY}, ["repaired: bad area"], 3),
    "no area": ({"area": None}, [], 3),
    "twice": (
        {"bbox": [4, 0, 8, 32], "segmentation": [[4, 0, 12, 0, 12, 32, 4, 32]]},
        ["warning: duplicate annotation"],
        3,
    ),
}
# The same, where repairs are asked for.
REPAIRS: dict[str, tuple[dict[str, Any], list[str], int]] = {
    "xyxy": ({"bbox": [8, 8, 28, 28]}, ["repaired: bbox as x1, y1, x2, y2"], 3),
    "no box": ({"bbox": None}, ["repaired: bad box"], 3),
    "empty box": ({"bbox": [1, 1, 0, 0]}, ["repaired: box without area"], 3),
    "text ids": ({"image_id": "1", "category_id": "3"}, ["repaired: number as text"] * 2, 3),
    "text crowd": ({"iscrowd": "0"}, ["repaired: number as text"], 3),
    "flat polygon": ({"segmentation": TRIANGLE[0]}, ["repaired: polygon not in a list"], 3),
    "points": ({"segmentation": [[8, 8], [28, 8], [28, 28]]}, ["repaired: polygon as points"], 3),
    "objects": (
        {"segmentation": [{"x": 8, "y": 8}, {"x": 28.0, "y": 8}, {"y": 28, "x": 28, "id": "p3"}]},
        ["repaired: polygon as points"],
        3,
    ),
    "parts of points": ({"segmentation": [[[8, 8], [28, 8], [28, 28]]]}, ["repaired: polygon as points"], 3),
    "parts of both": (
        {"segmentation": [[{"x": 8, "y": 8}, {"x": 28, "y": 8}, {"x": 28, "y": 28}], *TRIANGLE, [[1, 1], [2, 2]]]},
        ["repaired: polygon as points", "repaired: stray part"],
        3,
    ),
    "text": ({"segmentation": json.dumps(TRIANGLE)}, ["repaired: segmentation as text"], 3),
    "text of points": (
        {"segmentation": '[{"x": 8, "y": 8}, {"x": 28, "y": 8}, {"x": 28, "y": 28}]'},
        ["repaired: segmentation as text", "repaired: polygon as points"],
        3,
    ),
    "text of an RLE": (
        {"segmentation": json.dumps({"size": SIZE, "counts": [264, *[20, 12] * 19, 20, 388]})},
        ["repaired: segmentation as text"],
        3,
    ),
    "text of nothing": ({"segmentation": "8,8 28,8 28,28"}, ["error: no segmentation"], 2),
    "text of numbers": ({"segmentation": "[8, null]"}, ["error: bad polygon"], 2),
    "points of text": (
        {"segmentation": [{"x": "8", "y": "8"}, {"x": "28", "y": "8"}, {"x": "28", "y": 28}]},
        ["repaired: number as text", "repaired: polygon as points"],
        3,
    ),
    "polygon of text": ({"segmentation": [[*"8", "8.0", "28", "8", 28, "2.8e1"]]}, ["repaired: number as text"], 3),
    "words for numbers": ({"segmentation": [["NaN", "8", "28", "8", "28", "28"]]}, ["error: bad polygon"], 2),
    "box of text": ({"bbox": ["8", "8", "20.0", 20]}, ["repaired: number as text"], 3),
    "box of words": ({"bbox": ["left", 8, 20, 20]}, ["repaired: bad box"], 3),
    "RLE of text": (
        {"segmentation": {"size": [str(side) for side in SIZE], "counts": ["264", *[20, 12] * 19, 20, 388]}},
        ["repaired: number as text"] * 2,
        3,
    ),
    "part in a list": ({"segmentation": [TRIANGLE]}, ["repaired: too many lists"], 3),
    "points in lists": (
        {"segmentation": [[[[8, 8], [28, 8], [28, 28]]]]},
        ["repaired: too many lists", "repaired: polygon as points"],
        3,
    ),
    "RLE in a list": ({"segmentation": [PACKED]}, ["repaired: too many lists"], 3),
    "parts or holes in a list": ({"segmentation": [TRIANGLE * 2]}, ["error: bad polygon"], 2),
    "RLE as Python's bytes": (
        {"segmentation": {**PACKED, "counts": str(PACKED["counts"].encode())}},
        ["repaired: RLE as Python's bytes"],
        3,
    ),
    "beyond repair": ({"segmentation": LINE}, ["error: empty mask"], 2),
}


def kinds(coco: CocoFile) -> list[str]:
    return [f"{finding.severity}: {finding.kind}" for finding in coco.findings]


@pytest.mark.parametrize("repairs", [False, True])
def test_each_fault_is_refused_repaired_or_warned_of(tmp_path: Path, repairs: bool):
    for name, (changes, found, kept) in (REPAIRS if repairs else CASES).items():
        tree = sound()
        tree["annotations"][0] |= changes
        coco = read(tmp_path / "a.json", tree, repairs=repairs)
        assert coco is not None
        assert (kinds(coco), len(coco.raw[1])) == (found, kept), name
        if name == "infinite area":
            assert coco.raw[1][0]["area"] == pytest.approx(200, abs=20)
        if repairs and kept == 3:
            assert np.allclose(coco.instances[1][0].box, (8, 8, 28, 28), atol=1), name
        if repairs and (name == "text" or found[0].startswith("repaired: polygon")):
            assert coco.raw[1][0]["segmentation"][0] == TRIANGLE[0], name


def test_what_only_repairs_accept_is_refused_otherwise_and_the_error_names_the_setting(tmp_path: Path):
    for name in (
        "no box",
        "empty box",
        "text crowd",
        "flat polygon",
        "points",
        "objects",
        "text",
        "box of text",
        "RLE in a list",
    ):
        tree = sound()
        tree["annotations"][0] |= REPAIRS[name][0]
        coco = read(tmp_path / "a.json", tree)
        assert coco is not None
        (finding,) = coco.findings
        assert (finding.severity, len(coco.raw[1])) == ("error", 2), name
        assert finding.text.endswith("data.on_invalid=mend repairs it")


def test_boxes_suffice_where_no_masks_are_needed(tmp_path: Path):
    tree = sound()
    for entry, segmentation in zip(tree["annotations"], ([], None, LINE), strict=True):
        entry["segmentation"] = segmentation
        del entry["area"]
    coco = read(tmp_path / "a.json", tree, masks=False)
    assert coco is not None
    assert kinds(coco) == ["warning: empty mask"]
    assert [entry["area"] for entry in coco.raw[1]] == [400, 256, 256]
    assert [instance.has_mask for instance in coco.instances[1]] == [False] * 3
    refused = read(tmp_path / "a.json", tree)
    assert refused is not None
    assert kinds(refused) == ["error: no segmentation"] * 2 + ["error: empty mask"]
    assert "boxes alone suffice for model.task=box" in refused.findings[0].text


def test_boxes_that_fit_only_as_corners_are_guessed(tmp_path: Path):
    tree = sound()
    for entry, bbox in zip(tree["annotations"], ([4, 4, 32, 28], [16, 8, 36, 32], [0, 4, 20, 28]), strict=True):
        entry |= {"bbox": bbox, "segmentation": []}
    coco = read(tmp_path / "a.json", tree, masks=False)
    assert coco is not None
    assert kinds(coco) == ["warning: bbox as x1, y1, x2, y2?"]
    assert coco.findings[0].text.startswith("1 of 3 boxes extend beyond")
    tree["annotations"][2]["bbox"] = [20, 4, 16, 16]  # no corners
    coco = read(tmp_path / "a.json", tree, masks=False)
    assert coco is not None
    assert coco.findings == []


def test_a_faulty_image_is_the_only_fault_and_not_each_of_its_annotations(tmp_path: Path):
    for changes in (
        *({"height": None}, {"id": "a7"}, {"id": None}, {"id": [1]}, {"file_name": 5}, {"height": "64"}),
        *({"width": 1e300}, {"width": 3e5, "height": 3e5}),
    ):
        tree = sound()
        tree["images"][0] |= changes
        if changes.get("id") == "a7":
            for entry in tree["annotations"]:
                entry["image_id"] = "a7"
        coco = read(tmp_path / "a.json", tree)
        assert coco is not None
        assert len(coco.findings) == 1
        assert re.search(r"images\[0\] \(id ('a7'|None|\[1\])\)$|image 1$", coco.findings[0].where)
        assert coco.raw == {2: []}


def test_a_file_under_two_ids_is_warned_of(tmp_path: Path):
    tree = sound()
    tree["images"][1]["file_name"] = "1.jpg"
    coco = read(tmp_path / "a.json", tree)
    assert coco is not None
    assert kinds(coco) == ["warning: file listed twice"]
    assert coco.findings[0].where.endswith("image 2")


def test_sizes_come_from_the_files_where_the_annotation_file_has_none(tmp_path: Path):
    for odd in (None, 0, -4, 7.5, NAN, "8"):
        tree = sound()
        tree["images"][0]["height"] = odd
        coco = read(tmp_path / "a.json", tree, size_of=lambda name: SIZE)
        assert coco is not None
        assert (kinds(coco), len(coco.raw[1])) == (["repaired: no size"], 3)
    tree["images"][0]["height"] = 32.0
    coco = read(tmp_path / "a.json", tree)
    assert coco is not None
    assert coco.findings == []


def test_categories_of_one_name_are_told_apart(tmp_path: Path):
    tree = sound()
    tree["categories"] = [{"id": i, "name": name} for i, name in enumerate(("a", "b", "a (2)", "a", "a"), 3)]
    coco = read(tmp_path / "a.json", tree)
    assert coco is not None
    assert list(coco.categories.values()) == ["a", "b", "a (2)", "a (3)", "a (4)"]
    assert kinds(coco) == ["repaired: duplicate category name"] * 2
    assert "'a' is that of category 3" in coco.findings[0].text
    tree["categories"] = [{"id": 3, "name": "person\r\n"}, {"id": 5, "name": "\x1b[31mdog"}]
    assert read(tmp_path / "a.json", tree) is None
    coco = read(tmp_path / "a.json", tree, repairs=True)
    assert coco is not None
    assert list(coco.categories.values()) == ["person", "[31mdog"]
