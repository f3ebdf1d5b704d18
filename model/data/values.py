"""Values of JSON, checked: integers, lists of coordinates, text. No later code meets a value beyond these bounds."""

import json
import math
import reprlib
from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from model.data.findings import Fault, Findings

MAX_PX = 1_000_000  # limit of a coordinate or a side
CONTROL = r"[\x00-\x1f\x7f-\x9f]+"  # control characters, which no name of a class may have
MAX_PIXELS = 2**28  # in an image; Pillow opens no larger one
_MAX_ID = 2**63 - 1
_LEVELS = 3  # lists in lists: an object has parts, a part has points, a point has numbers

Size = tuple[int, int]  # (height, width)

_repr = reprlib.Repr()
_repr.maxlist, _repr.maxdict, _repr.maxstring, _repr.maxlong, _repr.maxlevel = 6, 4, 60, 40, 2


def show(value: Any) -> str:
    """A value of JSON in a message, shortened."""
    return _repr.repr(value)


def numbers(values: Any) -> NDArray[np.float64] | None:
    """Values of a list of JSON numbers within ±MAX_PX; None for anything else."""
    if not isinstance(values, list) or not set(map(type, values)) <= {int, float}:
        return None
    if values and not (min(values) >= -MAX_PX and max(values) <= MAX_PX):  # integers of any size
        return None
    array = np.array(values, dtype=np.float64)
    return None if np.isnan(array).any() else array


def from_text(value: Any, name: str, findings: Findings) -> Any:
    """A value of lists and objects with numbers where it has texts that are numbers, which is repairable."""
    if not _has_text(value, _LEVELS):
        return value
    found = _numbers_of_text(value, _LEVELS)
    if found != value:
        findings.repairable("number as text", f"{name} must have numbers, got {show(value)}")
    return found


def _has_text(value: Any, levels: int) -> bool:
    if not levels or not isinstance(value, list | dict):
        return False
    inside = value.values() if isinstance(value, dict) else value
    kinds = set(map(type, inside))
    return str in kinds or (not kinds <= {int, float} and any(_has_text(one, levels - 1) for one in inside))


def _numbers_of_text(value: Any, levels: int) -> Any:
    if isinstance(value, str):
        try:
            number = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return number if type(number) in (int, float) and abs(number) < math.inf else value
    if levels and isinstance(value, list):
        return [_numbers_of_text(one, levels - 1) for one in value]
    if levels and isinstance(value, dict):
        return {key: _numbers_of_text(one, levels - 1) for key, one in value.items()}
    return value


def integer(value: Any, name: str, kind: str, findings: Findings) -> int:
    """An id ≥ 0; a number in text is repairable."""
    number = whole(value)
    if number is None and isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 19:
        number = int(value)
        findings.repairable("number as text", f"{name} must be an integer, got {value!r}")
    if number is None:
        raise Fault(kind, f"{name} must be an integer from 0 to {_MAX_ID}, got {show(value)}")
    return number


def whole(value: Any) -> int | None:
    """An integer from 0 to _MAX_ID; JSON does not tell 64 from 64.0, so both are taken. None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MAX_ID:
        return None
    if isinstance(value, float) and not (value.is_integer() and value < 2**53):
        return None
    return int(value)


def distinct(names: Sequence[str], form: str = "{} ({})") -> list[str]:
    """Names, with a number by `form` after those that occurred before: thing, thing (2)."""
    taken: set[str] = set()
    found = []
    for name in names:
        new, count = name, 1
        while new in taken or (count > 1 and new in names):
            count += 1
            new = form.format(name, count)
        taken.add(new)
        found.append(new)
    return found


def is_text(value: Any) -> TypeGuard[str]:
    """True for a string that is not blank and can be written as UTF-8."""
    return isinstance(value, str) and bool(value.strip()) and not any(0xD800 <= ord(c) <= 0xDFFF for c in value)
