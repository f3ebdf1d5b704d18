"""The JSON of a COCO annotation file, parsed; a file of anything else is called what it is."""

import json
from pathlib import Path
from typing import Any

from model.data.file_kinds import why_no_json
from model.data.findings import Findings
from model.data.other_formats import name_of_text, name_of_tree
from model.data.values import show
from model.errors import UserError

_KEYS = ("images", "annotations", "categories")


class AnnotationError(UserError):
    """The data set cannot be used as it is; the message names the faulty records."""


def require_annotations(path: Path) -> None:
    """Refuse the path of an annotation file that does not exist.

    Raises:
        AnnotationError: if there is no such file.
    """
    if not path.is_file():
        raise AnnotationError(
            f"{path}: no such annotation file; set data.train_annotations and data.val_annotations, relative to "
            "data.raw_dir"
        )


def read_tree(path: Path, findings: Findings) -> dict[str, Any]:
    """Read an annotation file; its `images`, `annotations` and `categories` are lists.

    Raises:
        AnnotationError: if the file is missing, not JSON, or not in COCO's instances format.
    """
    require_annotations(path)
    content = path.read_bytes()
    twice: list[tuple[dict[str, Any], str]] = []  # objects that have a key with several values, and the key

    def as_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice.extend((found, key) for key, value in pairs if repr(value) != repr(found[key]))
        return found

    try:
        tree = json.loads(content, object_pairs_hook=as_dict)  # UTF-8, -16 or -32, with a byte order mark or without
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"{path}: {_why_no_json(content, error)}") from error
    if name := name_of_tree(tree):
        raise AnnotationError(f"{path}: must be in COCO's instances format, but is {name}")
    for key in _KEYS:
        if not isinstance(tree, dict) or not isinstance(tree.get(key), list):
            raise AnnotationError(f"{path}: must be in COCO's instances format: an object with a list under {key!r}")
    findings.where = str(path)
    for record, key in twice:
        if record is tree and key in _KEYS:
            raise AnnotationError(f"{path}: {key!r} occurs twice, with different lists; join them into one")
        findings.warn("key twice", f"{show(key)} occurs twice in one object, {show(record)}; the last value is used")
    return tree


def _why_no_json(content: bytes, error: Exception) -> str:
    """Say why a file cannot be read as JSON, and what to do."""
    if isinstance(error, json.JSONDecodeError) and (name := name_of_text(error.doc)):
        return f"must be COCO JSON, but is {name}"
    if reason := why_no_json(content):
        return f"must be COCO JSON, but {reason}"
    if isinstance(error, json.JSONDecodeError):
        is_cut = error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated")
        end = "; the file ends before its JSON does: copy or download it again" if is_cut else ""
        return f"line {error.lineno}, column {error.colno} (byte {error.pos}): not JSON: {error.msg}{end}"
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start}: not UTF-8 text; save it as UTF-8, for instance with iconv"
    return f"not COCO's JSON: {error}"
