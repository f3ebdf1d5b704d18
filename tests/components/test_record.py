"""The record stage: every record of a run is a file afterwards."""

from pathlib import Path

import pytest

from components import record
from components.config import Config, TrackingConfig
from components.runs.journal import Journal
from components.tracking.outbox import RunFile
from model.config import TrainConfig
from model.errors import UserError


def test_records_that_a_run_lacks_are_empty_files(tmp_path: Path):
    config = Config(train=TrainConfig(output_dir=tmp_path / "run"), tracking=TrackingConfig(enabled=False))
    with pytest.raises(UserError, match=r"run: must hold a run, but has no log\.jsonl"):
        record.run(config)
    journal = Journal(tmp_path / "run" / "log.jsonl")
    journal.append(1, {"loss/total": 2.0})
    log, system, mlflow_run = record.run(config).files
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"log.jsonl", "system.jsonl", "mlflow_run.json"}
    assert [entry.step for entry in Journal(log).read()] == [1]
    assert Journal(system).read() == []
    assert RunFile.read(mlflow_run) == RunFile()
