"""Options and destination of an import, without the libraries that it needs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from model.errors import UserError

Boxes = Literal["keep", "mask", "skip"]


@dataclass(frozen=True)
class ImportOptions:
    """Options of `maskrcnn import`."""

    val_fraction: float | None = None  # None: the source's own split, or 0.2 where it has none
    seed: int = 0
    boxes: Boxes = "keep"  # a box without a mask stays one, becomes a rectangular mask, or is left out
    on_invalid: Literal["error", "skip"] = "error"
    link: bool = False  # link to the images instead of copying them


def require_free(dst: Path) -> None:
    """Refuse a destination that exists.

    Raises:
        UserError: if it does.
    """
    if dst.exists() or dst.is_symlink():
        raise UserError(f"{dst}: must not exist; name a new folder, or move this one away")
