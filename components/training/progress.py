"""Progress of a TrainJob: percentage, remaining time and metrics, sent to the status server of Kubeflow Trainer.

With its feature gate TrainJobStatus, Trainer 2.3 or later names the server to training pods by three variables: its
URL, the file of its CA, and the file of a token; the kubelet renews both files while training runs. Without the
variables, nothing is sent. The job has the state: kubectl get trainjob NAME -o jsonpath={.status.trainerStatus}.

A thread sends the latest state now and then, so no step waits for the server; states in between are left out. A server
that does not answer or refuses costs one warning, and a few seconds at the end of training.

Source: KEP-2779 and pkg/statusserver of github.com/kubeflow/trainer v2.3.0.
"""

import json
import logging
import math
import os
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.client import HTTPException, HTTPSConnection
from pathlib import Path
from urllib.parse import urlsplit

from components.tracking.tracker import Tracker
from components.training.loop import Training

URL, CA_FILE, TOKEN_FILE = (f"KUBEFLOW_TRAINER_SERVER_{name}" for name in ("URL", "CA_CERT", "TOKEN"))
_PERIOD_S = 10.0  # between two states; the server passes 5 a second to the API server, those of all jobs together
_TIMEOUT_S = 5.0  # for each wait of a connection
_LAST_S = 8.0  # for the last state, at the end
_MAX_METRICS = 256  # in a state; the API server refuses one with more
_MAX_CHARACTERS = 64  # in a name
_MAX_ANSWER = 2**16  # bytes
_log = logging.getLogger(__name__)


class StatusError(Exception):
    """The status server did not take a state."""


@dataclass(frozen=True)
class Progress:
    """State of a training."""

    step: int
    max_iters: int
    is_complete: bool = False
    remaining_s: float | None = None  # None: not known yet
    metrics: Mapping[str, float] = field(default_factory=dict)  # latest values
    at: datetime = field(default_factory=lambda: datetime.now(UTC))

    def request(self) -> bytes:
        """The state as the server takes it, an UpdateTrainJobStatusRequest of trainer.kubeflow.org/v1alpha1."""
        named = {"step": self.step, "max_iters": self.max_iters, **self.metrics}
        metrics = [{"name": name, "value": f"{value:.6g}"} for name, value in named.items() if _is_allowed(name, value)]
        status = {
            "progressPercentage": 100 if self.is_complete else 100 * self.step // self.max_iters,
            "metrics": metrics[:_MAX_METRICS],
            "lastUpdatedTime": self.at.isoformat(timespec="seconds").replace("+00:00", "Z"),
        }
        if self.is_complete or self.remaining_s is not None:
            status["estimatedRemainingSeconds"] = 0 if self.is_complete else math.ceil(self.remaining_s or 0)
        return json.dumps({"trainerStatus": status}).encode()


def _is_allowed(name: str, value: float) -> bool:
    return 0 < len(name) <= _MAX_CHARACTERS and math.isfinite(value)


class StatusServer:
    """Trainer's server for the state of one job."""

    def __init__(self, url: str, ca_file: str | None, token_file: str) -> None:
        """Remember where the server is; nothing is sent.

        Args:
            ca_file: certificate of the CA that signed the server's; None: the CAs of this machine.

        Raises:
            StatusError: if the URL is not one of HTTPS; the token is for this server alone.
        """
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise StatusError(f"{URL}: must be a URL, got {url!r}: {error}") from error
        if parts.scheme != "https" or not host:
            raise StatusError(f"{URL}: must be a URL of HTTPS, got {url!r}")
        self.address = f"{host}:{port or 443}"
        self._path = parts.path + (f"?{parts.query}" if parts.query else "")
        self._host, self._port, self._ca_file, self._token_file = host, port or 443, ca_file, Path(token_file)

    def send(self, progress: Progress) -> None:
        """Send a state, by no proxy: the server is in the cluster.

        Raises:
            StatusError: if the server refuses it.
            OSError: if it cannot be reached, or a file cannot be read.
        """
        token = self._token_file.read_text().strip()
        context = ssl.create_default_context(cafile=self._ca_file)
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        with closing(HTTPSConnection(self._host, self._port, timeout=_TIMEOUT_S, context=context)) as connection:
            connection.request("POST", self._path, progress.request(), headers)
            answer = connection.getresponse()
            if answer.status != 200:
                raise StatusError(f"{answer.status} {answer.reason}: {_message(answer.read(_MAX_ANSWER))}")


