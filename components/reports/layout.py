"""Elements of a report, independent of HTML or Markdown: chapters of text, tables, charts, pictures and commands."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Picture:
    """One embedded image."""

    src: str  # data: URI
    width: int
    height: int
    caption: str
    alt: str


@dataclass(frozen=True)
class Cell:
    """Table cell with a bar behind its text: `share` of the column's width, in the colour of a slot."""

    text: str
    share: float
    slot: int = 0

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Table:
    """Table with a header; the first cell of a row is its name."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    caption: str = ""
    folded: bool = False  # collapsed until opened


@dataclass(frozen=True)
class Chart:
    """Chart with a title."""

    title: str
    svg: str


@dataclass(frozen=True)
class Gallery:
    """Pictures with a common title."""

    title: str
    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Chapter:
    """Chapter of a report: notes first, commands last."""

    id: str
    title: str
    notes: Sequence[str] = ()
    tables: Sequence[Table] = field(default_factory=list)
    charts: Sequence[Chart] = field(default_factory=list)
    galleries: Sequence[Gallery] = field(default_factory=list)
    commands: Sequence[str] = ()


def markdown_table(table: Table) -> str:
    """Format a table as GitHub Markdown, with all but the first column right-aligned."""
    lines = [
        _row(table.head),
        "|" + "---|" + "---:|" * (len(table.head) - 1),
        *(_row([str(cell) for cell in row]) for row in table.rows),
    ]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
