"""COCO run-length encoding: runs of outside and inside pixels in turn, column by column; plain or packed into text.

Source: pycocotools, common/maskApi.c (rleFrString).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_MAX_SHIFT = 60  # bits of a number; longer ones are no run of an image


def rle_runs(counts: str | Sequence[float]) -> NDArray[np.int64]:
    """Decode the `counts` of an RLE, compressed (text) or not, into runs [n], outside first.

    Raises:
        ValueError: if the text ends within a number or has an invalid character, or a run is not a whole number ≥ 0
            within int64.
    """
    values = _unpack(counts) if isinstance(counts, str) else [_whole(value) for value in counts]
    if not all(0 <= value < 2**63 for value in values):
        raise ValueError("runs must be integers ≥ 0")
    return np.array(values, dtype=np.int64)


def runs_to_mask(runs: NDArray[np.int64], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Expand runs to a mask [height, width]; they must add up to height × width."""
    inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return inside.reshape(size[::-1]).T


def _whole(value: float) -> int:
    """The integer that a number of JSON stands for; -1 for what is none."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return int(value) if is_number and (isinstance(value, int) or value.is_integer()) else -1


def _unpack(text: str) -> list[int]:
    """Decode compressed counts.

    Each character carries five bits and a continuation flag; from the fourth run on, values are differences to the run
    two before.
    """
    values: list[int] = []
    value, shift = 0, 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > _MAX_SHIFT:
            raise ValueError(f"compressed counts have the invalid character {character!r}")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        values.append(value + values[-2] if len(values) > 2 else value)
        value, shift = 0, 0
    if shift:
        raise ValueError("compressed counts end within a number")
    return values
