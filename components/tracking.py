"""Where the numbers of a run go: a local journal first, then MLflow. The only module that imports mlflow.

    with open_tracker(config, run_dir=config.train.output_dir) as tracker:
        tracker.log_metrics({"loss/mask": 0.7}, step=20)

One MLflow run a trained model: its id lies in `<run>/mlflow_run.json`, and every stage that opens a tracker on the same folder logs
into it. `log.jsonl` is the truth; what MLflow has not yet received is sent with the next success, at the end, or by the
next stage, so an unreachable server costs one warning and no number. `MLFLOW_TRACKING_URI` and `MLFLOW_RUN_ID` go first.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from components.config import Config
from components.environment import run_tags
from components.journal import Entry, Journal
from components.outbox import Outbox
from model.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_METRICS_A_CALL = 1000  # MLflow's limits on log_batch
_PARAMS_A_CALL = 100
_log = logging.getLogger(__name__)


class TrackingError(UserError):
    """MLflow cannot be used as configured."""


class Tracker(Protocol):
    """Takes what a stage has to tell. No method fails because a server is away."""

    def log_metrics(self, metrics: Mapping[str, float | None], step: int) -> None:
        """Values of one step by name (`loss/mask`, `time/step_s`); None and non-finite ones stay in the journal only."""

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Dotted configuration names; one already logged with another value becomes a tag `changed/<name>`."""

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Copy a file, or the content of a folder, into the run's artifacts."""

    def log_dataset(self, name: str, digest: str, path: Path) -> None:
        """The identity of the data that was learned from."""

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
    path = run_dir / "mlflow_run.json"
    if not config.tracking.enabled or not path.is_file() or not json.loads(path.read_text(encoding="utf-8"))["run_id"]:
        return ""
    _open_outbox(config, Journal(run_dir / "log.jsonl"), {}).finish(status)
    return json.loads(path.read_text(encoding="utf-8"))["run_id"]


def _open_outbox(config: Config, journal: Journal, tags: Mapping[str, str]) -> "MlflowTracker":
    tracking, run_dir = config.tracking, journal.path.parent
    run_name = tracking.run_name or run_dir.resolve().name
    server = _MlflowServer(os.environ.get("MLFLOW_TRACKING_URI") or tracking.uri, tracking.experiment, run_name)
    outbox = Outbox(journal, run_dir / "mlflow_run.json", server, experiment=tracking.experiment)
    outbox.post("tags", tags=dict(tags))
    params = {**config.flat(), "tracking.uri": server.uri}  # without the password it may hold
    outbox.post("params", params={name: str(value) for name, value in params.items()})
    return MlflowTracker(outbox)


class NullTracker:
    """Says nothing to anyone: for the ranks past 0."""

    def log_metrics(self, metrics: Mapping[str, float | None], step: int) -> None: ...

    def log_params(self, params: Mapping[str, Any]) -> None: ...

    def log_artifact(self, path: Path, folder: str = "") -> None: ...

    def log_dataset(self, name: str, digest: str, path: Path) -> None: ...

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

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox

    def log_metrics(self, metrics: Mapping[str, float | None], step: int) -> None:
        self._outbox.log(step, metrics)

    def log_params(self, params: Mapping[str, Any]) -> None:
        self._outbox.post("params", params={name: str(value) for name, value in params.items()})

    def log_artifact(self, path: Path, folder: str = "") -> None:
        self._outbox.post("artifact", path=str(path.resolve()), folder=folder)

    def log_dataset(self, name: str, digest: str, path: Path) -> None:
        self._outbox.post("dataset", name=name, digest=digest, path=str(path))

    def rewind(self, step: int) -> None:
        """MLflow cannot delete points: where it had received later steps, it will show both values of them."""
        self._outbox.rewind(step)

    def finish(self, status: str) -> None:
        """Send what waits and end the run as FINISHED, FAILED or KILLED."""
        self._outbox.post("status", status=status)
        self._outbox.flush(urgent=True)
        if not self._outbox.is_empty:
            _log.warning("MLflow has not received everything of this run; the next stage sends the rest")


