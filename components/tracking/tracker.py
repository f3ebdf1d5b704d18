"""Where the numbers of a run go: a local journal first, then MLflow, which only the modules components/tracking/*.py import.

    with open_tracker(config, run_dir=config.train.output_dir) as tracker:
        tracker.log_metrics({"loss/mask": 0.7}, step=20)

One MLflow run a trained model: its id lies in `<run>/mlflow_run.json`, and every stage that opens a tracker on the same folder logs
into it. `log.jsonl` is the truth; a thread sends it, so no step waits for a server, and what MLflow has not yet received is sent as soon as it
is back, at the end, or by the next stage: an outage costs one warning and no number, and the run's tag `tracking.outages` counts it.
`MLFLOW_TRACKING_URI` and `MLFLOW_RUN_ID` go first.
A run whose folder lies in the folder of another is its child, as the seeds of a stability study are.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from components.config import Config
from components.runs.environment import run_tags
from components.runs.journal import Journal
from components.tracking.monitor import SystemMonitor
from components.tracking.outbox import Outbox, RunFile
from components.tracking.server import MlflowServer, TrackingError, tracking_uri

_RUN_FILE = "mlflow_run.json"
_log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Takes what a stage has to tell. No method fails because a server is away."""

    def log_metrics(self, metrics: Mapping[str, float | None], step: int) -> None:
        """Values of one step by name (`loss/mask`, `time/step_s`); None and non-finite ones stay in the journal only."""

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Dotted configuration names; one already logged with another value becomes a tag `changed/<name>`."""

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Copy a file, or the content of a folder, into the run's artifacts."""

    def log_dataset(self, name: str, digest: str, path: Path, *, context: str = "training") -> None:
        """The identity of data; `context` says what it was for, `training` or `evaluation`."""

    def rewind(self, step: int) -> None:
        """Forget what the journal holds after a step, because training starts again from there."""


@contextmanager
def open_tracker(
    config: Config,
    *,
    run_dir: Path,
    data_hash: str = "",
    tags: Mapping[str, str] | None = None,
    metrics_csv: bool = True,
) -> Iterator[Tracker]:
    """Continue the run of a folder, or begin one; at the end, send what waits and say how the run ended.

    Only rank 0 opens a tracker; other ranks take a NullTracker.

    Args:
        config: all of it becomes parameters. `tracking.enabled: false` keeps the journal alone.
        run_dir: `<run>`; made where absent.
        data_hash: of the data that is learned from.
        tags: logged beside commit, hardware and versions.
        metrics_csv: render `<run>/metrics.csv` at the end. Stages after training leave that file as training wrote it.

    Raises:
        TrackingError: if the URI is of no kind MLflow knows, the experiment was deleted, or `MLFLOW_RUN_ID` names no run.
    """
    journal = Journal(run_dir / "log.jsonl")
    tracker = _open_outbox(config, journal, {**run_tags(), **(tags or {})}) if config.tracking.enabled else None
    if tracker and data_hash:
        tracker.log_dataset(config.data.source, data_hash, config.data.prepared_dir)
    status = "FAILED"
    try:
        yield tracker or JournalTracker(journal)
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        if metrics_csv:
            journal.write_csv(run_dir / "metrics.csv")
        if tracker:
            tracker.finish(status)


def end_run(config: Config, *, run_dir: Path, status: str) -> str:
    """Say how the run of a folder ended, for stages that could not: they were killed, say, or it is others that failed.

    Args:
        status: FINISHED, FAILED or KILLED.

    Returns:
        The run's id; empty where no run was begun, or tracking is off.
    """
    path = run_dir / _RUN_FILE
    if not config.tracking.enabled or not RunFile.read(path).run_id:
        return ""
    _open_outbox(config, Journal(run_dir / "log.jsonl"), {}).finish(status)
    return RunFile.read(path).run_id


