"""Options of an import, without the libraries that it needs."""

from dataclasses import dataclass
from typing import Literal

Boxes = Literal["keep", "mask", "skip"]


@dataclass(frozen=True)
class ImportOptions:
    """Options of `maskrcnn import`."""

    val_fraction: float | None = None  # None: the source's own split, or 0.2 where it has none
    seed: int = 0
    boxes: Boxes = "keep"  # a box without a mask stays one, becomes a rectangular mask, or is left out
    on_invalid: Literal["error", "skip"] = "error"
    link: bool = False  # link to the images instead of copying them
