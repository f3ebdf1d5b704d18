"""Annotations in the formats of other tools are named, with a way to convert them."""

import json
import os
import re
import time
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from model.data.annotations import read_coco
from model.data.coco_json import AnnotationError
from model.data.other_formats import name_of_text, names_below

COCO: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
FORMATS: list[tuple[Any, str]] = [  # content, an object or a text; what the error says
    (
        {"version": "5.2.1", "flags": {}, "shapes": [], "imagePath": "a.jpg", "imageHeight": 9},
        "labelme, .*; `maskrcnn import labelme FOLDER OUT`",
    ),
    ({"_via_settings": {}, "_via_img_metadata": {}}, r"VIA\); export it again"),
    ({"a.jpg123": {"filename": "a.jpg", "size": 1, "regions": [], "file_attributes": {}}}, "VIA"),
    (
        {"info": {}, "categories": {"label": {"labels": []}}, "items": [{"id": "a", "annotations": []}]},
        "Datumaro; `maskrcnn import datumaro",
    ),
    (
        {"metadata": {"name": "a.jpg"}, "instances": [{"type": "polygon"}], "tags": []},
        "SuperAnnotate; `python -c .*'COCO'",
    ),
    ([{"metadata": {"name": "a.jpg"}, "instances": []}], "SuperAnnotate"),
    ({"description": "", "tags": [], "size": {"height": 1}, "objects": []}, "Supervisely"),
    (COCO | {"annotations": [{"image_id": 1, "segments_info": []}]}, "panoptic format; `converters/panoptic2detection"),
    (COCO | {"annotations": [{"image_id": 1, "id": 1, "caption": "A dog."}]}, "captions"),
    ([{"image_id": 1, "category_id": 1, "bbox": [1, 1, 2, 2], "score": 0.5}], r"a list of detections \(COCO results\)"),
    ([{"id": 1, "data": {"image": "a.jpg"}, "annotations": []}], "Label Studio; export"),
    ([{"image": "a.jpg", "annotations": [{"label": "a", "coordinates": {}}]}], "CreateML"),
    ([{"data_row": {}, "projects": {}}], "Labelbox"),
    ('{"data_row": {}}\n{"data_row": {}}\n', "a JSON object on each line"),
    (
        '<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n  <version>1.1</version>',
        "CVAT's XML; `maskrcnn import cvat",
    ),
    (
        "<annotation>\n  <folder>a</folder><filename>a.jpg</filename>",
        "Pascal VOC's XML.*`maskrcnn import voc",
    ),
    ("0 0.5 0.5 0.25 0.25\n3 0.1 0.2 0.3 0.4\n", "YOLO's text.*`maskrcnn import yolo"),
    ("0 0.5 0.5 0.25 0.25 0.1 0.2", "YOLO's text"),
    ("train: images\nnc: 2\nnames: [a, b]\n", "YOLO's YAML"),
    ("filename,width,height,class,xmin\na.jpg,1,1,a,0\n", "a table"),
]


@pytest.mark.parametrize(("content", "reason"), FORMATS)
def test_another_format_is_named_with_the_way_to_convert_it(tmp_path: Path, content: Any, reason: str) -> None:
    path = tmp_path / "instances.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(AnnotationError) as error:
        read_coco(path)
    assert re.match(rf"{re.escape(str(path))}: must be .*COCO.*, but is .*{reason}", str(error.value))


@pytest.mark.parametrize(
    "content", ["", "nothing", "{", "[]", "7", "null", '"text"', "[[1]]", "{}", '{"images": 3}', "<html>"]
)
def test_what_is_no_known_format_is_not_guessed(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(AnnotationError) as error:
        read_coco(tmp_path / "a.json")
    assert "but is" not in str(error.value)


def test_long_texts_are_judged_quickly() -> None:
    begun = time.perf_counter()
    for text in ("\n" * 9999, "a: b\n" * 999, "1 " * 4999, "<!---->" * 999, "<!-- " * 999, "{}" * 4999, "a,b" * 3333):
        name_of_text(text)
    assert time.perf_counter() - begun < 1


def test_keypoints_are_instances_too(tmp_path: Path) -> None:
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 2, 2], "keypoints": [1, 1, 2]}
    image = {"id": 1, "file_name": "a.jpg", "height": 9, "width": 9}
    (tmp_path / "a.json").write_text(json.dumps(COCO | {"images": [image], "annotations": [annotation]}))
    assert read_coco(tmp_path / "a.json", masks=False).num_instances == 1


def test_a_named_pipe_is_not_read(tmp_path: Path) -> None:
    pipe = tmp_path / "labels.txt"
    os.mkfifo(pipe)
    writer = Thread(target=pipe.write_text, args=["0 0.5 0.5 0.25 0.25\n"])  # waits for a reader
    writer.start()
    assert names_below(tmp_path) == []
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    writer.join()
    os.close(reader)
