"""Context of a pipeline step: configuration, processes and MLflow runs; steps.py makes kfp components with it.

    with configured(params, overrides) as config:
        prepare.run(config)

A pipeline passes the same two inputs to every step: the text of a parameter file, and overrides as on a command line.
"""

import importlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from components.cli import user_errors
from components.config import Config
from components.params import ConfigError, parse_config, save_config
from components.runs.result import read_result, require_final
from components.studies.seed import seed_config
from components.tracking.tracker import end_run, open_tracker
from model.errors import UserError

COMPILED = "MASKRCNN_COMPILED"  # environment variable of a step's pod: the compiled values as JSON
# Keys that are compiled into all steps of a pipeline, so that no run can change them. The size of the training job and
# its queue may differ from run to run; the steps themselves keep their compiled size.
COMPILED_KEYS = (
    "cluster.image", "cluster.image_pull_secret", "cluster.working_dir", "cluster.volumes", "cluster.env",
    "cluster.secrets", "cluster.tracking_uri", "stability.parallel",
)  # fmt: skip
# State of the preceding steps → status of MLflow. A cluster gives the state of ML Metadata's execution, kfp's local
# runner its own words. RUNNING remains if a step could not report its end, because its pod was killed.
_STATUSES = {
    "COMPLETE": "FINISHED", "CACHED": "FINISHED", "SUCCEEDED": "FINISHED",
    "RUNNING": "KILLED", "CANCELED": "KILLED", "CANCELLED": "KILLED",
}  # fmt: skip


@contextmanager
def configured(params: str, overrides: Sequence[str], seed: int = -1) -> Iterator[Config]:
    """Yield the step's configuration; user errors within the context end the step without a traceback.

    In a pod, relative paths start at `cluster.working_dir`.

    Args:
        params: text of a parameter file.
        overrides: `section.key=value`.
        seed: seed of a stability study, whose training has its own folder; -1 for none (kfp's local runner has no
            None).
    """
    with user_errors():
        if not params.strip():
            raise ConfigError("params: must be the text of a parameter file, got nothing; keep the compiled value")
        config = parse_config(params, overrides)
        if compiled := os.environ.get(COMPILED):
            _require_as_compiled(config, json.loads(compiled))
            os.chdir(config.cluster.working_dir)
            # A step has at most one GPU; `cluster` sets the number of processes of the training job.
            config = config.model_copy(update={"train": config.train.model_copy(update={"processes": 1})})
        yield config if seed < 0 else seed_config(config, seed)


def compiled_values(config: Config) -> str:
    """Value of the environment variable COMPILED."""
    flat = config.flat()
    return json.dumps({key: flat[key] for key in COMPILED_KEYS})


def _require_as_compiled(config: Config, compiled: dict[str, object]) -> None:
    flat = config.flat()
    for key, value in compiled.items():
        if flat[key] != value:
            raise ConfigError(
                f"{key}: must be the value compiled into this pipeline, {json.dumps(value)}, got "
                f"{json.dumps(flat[key])}; "
                "compile or submit the pipeline again with the new value"
            )


def begin_study(config: Config) -> None:
    """Start or continue the MLflow run of a study, the parent of the runs of its seeds."""
    with open_tracker(config, run_dir=config.stability.output_dir, metrics_csv=False):
        pass


def in_processes(stage: str, config: Config, *options: str) -> None:
    """Run a stage by its command, which starts `train.processes` processes if there are several."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "params.yaml"
        save_config(config, path)
        importlib.import_module(f"components.{stage}").main(["--params", str(path), *options])


def job_id(config: Config, pipeline_run: str) -> str:
    """Id of the training job: a retried step finds the job of its own pipeline run, never that of another."""
    return f"{config.train.output_dir.name}-{pipeline_run[:8]}"


def end_runs(config: Config, state: str, pipeline_run: str, *, is_study: bool) -> None:
    """Mark the MLflow runs of a pipeline by its final state; completed seeds of a failed study stay finished.

    Jobs that still train, since the steps that followed them were killed, are deleted before.

    Args:
        state: state of the preceding steps when the pipeline ended, a key of _STATUSES; others count as failures.
        pipeline_run: id of the pipeline's run.
        is_study: True if the pipeline trained `stability.seeds`.
    """
    status = _STATUSES.get(state, "FAILED")
    trained = [seed_config(config, seed) for seed in config.stability.seeds] if is_study else [config]
    if status != "FINISHED" and COMPILED in os.environ:
        _end_jobs(config, [job_id(one, pipeline_run) for one in trained])
    for one in trained:
        run_dir = one.train.output_dir
        its_status = "FINISHED" if is_study and _is_final(run_dir) else status
        run_id = end_run(one, run_dir=run_dir, status=its_status)
        print(f"{run_dir}: MLflow run {run_id} is {its_status}" if run_id else f"{run_dir}: no MLflow run was started")


def _end_jobs(config: Config, run_ids: Sequence[str]) -> None:
    from components.pytorchjob import withdraw

    try:
        for name in withdraw(config, run_ids):
            print(f"{name}: the training job went on; it is marked as deleted")
    except UserError as error:
        print(f"training jobs may go on: {error}")


def _is_final(run_dir: Path) -> bool:
    """True if the run was trained to its end and evaluated."""
    try:
        require_final(read_result(run_dir))
    except UserError:
        return False
    return True
