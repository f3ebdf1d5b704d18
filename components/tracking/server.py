"""Server of an Outbox: one run on an MLflow server or database."""

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from filelock import FileLock

from components.config import TrackingConfig
from components.runs.experiment import in_working_tree
from components.runs.journal import Entry
from model.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_SQLITE = "sqlite:///"
_METRICS_A_CALL = 1000  # MLflow's limits on log_batch
_PARAMS_A_CALL = 100
_TAG_LENGTH = 5000


class TrackingError(UserError):
    """MLflow cannot be used as configured."""


class MlflowServer:
    """Client that sends items to one MLflow run."""

    def __init__(self, uri: str, experiment: str, run_name: str) -> None:
        self.uri = without_password(uri)
        self._full_uri = _in_working_tree(uri)
        self._experiment = experiment
        self._run_name = run_name
        self._client: MlflowClient
        self._run_id: str

    def connect(self, run_id: str) -> str:
        with _locked(self._full_uri), _allowed(self.uri):
            self._client = make_client(self._full_uri)
            return self._begin(run_id)

    def _begin(self, run_id: str) -> str:
        forced = os.environ.get("MLFLOW_RUN_ID", "")
        run = self._find_run(forced or run_id)
        if forced and run is None:
            raise TrackingError(
                f"MLFLOW_RUN_ID: must be a run at {self.uri}, got {forced}; unset it to start a new run"
            )
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
            "origin": self._send_origin,
            "parent": self._send_parent,
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
        # MLflow's parameters cannot change; a run resumed with other values gets tags.
        self._send_tags(
            {f"changed/{name}": value for name, value in params.items() if logged.get(name, value) != value}
        )

    def _send_tags(self, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        if tags:
            self._client.log_batch(
                self._run_id, tags=[RunTag(name, value[:_TAG_LENGTH]) for name, value in tags.items()]
            )

    def _send_origin(self, tags: dict[str, str]) -> None:
        """Set tags of the run's origin; a later stage on another machine or commit adds `changed/…` tags."""
        known = self._client.get_run(self._run_id).data.tags
        changed = {f"changed/{name}": value for name, value in tags.items() if known.get(name, value) != value}
        self._send_tags({name: value for name, value in tags.items() if name not in known} | changed)

    def _send_parent(self, run_id: str) -> None:
        self._send_tags({"mlflow.parentRunId": run_id})

    def _send_artifact(self, path: str, folder: str) -> None:
        send = self._client.log_artifacts if Path(path).is_dir() else self._client.log_artifact
        send(self._run_id, path, folder or None)

    def _send_dataset(self, name: str, digest: str, path: str, context: str = "training") -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        # MLflow limits digests to 36 characters; the complete one is a tag.
        dataset = Dataset(name, digest[:36], source_type="local", source=json.dumps({"uri": path}))
        self._client.log_inputs(self._run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])
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

    def _make_experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        place = _artifacts_beside(self._full_uri)
        try:
            return self._client.create_experiment(self._experiment, artifact_location=place)
        except MlflowException as error:
            made = self._client.get_experiment_by_name(self._experiment)
            if error.error_code != "RESOURCE_ALREADY_EXISTS" or made is None:  # otherwise another process was faster
                raise
            return made.experiment_id

    def _experiment_id(self) -> str:
        experiment = self._client.get_experiment_by_name(self._experiment)
        if experiment is None:
            return self._make_experiment()
        if experiment.lifecycle_stage != "active":
            raise TrackingError(
                f"tracking.experiment: {self._experiment!r} was deleted at {self.uri}; set another name, or restore "
                "it: "
                f"mlflow experiments restore -x {experiment.experiment_id}"
            )
        return experiment.experiment_id


@contextmanager
def _allowed(uri: str) -> Iterator[None]:
    """Raise TrackingError within the context if MLflow denies access."""
    try:
        yield
    except Exception as error:
        if getattr(error, "error_code", "") not in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
            raise
        raise TrackingError(
            f"MLflow at {uri}: access must be allowed, but is denied; set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD"
        ) from error


@contextmanager
def _locked(uri: str) -> Iterator[None]:
    """Lock a local database within the context, since its first user creates or migrates the tables."""
    if not uri.startswith(_SQLITE):
        yield
        return
    path = Path(uri.removeprefix(_SQLITE))
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(path.name + ".lock")):
        yield


def tracking_uri(tracking: TrackingConfig) -> str:
    """URI of MLflow: MLFLOW_TRACKING_URI if set, else tracking.uri."""
    return os.environ.get("MLFLOW_TRACKING_URI") or tracking.uri


def _in_working_tree(uri: str) -> str:
    """The URI of a local database that outlasts a DVC experiment: a relative path starts in the user's tree."""
    path = uri.removeprefix(_SQLITE)
    return uri if path == uri else f"{_SQLITE}{in_working_tree(Path(path))}"


def make_client(uri: str) -> "MlflowClient":
    """Make a client that fails fast and logs little; mlflow is imported only here, since that takes a second."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    for name in ("mlflow.pyfunc", "mlflow.store", "alembic", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        return MlflowClient(tracking_uri=uri)
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        raise TrackingError(
            f"tracking.uri: must be sqlite:///FILE or http(s)://HOST, got {without_password(uri)!r}: {error.message}"
        ) from error


def _artifacts_beside(uri: str) -> str | None:
    """Folder `mlartifacts` beside a local database; None for a server, which has its own location."""
    path = uri.removeprefix(_SQLITE)
    return None if path == uri else (Path(path).resolve().parent / "mlartifacts").as_uri()


def without_password(uri: str) -> str:
    """Mask the password in a URI."""
    parts = urlsplit(uri)
    return uri if parts.password is None else uri.replace(f":{parts.password}@", ":***@")
