"""Files of finished runs: what is damaged is an error that names the file."""

from pathlib import Path

import pytest

from components.runs.files import read_run
from model.errors import UserError

ENTRY = b'{"step": 1, "time": 0.5, "metrics": {"loss/total": 2.0}}\n'


def test_a_damaged_journal_is_told_and_a_line_in_writing_left_out(tmp_path: Path) -> None:
    journal = tmp_path / "log.jsonl"
    journal.write_bytes(ENTRY + ENTRY[:9])
    assert [entry.step for entry in read_run(tmp_path).journal] == [1]
    for line in (b"junk\n", b"[]\n", b"{}\n", b"null\n", b"\xff\n"):
        journal.write_bytes(ENTRY + line + ENTRY)
        with pytest.raises(UserError, match=r"log\.jsonl: each line must be a JSON object"):
            read_run(tmp_path)


def test_other_damaged_files_are_told(tmp_path: Path) -> None:
    for name in ("evaluation", "benchmark", "environment"):
        (tmp_path / "log.jsonl").write_bytes(ENTRY)
        path = tmp_path / f"{name}.json"
        for content in (b"", b"[]", b"\xff"):
            path.write_bytes(content)
            with pytest.raises(UserError, match=rf"{name}\.json: "):
                read_run(tmp_path)
        path.unlink()
