"""What a report consists of, before it is HTML or Markdown: chapters of text, tables, charts, pictures and commands."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Picture:
    """One image as a page shows it."""

    src: str  # data: URI
    width: int
    height: int
    caption: str
    alt: str


@dataclass(frozen=True)
class Cell:
    """A figure with a bar behind it: `share` of the column's full width, in the colour of a slot."""

    text: str
    share: float
    slot: int = 0

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Table:
    """Rows below a head; the first cell of a row names it."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    caption: str = ""
    folded: bool = False  # shown when asked for


@dataclass(frozen=True)
class Chart:
    """A drawn chart below its title."""

    title: str
    svg: str


@dataclass(frozen=True)
class Gallery:
    """Pictures of one kind."""

    title: str
    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Chapter:
    """One question that a report answers. `notes` stand above what follows, `commands` below it."""

    id: str
    title: str
    notes: Sequence[str] = ()
    tables: Sequence[Table] = field(default_factory=list)
    charts: Sequence[Chart] = field(default_factory=list)
    galleries: Sequence[Gallery] = field(default_factory=list)
    commands: Sequence[str] = ()


def markdown_table(table: Table) -> str:
    """A table as GitHub reads it; figures, which is all but the first column, stand to the right."""
    lines = [
        _row(table.head),
        "|" + "---|" + "---:|" * (len(table.head) - 1),
        *(_row([str(cell) for cell in row]) for row in table.rows),
    ]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
