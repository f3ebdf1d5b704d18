"""Fonts for class names in drawings, whatever their script.

Pillow's own font has ASCII only. matplotlib brings DejaVu Sans: Latin, Greek, Cyrillic, Hebrew, Arabic and more. Other
scripts need a font of the system.
"""

import sys
import unicodedata
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import ImageFont

_SHOWN = 10  # characters in a warning
_REGULAR = ("Regular", "Book", "Normal", "Roman", "Medium")


@dataclass(frozen=True)
class Face:
    """A font file, and those of the characters asked for that it has."""

    path: str
    family: str
    characters: frozenset[str]


def shortened(text: str, most: int) -> str:
    """A text of at most `most` ≥ 2 characters; a longer one loses its middle."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[len(text) - (most - 1 - most // 2) :]}"


def font_for(text: str, names: Collection[str], size_px: int) -> Any:
    """Pillow's font for a text that is made of one of the names and ASCII."""
    needed = _needed(text)
    if not needed:
        return _load(None, size_px)
    best = max(faces_for(tuple(names)), key=lambda face: len(face.characters & needed), default=None)
    return _load(best.path if best else None, size_px)


def families_for(names: Collection[str]) -> list[str]:
    """Font families for matplotlib, which takes each character from the first that has it."""
    from matplotlib import font_manager

    faces = faces_for(tuple(names))
    for face in faces:  # matplotlib's list of fonts may be older than they are
        font_manager.fontManager.addfont(face.path)
    return list(dict.fromkeys(["DejaVu Sans", *(face.family for face in faces)]))


@lru_cache
def faces_for(names: tuple[str, ...]) -> tuple[Face, ...]:
    """Find the fewest fonts that have all characters of the names beyond ASCII; warn, once, if some are in none."""
    needed = frozenset[str]().union(*map(_needed, names))
    missing, faces, found = needed, list[Face](), list[Face]()
    for is_of_system in (False, True):
        if not missing:
            break
        faces += _installed(needed, is_of_system=is_of_system)
        while best := max(faces, key=lambda face: len(face.characters & missing), default=None):
            if not best.characters & missing:
                break
            found.append(best)
            missing -= best.characters
    if missing:
        shown = "".join(sorted(missing)[:_SHOWN]) + ("…" if len(missing) > _SHOWN else "")
        print(
            f"warning: no font here has {shown} of the class names, which drawings show as boxes; install one, such as "
            "Debian's fonts-noto-cjk for Chinese, Japanese and Korean, or fonts-noto-core for other scripts",
            file=sys.stderr,
        )
    return tuple(found)


def _needed(text: str) -> frozenset[str]:
    """Characters that Pillow's own font lacks and that leave a mark."""
    if text.isascii():
        return frozenset()
    return frozenset(
        one for one in text if not one.isascii() and one != "…" and unicodedata.category(one)[0] not in "CZ"
    )


def _installed(needed: frozenset[str], *, is_of_system: bool) -> Iterator[Face]:
    """Fonts that have some of the characters, upright sans-serif ones of normal weight first."""
    from matplotlib import font_manager, get_data_path
    from matplotlib.ft2font import FT2Font

    paths = [str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")]
    ranked = []
    for path in sorted(font_manager.findSystemFonts()) if is_of_system else paths:
        try:
            font = FT2Font(path)
            characters = frozenset(map(chr, font.get_charmap().keys() & set(map(ord, needed))))
        except (OSError, RuntimeError, ValueError, UnicodeError):  # a damaged file, or a format that is not FreeType's
            continue
        if font.scalable and characters:
            is_odd = font.style_name not in _REGULAR, "Sans" not in font.family_name, "Mono" in font.family_name
            ranked.append((is_odd, path, Face(path, font.family_name, characters)))
    yield from (face for _, _, face in sorted(ranked, key=lambda one: one[:2]))


@lru_cache
def _load(path: str | None, size_px: int) -> Any:
    return ImageFont.load_default(size_px) if path is None else ImageFont.truetype(path, size_px)
