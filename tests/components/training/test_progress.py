"""Progress of a TrainJob, sent to a server that speaks Trainer's protocol by HTTPS: what arrives, what a server that
hangs or refuses does to a training, and that nothing is sent where none is named.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from types import ModuleType
from typing import Any

import pytest
from kubeflow_trainer_api.models import TrainerV1alpha1UpdateTrainJobStatusRequest

from components import download, prepare, train
from components.config import Config
from components.params import load_config
from components.training import loop, progress
from components.training.progress import Progress, Reporter, StatusServer, status_server
from model.engine.checkpoint import save_checkpoint

TINY = Path(__file__).parents[1] / "tiny.yaml"
PATH = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/maskrcnn/trainjobs/try-1/status"
Json = dict[str, Any]


@dataclass
class Server:
    """A status server as pkg/statusserver of Trainer 2.3 has it, with a token per job; it keeps what it takes."""

    url: str
    ca_file: Path
    token_file: Path
    token: str = "of-try-1"
    taken: list[Json] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)
    hangs: Event = field(default_factory=Event)
    freed: Event = field(default_factory=Event)

    def answer(self, path: str, headers: Any, body: bytes) -> tuple[int, Json]:
        if self.hangs.is_set():
            self.freed.wait(30)
        if path != PATH:
            return self._refuse(404, "Not found")
        if headers["Authorization"].split() != ["Bearer", self.token]:
            return self._refuse(403, "Forbidden")
        request = json.loads(body)
        known = TrainerV1alpha1UpdateTrainJobStatusRequest.from_dict(request)
        assert known is not None
        status, again = request["trainerStatus"], known.to_dict()["trainerStatus"]
        datetime.strptime(status["lastUpdatedTime"], "%Y-%m-%dT%H:%M:%SZ")
        # The limits of the CRD; the clients' types have none.
        limits = 0 <= status["progressPercentage"] <= 100 and len(status["metrics"]) <= 256
        limits &= all(0 < len(metric[key]) <= 64 for metric in status["metrics"] for key in ("name", "value"))
        if again.keys() != status.keys() or not limits or not is_int32(status.get("estimatedRemainingSeconds", 0)):
            return self._refuse(422, f"Invalid payload {request}")
        self.taken.append({**status, "metrics": {metric["name"]: metric["value"] for metric in status["metrics"]}})
        return 200, request

    def _refuse(self, code: int, message: str) -> tuple[int, Json]:
        self.refused.append(code)
        return code, {"kind": "Status", "status": "Failure", "message": message, "code": code}

    def client(self) -> StatusServer:
        return StatusServer(self.url, str(self.ca_file), str(self.token_file))


def is_int32(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 2**31


@pytest.fixture
def server(tls: ModuleType, tmp_path: Path) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            code, content = own.answer(self.path, self.headers, body)
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

    ca_file, context = tls.authority(tmp_path)
    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    tls.secure(listener, context)
    own = Server(f"https://127.0.0.1:{listener.server_address[1]}{PATH}", ca_file, tmp_path / "token")
    own.token_file.write_text("of-try-1\n")
    Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield own
    own.freed.set()
    listener.shutdown()
    listener.server_close()


@pytest.fixture
def named(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server, named in the environment as Trainer's plugin TrainJobStatus does."""
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", server.url)
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_CA_CERT", str(server.ca_file))
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_TOKEN", str(server.token_file))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # for the internet, not for servers of the cluster
    return server


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_PERIOD_S", 0.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("progress")
    download.run(tiny(root, "unused"))
    prepare.run(tiny(root, "unused"))
    return root


