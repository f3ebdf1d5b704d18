"""Tests skip for want of a program or package and of nothing else, and the last lines of a run count them by it."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent
SKIPS = ("skip", "skipif", "importorskip")

SOME_SKIP = """
import pytest

def test_that_runs():
    pass

@pytest.mark.parametrize("number", range(3))
def test_of_sails(number):
    pytest.skip("needs a sailmaker, of the harbour")

@pytest.mark.skipif(True, reason="needs a lighthouse")
def test_of_light():
    pass

def test_of_weather():
    pytest.skip("rain")
"""


def skips(path: Path) -> Iterator[ast.Call]:
    """Each call of a test file that may skip."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in SKIPS:
            yield node


def reason(call: ast.Call) -> str:
    """The constant start of a call's reason: the keyword, or what pytest.skip is given first."""
    first = call.args[:1] if isinstance(call.func, ast.Attribute) and call.func.attr == "skip" else []
    given = [keyword.value for keyword in call.keywords if keyword.arg == "reason"] + first
    texts = [node.value for value in given for node in ast.walk(value) if isinstance(node, ast.Constant)]
    return str(texts[0]) if texts else ""


def test_every_skip_names_what_it_needs() -> None:
    found = [(path, call) for path in TESTS.rglob("*.py") for call in skips(path)]
    assert len(found) > 10
    assert [f"{path}:{call.lineno}" for path, call in found if not reason(call).startswith("needs ")] == []


def test_the_last_lines_count_skipped_tests_by_what_they_need(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(SOME_SKIP)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "missing_programs", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(
        [*command, "--rootdir", str(tmp_path), "-c", os.devnull],
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        check=True,
    )
    told = done.stdout.partition("by what this machine lacks")[2].splitlines()
    assert told[1:4] == ["a sailmaker: 3", "a lighthouse: 1", "rain: 1"]
