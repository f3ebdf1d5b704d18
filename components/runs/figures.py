"""Figures as people read them, and Markdown tables of them; a dash stands for one that there is not."""

from collections.abc import Iterable, Sequence

DASH = "–"


def number(value: float | None, form: str = ".3f", unit: str = "") -> str:
    """A figure in a form of `format`, and its unit; minus as printers set it."""
    return DASH if value is None else f"{value:{form}} {unit}".rstrip().replace("-", "−")


def interval(ends: Sequence[float] | None, form: str = ".3f") -> str:
    """The ends of an interval: `0.670 to 0.770`."""
    return DASH if ends is None else " to ".join(number(end, form) for end in ends)


def duration(seconds: float | None) -> str:
    """Seconds as people say them: 48 s, 6 min 26 s, 3 h 37 min."""
    if seconds is None:
        return DASH
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Format a table as GitHub Markdown, with all but the first column right-aligned."""
    lines = [_row(head), "|---|" + "---:|" * (len(head) - 1), *map(_row, rows)]
    return "\n".join(lines)


def _row(cells: Iterable[object]) -> str:
    texts = (" ".join(str(cell).split()) for cell in cells)  # a line break would end the row
    return "| " + " | ".join(text.replace("|", "\\|").replace("<", "&lt;") for text in texts) + " |"
