"""Files of finished runs: what is damaged is an error that names the file."""

import json
from pathlib import Path

import pytest

from components.config import Config
from components.params import save_config
from components.runs.files import read_run
from components.runs.journal import last_step
from model.errors import UserError

ENTRY = b'{"step": 1, "time": 0.5, "metrics": {"loss/total": 2.0}}\n'


def test_a_damaged_journal_is_told_and_a_line_in_writing_left_out(tmp_path: Path) -> None:
    journal = tmp_path / "log.jsonl"
    journal.write_bytes(ENTRY + ENTRY[:9])
    assert [entry.step for entry in read_run(tmp_path).journal] == [1]
    wrong = (
        ENTRY.replace(b"2.0", b'"two"'),
        ENTRY.replace(b"1", b"null", 1),
        ENTRY.replace(b"{", b"[1, {")[:-1] + b"]\n",
    )
    for line in (b"junk\n", b"[]\n", b"{}\n", b"null\n", b"\xff\n", *wrong):
        journal.write_bytes(ENTRY + line + ENTRY)
        with pytest.raises(UserError, match=r"log\.jsonl: each line must be a JSON object"):
            read_run(tmp_path)
        journal.write_bytes(ENTRY + line)
        with pytest.raises(UserError, match=r"log\.jsonl: each line must be a JSON object"):
            last_step(journal)


def test_other_damaged_files_are_told(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_bytes(ENTRY)
    config = Config()
    data = config.data.model_copy(update={"prepared_dir": tmp_path})
    save_config(config.model_copy(update={"data": data}), tmp_path / "config.yaml")
    evaluated = {"checkpoint": "a.pt", "images": 1, "detections": 0, "data_hash": "da"}
    for name, contents in {
        "evaluation": [{}, evaluated | {"bbox": {"AP": "high"}}, evaluated | {"data_hash": None}],
        "benchmark": [{"hardware": None}, {"steps": {"cases": [{}]}}, {"scaling": {}}],
        "environment": [{"versions": []}, {"hardware": {"cpu": "a"}}],
        "report": [{"val": {}}, {"val": {"per_class": {"cat": "many"}}}],
    }.items():
        path = tmp_path / f"{name}.json"
        for content in (b"", b"[]", b"3", b"\xff", *(json.dumps(content).encode() for content in contents)):
            path.write_bytes(content)
            with pytest.raises(UserError, match=rf"{name}\.json: .*; "):
                read_run(tmp_path)
        path.unlink()
    path = tmp_path / "plots" / "precision_recall.csv"
    path.parent.mkdir()
    for content in (
        b"recall,bbox_50\n0,high\n",
        b"recall,bbox_50\n0\n",
        b"a\n1\n",
        b"recall\n1,2\n",
        b"recall\n\xff\n",
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"precision_recall\.csv: must hold columns of numbers"):
            read_run(tmp_path)
