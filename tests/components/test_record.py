"""The record stage: every record of a run is a file afterwards, and MLflow has all of it."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import pytest

from components import record
from components.config import Config, TrackingConfig
from components.runs.journal import Journal
from components.tracking.run_file import RunFile
from components.tracking.tracker import Tracker, open_tracker
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


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for name in ("MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)


def preempted(tracker: Tracker) -> None:
    tracker.log_metrics({"loss/total": 2.0}, step=1)
    raise SystemExit(143)


def killed(tracker: Tracker) -> None:
    tracker.log_metrics({"loss/total": 2.0}, step=1)
    os._exit(9)


def finished(tracker: Tracker) -> None:
    tracker.log_metrics({"loss/total": 2.0}, step=1)


@pytest.mark.parametrize(
    ("end", "is_away", "status"),
    [
        (finished, True, "FINISHED"),
        (preempted, True, "KILLED"),
        (killed, True, "KILLED"),
        (killed, False, "KILLED"),  # before the line was sent
    ],
)
def test_what_mlflow_could_not_receive_is_sent(
    tmp_path: Path, fake_store: ModuleType, end: Callable[[Tracker], None], is_away: bool, status: str
) -> None:
    run_dir = tmp_path / "run"
    with fake_store.FakeServer() as server:
        tracking = TrackingConfig(uri=server.url, system_metrics_s=0)
        config = Config(train=TrainConfig(output_dir=run_dir), tracking=tracking)
        server.is_away = is_away
        pid = os.fork()
        if pid == 0:
            with suppress(BaseException), open_tracker(config, run_dir=run_dir) as tracker:
                end(tracker)
            os._exit(0)
        os.waitpid(pid, 0)
        assert [run["info"]["status"] for run in server.runs.values()] == ([] if is_away else ["RUNNING"])
        server.is_away = False
        record.run(config)
        assert [run["info"]["status"] for run in server.runs.values()] == [status]
        assert server.metrics == [("loss/total", 1)]
        file, asked = RunFile.read(run_dir / "mlflow_run.json"), len(server.asked)
        assert (file.sent_lines, file.waiting) == (1, [])
        record.run(config)
        assert len(server.asked) == asked, "a run with nothing left to send is left alone"
