"""Tracking against a real MLflow database; an outage is a port of this machine that nobody listens on."""

import csv
import json
import shutil
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from filelock import FileLock, Timeout
from mlflow import MlflowClient
from mlflow.entities import Run

from components.config import Config, TrackingConfig
from components.tracking import outbox
from components.tracking.client import TrackingError, locked, tracking_uri
from components.tracking.reason import reason
from components.tracking.tracker import end_run, open_tracker
from model.distributed import EndedByPeer
from model.errors import UserError


@pytest.fixture(scope="module")
def database(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{shutil.copy(empty_database, tmp_path_factory.mktemp('tracker'))}"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # MLflow makes an empty mlruns in the current directory
    names = ("MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID", "DVC_EXP_NAME")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.fixture
def closed_port() -> Iterator[str]:
    with socket.socket() as taken:  # bound but not listening: connections are refused, and nobody else can take it
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def config_for(uri: str, **tracking: object) -> Config:
    return Config(tracking=TrackingConfig.model_validate({"uri": uri, **tracking}))


def run_of(run_dir: Path, uri: str) -> Run:
    return MlflowClient(tracking_uri=uri).get_run(json.loads((run_dir / "mlflow_run.json").read_text())["run_id"])


def until(is_so: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.02)


def history(run: Run, uri: str, name: str) -> list[tuple[int, float]]:
    points = MlflowClient(tracking_uri=uri).get_metric_history(run.info.run_id, name)
    return sorted((point.step, point.value) for point in points)


def journal_of(run_dir: Path) -> list[tuple[int, dict[str, float | None]]]:
    lines = map(json.loads, (run_dir / "log.jsonl").read_text().splitlines())
    return [(line["step"], line["metrics"]) for line in lines]


def test_run_receives_parameters_tags_metrics_data_and_artifacts(tmp_path: Path, database: str) -> None:
    note = tmp_path / "note.txt"
    note.write_text("hello")
    with open_tracker(
        config_for(database), run_dir=tmp_path / "demo", data_hash="ab" * 32, tags={"seed": "3"}
    ) as tracker:
        tracker.log_metrics({"loss/mask": 0.5, "time/step_s": 2.0}, step=20)
        tracker.log_artifact(note, "plots")
    run = run_of(tmp_path / "demo", database)
    assert run.info.run_name == "demo"
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"loss/mask": 0.5, "time/step_s": 2.0}
    assert run.data.params["train.base_lr"] == "0.02"
    assert run.data.tags["seed"] == "3"
    assert run.data.tags["version.torch"]
    assert run.data.tags["data_hash/shapes"] == "ab" * 32
    assert run.inputs.dataset_inputs[0].dataset.name == "shapes"
    client = MlflowClient(tracking_uri=database)
    assert [file.path for file in client.list_artifacts(run.info.run_id, "plots")] == ["plots/note.txt"]


def test_next_stage_continues_the_same_run(tmp_path: Path, database: str) -> None:
    run_dir = tmp_path / "run"
    with open_tracker(config_for(database), run_dir=run_dir) as tracker:
        tracker.log_metrics({"loss/mask": 0.5}, step=1)
    first = run_of(run_dir, database)
    with open_tracker(config_for(database), run_dir=run_dir, metrics_csv=False) as tracker:
        tracker.log_metrics({"ap/bbox": 0.4, "aps/bbox": None}, step=1)
    second = run_of(run_dir, database)
    assert second.info.run_id == first.info.run_id
    assert second.data.metrics == {"loss/mask": 0.5, "ap/bbox": 0.4}
    assert (run_dir / "metrics.csv").read_text() == "step,loss/mask\n1,0.5\n"


