"""Upload a pipeline to Kubeflow Pipelines where it is new or has changed, run it, and follow the run to its end.

A pipeline has versions, named after the digest of the compiled text. The same parameter file and cluster give the same
version; overrides are the run's own arguments, so each run shows them.
"""

import hashlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kfp_server_api

from components.cluster.description import experiment_variables
from components.config import Config
from components.params import ConfigError
from model.errors import UserError
from pipelines.compile import Request, compile_pipeline, output_dir
from pipelines.progress import Progress, step_names
from pipelines.server import ConflictError, Server
from pipelines.training import kubeflow_name

_POLL_S = 5.0
_PATIENCE_S = 300.0  # with a server that is away while a run is followed
_ENDS = {"SUCCEEDED", "FAILED", "CANCELED", "SKIPPED"}


class WaitError(UserError):
    """The end of a run could not be determined in time."""


def submit(
    request: Request,
    server: Server,
    *,
    experiment: str = "",
    service_account: str = "",
    wait: bool = False,
    timeout_s: float = 0.0,
) -> int:
    """Run the pipeline of a request.

    Args:
        experiment: experiment of Kubeflow Pipelines; empty: tracking.experiment.
        service_account: account that steps run as; empty leaves it to the server.
        wait: follow the run to its end.
        timeout_s: longest wait; 0 waits for ever.

    Returns:
        0, or with `wait` 1 if the run did not succeed.

    Raises:
        ConfigError, ManifestError: if it could not run so.
        PipelinesError: if the server cannot be reached or refuses.
        WaitError: if the run has not ended in time; it continues.
    """
    config = request.config
    if server.namespace and server.namespace != config.cluster.namespace:
        raise ConfigError(
            f"--namespace: must be cluster.namespace, {config.cluster.namespace}, got {server.namespace}: steps and "
            "training share volumes, "
            "and those are of one namespace"
        )
    text = compile_pipeline(request, with_overrides=False)
    version = _upload(server, kubeflow_name(request.pipeline), text)
    _, overrides = request.defaults()
    run = kfp_server_api.V2beta1Run(
        display_name=f"{request.pipeline} {output_dir(config, request.pipeline).name}",
        experiment_id=_experiment(server, experiment or config.tracking.experiment),
        pipeline_version_reference=kfp_server_api.V2beta1PipelineVersionReference(
            pipeline_id=version.pipeline_id, pipeline_version_id=version.pipeline_version_id
        ),
        runtime_config=kfp_server_api.V2beta1RuntimeConfig(parameters={"overrides": overrides}),
        service_account=service_account or None,
    )
    run_id = server.ask("run the pipeline", server.runs.run_service_create_run, run).run_id
    print(f"run: {server.link('runs', run_id)}\n{_mlflow(config)}", flush=True)
    return _follow(server, run_id, Progress(server, run_id, step_names(text)), timeout_s) if wait else 0


def _mlflow(config: Config) -> str:
    if not config.tracking.enabled:
        return "MLflow: off (tracking.enabled)"
    cluster = config.cluster
    env = experiment_variables(cluster) | dict(word.split("=", 1) for word in cluster.env)
    number = env.get("MLFLOW_EXPERIMENT_ID")
    name = env.get("MLFLOW_EXPERIMENT_NAME") or (f"of id {number}" if number else config.tracking.experiment)
    return f"MLflow: experiment {name} at {cluster.tracking_uri}, as the steps reach it"


def _find_or_make(find: Callable[[], Any], make: Callable[[], Any]) -> tuple[Any, bool]:
    """The thing that is there, or else a new one, and whether it is new.

    Another submit may make it between the two steps; then the server refuses to, and it is there at a second look.
    """
    found = find()
    if found is not None:
        return found, False
    try:
        return make(), True
    except ConflictError:
        found = find()
        if found is None:
            raise
        return found, False


def _upload(server: Server, name: str, text: str) -> Any:
    """The version of this text: the one that is there, or a new one."""
    digest = f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    list_pipelines, list_versions = (
        server.pipelines.pipeline_service_list_pipelines,
        server.pipelines.pipeline_service_list_pipeline_versions,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{digest}.yaml"
        path.write_text(text, encoding="utf-8")
        # The server makes a version of a new pipeline, too, under the pipeline's own name.
        pipeline, is_new = _find_or_make(
            lambda: server.find("find the pipeline", list_pipelines, "pipelines", name, **server.scope),
            lambda: server.ask(
                "upload the pipeline", server.uploads.upload_pipeline, str(path), name=name, **server.scope
            ),
        )
        of = pipeline.pipeline_id
        version, is_new_version = _find_or_make(
            lambda: server.find("find the version", list_versions, "pipeline_versions", digest, pipeline_id=of),
            lambda: server.ask(
                "upload the version",
                server.uploads.upload_pipeline_version,
                str(path),
                **{"name": digest, "pipelineid": of},
            ),
        )
    if is_new_version:
        link = server.link("pipelines", f"{of}/version/{version.pipeline_version_id}")
        print(f"pipeline {name} {'is new' if is_new else 'has changed'}, version {digest}: {link}", flush=True)
    return version


def _experiment(server: Server, name: str) -> str:
    """Id of the experiment of this name."""
    api, wanted = server.experiments, kfp_server_api.V2beta1Experiment(display_name=name, **server.scope)
    list_experiments = api.experiment_service_list_experiments
    found, _ = _find_or_make(
        lambda: server.find("find the experiment", list_experiments, "experiments", name, **server.scope),
        lambda: server.ask("create the experiment", api.experiment_service_create_experiment, wanted),
    )
    return found.experiment_id


def _follow(server: Server, run_id: str, progress: Progress, timeout_s: float) -> int:
    until_s = time.monotonic() + timeout_s if timeout_s else float("inf")
    while True:
        run = server.ask("look at the run", server.runs.run_service_get_run, run_id, patience_s=_PATIENCE_S)
        if run.state in _ENDS:
            return 0 if progress.end(run) else 1
        progress.look(run)
        if time.monotonic() >= until_s:
            raise WaitError(
                f"run {run_id}: did not end within --timeout {timeout_s:g} s and is {run.state}; it continues: "
                f"{server.link('runs', run_id)}"
            )
        time.sleep(min(_POLL_S, max(0.0, until_s - time.monotonic())))
