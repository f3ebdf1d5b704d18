"""Text, JSON and XML files of other tools: read whole, or a Fault."""

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from model.data.findings import Fault
from model.data.other_formats import name_of_text, name_of_tree
from model.data.values import show
from model.errors import UserError
from model.files import require_file


def text_of(path: Path) -> str:
    """The text of a file in UTF-8.

    Raises:
        Fault: if it cannot be read.
    """
    try:
        require_file(path)
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise Fault("unreadable file", f"byte {error.start}: not UTF-8 text") from error
    except OSError as error:
        raise Fault("unreadable file", error.strerror or str(error)) from error


def lines_of(path: Path, what: str) -> list[str]:
    """The lines of a list that are not blank.

    Args:
        what: content of a line, for the error.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        return [line for line in map(str.strip, text_of(path).splitlines()) if line]
    except Fault as fault:
        raise UserError(f"{path}: must have {what} on each line: {fault}") from fault


def json_of(path: Path, *keys: str) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        Fault: if it cannot be read, or lacks a key.
    """
    text = text_of(path)
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Fault("unreadable file", f"not JSON: {error}{_is(name_of_text(text))}") from error
    if not isinstance(tree, dict) or not set(keys) <= tree.keys():
        raise Fault("other file", f"must be an object with {', '.join(keys)}{_is(name_of_tree(tree))}")
    return tree


def list_of(entry: dict[str, Any], key: str) -> list[Any]:
    """The list under a key of a JSON object.

    Raises:
        Fault: if there is none.
    """
    if not isinstance(entry.get(key), list):
        raise Fault(f"bad {key}", f"{key} must be a list, got {show(entry.get(key))}")
    return list(entry[key])


def xml_of(path: Path, root: str) -> ElementTree.Element:
    """The root element of an XML file.

    Raises:
        Fault: if it cannot be read, or has another root.
    """
    text = text_of(path)
    try:
        tree = ElementTree.fromstring(text.encode())
    except (ElementTree.ParseError, ValueError) as error:
        raise Fault("unreadable file", f"not XML: {error}") from error
    if tree.tag != root:
        raise Fault("other file", f"its root must be <{root}>, got <{tree.tag}>{_is(name_of_text(text))}")
    return tree


def number_of(element: ElementTree.Element, name: str) -> float:
    """The finite number in a child element, or else in an attribute.

    Raises:
        Fault: if there is none.
    """
    child = element.find(name)
    text = child.text if child is not None else element.get(name)
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise Fault("bad number", f"<{element.tag}>: {name} must be a number, got {text!r}")
    return value


def _is(name: str) -> str:
    return f"; it is {name}" if name else ""
