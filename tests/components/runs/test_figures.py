"""Figures as people read them."""

import pytest

from components.runs.figures import duration, interval, markdown_table, number
from components.studies.tables import markdown_scores


def test_a_figure_has_its_form_and_unit() -> None:
    assert [number(0.3768), number(1234.5, ".0f", "MiB"), number(0.5, ".1%")] == ["0.377", "1234 MiB", "50.0%"]
    assert [number(0.0123, "+.4f"), number(-0.0123, "+.2f")] == ["+0.0123", "−0.01"]
    assert interval((0.67, 0.77)) == "0.670 to 0.770"
    assert interval([-0.01, 0.02], "+.2f") == "−0.01 to +0.02"


def test_a_dash_stands_for_what_there_is_not() -> None:
    assert number(None, ".0f", "MiB") == interval(None) == duration(None) == "–"


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "–"), (59.6, "1 min 0 s"), (48, "48 s"), (386, "6 min 26 s"), (13020, "3 h 37 min")]
)
def test_durations_are_said_as_people_say_them(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_every_markdown_table_is_made_alike_and_bars_in_cells_do_not_end_them() -> None:
    assert markdown_table(["", "a|b"], [["x", 1], ["y", "|"]]) == "|  | a\\|b |\n|---|---:|\n| x | 1 |\n| y | \\| |"
    assert markdown_table(["a\nb"], [["<b>"]]).splitlines() == ["| a b |", "|---|", "| &lt;b> |"]
    score = {"values": [0.5], "mean": 0.5, "deviation": None, "interval": None}
    lines = markdown_scores({"seeds": [1], "confidence": 0.95, "bbox": {"AP": score}}).splitlines()
    assert lines[1:] == ["|---|---:|---:|---:|---:|", "| final AP box | 0.500 | 0.500 | – | – |"]
