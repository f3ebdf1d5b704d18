"""The pipelines: `training`, from raw data to a measured model, and `stability`, the same training from several seeds.

The same definitions run on a cluster and on this machine. `Placement` makes the difference: what trains, and what a
step's pod is like. Steps that write into one run's folder, and so into one MLflow run, go one after another.
"""

from kfp import dsl
from kfp.dsl import Collected, ExitHandler, ParallelFor
from kfp.dsl.base_component import BaseComponent

from components.kubeflow import steps
from pipelines.placement import Placement


def kubeflow_name(pipeline: str) -> str:
    """Name of one of PIPELINES in Kubeflow."""
    return f"maskrcnn-{pipeline}"


def training(placement: Placement, params: str, overrides: list[str]) -> BaseComponent:
    """download → prepare → train → evaluate → predict → benchmark → register if good enough.

    The MLflow run is then marked as ended, even after a failure.

    Args:
        placement: where it will run.
        params: the default of the parameter `params`.
        overrides: the default of the parameter `overrides`.
    """
    place, defaults = placement.place, (params, list(overrides))

    @dsl.pipeline(
        name=kubeflow_name("training"), description="Mask R-CNN: from raw data to a model with its AP and speed."
    )
    def pipeline(params: str = defaults[0], overrides: list[str] = defaults[1]) -> None:
        inputs = {"params": params, "overrides": overrides}
        with ExitHandler(
            place("finish", steps.finish(**inputs, pipeline_run=dsl.PIPELINE_JOB_ID_PLACEHOLDER, is_study=False)),
            name="stages",
        ):
            raw = place("download", steps.download(**inputs))
            data = place("prepare", steps.prepare(**inputs, raw=raw.outputs["raw"]))
            trained = place(
                "train",
                placement.train(
                    **inputs, dataset=data.outputs["dataset"], pipeline_run=dsl.PIPELINE_JOB_ID_PLACEHOLDER
                ),
            )
            model = trained.outputs["model"]
            scored = place("evaluate", steps.evaluate(**inputs, model=model))
            drawn = place("predict", steps.predict(**inputs, model=model).after(scored))
            timed = place("benchmark", steps.benchmark(**inputs, model=model).after(drawn))
            place("register", steps.register(**inputs, model=model).after(timed))

    return pipeline


def stability(placement: Placement, params: str, overrides: list[str]) -> BaseComponent:
    """download → prepare → for each of stability.seeds: train → evaluate; then a table of their AP.

    Args:
        placement: where it will run.
        params: the default of the parameter `params`.
        overrides: the default of the parameter `overrides`.
    """
    place, defaults = placement.place, (params, list(overrides))

    @dsl.pipeline(
        name=kubeflow_name("stability"), description="Mask R-CNN from several seeds: mean and deviation of AP."
    )
    def pipeline(params: str = defaults[0], overrides: list[str] = defaults[1]) -> None:
        inputs = {"params": params, "overrides": overrides}
        with ExitHandler(
            place("finish", steps.finish(**inputs, pipeline_run=dsl.PIPELINE_JOB_ID_PLACEHOLDER, is_study=True)),
            name="stages",
        ):
            raw = place("download", steps.download(**inputs))
            data = place("prepare", steps.prepare(**inputs, raw=raw.outputs["raw"]))
            listed = place("seeds", steps.seeds(**inputs))
            with ParallelFor(listed.output, name="each seed", parallelism=placement.parallel) as seed:
                trained = place(
                    "train",
                    placement.train(
                        **inputs,
                        dataset=data.outputs["dataset"],
                        pipeline_run=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
                        seed=seed,
                    ),
                )
                scored = place("evaluate", steps.evaluate(**inputs, model=trained.outputs["model"], seed=seed))
            place("summarise", steps.summarise(**inputs, evaluations=Collected(scored.outputs["metrics"])))

    return pipeline
