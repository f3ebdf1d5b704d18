"""Formats of other tools where COCO JSON is required: their names, and how to convert them.

docs/data.md lists the versions of the converters that each command was tried with.
"""

import json
import os
import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

_IMPORT = "`maskrcnn import {} FOLDER OUT` takes the folder over"
_SUPERANNOTATE = (
    "`python -c \"from superannotate import export_annotation; export_annotation('FOLDER', 'OUT', 'COCO', 'set', "
    "task='instance_segmentation')\"` converts it (pip install superannotate)"
)
VOC = f"Pascal VOC's XML, a file for each image; {_IMPORT.format('voc')}"
YOLO = f"YOLO's text, a file for each image; {_IMPORT.format('yolo')}"
_LABELBOX = (
    "a file of Labelbox; version 7 of its SDK has no COCOConverter any more, so write COCO JSON from its `labels` with "
    "a script of yours"
)
_PROLOG = r"<!--(?:(?!-->).)*-->|<\?[^>]*>"  # comments and declarations of XML
_HEAD_CHARS, _SEARCHED_FILES, _PARSED_BYTES = 4096, 2000, 1_000_000

Tree = dict[str, Any]
_OBJECTS: tuple[tuple[Callable[[Tree], bool], str], ...] = (
    (
        lambda tree: isinstance(tree.get("shapes"), list),
        f"a file of labelme, one for each image; {_IMPORT.format('labelme')}",
    ),
    (
        lambda tree: "_via_img_metadata" in tree or _all(tree.values(), "regions", "filename"),
        "a file of the VGG Image Annotator (VIA); export it again: Annotation, Export Annotations (COCO format)",
    ),
    (
        lambda tree: isinstance(tree.get("items"), list) and "categories" in tree,
        f"a file of Datumaro; {_IMPORT.format('datumaro')}",
    ),
    (
        lambda tree: {"metadata", "instances"} <= tree.keys(),
        f"a file of SuperAnnotate; {_SUPERANNOTATE}",
    ),
    (lambda tree: {"objects", "size"} <= tree.keys(), "a file of Supervisely; its app Export to COCO converts it"),
    (
        lambda tree: _some(tree.get("annotations"), "segments_info"),
        "COCO's panoptic format; `converters/panoptic2detection_coco_format.py` of github.com/cocodataset/panopticapi "
        "converts it",
    ),
    (
        lambda tree: _all(tree.get("annotations"), "caption"),
        "COCO's captions; take the file whose name begins with `instances`",
    ),
)
_LISTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("image_id", "category_id", "score"), "a list of detections (COCO results); ground truth is required"),
    (("data", "annotations"), "a file of Label Studio; export the project as COCO, or as YOLO for `maskrcnn import`"),
    (("metadata", "instances"), f"a list of SuperAnnotate's files; as a file for each image, {_SUPERANNOTATE}"),
    (("image", "annotations"), "a file of CreateML; export the set as COCO from the tool that you label with"),
    (("data_row",), _LABELBOX),
)
_TEXTS: tuple[tuple[str, str], ...] = (
    (r"<annotations\b", f"CVAT's XML; {_IMPORT.format('cvat')}"),
    (r"<annotation\b", VOC),
    (r"(\d+([ \t]+-?\d[-.\de]*){4,}[ \t]*(\r?\n|$))+", YOLO),
    (r"(?m)\A.*?^(names|nc):", f"YOLO's YAML; {_IMPORT.format('yolo')}"),
    (r"\{.*\}\r?\n\{", f"a JSON object on each line, as Labelbox exports; if it is {_LABELBOX}"),
    (r"[\w ]+(,[\w ]+){3,}\r?\n", "a table (CSV); no common tool converts it without knowing its columns"),
)


def name_of_tree(tree: Any) -> str:
    """Name the format of parsed JSON, and how to convert it; empty if it is COCO's instances format, or unknown."""
    if isinstance(tree, dict):
        return next((text for fits, text in _OBJECTS if fits(tree)), "")
    return next((text for keys, text in _LISTS if _all(tree, *keys)), "")


def name_of_text(text: str) -> str:
    """Name the format of a text that is not JSON, and how to convert it; empty if unknown."""
    head = re.sub(_PROLOG, "", text[:_HEAD_CHARS], flags=re.DOTALL).lstrip()
    return next((name for pattern, name in _TEXTS if re.match(pattern, head, re.DOTALL)), "")


def names_below(folder: Path) -> list[str]:
    """Name the formats of the first files below a folder that are not COCO's, each once."""
    files = (Path(parent, name) for parent, _, names in os.walk(folder) for name in sorted(names))
    found: dict[str, None] = {}
    for path in islice(files, _SEARCHED_FILES):
        if path.suffix.lower() in (".json", ".xml", ".txt", ".yaml", ".yml", ".csv", ".ndjson"):
            found[_name_of_file(path)] = None
    return [name for name in found if name]


def _name_of_file(path: Path) -> str:
    try:
        if not path.is_file() or path.stat().st_size > _PARSED_BYTES:  # reading a named pipe would wait
            return ""
        text = path.read_bytes().decode("utf-8-sig", errors="replace")
        return name_of_tree(json.loads(text)) if path.suffix.lower() == ".json" else name_of_text(text)
    except (OSError, ValueError, RecursionError):
        return ""


def _all(records: Any, *keys: str) -> bool:
    """Tell if there are records, and the first ones have all keys."""
    first = list(islice(records, 3)) if records and not isinstance(records, str | int | float) else []
    return bool(first) and all(isinstance(record, dict) and record.keys() >= set(keys) for record in first)


def _some(records: Any, key: str) -> bool:
    return isinstance(records, list) and any(isinstance(record, dict) and key in record for record in records[:3])
