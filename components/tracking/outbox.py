"""Delivery that survives server outages: in order, at least once, with pending items on disk; independent of MLflow.

A separate thread talks to the server, so logging never waits for it. `mlflow_run.json` says which run a folder belongs
to, how many lines of its journals the server has, and what else is pending. A line sent twice is one point in MLflow,
since its time is sent with it.
"""

import json
import logging
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel

from components.runs.journal import Entry, Journal
from model.errors import UserError
from model.files import read_json, write_atomically

RUN_FILE = "mlflow_run.json"
_SEND_EVERY_S = 1.0  # lines of this period are sent together
_RETRY_AFTER_S = 5.0
_LINES_A_CALL = 200  # progress is saved after this many lines
_PASSWORD = re.compile(r"(://[^:/@\s]*:)[^@\s]+@")  # drivers put the full URI into their errors
_log = logging.getLogger(__name__)


class Server(Protocol):
    """Delivery target: one run of an MLflow server."""

    uri: str  # without the password

    def connect(self, run_id: str) -> str:
        """Continue a run ("" starts one) and return its id: a new one, if that run no longer exists."""

    def send(self, kind: str, arguments: dict[str, Any]) -> None:
        """Deliver one item that is not a metric."""

    def send_metrics(self, entries: list[Entry]) -> None:
        """Deliver lines of a journal."""

    def refuses(self, error: Exception) -> bool:
        """True if an error means that retrying would not help."""


class Item(BaseModel):
    """Item for the server that is not a metric."""

    kind: str
    arguments: dict[str, Any]


class RunFile(BaseModel, extra="forbid"):
    """`mlflow_run.json`."""

    run_id: str = ""
    uri: str = ""
    experiment: str = ""
    parent_id: str = ""  # run id of the parent
    sent_lines: int = 0  # number of sent lines of log.jsonl
    sent_system_lines: int = 0  # number of sent lines of system.jsonl
    outages: int = 0  # number of times the server was unavailable
    waiting: list[Item] = []  # oldest first

    @staticmethod
    def read(path: Path) -> "RunFile":
        """Read a run's file; empty if there is none yet.

        Raises:
            UserError: if it is damaged.
        """
        if not path.is_file():
            return RunFile()
        return RunFile(**read_json(path, RunFile, "delete it to start a new MLflow run"))


class Outbox:
    """Sender of journals and other posted items to a server; it must be closed at the end."""

    def __init__(self, journal: Journal, system: Journal, path: Path, server: Server, *, experiment: str) -> None:
        self._journals = {"sent_lines": journal, "sent_system_lines": system}
        self._path = path
        self._server = server
        self._file = RunFile.read(path)
        if (self._file.uri, self._file.experiment) != (server.uri, experiment):
            self._file.run_id = ""  # a run of another server or experiment cannot be continued
        self._file.uri, self._file.experiment = server.uri, experiment
        self._unsent: dict[str, list[Entry]] = {}
        self._read_unsent()
        self._is_connected = self._is_away = False
        self._sending = threading.Lock()  # held during communication with the server
        self._state = threading.RLock()  # held briefly, to change pending items
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._deliver, name="outbox", daemon=True)

    def open(self) -> None:
        """Connect and start delivery.

        Raises:
            UserError: if the server can be reached but not used as configured.
        """
        self._flush(raises=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Write metrics to the run's journal, and send them soon."""
        self._append("sent_lines", step, metrics)

    def log_system(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Write metrics to the journal of the machine, and send them soon."""
        self._append("sent_system_lines", step, metrics)

    def post(self, kind: str, **arguments: Any) -> None:
        """Send one item that is not a metric soon; it is kept on disk until then."""
        with self._state:
            self._file.waiting.append(Item(kind=kind, arguments=arguments))
            self._save()

    def belong_to(self, parent_id: str) -> None:
        """Set the parent of this run."""
        self._file.parent_id = parent_id
        self.post("parent", run_id=parent_id)

    def rewind(self, step: int) -> None:
        """Remove the journal's lines after a step, sent or not."""
        with self._sending, self._state:
            kept = self._journals["sent_lines"].rewind(step)
            self._file.sent_lines = sum(kept[: self._file.sent_lines])
            self._read_unsent()
            self._save()

    def close(self, last_kind: str, **arguments: Any) -> bool:
        """Send everything pending, then one last item; return True if all was delivered."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()
        self.post(last_kind, **arguments)
        self._flush()
        return not self._file.waiting and not any(self._unsent.values())

    def _append(self, counter: str, step: int, metrics: Mapping[str, float | None]) -> None:
        with self._state:
            self._unsent[counter].append(self._journals[counter].append(step, metrics))

    def _deliver(self) -> None:
        while not self._closing.wait(_RETRY_AFTER_S if self._is_away else _SEND_EVERY_S):
            self._flush()

    def _flush(self, *, raises: bool = False) -> None:
        """Send everything pending, if the server can be reached."""
        with self._sending:
            try:
                self._connect()
                self._send_all()
                self._is_away = False
            except Exception as error:  # any driver error: training must survive its tracking server
                self._is_connected = False  # a replaced server may not have the run
                if raises and isinstance(error, UserError):
                    raise
                self._note_outage(error)

    def _note_outage(self, error: Exception) -> None:
        if self._is_away:
            return
        self._is_away = True
        reason = _PASSWORD.sub(r"\1***@", str(error))
        _log.warning(
            "MLflow at %s is unavailable; metrics are kept in %s: %s", self._file.uri, self._path.parent, reason
        )
        with self._state:
            self._file.outages += 1
            self.post("tags", tags={"tracking.outages": str(self._file.outages)})

    def _connect(self) -> None:
        if self._is_connected:
            return
        run_id = self._server.connect(self._file.run_id)
        with self._state:
            if run_id != self._file.run_id:  # a new run gets everything
                self._file.run_id, self._file.sent_lines, self._file.sent_system_lines = run_id, 0, 0
                self._read_unsent()
                self._save()
        self._is_connected = True

    def _send_all(self) -> None:
        """Send the lines first, so that a run marked as ended is complete."""
        for counter in self._journals:
            while lines := self._unsent[counter][:_LINES_A_CALL]:
                self._server.send_metrics(lines)
                with self._state:
                    setattr(self._file, counter, getattr(self._file, counter) + len(lines))
                    del self._unsent[counter][: len(lines)]
                    self._save()
        while self._file.waiting:
            item = self._file.waiting[0]
            try:
                self._server.send(item.kind, item.arguments)
            except Exception as error:
                if not self._server.refuses(error):
                    raise
                _log.warning(
                    "MLflow refuses %s: %s", item.model_dump(), error
                )  # dropped, so that it does not block later items
            with self._state:
                del self._file.waiting[0]
                self._save()

    def _read_unsent(self) -> None:
        for counter, journal in self._journals.items():
            self._unsent[counter] = journal.read()[getattr(self._file, counter) :]

    def _save(self) -> None:
        write_atomically(self._path, json.dumps(self._file.model_dump(), indent=2) + "\n")
