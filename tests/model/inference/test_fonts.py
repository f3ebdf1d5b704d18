"""Fonts of class names: a character is drawn from a font that has it, and reported if there is none."""

from pathlib import Path

import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib.font_manager import FontProperties

from model.inference.fonts import faces_for, families_for, font_for, shortened


def make_font(path: Path, characters: str) -> None:
    """Write a font whose characters are squares of different sizes."""
    font = FontBuilder(1000, isTTF=True)
    names = [".notdef", *(f"u{ord(one):04X}" for one in characters)]
    font.setupGlyphOrder(names)
    font.setupCharacterMap({ord(one): name for one, name in zip(characters, names[1:], strict=True)})
    glyphs = {}
    for k, name in enumerate(names):
        pen, side = TTGlyphPen(None), 100 + 100 * k
        pen.moveTo((0, 0))
        for corner in ((side, 0), (side, side), (0, side)):
            pen.lineTo(corner)
        pen.closePath()
        glyphs[name] = pen.glyph()
    font.setupGlyf(glyphs)
    font.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    font.setupHorizontalHeader(ascent=900, descent=-100)
    font.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(path)


@pytest.fixture
def system_fonts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system with two fonts of its own and a damaged one."""
    make_font(tmp_path / "One Sign.ttf", "\u732b")
    make_font(tmp_path / "Three Signs.ttf", "\u732b\u72ac\u9b5a")
    (tmp_path / "damaged.ttf").write_bytes(b"no font")
    fonts = sorted(map(str, tmp_path.glob("*.ttf")))
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: fonts)
    faces_for.cache_clear()
    return tmp_path


def look(text: str, *names: str) -> bytes:
    mask = font_for(text, names or (text,), 40).getmask(text)
    return bytes(mask)


def test_each_script_has_a_font_that_has_its_letters(system_fonts: Path) -> None:
    pairs = [("\u0436", "\u0434"), ("\u03b1", "\u03b2"), ("\u00e9", "\u00f1"), ("\u0642", "\u0637")]  # in DejaVu Sans
    for one, other in (*pairs, ("\u732b", "\u72ac"), ("dog", "cat")):  # a missing one is the same box as another
        assert look(one, one, other) != look(other, one, other), (one, other)


def test_fewest_fonts_of_the_system_are_taken_and_matplotlib_knows_them(system_fonts: Path) -> None:
    names = ["\u732b", "\u72ac \u9b5a", "stra\u00dfe"]
    assert families_for(names) == ["DejaVu Sans", "Three Signs"]
    found = font_manager.findfont(FontProperties(family="Three Signs"), fallback_to_default=False)
    assert Path(found) == system_fonts / "Three Signs.ttf"
    assert families_for(["dog"]) == ["DejaVu Sans"]


def test_characters_in_no_font_are_reported_once(system_fonts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("\u732b", "\uac1c\u200d", "dog")
    for _ in range(3):
        assert look("\uac1c", *names)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: no font here has \uac1c of the class names")
    assert "fonts-noto-cjk" in line


def test_texts_lose_their_middle() -> None:
    assert [shortened("abcdefgh", most) for most in (9, 8, 7, 4, 3, 2)] == [
        *("abcdefgh", "abcdefgh", "abc\u2026fgh", "ab\u2026h", "a\u2026h", "a\u2026"),
    ]
