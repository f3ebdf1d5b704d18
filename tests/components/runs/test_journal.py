"""Journal of a run: whole lines, whatever happens to the disk."""

import resource
from pathlib import Path

import pytest

from components.runs.journal import Journal


def test_a_line_that_cannot_be_written_whole_leaves_nothing(tmp_path: Path):
    journal = Journal(tmp_path / "log.jsonl")
    journal.append(1, {"loss/total": 3.0})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (journal.path.stat().st_size + 9, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            journal.append(2, {"loss/total": 2.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    journal.append(2, {"loss/total": 1.0})
    assert [(entry.step, entry.metrics["loss/total"]) for entry in journal.read()] == [(1, 3.0), (2, 1.0)]
