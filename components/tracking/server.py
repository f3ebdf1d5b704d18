"""Server of an Outbox: one run on an MLflow server or database."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from components.runs.journal import Entry
from components.tracking.client import (
    TrackingError,
    allowed,
    artifacts_beside,
    in_users_tree,
    locked,
    make_client,
    without_password,
)
from components.tracking.reason import reason

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

_log = logging.getLogger(__name__)
_METRICS_A_CALL = 1000  # MLflow's limits on log_batch
_PARAMS_A_CALL = 100
_TAG_LENGTH = 5000
_EXPERIMENT_NAME, _EXPERIMENT_ID = "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"
_MAY_CHANGE = (401, 403, 408, 425, 429)  # statuses of an upload that may succeed later


class MlflowServer:
    """Client that sends items to one MLflow run."""

    def __init__(self, uri: str, experiment: str, run_name: str) -> None:
        self.uri = without_password(uri)
        self.experiment = experiment
        self._full_uri = in_users_tree(uri)
        self._run_name = run_name
        self._client: MlflowClient
        self._run_id: str

    def connect(self, run_ids: list[str], experiment: str) -> str:
        with locked(self._full_uri), allowed(self.uri):
            self._client = make_client(self._full_uri)
            return self._begin(run_ids, experiment)

    def _begin(self, run_ids: list[str], experiment: str) -> str:
        if os.environ.get(_EXPERIMENT_ID):
            self.experiment = self._named_by_id(os.environ[_EXPERIMENT_ID])
        forced = os.environ.get("MLFLOW_RUN_ID", "")
        run = self._forced_run(forced) if forced else self._known_run(run_ids, experiment)
        if run is None:
            run = self._client.create_run(self._experiment_id(), run_name=self._run_name)
        elif run.info.status != "RUNNING":
            self._client.update_run(run.info.run_id, status="RUNNING")
        self._run_id = run.info.run_id
        return self._run_id

    def _named_by_id(self, experiment_id: str) -> str:
        """Return the name of the experiment of MLFLOW_EXPERIMENT_ID."""
        try:
            found = self._client.get_experiment(experiment_id)
        except Exception as error:
            if getattr(error, "error_code", "") not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise TrackingError(
                f"{_EXPERIMENT_ID}: must be an experiment at {self.uri}, got {experiment_id}; unset it to use "
                "MLFLOW_EXPERIMENT_NAME or tracking.experiment"
            ) from error
        if (os.environ.get(_EXPERIMENT_NAME) or found.name) != found.name:
            raise TrackingError(
                f"{_EXPERIMENT_NAME} and {_EXPERIMENT_ID} must name one experiment, got "
                f"{os.environ[_EXPERIMENT_NAME]!r} and {experiment_id}, which is {found.name!r} at {self.uri}; "
                "unset one of them"
            )
        return found.name

    def _known_run(self, run_ids: list[str], experiment: str) -> "Run | None":
        """Find the first run that is in the experiment here; the latest stays even if its experiment was renamed."""
        for run_id in run_ids:
            run = self._find_run(run_id)
            is_same = run_id == run_ids[0] and experiment == self.experiment
            if run is not None and (is_same or run.info.experiment_id == self._experiment_id()):
                return run
        return None

    def _forced_run(self, run_id: str) -> "Run":
        """Find the run of MLFLOW_RUN_ID; its experiment counts, but must not contradict the environment's."""
        run = self._find_run(run_id)
        if run is None:
            raise TrackingError(
                f"MLFLOW_RUN_ID: must be a run at {self.uri}, got {run_id}; unset it to start a new run"
            )
        source = self._source()
        if source == "tracking.experiment":
            return run
        experiment = self._client.get_experiment(run.info.experiment_id).name
        if experiment != self.experiment:
            raise TrackingError(
                f"MLFLOW_RUN_ID: must be a run of the experiment {self.experiment!r}, as {source} says, got {run_id} "
                f"of {experiment!r}; unset one of them"
            )
        return run

    def answers(self) -> bool:
        try:
            self._client.get_run(self._run_id)
        except Exception:  # any driver error
            return False
        return True

    def lacks_run(self) -> bool:
        try:
            return self._find_run(self._run_id) is None
        except Exception:  # any driver error
            return False

    def refuses(self, error: Exception) -> bool:
        status = getattr(getattr(error, "response", None), "status_code", 0)  # answer to an upload
        return (
            getattr(error, "error_code", "") in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
            or isinstance(error, FileNotFoundError)
            or (400 <= status < 500 and status not in _MAY_CHANGE)
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
            "replaced": self._send_replaced,
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
            self._send_batch(metrics[start : start + _METRICS_A_CALL])

    def _send_batch(self, metrics: "list[Metric]") -> None:
        """Send metrics in one call; if MLflow refuses some, all others, since one faulty name refuses the call."""
        try:
            self._client.log_batch(self._run_id, metrics=metrics)
        except Exception as error:
            if self.lacks_run() or not self.refuses(error):
                raise
            if len(metrics) == 1:
                _log.warning("MLflow at %s refuses the metric %r: %s", self.uri, metrics[0].key, reason(error))
                return
            for half in (metrics[: len(metrics) // 2], metrics[len(metrics) // 2 :]):
                self._send_batch(half)

    def _send_params(self, params: dict[str, str]) -> None:
        from mlflow.entities import Param

        run = self._client.get_run(self._run_id)
        logged, experiment = run.data.params, self._client.get_experiment(run.info.experiment_id).name
        params = params | {"tracking.experiment": experiment}  # the environment may have set another one
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
        if self._find_run(run_id) is not None:  # else it is a run of another server
            self._send_tags({"mlflow.parentRunId": run_id})

    def _send_artifact(self, path: str, folder: str) -> None:
        self._client.log_artifact(self._run_id, path, folder or None)

    def _send_dataset(self, name: str, digest: str, path: str, context: str = "training") -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        # MLflow limits digests to 36 characters; the complete one is a tag.
        dataset = Dataset(name, digest[:36], source_type="local", source=json.dumps({"uri": path}))
        self._client.log_inputs(self._run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])
        self._send_tags({f"data_hash/{name}": digest})

    def _send_status(self, status: str) -> None:
        self._client.set_terminated(self._run_id, status)

    def _send_replaced(self, run_id: str, folder: str) -> None:
        run = self._find_run(run_id)
        suffix = "".join(PurePath(folder).suffixes[-1:])  # .old-1
        if run is not None and not (run.info.run_name or "").endswith(suffix):
            self._client.update_run(run_id, name=f"{run.info.run_name or ''}{suffix}")

    def _find_run(self, run_id: str) -> "Run | None":
        try:
            run = self._client.get_run(run_id)
        except Exception as error:
            if getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return run if run.info.lifecycle_stage == "active" else None

    def _source(self) -> str:
        """Name of what set the experiment."""
        return next(
            (name for name in (_EXPERIMENT_ID, _EXPERIMENT_NAME) if os.environ.get(name)), "tracking.experiment"
        )

    def _make_experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        place = artifacts_beside(self._full_uri)
        try:
            return self._client.create_experiment(self.experiment, artifact_location=place)
        except MlflowException as error:
            made = self._client.get_experiment_by_name(self.experiment)
            if error.error_code != "RESOURCE_ALREADY_EXISTS" or made is None:  # otherwise another process was faster
                raise
            return made.experiment_id

    def _experiment_id(self) -> str:
        experiment = self._client.get_experiment_by_name(self.experiment)
        if experiment is None:
            return self._make_experiment()
        if experiment.lifecycle_stage != "active":
            raise TrackingError(
                f"{self._source()}: {self.experiment!r} was deleted at {self.uri}; set another name, or restore "
                f"it: mlflow experiments restore -x {experiment.experiment_id}"
            )
        return experiment.experiment_id