def tiny(root: Path, name: str, *overrides: str) -> Config:
    folders = (f"data.raw_dir={root}/raw", f"data.prepared_dir={root}/prepared", f"train.output_dir={root}/{name}")
    return load_config(TINY, [*folders, "train.lr_steps=[1]", "train.checkpoint_period=1", *overrides])


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_training_reports_its_way_from_nothing_to_the_end_or_to_where_it_breaks(
    data: Path, named: Server, often: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    train.run(tiny(data, "whole", "train.max_iters=2"), skip_test=True)
    first, *_, last = named.taken
    assert (first["progressPercentage"], first["metrics"]) == (0, {"step": "0", "max_iters": "2"})
    assert "estimatedRemainingSeconds" not in first, "nothing is known yet"
    assert (last["progressPercentage"], last["estimatedRemainingSeconds"]) == (100, 0)
    lines = [json.loads(line) for line in (data / "whole" / "log.jsonl").read_text().splitlines()]
    assert last["metrics"]["step"] == "2"
    assert last["metrics"]["loss/total"] == f"{lines[-1]['metrics']['loss/total']:.6g}"

    def fails_later(folder: Path, step: int, *state: Any, **options: Any) -> Path:
        if step > 2:
            raise RuntimeError("no space")
        return save_checkpoint(folder, step, *state, **options)

    named.taken.clear()
    monkeypatch.setattr(loop, "save_checkpoint", fails_later)
    with pytest.raises(RuntimeError, match="no space"):
        train.run(tiny(data, "whole", "train.max_iters=4"), skip_test=True)
    assert [state["progressPercentage"] for state in (named.taken[0], named.taken[-1])] == [50, 75]
    assert named.taken[-1]["estimatedRemainingSeconds"] > 0
    assert not named.refused


def test_a_server_that_hangs_costs_no_step_and_a_bounded_time_at_the_end(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "_LAST_S", 0.3)
    server.hangs.set()
    reporter, began = Reporter(server.client()), time.monotonic()
    for step in range(1000):
        reporter.report(Progress(step, 1000))
    assert time.monotonic() - began < 0.2
    reporter.close()
    assert 0.2 < time.monotonic() - began < 2


def test_a_server_that_refuses_costs_one_warning_until_it_takes_a_state_again(
    server: Server, often: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    server.token = "of-another-job"
    reporter = Reporter(server.client())
    for count in range(1, 4):
        reporter.report(Progress(count, 10))
        wait(lambda count=count: len(server.refused) == count)  # type: ignore[misc]
    (warning,) = caplog.messages
    assert warning.endswith("does not take the progress of this training, which goes on: 403 Forbidden: Forbidden")
    server.token_file.write_text("of-another-job")  # renewed, as the kubelet does each hour
    reporter.report(Progress(4, 10, remaining_s=2.1))
    reporter.close()
    assert (server.taken[0]["progressPercentage"], server.taken[0]["estimatedRemainingSeconds"]) == (40, 3)
    assert len(caplog.messages) == 1


def test_states_are_sent_seldom_the_last_at_once(server: Server) -> None:
    reporter = Reporter(server.client())
    reporter.report(Progress(1, 10))
    wait(lambda: len(server.taken) == 1)
    for step in range(2, 11):
        reporter.report(Progress(step, 10, is_complete=step == 10))
    time.sleep(0.05)
    assert len(server.taken) == 1
    began = time.monotonic()
    reporter.close()
    reporter.close()
    assert time.monotonic() - began < 2
    assert [state["metrics"]["step"] for state in server.taken] == ["1", "10"]


def test_values_that_the_api_server_would_refuse_are_left_out(server: Server) -> None:
    metrics = {"loss/total": float("nan"), "grad_norm": float("inf"), "x" * 65: 1.0, "loss/mask": 0.123456789}
    server.client().send(Progress(1, 3, metrics={**metrics, **{f"m{i}": float(i) for i in range(300)}}))
    (status,) = server.taken
    assert status["progressPercentage"] == 33
    assert len(status["metrics"]) == 256
    assert dict(list(status["metrics"].items())[:3]) == {"step": "1", "max_iters": "3", "loss/mask": "0.123457"}


def test_the_time_is_that_of_the_state_in_utc(server: Server) -> None:
    server.client().send(Progress(1, 3, at=datetime(2026, 2, 3, 4, 5, 6, 789, UTC)))
    assert server.taken[0]["lastUpdatedTime"] == "2026-02-03T04:05:06Z"


def test_a_server_of_another_authority_gets_no_token(
    server: Server, tls: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other, _ = tls.authority(tmp_path_factory.mktemp("other"))
    for ca_file in (str(other), None):
        with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
            StatusServer(server.url, ca_file, str(server.token_file)).send(Progress(1, 3))
    assert not server.taken
    assert not server.refused


def test_what_cannot_be_read_or_sent_is_one_warning(
    server: Server, often: None, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    for content, words in ((None, "No such file"), ("two\nlines", "Invalid header value"), ("é\udcff", "")):
        caplog.clear()
        server.token_file.unlink(missing_ok=True)
        if content is not None:
            server.token_file.write_bytes(content.encode(errors="surrogateescape"))
        reporter = Reporter(server.client())
        reporter.report(Progress(1, 3))
        reporter.close()
        (warning,) = caplog.messages
        assert words in warning
    assert not server.taken


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("URL", "http://manager:10443/status", "KUBEFLOW_TRAINER_SERVER_URL: must be a URL of HTTPS, got 'http:"),
        ("URL", "file:///etc/passwd", "KUBEFLOW_TRAINER_SERVER_URL: must be a URL of HTTPS"),
        ("URL", "https://manager:port/", "KUBEFLOW_TRAINER_SERVER_URL: must be a URL, got"),
        ("TOKEN", "", "KUBEFLOW_TRAINER_SERVER_TOKEN: must name the file of a token, got none"),
    ],
)
def test_a_server_that_is_named_wrongly_is_a_warning(
    named: Server,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    variable: str,
    value: str,
    words: str,
) -> None:
    assert status_server() is not None
    monkeypatch.setenv(f"KUBEFLOW_TRAINER_SERVER_{variable}", value)
    assert status_server() is None
    assert words in caplog.text


def test_without_a_server_in_the_environment_nothing_is_sent(
    data: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KUBEFLOW_TRAINER_SERVER_URL", raising=False)
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_TOKEN", str(server.token_file))
    assert status_server() is None
