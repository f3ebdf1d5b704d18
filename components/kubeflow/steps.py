"""Stages as components of Kubeflow Pipelines: thin wrappers with names and types, without logic of their own.

`params` is the text of a parameter file, `overrides` a list of `section.key=value`; both reach every step unchanged.
Artifacts only carry order and lineage between steps: the data lie where the configuration says. kfp sends the source of
these functions to their pods, so each imports what it needs. The image has this package and kfp.
"""

from collections.abc import Callable
from typing import Any

from kfp import dsl
from kfp.dsl import HTML, Dataset, Input, Metrics, Model, Output


def _component(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a component that installs nothing; pipelines/placement.py sets its image; locally it runs in this Python."""
    return dsl.component(function, base_image="python", install_kfp_package=False)


@_component
def download(params: str, overrides: list[str], raw: Output[Dataset]) -> None:
    """Fetch, generate or check the raw data set."""
    from components import download
    from components.kubeflow import artifacts, context

    with context.configured(params, overrides) as config:
        artifacts.describe_raw(raw, config, download.run(config))


@_component
def prepare(params: str, overrides: list[str], raw: Input[Dataset], dataset: Output[Dataset]) -> None:
    """Check every image and annotation once; write the index."""
    from components import prepare
    from components.kubeflow import artifacts, context

    with context.configured(params, overrides) as config:
        artifacts.describe_dataset(dataset, prepare.run(config))


@_component
def train(
    params: str, overrides: list[str], dataset: Input[Dataset], model: Output[Model], pipeline_run: str, seed: int = -1
) -> None:
    """Train on the cluster as a job of cluster.api, and follow it to its end."""
    from components import pytorchjob
    from components.kubeflow import artifacts, context

    with context.configured(params, overrides, seed) as config:
        pytorchjob.run(config, run_id=context.job_id(config, pipeline_run), skip_test=True)
        artifacts.describe_model(model, config)


@_component
def train_here(
    params: str, overrides: list[str], dataset: Input[Dataset], model: Output[Model], pipeline_run: str, seed: int = -1
) -> None:
    """Train in this step, with train.processes processes."""
    from components.kubeflow import artifacts, context

    with context.configured(params, overrides, seed) as config:
        context.in_processes("train", config, "--skip-test")
        artifacts.describe_model(model, config)


@_component
def evaluate(
    params: str, overrides: list[str], model: Input[Model], metrics: Output[Metrics], page: Output[HTML], seed: int = -1
) -> None:
    """Compute box and mask AP of the trained model."""
    from components.kubeflow import artifacts, context

    with context.configured(params, overrides, seed) as config:
        context.in_processes("evaluate", config)
        artifacts.describe_evaluation(metrics, page, config)


@_component
def predict(params: str, overrides: list[str], model: Input[Model], page: Output[HTML]) -> None:
    """Draw the model's detections in some images of the val split."""
    from components import predict
    from components.kubeflow import artifacts, context

    with context.configured(params, overrides) as config:
        artifacts.describe_predictions(page, predict.run(config))


@_component
def benchmark(params: str, overrides: list[str], model: Input[Model], metrics: Output[Metrics]) -> None:
    """Measure throughput, step time and memory."""
    from components import benchmark
    from components.kubeflow import artifacts, context

    with context.configured(params, overrides) as config:
        artifacts.describe_benchmark(metrics, benchmark.run(config))


@_component
def register(params: str, overrides: list[str], model: Input[Model], registered: Output[Model]) -> None:
    """Register the model in MLflow if its AP reaches registry.min_bbox_ap and registry.min_segm_ap."""
    from components import register
    from components.kubeflow import artifacts, context

    with context.configured(params, overrides) as config:
        result = register.run(config) if config.tracking.enabled else None
        artifacts.describe_registration(registered, config, result)


@_component
def seeds(params: str, overrides: list[str]) -> list[int]:
    """List the seeds of a study, and start its MLflow run."""
    from components.kubeflow import context

    with context.configured(params, overrides) as config:
        context.begin_study(config)
        return list(config.stability.seeds)


@_component
def summarise(
    params: str, overrides: list[str], evaluations: Input[list[Metrics]], metrics: Output[Metrics], page: Output[HTML]
) -> None:
    """Compute mean and standard deviation of AP over the seeds of a study."""
    from components.kubeflow import artifacts, context
    from components.studies import study

    with context.configured(params, overrides) as config:
        artifacts.describe_study(metrics, page, study.summarise_study(config))


@_component
def finish(
    params: str, overrides: list[str], pipeline_run: str, is_study: bool, status: dsl.PipelineTaskFinalStatus
) -> None:
    """Mark the MLflow runs as finished or failed, and end training jobs, however the preceding steps ended."""
    from components.kubeflow import context

    with context.configured(params, overrides) as config:
        context.end_runs(config, status.state, pipeline_run, is_study=is_study)
