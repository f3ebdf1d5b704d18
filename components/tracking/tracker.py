"""Tracking of a run: metrics go to a local journal first, then to MLflow, which only components/tracking/*.py import.

    with open_tracker(config, run_dir=config.train.output_dir) as tracker:
        tracker.log_metrics({"loss/mask": 0.7}, step=20)

A trained model has one MLflow run: its id is in `<run>/mlflow_run.json`, and every stage that opens a tracker on the
same folder logs to it. `log.jsonl` is authoritative; a thread sends it, so no step waits for a server. Lines that
MLflow has not received are sent when it is back, at the end, or by the next stage: an outage causes one warning and
loses no metric, and the tag `tracking.outages` counts it. `MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_NAME` or
`MLFLOW_EXPERIMENT_ID`, and `MLFLOW_RUN_ID` have priority. A DVC experiment has a run of its own, and so has the copy of
a folder once it is trained. A run whose folder is inside the folder of another run is its child, like the seeds of a
stability study.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from components.config import Config
from components.runs.environment import run_tags
from components.runs.journal import Journal, read_journal
from components.tracking.client import TrackingError, experiment_name, tracking_uri
from components.tracking.monitor import SystemMonitor
from components.tracking.outbox import Outbox
from components.tracking.run_file import RUN_FILE, RUNNING, RunFile
from components.tracking.server import MlflowServer
from model.files import real, write_atomically

_log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Interface for the records of a stage. No method fails if the server is unavailable."""

    def log_metrics(self, metrics: Mapping[str, float | None], step: int) -> None:
        """Log values of one step by name (`loss/mask`, `time/step_s`); MLflow does not get None and non-finite ones."""

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Copy a file, or the content of a folder, to the run's artifacts."""

    def log_dataset(self, name: str, digest: str, path: Path, *, context: str = "training") -> None:
        """Log the identity of data; `context` is its use, `training` or `evaluation`."""

    def log_replaced(self, path: Path) -> None:
        """Rename the run of a folder that was moved aside for this one, as the folder was."""

    def rewind(self, step: int, undone: str | None = None) -> None:
        """Remove the journal's lines after a step, from which training restarts; see Journal."""


@contextmanager
def open_tracker(
    config: Config,
    *,
    run_dir: Path,
    data_hash: str = "",
    tags: Mapping[str, str] | None = None,
    metrics_csv: bool = True,
) -> Iterator[Tracker]:
    """Continue or start the MLflow run of a folder; at the end, send what is pending and the run's status.

    Only rank 0 opens a tracker; other ranks use a NullTracker.

    Args:
        config: logged completely as parameters; a value that differs from one logged before becomes a tag
            `changed/<name>`. `tracking.enabled: false` only keeps the journal.
        run_dir: `<run>`; created if missing.
        data_hash: hash of the training data.
        tags: additional tags, beside commit, hardware and versions.
        metrics_csv: write `<run>/metrics.csv` at the end. Stages after training keep the file as training wrote it.

    Raises:
        TrackingError: if the URI is invalid, the database is of another MLflow version, the experiment was deleted, or
            the environment names no run or experiment, or two that contradict each other.
    """
    journal = Journal(run_dir / "log.jsonl")
    is_on, origin = config.tracking.enabled, {**run_tags(), **(tags or {})}
    tracker = _open_outbox(config, journal, origin, trains=bool(data_hash)) if is_on else None
    if tracker and data_hash:
        tracker.log_dataset(config.data.source, data_hash, config.data.prepared_dir)
    status = "FAILED"
    try:
        yield tracker or JournalTracker(journal)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    except SystemExit as end:  # a signal has come, or another process of the job has failed
        status = "FAILED" if end.code in (1, 2) else "KILLED"
        raise
    finally:
        if metrics_csv:
            journal.write_csv(run_dir / "metrics.csv")
        if tracker:
            tracker.finish(status)


def end_run(config: Config, *, run_dir: Path, status: str) -> str:
    """Set the status of a folder's MLflow run for stages that could not, for example because they were killed.

    Args:
        status: FINISHED, FAILED or KILLED.

    Returns:
        Run id; empty if no run was started or tracking is off.
    """
    path = run_dir / RUN_FILE
    if not config.tracking.enabled or not RunFile.read(path).run_id:
        return ""
    _open_outbox(config, Journal(run_dir / "log.jsonl"), {}).finish(status)
    return RunFile.read(path).run_id


def delivered_run(run_dir: Path) -> str:
    """Return the id of a folder's MLflow run, if it has received everything except artifacts.

    Raises:
        TrackingError: if something else is still pending.
    """
    file = RunFile.read(run_dir / RUN_FILE)
    if not file.run_id or any(item.kind != "artifact" for item in file.waiting):
        raise TrackingError(
            f"tracking.uri: MLflow must be reachable, but {file.uri} is not; start it, or set MLFLOW_TRACKING_URI"
        )
    return file.run_id


