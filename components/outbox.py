"""Delivery that survives a server's absence: in order, at least once, what waits lies on disk. Knows nothing of MLflow.

`mlflow_run.json` says which run a folder is, how many lines of its journal the server has, and what else waits. The same line
sent twice is one point to MLflow, since its time goes with it.
"""

import json
import logging
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from components.journal import Entry, Journal, write_atomically
from model.errors import UserError

# Training logs many lines at once and must not wait for a server at each, nor again and again for one that is away.
_SEND_AFTER_S = 1.0
_RETRY_AFTER_S = 30.0
_PASSWORD = re.compile(r"(://[^:/@\s]*:)[^@\s]+@")  # drivers put the whole URI into their errors
_log = logging.getLogger(__name__)


class Server(Protocol):
    """What receives."""

    uri: str  # fit to be shown: without a password

    def connect(self, run_id: str) -> str:
        """Continue a run ("" begins one) and return its id: another one, where that run is no more."""

    def send(self, kind: str, arguments: dict[str, Any]) -> None:
        """Deliver one thing that is not a metric."""

    def send_metrics(self, entries: list[Entry]) -> None:
        """Deliver lines of the journal."""

    def refuses(self, error: Exception) -> bool:
        """Whether an error says that sending again would not help."""


@dataclass
class RunFile:
    """`mlflow_run.json`."""

    run_id: str = ""
    uri: str = ""
    experiment: str = ""
    parent_id: str = ""  # of the run that this one is a child of
    sent_lines: int = 0  # of the journal, from its start
    waiting: list[dict[str, Any]] = field(default_factory=list)  # {"kind": …, "arguments": …}, oldest first

    @staticmethod
    def read(path: Path) -> "RunFile":
        """What a run's folder says; empty where it says nothing yet."""
        return RunFile(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else RunFile()


class Outbox:
    """Hands a journal, and whatever else is posted, to a server."""

    def __init__(self, journal: Journal, path: Path, server: Server, *, experiment: str) -> None:
        self._journal = journal
        self._path = path
        self._server = server
        self._file = RunFile.read(path)
        if (self._file.uri, self._file.experiment) != (server.uri, experiment):
            self._file.run_id = ""  # the run of another server or experiment cannot be continued on this one
        self._file.uri, self._file.experiment = server.uri, experiment
        self._unsent = journal.read()[self._file.sent_lines :]
        self._connected = False
        self._next_at_s = 0.0
        self._warned = False

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Write to the journal, then send."""
        self._unsent.append(self._journal.append(step, metrics))
        self.flush()

    def post(self, kind: str, **arguments: Any) -> None:
        """Send one thing that is no metric, or keep it for later."""
        self._file.waiting.append({"kind": kind, "arguments": arguments})
        self.flush()

    def belong_to(self, parent_id: str) -> None:
        """Tell whose child this run is."""
        self._file.parent_id = parent_id
        self.post("parent", run_id=parent_id)

    def flush(self, *, urgent: bool = False) -> None:
        """Send everything that waits, if the server can be reached. `urgent` sends now rather than a little later.

        Raises:
            UserError: if it can be reached but not used as configured.
        """
        if time.monotonic() < self._next_at_s and not urgent:
            return
        try:
            self._connect()
            self._send_all()
        except UserError:
            raise
        except Exception as error:  # whatever its driver raises: training outlives its tracking server
            self._next_at_s = time.monotonic() + _RETRY_AFTER_S
            if not self._warned:
                why = _PASSWORD.sub(r"\1***@", str(error))
                _log.warning("MLflow at %s is away, %s keeps the metrics: %s", self._file.uri, self._journal.path, why)
            self._warned = True
        else:
            self._next_at_s = time.monotonic() + _SEND_AFTER_S
            self._warned = False
        write_atomically(self._path, json.dumps(asdict(self._file), indent=2) + "\n")

    def rewind(self, step: int) -> None:
        """Forget the journal's lines after a step, sent or not."""
        kept = self._journal.rewind(step)
        self._file.sent_lines = sum(kept[: self._file.sent_lines])
        self._unsent = self._journal.read()[self._file.sent_lines :]
        self.flush(urgent=True)

    @property
    def is_empty(self) -> bool:
        """Whether everything was delivered."""
        return not self._file.waiting and not self._unsent

    def _connect(self) -> None:
        if self._connected:
            return
        run_id = self._server.connect(self._file.run_id)
        if run_id != self._file.run_id:  # a run that is new to us is told everything
            self._file.run_id, self._file.sent_lines = run_id, 0
            self._unsent = self._journal.read()
        self._connected = True

    def _send_all(self) -> None:
        while self._file.waiting:
            letter = self._file.waiting[0]
            try:
                self._server.send(letter["kind"], letter["arguments"])
            except Exception as error:
                if not self._server.refuses(error):
                    raise
                _log.warning("MLflow refuses %s: %s", letter, error)  # given up, lest it block what comes after it
            del self._file.waiting[0]
        if self._unsent:
            self._server.send_metrics(self._unsent)
            self._file.sent_lines += len(self._unsent)
            self._unsent = []
