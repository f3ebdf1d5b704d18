"""Artifacts behind stores that are slow, fail, refuse or never answer; the wire is real, the server behind it is not
MLflow's.
"""

import json
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from components.config import Config, TrackingConfig
from components.runs.journal import Entry, Journal
from components.tracking import outbox
from components.tracking.tracker import open_tracker


@pytest.fixture(autouse=True)
def _quick_and_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT", "1")
    monkeypatch.setattr(outbox, "_SEND_EVERY_S", 0.05)


def stage(url: str, run_dir: Path, *artifacts: Path) -> None:
    """A stage of a run that has artifacts, or only opens its tracker."""
    config = Config(tracking=TrackingConfig(uri=url, system_metrics_s=0))
    with open_tracker(config, run_dir=run_dir) as tracker:
        for path in artifacts:
            tracker.log_artifact(path)


def files(folder: Path, *names: str) -> list[Path]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return [folder / name for name in names]


def waiting(run_dir: Path) -> list[str]:
    """Names of the artifacts that are not stored yet."""
    items = json.loads((run_dir / "mlflow_run.json").read_text())["waiting"]
    return [Path(item["arguments"]["path"]).name for item in items if item["kind"] == "artifact"]


def test_a_slow_store_gets_each_file_once_and_nothing_waits_for_it(
    tmp_path: Path, fake_store: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT", "60")  # other answers have 1 s
    monkeypatch.setattr(outbox, "_PATIENCE_S", 0.2)
    names = ["plots/a.png", "plots/deep/b.png"]
    files(tmp_path, *names)
    with fake_store.FakeServer(lambda _: time.sleep(1.2) or 200) as server:
        config = Config(tracking=TrackingConfig(uri=server.url, system_metrics_s=0))
        with open_tracker(config, run_dir=tmp_path / "run") as tracker:
            tracker.log_artifact(tmp_path / "plots", "plots")
            while names[0] not in server.asked:
                time.sleep(0.01)
            asked = len(server.asked)
            tracker.log_metrics({"loss/mask": 0.5}, step=1)
            while "runs/log-batch" not in server.asked[asked:]:
                assert not server.stored, "metrics must not wait for the file"
                time.sleep(0.01)
        assert server.stored == {name: name.encode() for name in names}
        assert [name for name in server.asked if name in names] == names
        assert server.asked.index("runs/update FINISHED") < server.asked.index(names[1])
        assert [run["info"]["status"] for run in server.runs.values()] == ["FINISHED"]
    assert "still sending" in caplog.text
    assert "did not store" not in caplog.text


def test_a_file_that_a_store_does_not_take_is_tried_three_times_over_all_stages(
    tmp_path: Path, fake_store: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    # Statuses and tries; 0 is no answer at all.
    for status, tries in ((500, 3), (0, 3), (413, 1)):
        folder = tmp_path / str(status)
        bad, good = files(folder, "bad.pt", "good.txt")
        caplog.clear()
        with fake_store.FakeServer(lambda path, status=status: 200 if path == "good.txt" else status) as server:
            for number in range(1, tries + 2):
                stage(server.url, folder / "run", *([bad, good] if number == 1 else []))
                assert server.asked.count("bad.pt") == min(number, tries), status
                assert [run["info"]["status"] for run in server.runs.values()] == ["FINISHED"]
            assert server.stored == {"good.txt": b"good.txt"}
            assert waiting(folder / "run") == []
        assert f"mlflow artifacts log-artifact --run-id {next(iter(server.runs))} --local-file {bad}" in caplog.text
        assert sum(str(bad) in record.getMessage() for record in caplog.records) == tries


def test_an_outage_of_the_whole_server_costs_an_artifact_no_try(tmp_path: Path, fake_store: ModuleType) -> None:
    def fails(_: str) -> int:
        server.is_away = True
        return 502

    note = files(tmp_path, "note.txt")
    with fake_store.FakeServer(fails) as server:
        for _ in range(4):
            server.is_away = False
            stage(server.url, tmp_path / "run", *note)
            note = []
            assert "note.txt" in waiting(tmp_path / "run")
        server.is_away, server.put = False, lambda _: 200
        stage(server.url, tmp_path / "run")
        assert server.stored == {"note.txt": b"note.txt"}


def test_a_server_whose_answer_never_ends_holds_up_no_stage(
    tmp_path: Path, fake_store: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(outbox, "_ANSWERS_WITHIN_S", 0.5)
    run_dir, drips_from = tmp_path / "run", ("the first contact", "the second step", "the end")
    with fake_store.FakeServer() as server:
        config = Config(tracking=TrackingConfig(uri=server.url, system_metrics_s=0))
        for step, begin in enumerate(drips_from, start=1):
            caplog.clear()
            server.drips = begin == "the first contact"
            began_s = time.monotonic()
            with open_tracker(config, run_dir=run_dir) as tracker:
                tracker.log_metrics({"loss/mask": 0.5}, step=2 * step)
                if begin == "the second step":
                    server.drips = True
                tracker.rewind(2 * step - 1)
                tracker.log_metrics({"loss/mask": 0.25}, step=2 * step)
                server.drips |= begin == "the end"
            assert time.monotonic() - began_s < 5, begin
            assert "no answer within 0.5 s" in caplog.text, begin
        server.drips = False
        stage(server.url, run_dir)
        assert sorted(set(server.metrics)) == [("loss/mask", step) for step in (2, 4, 6)]
        assert [run["info"]["status"] for run in server.runs.values()] == ["FINISHED"]
        assert waiting(run_dir) == []


class HeldServer:
    """A server that takes lines only when it is let go."""

    uri = experiment = "held"

    def __init__(self) -> None:
        self.holds, self.goes, self.got = threading.Event(), threading.Event(), list[int]()

    def connect(self, run_ids: list[str], experiment: str) -> str:
        return "run"

    def send(self, kind: str, arguments: dict[str, Any]) -> None: ...

    def send_metrics(self, entries: list[Entry]) -> None:
        self.holds.set()
        assert self.goes.wait(60)
        self.got += [entry.step for entry in entries]

    def answers(self) -> bool:
        return True

    def refuses(self, error: Exception) -> bool:
        return False


def test_a_journal_that_is_cut_while_its_lines_are_sent_arrives_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, journal, run_file = HeldServer(), Journal(tmp_path / "log.jsonl"), tmp_path / "mlflow_run.json"
    box = outbox.Outbox(journal, Journal(tmp_path / "system.jsonl"), run_file, server)
    for step in (1, 2, 3):
        box.log(step, {"loss/mask": float(step)})
    opening = threading.Thread(target=box.open)
    opening.start()
    assert server.holds.wait(60)
    box.rewind(1)
    box.log(2, {"loss/mask": 0.5})
    server.goes.set()
    opening.join(60)
    assert box.close("FINISHED")
    assert server.got == [1, 2, 3, 1, 2]  # a step that is sent twice is one point
    assert json.loads(run_file.read_text())["sent_lines"] == 2

    server = HeldServer()
    late = outbox.Outbox(journal, Journal(tmp_path / "system.jsonl"), run_file, server)
    monkeypatch.setattr(outbox, "_ANSWERS_WITHIN_S", 0.1)
    late.log(3, {"loss/mask": 0.25})
    late.open()
    assert not late.close("FINISHED")
    run_file.write_text("of the next stage")
    server.goes.set()
    late._thread.join(60)
    assert run_file.read_text() == "of the next stage"


def test_a_part_of_a_large_file_has_the_same_limit(
    tmp_path: Path, fake_store: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE", "1")
    monkeypatch.setenv("MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD", "true")
    with fake_store.FakeServer(lambda _: 0) as server:
        began = time.monotonic()
        stage(server.url, tmp_path / "run", *files(tmp_path, "large.pt"))
        assert time.monotonic() - began < 10
        assert server.asked.count("part") == 1
        assert waiting(tmp_path / "run") == ["large.pt"]
        server.put = lambda _: 200
        stage(server.url, tmp_path / "run")
        assert server.stored == {"part": b"large.pt"}


def test_one_server_under_several_urls_has_one_run_of_a_folder(tmp_path: Path, fake_store: ModuleType) -> None:
    with fake_store.FakeServer() as server, fake_store.FakeServer() as other:
        port = server.port
        for url in (f"http://127.0.0.1:{port}", f"http://127.0.0.1:{port}/", f"http://localhost:{port}//"):
            stage(url, tmp_path / "run")
            assert len(server.runs) == 1, url
        for url in (other.url, server.url, other.url):  # the other does not have it, and starts its own
            stage(url, tmp_path / "run")
        assert (len(server.runs), len(other.runs)) == (1, 1)


def test_a_store_of_s3_has_the_same_limit_and_gets_a_file_twice_in_a_try(
    tmp_path: Path, fake_store: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("boto3", reason="needs boto3, which MLflow uses for s3://")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "of a test")
    monkeypatch.delenv("AWS_MAX_ATTEMPTS", raising=False)
    with fake_store.FakeServer(lambda _: 0) as server:
        monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", server.url)
        server.artifact_root = "s3://bucket"
        began = time.monotonic()
        stage(server.url, tmp_path / "run", *files(tmp_path, "large.pt"))
        assert time.monotonic() - began < 10
        assert server.asked.count("large.pt") == 2
        assert waiting(tmp_path / "run") == ["large.pt"]
        server.put = lambda _: 200
        stage(server.url, tmp_path / "run")
        assert list(server.stored) == ["large.pt"]
