"""What a pipeline's step does around its stage, wherever it runs; `components/kubeflow/steps.py` makes kfp components of it.

    with configured(params, overrides) as config:
        prepare.run(config)

A pipeline hands every step the same two texts: a parameter file, and overrides of it as on a command line.
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
from components.studies.seeds import seed_config
from components.tracking.tracker import end_run, open_tracker
from model.errors import UserError

COMPILED = "MASKRCNN_COMPILED"  # of a step's pod: the values that were compiled into it, as JSON
# What is the same for all steps of a pipeline, so that no run can set it otherwise. The size of the training job, and where it
# is queued, may differ from run to run; the steps themselves keep the size that was compiled.
COMPILED_KEYS = (
    "cluster.image", "cluster.image_pull_secret", "cluster.working_dir", "cluster.volumes", "cluster.env", "cluster.secrets",
    "cluster.tracking_uri", "stability.parallel",
)  # fmt: skip
_STATUSES = {"SUCCEEDED": "FINISHED", "CANCELED": "KILLED", "CANCELLED": "KILLED"}  # of kfp and of MLflow


@contextmanager
def configured(params: str, overrides: Sequence[str], seed: int = -1) -> Iterator[Config]:
    """The step's configuration; in a pod, relative paths start at `cluster.working_dir`. The user's errors end the step without a traceback.

    Args:
        params: the text of a parameter file.
        overrides: `section.key=value`.
        seed: one of a stability study, whose training has a folder of its own; -1 is none. (kfp's local runner knows no None.)
    """
    with user_errors():
        if not params.strip():
            raise ConfigError("params: must be the text of a parameter file, got nothing; leave it as it was compiled")
        config = parse_config(params, overrides)
        if compiled := os.environ.get(COMPILED):
            _require_as_compiled(config, json.loads(compiled))
            os.chdir(config.cluster.working_dir)
            # A step has one GPU at most; the processes of the training job are counted by `cluster`.
            config = config.model_copy(update={"train": config.train.model_copy(update={"processes": 1})})
        yield config if seed < 0 else seed_config(config, seed)


def compiled_values(config: Config) -> str:
    """The value of the variable COMPILED."""
    flat = config.flat()
    return json.dumps({key: flat[key] for key in COMPILED_KEYS})


def _require_as_compiled(config: Config, compiled: dict[str, object]) -> None:
    flat = config.flat()
    for key, value in compiled.items():
        if flat[key] != value:
            raise ConfigError(
                f"{key}: must be as it was compiled into this pipeline, {json.dumps(value)}, got {json.dumps(flat[key])}; "
                "compile or submit the pipeline anew with it"
            )


def begin_study(config: Config) -> None:
    """Begin or continue the MLflow run of a study, the parent of those of its seeds."""
    with open_tracker(config, run_dir=config.stability.output_dir, metrics_csv=False):
        pass


def in_processes(stage: str, config: Config, *options: str) -> None:
    """Run a stage by its own command, which begins `train.processes` processes where more than one is wanted."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "params.yaml"
        save_config(config, path)
        importlib.import_module(f"components.{stage}").main(["--params", str(path), *options])


def job_id(config: Config, pipeline_run: str) -> str:
    """Names the training job: a step that is tried again finds the job of its own pipeline run, never that of another."""
    return f"{config.train.output_dir.name}-{pipeline_run[:8]}"


def end_runs(config: Config, state: str, *, is_study: bool) -> None:
    """Mark the MLflow runs of a pipeline as it ended. Of a study that failed, seeds that came to their end stay finished.

    Args:
        state: of the pipeline, as kfp has it.
        is_study: whether the pipeline trained `stability.seeds`.
    """
    status = _STATUSES.get(state, "FAILED")
    for one in [seed_config(config, seed) for seed in config.stability.seeds] if is_study else [config]:
        run_dir = one.train.output_dir
        its_status = "FINISHED" if is_study and _is_final(run_dir) else status
        run_id = end_run(one, run_dir=run_dir, status=its_status)
        print(f"{run_dir}: MLflow run {run_id} is {its_status}" if run_id else f"{run_dir}: no MLflow run was begun")


def _is_final(run_dir: Path) -> bool:
    """Whether training there came to its end, and was evaluated."""
    try:
        require_final(read_result(run_dir))
    except UserError:
        return False
    return True