def _message(content: bytes) -> str:
    """The message of a Status of Kubernetes, or whatever the server has answered instead."""
    text = content.decode(errors="replace")
    try:
        return str(json.loads(text)["message"])
    except (ValueError, KeyError, TypeError):
        return " ".join(text.split())[:200]


def status_server() -> StatusServer | None:
    """The server that the environment names, if any; a warning says if it cannot be used as named."""
    url, token_file = os.environ.get(URL), os.environ.get(TOKEN_FILE)
    if not url:
        return None
    try:
        if not token_file:
            raise StatusError(f"{TOKEN_FILE}: must name the file of a token, got none")
        return StatusServer(url, os.environ.get(CA_FILE) or None, token_file)
    except StatusError as error:
        _log.warning("the TrainJob will not have the progress of training: %s", error)
        return None


class Reporter:
    """Thread that sends the latest state; it must be closed at the end."""

    def __init__(self, server: StatusServer) -> None:
        self._server, self._is_away = server, False
        self._latest: Progress | None = None
        self._has_news, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._thread.start()

    def report(self, progress: Progress) -> None:
        """Replace the state that is sent next."""
        self._latest = progress
        self._has_news.set()

    def close(self) -> None:
        """Send the last state if it is not sent, within seconds."""
        self._closing.set()
        self._has_news.set()
        self._thread.join(_LAST_S)

    def _run(self) -> None:
        sent: Progress | None = None
        while True:
            self._has_news.wait()
            self._has_news.clear()
            is_last, latest = self._closing.is_set(), self._latest  # in this order: none comes after the closing
            if latest is not None and latest is not sent:
                self._send(latest)
                sent = latest
            if is_last:
                return
            self._closing.wait(_PERIOD_S)

    def _send(self, progress: Progress) -> None:
        try:
            self._server.send(progress)
            self._is_away = False
        except (StatusError, OSError, HTTPException, ValueError) as error:  # ValueError: of a token with line breaks
            if not self._is_away:
                _log.warning(
                    "the status server at %s does not take the progress of this training, which goes on: %s",
                    *(self._server.address, error),
                )
            self._is_away = True


class ProgressTracker:
    """Tracker that also reports the progress of a training; see Tracker."""

    def __init__(self, tracker: Tracker, reporter: Reporter, training: Training) -> None:
        self._tracker, self._reporter, self._training = tracker, reporter, training
        self._metrics: dict[str, float] = {}
        self.report(training.step)

    def report(self, step: int, remaining_s: float | None = None) -> None:
        """Report that a step is done."""
        training = self._training
        self._reporter.report(
            Progress(step, training.train.max_iters, training.is_complete, remaining_s, dict(self._metrics))
        )

    def log_metrics(self, metrics: Mapping[str, float | None], step: int) -> None:
        self._tracker.log_metrics(metrics, step)
        self._metrics |= {name: value for name, value in metrics.items() if value is not None}
        self.report(step, self._training.log.eta_s(step))

    def log_artifact(self, path: Path, folder: str = "") -> None:
        self._tracker.log_artifact(path, folder)

    def log_dataset(self, name: str, digest: str, path: Path, *, context: str = "training") -> None:
        self._tracker.log_dataset(name, digest, path, context=context)

    def log_replaced(self, path: Path) -> None:
        self._tracker.log_replaced(path)

    def rewind(self, step: int, undone: str | None = None) -> None:
        self._tracker.rewind(step, undone)


@contextmanager
def reported(tracker: Tracker, training: Training) -> Iterator[Tracker]:
    """Yield a tracker that also reports to the status server, or the same one if the environment names none."""
    server = status_server()
    if server is None:
        yield tracker
        return
    with closing(Reporter(server)) as reporter:
        own = ProgressTracker(tracker, reporter, training)
        yield own
        own.report(training.step)