class _MlflowServer:
    """One run of an MLflow server or database, as an Outbox sees it."""

    def __init__(self, uri: str, experiment: str, run_name: str) -> None:
        self.uri = _without_password(uri)
        self._full_uri = uri
        self._experiment = experiment
        self._run_name = run_name
        self._client: MlflowClient
        self._run_id: str

    def connect(self, run_id: str) -> str:
        self._client = _make_client(self._full_uri)
        forced = os.environ.get("MLFLOW_RUN_ID", "")
        run = self._find_run(forced or run_id)
        if forced and run is None:
            raise TrackingError(f"MLFLOW_RUN_ID: {self.uri} has no run {forced}; unset it to begin a new run")
        if run is None:
            run = self._client.create_run(self._experiment_id(), run_name=self._run_name)
        elif run.info.status != "RUNNING":
            self._client.update_run(run.info.run_id, status="RUNNING")
        self._run_id = run.info.run_id
        return self._run_id

    def refuses(self, error: Exception) -> bool:
        return getattr(error, "error_code", "") in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST") or isinstance(
            error, FileNotFoundError
        )

    def send(self, kind: str, arguments: dict[str, Any]) -> None:
        senders: dict[str, Callable[..., None]] = {
            "params": self._send_params,
            "tags": self._send_tags,
            "artifact": self._send_artifact,
            "dataset": self._send_dataset,
            "status": self._send_status,
        }
        senders[kind](**arguments)

    def send_metrics(self, entries: list[Entry]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, int(entry.time_s * 1000), entry.step)
            for entry in entries
            for name, value in entry.metrics.items()
            if value is not None
        ]
        for start in range(0, len(metrics), _METRICS_A_CALL):
            self._client.log_batch(self._run_id, metrics=metrics[start : start + _METRICS_A_CALL])

    def _send_params(self, params: dict[str, str]) -> None:
        from mlflow.entities import Param

        logged = self._client.get_run(self._run_id).data.params
        new = [Param(name, value) for name, value in params.items() if name not in logged]
        for start in range(0, len(new), _PARAMS_A_CALL):
            self._client.log_batch(self._run_id, params=new[start : start + _PARAMS_A_CALL])
        # MLflow's parameters never change; a run that was resumed with others says so.
        self._send_tags(
            {f"changed/{name}": value for name, value in params.items() if logged.get(name, value) != value}
        )

    def _send_tags(self, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        self._client.log_batch(self._run_id, tags=[RunTag(name, value) for name, value in tags.items()])

    def _send_artifact(self, path: str, folder: str) -> None:
        send = self._client.log_artifacts if Path(path).is_dir() else self._client.log_artifact
        send(self._run_id, path, folder or None)

    def _send_dataset(self, name: str, digest: str, path: str) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        # MLflow takes 36 characters of a digest; the whole one is in the tags.
        dataset = Dataset(name, digest[:36], source_type="local", source=json.dumps({"uri": path}))
        self._client.log_inputs(self._run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])
        self._send_tags({f"data_hash/{name}": digest})

    def _send_status(self, status: str) -> None:
        self._client.set_terminated(self._run_id, status)

    def _find_run(self, run_id: str) -> "Run | None":
        if not run_id:
            return None
        try:
            run = self._client.get_run(run_id)
        except Exception as error:
            if getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return run if run.info.lifecycle_stage == "active" else None

    def _experiment_id(self) -> str:
        experiment = self._client.get_experiment_by_name(self._experiment)
        if experiment is None:
            return self._client.create_experiment(self._experiment, artifact_location=_artifacts_beside(self._full_uri))
        if experiment.lifecycle_stage != "active":
            raise TrackingError(
                f"tracking.experiment: {self._experiment!r} was deleted at {self.uri}; name another, or restore it: "
                f"mlflow experiments restore -x {experiment.experiment_id}"
            )
        return experiment.experiment_id


def _make_client(uri: str) -> "MlflowClient":
    """A client that fails fast and keeps quiet; mlflow is imported here, since that takes a second and not every run needs it."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    for chatter in ("mlflow.store", "alembic", "urllib3.connectionpool"):
        logging.getLogger(chatter).setLevel(logging.ERROR)
    try:
        return MlflowClient(tracking_uri=uri)
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        raise TrackingError(
            f"tracking.uri: must be sqlite:///FILE or http(s)://HOST, got {_without_password(uri)!r}: {error.message}"
        ) from error


def _artifacts_beside(uri: str) -> str | None:
    """A local database keeps artifacts in `mlartifacts` beside itself; a server knows its own place."""
    path = uri.removeprefix("sqlite:///")
    return None if path == uri else (Path(path).resolve().parent / "mlartifacts").as_uri()


def _without_password(uri: str) -> str:
    parts = urlsplit(uri)
    return uri if parts.password is None else uri.replace(f":{parts.password}@", ":***@")