def send_rest(config: Config, *, run_dir: Path) -> None:
    """Send what MLflow has not received of a folder's run, and its parent; no stage may be running there.

    The run keeps the status that its last stage ended with; KILLED if that was killed and could set none.
    """
    file = RunFile.read(run_dir / RUN_FILE)
    is_known = file.parent_id == RunFile.read(run_dir.parent / RUN_FILE).run_id
    was_killed = file.status == RUNNING
    is_rest = bool(file.waiting) or was_killed or _has_unsent_lines(file, run_dir)
    if config.tracking.enabled and file.uri and (is_rest or not is_known):
        _open_outbox(config, Journal(run_dir / "log.jsonl"), {}).finish("KILLED" if was_killed else file.status)


def _has_unsent_lines(file: RunFile, run_dir: Path) -> bool:
    sent = {"log.jsonl": file.sent_lines, "system.jsonl": file.sent_system_lines}
    return any(len(read_journal(run_dir / name)) > lines for name, lines in sent.items())


def complete_records(run_dir: Path) -> list[Path]:
    """Write an empty file for each record that a run does not have, since DVC requires every output of a stage."""
    empty = {run_dir / "log.jsonl": "", run_dir / "system.jsonl": "", run_dir / RUN_FILE: "{}\n"}
    for path, text in empty.items():
        if not path.is_file():
            write_atomically(path, text)
    return list(empty)


def _open_outbox(config: Config, journal: Journal, tags: Mapping[str, str], *, trains: bool = False) -> "MlflowTracker":
    tracking, run_dir = config.tracking, journal.path.parent
    run_name = tracking.run_name or real(run_dir).name
    server = MlflowServer(tracking_uri(tracking), experiment_name(tracking), run_name)
    system = Journal(run_dir / "system.jsonl")
    outbox = Outbox(journal, system, run_dir / RUN_FILE, server)
    if experiment := os.environ.get("DVC_EXP_NAME"):
        outbox.enter_experiment(experiment)
    elif trains:
        outbox.leave_original()
    parent = RunFile.read(run_dir.parent / RUN_FILE)
    if parent.run_id:
        outbox.belong_to(parent.run_id)
    outbox.post("origin", tags=dict(tags))
    params = {**config.flat(), "tracking.uri": server.uri}  # no password
    outbox.post("params", params={name: str(value) for name, value in params.items()})
    outbox.open()
    monitor = SystemMonitor(outbox.log_system, tracking.system_metrics_s, first_step=len(system.read()))
    return MlflowTracker(outbox, monitor)


class NullTracker:
    """Tracker that records nothing, for ranks other than 0."""

    def log_metrics(self, metrics: Mapping[str, float | None], step: int) -> None: ...

    def log_artifact(self, path: Path, folder: str = "") -> None: ...

    def log_dataset(self, name: str, digest: str, path: Path, *, context: str = "training") -> None: ...

    def log_replaced(self, path: Path) -> None: ...

    def rewind(self, step: int, undone: str | None = None) -> None: ...


class JournalTracker(NullTracker):
    """Tracker that only writes metrics to the local journal."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def log_metrics(self, metrics: Mapping[str, float | None], step: int) -> None:
        self._journal.append(step, metrics)

    def rewind(self, step: int, undone: str | None = None) -> None:
        self._journal.rewind(step, undone)


class MlflowTracker:
    """Tracker that writes everything locally, then sends it to MLflow."""

    def __init__(self, outbox: Outbox, monitor: SystemMonitor) -> None:
        self._outbox = outbox
        self._monitor = monitor
        monitor.start()

    def log_metrics(self, metrics: Mapping[str, float | None], step: int) -> None:
        self._outbox.log(step, metrics)

    def log_artifact(self, path: Path, folder: str = "") -> None:
        self._outbox.post("artifact", path=str(real(path)), folder=folder)

    def log_dataset(self, name: str, digest: str, path: Path, *, context: str = "training") -> None:
        self._outbox.post("dataset", name=name, digest=digest, path=str(path), context=context)

    def log_replaced(self, path: Path) -> None:
        if run_id := RunFile.read(path / RUN_FILE).run_id:
            self._outbox.post("replaced", run_id=run_id, folder=path.name)

    def rewind(self, step: int, undone: str | None = None) -> None:
        """Remove the journal's lines after a step; MLflow cannot delete points and shows both values of later steps."""
        self._outbox.rewind(step, undone)

    def finish(self, status: str) -> None:
        """Send what is pending and end the run as FINISHED, FAILED or KILLED."""
        self._monitor.stop()
        if not self._outbox.close(status):
            _log.warning("MLflow has not received everything of this run; the next stage will send the rest")