def delivered_run(run_dir: Path) -> str:
    """The id of a folder's MLflow run, which has received everything that the folder's stages had to tell.

    Raises:
        TrackingError: if something still waits to be sent.
    """
    file = RunFile.read(run_dir / _RUN_FILE)
    if not file.run_id or file.waiting:
        raise TrackingError(
            f"tracking.uri: MLflow must be reachable for this, but {file.uri} is not; start it, or set MLFLOW_TRACKING_URI"
        )
    return file.run_id


def send_rest(config: Config, *, run_dir: Path) -> None:
    """Send what the finished run of a folder still has to tell, and whose child it is, if MLflow was away when it ended."""
    file = RunFile.read(run_dir / _RUN_FILE)
    is_known = file.parent_id == RunFile.read(run_dir.parent / _RUN_FILE).run_id
    if config.tracking.enabled and file.uri and (file.waiting or not is_known):
        _open_outbox(config, Journal(run_dir / "log.jsonl"), {}).finish("FINISHED")


def _open_outbox(config: Config, journal: Journal, tags: Mapping[str, str]) -> "MlflowTracker":
    tracking, run_dir = config.tracking, journal.path.parent
    run_name = tracking.run_name or run_dir.resolve().name
    server = MlflowServer(tracking_uri(tracking), tracking.experiment, run_name)
    system = Journal(run_dir / "system.jsonl")
    outbox = Outbox(journal, system, run_dir / _RUN_FILE, server, experiment=tracking.experiment)
    parent = RunFile.read(run_dir.parent / _RUN_FILE)
    if parent.run_id and (parent.uri, parent.experiment) == (server.uri, tracking.experiment):
        outbox.belong_to(parent.run_id)
    outbox.post("origin", tags=dict(tags))
    params = {**config.flat(), "tracking.uri": server.uri}  # without the password it may hold
    outbox.post("params", params={name: str(value) for name, value in params.items()})
    outbox.open()
    monitor = SystemMonitor(outbox.log_system, tracking.system_metrics_s, first_step=len(system.read()))
    return MlflowTracker(outbox, monitor)


class NullTracker:
    """Says nothing to anyone: for the ranks past 0."""

    def log_metrics(self, metrics: Mapping[str, float | None], step: int) -> None: ...

    def log_params(self, params: Mapping[str, Any]) -> None: ...

    def log_artifact(self, path: Path, folder: str = "") -> None: ...

    def log_dataset(self, name: str, digest: str, path: Path, *, context: str = "training") -> None: ...

    def rewind(self, step: int) -> None: ...


class JournalTracker(NullTracker):
    """Keeps metrics in the local journal alone."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def log_metrics(self, metrics: Mapping[str, float | None], step: int) -> None:
        self._journal.append(step, metrics)

    def rewind(self, step: int) -> None:
        self._journal.rewind(step)


class MlflowTracker:
    """Keeps everything locally, then hands it to MLflow."""

    def __init__(self, outbox: Outbox, monitor: SystemMonitor) -> None:
        self._outbox = outbox
        self._monitor = monitor
        monitor.start()

    def log_metrics(self, metrics: Mapping[str, float | None], step: int) -> None:
        self._outbox.log(step, metrics)

    def log_params(self, params: Mapping[str, Any]) -> None:
        self._outbox.post("params", params={name: str(value) for name, value in params.items()})

    def log_artifact(self, path: Path, folder: str = "") -> None:
        self._outbox.post("artifact", path=str(path.resolve()), folder=folder)

    def log_dataset(self, name: str, digest: str, path: Path, *, context: str = "training") -> None:
        self._outbox.post("dataset", name=name, digest=digest, path=str(path), context=context)

    def rewind(self, step: int) -> None:
        """MLflow cannot delete points: where it had received later steps, it will show both values of them."""
        self._outbox.rewind(step)

    def finish(self, status: str) -> None:
        """Send what waits and end the run as FINISHED, FAILED or KILLED."""
        self._monitor.stop()
        if not self._outbox.close("status", status=status):
            _log.warning("MLflow has not received everything of this run; the next stage sends the rest")
