"""COCO run-length encoding: column by column, runs of outside and inside in turn, outside first; plain or packed into text.

Source: pycocotools, common/maskApi.c (rleFrString).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def rle_runs(counts: str | Sequence[int]) -> NDArray[np.int64]:
    """The runs of an RLE's `counts`, compressed (text) or not.

    Raises:
        ValueError: if the text ends within a number or holds other characters, or a run is negative or not a whole number.
    """
    values = _unpack(counts) if isinstance(counts, str) else list(counts)
    if not all(isinstance(value, int) and value >= 0 for value in values):
        raise ValueError("runs must be whole numbers ≥ 0")
    return np.array(values, dtype=np.int64)


def runs_to_mask(runs: NDArray[np.int64], size: tuple[int, int]) -> NDArray[np.bool_]:
    """[height, width]; the runs must add up to height × width."""
    inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return inside.reshape(size[::-1]).T


def _unpack(text: str) -> list[int]:
    """Five bits a character, a sixth says that more follow; from the third run on, differences to the run before the last."""
    values: list[int] = []
    value, shift = 0, 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"compressed counts hold the character {character!r}")
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
