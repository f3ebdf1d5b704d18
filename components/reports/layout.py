"""Elements of a report, independent of HTML or Markdown: chapters of text, tables, charts, pictures and commands."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from components.runs.figures import markdown_table


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

    @property
    def markdown(self) -> str:
        """The table as Markdown."""
        return markdown_table(self.head, self.rows)


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
    """Chapter of a report: warnings and notes first, commands last."""

    id: str
    title: str
    notes: Sequence[str] = ()
    tables: Sequence[Table] = field(default_factory=list)
    charts: Sequence[Chart] = field(default_factory=list)
    galleries: Sequence[Gallery] = field(default_factory=list)
    commands: Sequence[str] = ()
    warnings: Sequence[str] = ()