def test_lines_logged_together_travel_together(tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    log_batch = MlflowClient.log_batch
    monkeypatch.setattr(
        MlflowClient, "log_batch", lambda self, *args, **kwargs: calls.append(1) or log_batch(self, *args, **kwargs)
    )
    monkeypatch.setattr(outbox, "_SEND_EVERY_S", 60.0)
    with open_tracker(config_for(database), run_dir=tmp_path / "run") as tracker:
        for step in range(1, 1002):
            tracker.log_metrics({"loss/a": step, "loss/b": -step}, step)
    assert len(calls) < 50, "not one for each step"
    run = run_of(tmp_path / "run", database)
    assert history(run, database, "loss/b") == [(step, -step) for step in range(1, 1002)]


def test_outage_costs_one_warning_and_no_number(
    tmp_path: Path, database: str, closed_port: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    note = tmp_path / "note.txt"
    note.write_text("hello")
    monkeypatch.setattr(outbox, "_RETRY_AFTER_S", 0.0)  # every line tries again
    with open_tracker(config_for(closed_port), run_dir=run_dir) as tracker:
        for step in (1, 2, 3):
            tracker.log_metrics({"loss/mask": step / 10}, step)
        tracker.log_artifact(note)
    assert sum("is unavailable" in record.message for record in caplog.records) == 1
    assert journal_of(run_dir) == [(step, {"loss/mask": step / 10}) for step in (1, 2, 3)]
    with open_tracker(config_for(database), run_dir=run_dir) as tracker:
        tracker.log_metrics({"ap/bbox": 0.4}, step=3)
    run = run_of(run_dir, database)
    assert history(run, database, "loss/mask") == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert run.data.metrics["ap/bbox"] == 0.4
    assert [file.path for file in MlflowClient(tracking_uri=database).list_artifacts(run.info.run_id)] == ["note.txt"]


def test_server_that_is_away_is_not_asked_at_every_line(
    tmp_path: Path, closed_port: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = []
    real = socket.create_connection
    monkeypatch.setattr(
        socket, "create_connection", lambda *args, **kwargs: attempts.append(args) or real(*args, **kwargs)
    )
    connect = socket.socket.connect
    monkeypatch.setattr(
        socket.socket, "connect", lambda self, address: attempts.append(address) or connect(self, address)
    )
    with open_tracker(config_for(closed_port), run_dir=tmp_path / "run") as tracker:
        after_opening = len(attempts)
        for step in range(50):
            tracker.log_metrics({"loss/mask": 0.5}, step)
        assert after_opening > 0
        assert len(attempts) == after_opening


def test_rewound_journal_equals_that_of_an_unbroken_run(tmp_path: Path, database: str) -> None:
    for name, stops in (("broken", [3, 5]), ("unbroken", [5])):
        start = 0
        for stop in stops:
            with open_tracker(config_for(database), run_dir=tmp_path / name) as tracker:
                tracker.rewind(start)
                for step in range(start + 1, stop + 1):
                    tracker.log_metrics({"loss/mask": step / 10}, step)
            start = 2  # the last checkpoint before the break
    assert journal_of(tmp_path / "broken") == journal_of(tmp_path / "unbroken")
    run = run_of(tmp_path / "broken", database)
    assert [step for step, _ in history(run, database, "loss/mask")] == [1, 2, 3, 3, 4, 5]  # one was taken twice
    assert json.loads((tmp_path / "broken" / "mlflow_run.json").read_text())["sent_lines"] == 5


def test_line_torn_by_a_kill_is_dropped(tmp_path: Path) -> None:
    journal = tmp_path / "run" / "log.jsonl"
    journal.parent.mkdir()
    journal.write_text('{"step": 1, "time": 1.0, "metrics": {"a": 1.0}}\n{"step": 2, "ti')
    with open_tracker(config_for("", enabled=False), run_dir=journal.parent) as tracker:
        tracker.log_metrics({"a": 2.0}, step=2)
    assert journal_of(journal.parent) == [(1, {"a": 1.0}), (2, {"a": 2.0})]


def test_disabled_tracking_keeps_the_journal_alone(tmp_path: Path) -> None:
    with open_tracker(config_for("", enabled=False), run_dir=tmp_path) as tracker:
        tracker.log_metrics({"loss/mask": 0.5}, step=1)
        tracker.log_metrics({"loss/mask": float("nan"), "ap/bbox": 0.1}, step=2)
    assert journal_of(tmp_path) == [(1, {"loss/mask": 0.5}), (2, {"loss/mask": None, "ap/bbox": 0.1})]
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {"step": "1", "ap/bbox": "", "loss/mask": "0.5"},
        {"step": "2", "ap/bbox": "0.1", "loss/mask": ""},
    ]
    assert not (tmp_path / "mlflow_run.json").exists()


def test_environment_names_the_run(tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = MlflowClient(tracking_uri=database)
    run_id = client.create_run(client.create_experiment("outside")).info.run_id
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    with open_tracker(config_for("sqlite:///not_used.db"), run_dir=tmp_path / "run") as tracker:
        tracker.log_metrics({"loss/mask": 0.5}, step=1)
    assert client.get_run(run_id).data.metrics == {"loss/mask": 0.5}
    assert client.get_run(run_id).data.params["tracking.experiment"] == "outside"
    assert not Path("not_used.db").exists()


def test_a_server_is_named_without_a_slash_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(config_for("http://server:5000/").tracking) == "http://server:5000"
    assert tracking_uri(config_for("file:///").tracking) == "file:///"


def test_environment_names_the_experiment(tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = MlflowClient(tracking_uri=database)
    config, run_dir = config_for(database, experiment="of the file"), tmp_path / "run"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "team")
    with open_tracker(config, run_dir=run_dir):
        pass
    first = run_of(run_dir, database)
    team = client.get_experiment_by_name("team").experiment_id
    assert (first.info.experiment_id, first.data.params["tracking.experiment"]) == (team, "team")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", team)
    for changed in ({}, {"MLFLOW_EXPERIMENT_NAME": ""}, {"MLFLOW_RUN_ID": first.info.run_id}):
        for name, value in changed.items():
            monkeypatch.setenv(name, value)
        with open_tracker(config, run_dir=run_dir):
            pass
        assert run_of(run_dir, database).info.run_id == first.info.run_id, changed  # the same under another name
    monkeypatch.delenv("MLFLOW_RUN_ID")
    with open_tracker(config, run_dir=tmp_path / "by id"):
        pass
    assert run_of(tmp_path / "by id", database).data.params["tracking.experiment"] == "team"
    monkeypatch.setenv("MLFLOW_RUN_ID", first.info.run_id)
    other = client.create_experiment("other")
    for experiment_id, name, message in (
        ("987", "", "MLFLOW_EXPERIMENT_ID: must be an experiment at .*, got 987"),
        ("no number", "", "MLFLOW_EXPERIMENT_ID: must be an experiment"),
        (other, "team", "MLFLOW_EXPERIMENT_NAME and MLFLOW_EXPERIMENT_ID must name one .* 'team' and .* is 'other'"),
        (
            other,
            "",
            "MLFLOW_RUN_ID: must be a run of the experiment 'other', as MLFLOW_EXPERIMENT_ID says, .* of 'team'",
        ),
        (
            "",
            "new",
            "MLFLOW_RUN_ID: must be a run of the experiment 'new', as MLFLOW_EXPERIMENT_NAME says, .* of 'team'",
        ),
    ):
        monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", experiment_id)
        monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", name)
        with pytest.raises(TrackingError, match=message), open_tracker(config, run_dir=run_dir):
            pass
    assert client.get_experiment_by_name("of the file") is None


def test_dvc_experiment_that_only_evaluates_has_its_own_run(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"

    def stage(experiment: str, metrics: dict[str, float | None], error: type[BaseException] | None = None) -> Run:
        monkeypatch.setenv("DVC_EXP_NAME", experiment)
        with suppress(KeyboardInterrupt), open_tracker(config_for(database), run_dir=run_dir) as tracker:
            tracker.log_metrics(metrics, step=1)
            if error:
                raise error
        return run_of(run_dir, database)

    base = stage("", {"loss/mask": 0.5, "ap/bbox": 0.4})
    first = stage("sober-otter", {"ap/bbox": 0.3})
    assert first.info.run_id != base.info.run_id
    assert (first.info.status, first.data.metrics) == ("FINISHED", {"loss/mask": 0.5, "ap/bbox": 0.3})
    assert first.data.tags["dvc.exp_name"] == "sober-otter"
    kept = MlflowClient(tracking_uri=database).get_run(base.info.run_id)
    assert kept.to_dictionary() == base.to_dictionary()
    assert stage("sober-otter", {"time/step_s": 1.0}).info.run_id == first.info.run_id
    assert stage("", {"ap/bbox": 0.2}).info.run_id == first.info.run_id, "once applied, it goes on by hand"
    second = stage("late-mink", {"ap/bbox": 0.1}, KeyboardInterrupt)
    assert second.info.run_id not in (base.info.run_id, first.info.run_id)
    assert stage("mad-wasp", {"ap/bbox": 0.1}).info.run_id == second.info.run_id, "it had not ended"


def test_database_of_another_mlflow_version_is_left_as_it_is(tmp_path: Path, empty_database: Path) -> None:
    path = Path(shutil.copy(empty_database, tmp_path))
    for schema, message in (
        ("0584bdc529eb", "of an earlier version .*: mlflow db upgrade sqlite:///"),  # MLflow 2.22
        ("ffffffffffff", "of a later version .*: pip install --upgrade mlflow"),
    ):
        with sqlite3.connect(path) as connection:
            connection.execute("update alembic_version set version_num = ?", [schema])
            connection.execute("drop table if exists logged_models")  # MLflow migrates if a table is missing
        before = path.read_bytes()
        with (
            pytest.raises(TrackingError, match=f"tracking.uri: the database .*mlflow.db must have .*{message}"),
            open_tracker(config_for(f"sqlite:///{path}"), run_dir=tmp_path / "run"),
        ):
            pass
        assert path.read_bytes() == before


def test_run_that_was_moved_aside_is_named_like_its_folder(tmp_path: Path, database: str) -> None:
    for moved in ("", "run.old-1", "run.old-2"):
        if moved:
            (tmp_path / "run").rename(tmp_path / moved)
        with open_tracker(config_for(database), run_dir=tmp_path / "run") as tracker:
            if moved:
                tracker.log_replaced(tmp_path / moved)
                tracker.log_replaced(tmp_path / moved)  # at least once
    names = {folder.name: run_of(folder, database).info.run_name for folder in tmp_path.glob("run*")}
    assert names == {"run": "run", "run.old-1": "run.old-1", "run.old-2": "run.old-2"}


def test_copy_of_a_folder_has_a_run_of_its_own_once_it_is_trained(tmp_path: Path, database: str) -> None:
    def stage(run_dir: Path, step: int, data_hash: str = "") -> str:
        with open_tracker(config_for(database), run_dir=run_dir, data_hash=data_hash) as tracker:
            tracker.log_metrics({"loss/mask": step / 10}, step)
        return run_of(run_dir, database).info.run_id

    original, moved, copy = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    run_id = stage(original, 1, "ab")
    original.rename(moved)
    assert stage(moved, 2, "ab") == run_id
    shutil.copytree(moved, copy)
    assert stage(copy, 2) == run_id, "an evaluation is of the same model"
    own = stage(copy, 3, "ab")
    assert own != run_id
    assert stage(copy, 4, "ab") == own
    (tmp_path / "link").symlink_to(moved)
    assert stage(tmp_path / "link", 5, "ab") == run_id
    run = run_of(copy, database)
    assert (run.info.run_name, len(history(run, database, "loss/mask"))) == ("c", 5)
    assert [step for step, _ in history(run_of(moved, database), database, "loss/mask")] == [1, 2, 2, 5]


def test_lock_is_beside_a_local_database_only(tmp_path: Path) -> None:
    with locked(f"sqlite:///{tmp_path}/new/mlflow.db"), pytest.raises(Timeout):
        FileLock(tmp_path / "new" / "mlflow.db.lock", timeout=0).acquire()
    before = sorted(tmp_path.rglob("*"))
    with locked("http://127.0.0.1:9"):
        assert sorted(tmp_path.rglob("*")) == before


def test_web_page_in_an_error_is_replaced_by_its_title() -> None:
    page = "API request failed. Response body: '<!doctype html>\n<html lang=en>\n<title>404 Not\nFound</title><p>…</p>'"
    assert reason(ValueError(page)) == "API request failed. Response body: ' a web page, '404 Not Found'"
    assert len(reason(ValueError("x" * 10_000))) < 600


def test_unknown_run_in_the_environment_is_an_error(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    with (
        pytest.raises(TrackingError, match="MLFLOW_RUN_ID"),
        open_tracker(config_for(database), run_dir=tmp_path / "run"),
    ):
        pass


def test_deleted_run_is_replaced_by_one_that_receives_everything(tmp_path: Path, database: str) -> None:
    run_dir = tmp_path / "run"
    with open_tracker(config_for(database), run_dir=run_dir) as tracker:
        tracker.log_metrics({"loss/mask": 0.5}, step=1)
    deleted = run_of(run_dir, database).info.run_id
    MlflowClient(tracking_uri=database).delete_run(deleted)
    with open_tracker(config_for(database), run_dir=run_dir) as tracker:
        tracker.log_metrics({"loss/mask": 0.4}, step=2)
    run = run_of(run_dir, database)
    assert run.info.run_id != deleted
    assert history(run, database, "loss/mask") == [(1, 0.5), (2, 0.4)]


@pytest.mark.parametrize("last", ["line", "artifact", "nothing"])
def test_run_that_is_deleted_during_a_stage_is_replaced_by_one_that_receives_everything(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, last: str
) -> None:
    monkeypatch.setattr(outbox, "_SEND_EVERY_S", 0.02)
    run_dir, note, client = tmp_path / "run", tmp_path / "note.txt", MlflowClient(tracking_uri=database)
    note.write_text("hello")
    with open_tracker(config_for(database), run_dir=run_dir, data_hash="ab" * 32) as tracker:
        tracker.log_metrics({"loss/mask": 0.5}, step=1)
        tracker.log_artifact(note)
        deleted = run_of(run_dir, database).info.run_id
        until(
            lambda: (
                client.list_artifacts(deleted) and not json.loads((run_dir / "mlflow_run.json").read_text())["waiting"]
            )
        )
        client.delete_run(deleted)
        if last == "line":
            tracker.log_metrics({"loss/mask": 0.4}, step=2)
        elif last == "artifact":
            tracker.log_artifact(note, "late")
    run = run_of(run_dir, database)
    assert run.info.run_id != deleted
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"loss/mask": 0.4 if last == "line" else 0.5}
    assert run.data.params["train.base_lr"] == "0.02"
    assert run.data.tags["version.torch"]
    assert len(run.inputs.dataset_inputs) == 1
    files = [file.path for file in client.list_artifacts(run.info.run_id)]
    assert files == ["late", "note.txt"] if last == "artifact" else ["note.txt"]
    assert "unavailable" not in caplog.text
    assert f"the run {deleted} was deleted; the run {run.info.run_id} gets everything" in caplog.text


def test_a_metric_that_mlflow_refuses_holds_up_no_other(
    tmp_path: Path, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    with open_tracker(config_for(database), run_dir=tmp_path / "run") as tracker:
        tracker.log_metrics({"loss/mask": 0.5, "class_ap/.": 0.1, "loss/box": 0.25}, step=1)
    run = run_of(tmp_path / "run", database)
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"loss/mask": 0.5, "loss/box": 0.25})
    assert "refuses the metric 'class_ap/.'" in caplog.text
    assert "unavailable" not in caplog.text


def test_changed_parameter_becomes_a_tag(tmp_path: Path, database: str) -> None:
    longer = config_for(database).model_copy(update={"train": Config().train.model_copy(update={"max_iters": 7})})
    for config in (config_for(database), longer):
        with open_tracker(config, run_dir=tmp_path / "run"):
            pass
    run = run_of(tmp_path / "run", database)
    assert run.data.params["train.max_iters"] == "90000"
    assert run.data.tags["changed/train.max_iters"] == "7"


@pytest.mark.parametrize("uri", ["ftp://host/place", "./mlruns"])
def test_uri_that_mlflow_refuses_is_an_error_that_says_what_to_use(tmp_path: Path, uri: str) -> None:
    with pytest.raises(TrackingError, match="sqlite:///FILE"), open_tracker(config_for(uri), run_dir=tmp_path / "run"):
        pass


def test_deleted_experiment_is_an_error_that_says_how_to_restore_it(tmp_path: Path, database: str) -> None:
    client = MlflowClient(tracking_uri=database)
    client.delete_experiment(client.create_experiment("gone"))
    config = config_for(database, experiment="gone")
    with pytest.raises(TrackingError, match="experiments restore"), open_tracker(config, run_dir=tmp_path / "run"):
        pass


def test_password_is_neither_written_to_disk_nor_said(
    tmp_path: Path, closed_port: str, caplog: pytest.LogCaptureFixture
) -> None:
    uri = closed_port.replace("http://", "http://me:pa55word@")
    with open_tracker(config_for(uri), run_dir=tmp_path) as tracker:
        tracker.log_metrics({"loss/mask": 0.5}, step=1)
    state = (tmp_path / "mlflow_run.json").read_text()
    assert "***@127.0.0.1" in json.loads(state)["uri"]
    assert "pa55word" not in state
    assert "me:***@127.0.0.1" in caplog.text
    assert "pa55word" not in caplog.text


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError(), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(143), "KILLED"),
        (EndedByPeer(1), "FAILED"),  # another process of the job reports its own error
    ],
)
def test_status_says_how_the_stage_ended(tmp_path: Path, database: str, error: BaseException, status: str) -> None:
    @contextmanager
    def stage() -> Iterator[None]:
        with open_tracker(config_for(database), run_dir=tmp_path / "run"):
            yield

    with pytest.raises(type(error)), stage():
        raise error
    assert run_of(tmp_path / "run", database).info.status == status


def test_a_damaged_state_of_a_run_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "mlflow_run.json"
    for content in (b"", b"[]", b'{"nobody": 1}', b"\xff", b'{"sent_lines": "x"}', b'{"waiting": [{"kind": "tags"}]}'):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"mlflow_run\.json: .*; delete it to start"):
            end_run(Config(), run_dir=tmp_path, status="FINISHED")
