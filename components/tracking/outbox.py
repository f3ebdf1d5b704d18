"""Delivery that survives server outages: in order, at least once, with pending items on disk; independent of MLflow.

A separate thread talks to the server, so logging never waits for it; what a call without an answer holds up is left to
the next stage. `mlflow_run.json` says which run a folder belongs to, how many lines of its journals the server has, and
what else is pending. A line sent twice is one point in MLflow, since its time is sent with it.

Artifacts have a thread of their own: a store may take minutes over a file, and metrics and status do not wait for it. A
file that the store did not take is sent again after a pause, at the end, or by the next stage; after three tries it is
given up, with a warning. Tries during an outage of the whole server do not count.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

from components.runs.journal import Entry, Journal
from components.tracking.reason import reason
from components.tracking.run_file import RUNNING, Item, RunFile
from model.errors import UserError
from model.files import real, write_atomically

_SEND_EVERY_S = 1.0  # lines of this period are sent together
_RETRY_AFTER_S = 5.0
_LINES_A_CALL = 200  # progress is saved after this many lines
_TRIES = 3  # for an artifact, over all stages
_LONGEST_PAUSE_S = 600.0  # between two tries
_PATIENCE_S = 10.0  # at the end, before a message says that artifacts are still being sent
_ANSWERS_WITHIN_S = 90.0  # longest wait for one call; a server can keep one open for ever by a byte now and then
_log = logging.getLogger(__name__)


class Server(Protocol):
    """Delivery target: one run of an MLflow server."""

    uri: str  # without the password
    experiment: str

    def connect(self, run_ids: list[str], experiment: str) -> str:
        """Continue a run, or start one; return its id.

        Args:
            run_ids: runs of this folder, latest first; the server, under whatever URI, continues the first that it has.
            experiment: the experiment's name when the latest run was last continued.
        """

    def send(self, kind: str, arguments: dict[str, Any]) -> None:
        """Deliver one item that is not a metric."""

    def send_metrics(self, entries: list[Entry]) -> None:
        """Deliver lines of a journal."""

    def answers(self) -> bool:
        """True if the server can be reached and has the run."""

    def lacks_run(self) -> bool:
        """True if the server can be reached, but the run was deleted."""

    def refuses(self, error: Exception) -> bool:
        """True if an error means that retrying would not help."""


class Outbox:
    """Sender of journals and other posted items to a server; it must be closed at the end."""

    def __init__(self, journal: Journal, system: Journal, path: Path, server: Server) -> None:
        self._journals = {"sent_lines": journal, "sent_system_lines": system}
        self._path = path
        self._server = server
        self._file = RunFile.read(path)
        self._file.uri = server.uri
        self._delivered: list[Item] = []  # another run gets it, too, if this one is deleted
        self._unsent: dict[str, list[Entry]] = {}
        self._read_unsent()
        self._is_connected = self._is_away = False
        self._contact: Future[None] = Future()  # the first one
        self._answered_s = time.monotonic()  # when the last call of the delivering thread ended
        self._state = threading.RLock()  # held briefly, to change pending items
        self._rewinds = 0
        self._is_left = False  # to the next stage, whose file it is then
        self._closing, self._ending = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._deliver, name="outbox", daemon=True)
        self._uploader = threading.Thread(target=self._deliver_artifacts, name="artifacts", daemon=True)

    def open(self) -> None:
        """Connect and start delivery.

        Raises:
            UserError: if the server can be reached but not used as configured.
        """
        self._answered_s = time.monotonic()
        self._thread.start()
        if self._ends(self._contact.done):
            self._contact.result()
        with self._state:
            self._file.status = RUNNING
            if self._file.original_of(self._path.parent) is None:
                self._file.folder = str(real(self._path.parent))
            self._save()
        self._uploader.start()

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

    def enter_experiment(self, name: str) -> None:
        """Begin another run, which gets everything, if a DVC experiment goes on from a finished run of another one."""
        with self._state:
            if name != self._file.dvc_experiment and self._file.status == "FINISHED" and self._file.run_id:
                self.leave_run()
            self._file.dvc_experiment = name

    def leave_run(self) -> None:
        """Begin another run, which gets everything."""
        with self._state:
            self._file.run_id, self._file.earlier_ids = "", []
            self._file.sent_lines = self._file.sent_system_lines = 0
            self._read_unsent()

    def leave_original(self) -> None:
        """Begin another run, which gets everything, if this folder is a copy: the run is that of the original."""
        if original := self._file.original_of(self._path.parent):
            _log.warning("%s is a copy of %s; training gets an MLflow run of its own", self._path.parent, original)
            self.leave_run()

    def belong_to(self, parent_id: str) -> None:
        """Set the parent of this run."""
        self._file.parent_id = parent_id
        self.post("parent", run_id=parent_id)

    def rewind(self, step: int, undone: str | None = None) -> None:
        """Remove the journal's lines after a step, sent or not; see Journal."""
        with self._state:
            self._rewinds += 1
            kept = self._journals["sent_lines"].rewind(step, undone)
            self._file.sent_lines = sum(kept[: self._file.sent_lines])
            self._read_unsent()
            self._save()

    def close(self, status: str) -> bool:
        """Send everything pending and the run's status, then the artifacts; return True if all was delivered."""
        with self._state:
            self._file.status = status
            self.post("status", status=status)
        self._closing.set()
        self._is_left = not self._ends(lambda: not self._thread.is_alive())
        self._ending.set()
        if self._uploader.is_alive():
            self._uploader.join(_PATIENCE_S)
        if not self._is_left and self._uploader.is_alive():
            _log.warning(
                "MLflow at %s: still sending %d artifacts of %s; Ctrl-C leaves them to the next stage",
                *(self._file.uri, len(self._file.waiting), self._path.parent),
            )
            self._uploader.join()
        return not self._file.waiting and not any(self._unsent.values())

    def _append(self, counter: str, step: int, metrics: Mapping[str, float | None]) -> None:
        with self._state:
            self._unsent[counter].append(self._journals[counter].append(step, metrics))

    def _ends(self, is_over: Callable[[], bool]) -> bool:
        """Wait for the delivering thread, unless a call of it gets no answer."""
        while not is_over():
            if time.monotonic() - self._answered_s > _ANSWERS_WITHIN_S:
                self._note_outage(TimeoutError(f"no answer within {_ANSWERS_WITHIN_S:g} s"))
                return False
            time.sleep(0.01)
        return True

    def _deliver(self) -> None:
        try:
            self._flush(raises=True)
        except UserError as error:
            self._contact.set_exception(error)
            return
        self._contact.set_result(None)
        while not self._closing.wait(_RETRY_AFTER_S if self._is_away else _SEND_EVERY_S):
            self._flush()
        if not self._is_left:
            self._flush()

    def _flush(self, *, raises: bool = False) -> None:
        """Send everything pending, if the server can be reached."""
        self._answered_s = time.monotonic()
        try:
            self._connect()
            try:
                self._send_all()
            except Exception:  # any driver error
                if not self._server.lacks_run():
                    raise
                self._is_connected = False
                self._connect()
                self._send_all()
            self._is_away = False
        except Exception as error:  # any driver error: training must survive its tracking server
            self._is_connected = False  # a replaced server may not have the run
            if raises and isinstance(error, UserError):
                raise
            self._note_outage(error)
        self._answered_s = time.monotonic()

    def _note_outage(self, error: Exception) -> None:
        if self._is_away:
            return
        self._is_away = True
        _log.warning(
            "MLflow at %s is unavailable; metrics are kept in %s: %s", self._file.uri, self._path.parent, reason(error)
        )
        with self._state:
            self._file.outages += 1
            self.post("tags", tags={"tracking.outages": str(self._file.outages)})

    def _connect(self) -> None:
        if self._is_connected:
            return
        known = [run_id for run_id in (self._file.run_id, *self._file.earlier_ids) if run_id]
        run_id = self._server.connect(known, self._file.experiment)
        with self._state:
            self._file.experiment = self._server.experiment
            if run_id != self._file.run_id:  # another run gets everything
                if self._delivered:
                    _log.warning(
                        "MLflow at %s: the run %s was deleted; the run %s gets everything",
                        *(self._file.uri, self._file.run_id, run_id),
                    )
                self._file.waiting[:0], self._delivered = self._delivered, []
                self._file.run_id, self._file.sent_lines, self._file.sent_system_lines = run_id, 0, 0
                self._file.earlier_ids = [known_id for known_id in known if known_id != run_id]
                self._read_unsent()
            self._save()
        self._is_connected = True

    def _send_all(self) -> None:
        """Send the lines first, so that a run marked as ended is complete."""
        for counter in self._journals:
            while lines := self._unsent[counter][:_LINES_A_CALL]:
                rewinds = self._rewinds
                self._server.send_metrics(lines)
                self._answered_s = time.monotonic()
                with self._state:
                    if rewinds != self._rewinds:
                        continue  # the journal was cut meanwhile
                    setattr(self._file, counter, getattr(self._file, counter) + len(lines))
                    del self._unsent[counter][: len(lines)]
                    self._save()
        while item := self._first(is_artifact=False):
            try:
                self._server.send(item.kind, item.arguments)
            except Exception as error:
                if self._server.lacks_run() or not self._server.refuses(error):
                    raise
                # Dropped, so that it does not block later items.
                _log.warning("MLflow refuses %s: %s", item.model_dump(), reason(error))
                self._replace(item)
            else:
                self._note_delivery(item)
            self._answered_s = time.monotonic()

    def _deliver_artifacts(self) -> None:
        """Send artifacts one by one, until none is left at the end, or one fails there."""
        pause_s = _RETRY_AFTER_S
        while True:
            is_ending = self._ending.is_set()  # before the look at what is pending
            item = self._first(is_artifact=True) if self._is_connected else None
            if item is not None and self._upload(item):
                pause_s = _RETRY_AFTER_S
            elif item is None and not is_ending:
                self._ending.wait(_SEND_EVERY_S)
            elif item is None or self._ending.is_set():
                return
            else:
                self._ending.wait(pause_s)
                pause_s = min(4 * pause_s, _LONGEST_PAUSE_S)

    def _upload(self, item: Item) -> bool:
        """Send a file, or replace a folder by its files; return False if it failed and trying again may help."""
        path = Path(item.arguments["path"])
        if path.is_dir():
            self._replace(item, *_files_of(path, item.arguments["folder"]))
            return True
        try:
            self._server.send(item.kind, item.arguments)
        except Exception as error:  # any driver error
            return self._note_failure(item, error)
        self._note_delivery(item)
        return True

    def _note_failure(self, item: Item, error: Exception) -> bool:
        """Count a failed try if the server itself answers; return True if the artifact is given up."""
        if self._server.lacks_run():
            self._is_connected = False
            return False
        is_refused = self._server.refuses(error)
        if not is_refused and not self._server.answers():
            self._is_connected = False
            self._note_outage(error)
            return False
        tries = item.tries + 1
        path, place = item.arguments["path"], item.arguments["folder"]
        if is_refused or tries >= _TRIES:
            self._replace(item)
            _log.warning(
                "MLflow at %s does not store %s (tries: %d): %s; send it yourself: mlflow artifacts log-artifact "
                "--run-id %s --local-file %s%s",
                *(self._file.uri, path, tries, reason(error), self._file.run_id, path),
                f" --artifact-path {place}" if place else "",
            )
            return True
        self._replace(item, item.model_copy(update={"tries": tries}))  # behind the others, which may be stored
        _log.warning(
            "MLflow at %s did not store %s (try %d of %d); it will be sent again: %s",
            *(self._file.uri, path, tries, _TRIES, reason(error)),
        )
        return False

    def _first(self, *, is_artifact: bool) -> Item | None:
        with self._state:
            return next((item for item in self._file.waiting if (item.kind == "artifact") is is_artifact), None)

    def _note_delivery(self, item: Item) -> None:
        with self._state:
            self._delivered.append(item)
            self._replace(item)

    def _replace(self, item: Item, *others: Item) -> None:
        """Remove a pending item, and append others."""
        with self._state:
            self._file.waiting.remove(item)
            self._file.waiting += others
            self._save()

    def _read_unsent(self) -> None:
        for counter, journal in self._journals.items():
            self._unsent[counter] = journal.read()[getattr(self._file, counter) :]

    def _save(self) -> None:
        if self._is_left:
            return
        write_atomically(self._path, json.dumps(self._file.model_dump(), indent=2) + "\n")


def _files_of(path: Path, folder: str) -> list[Item]:
    """Artifacts for the files in a folder."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    places = [(Path(folder) / file.relative_to(path).parent).as_posix() for file in files]
    return [
        Item(kind="artifact", arguments={"path": str(file), "folder": "" if place == "." else place})
        for file, place in zip(files, places, strict=True)
    ]
