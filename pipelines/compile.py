"""A pipeline as text: the intermediate representation of Kubeflow Pipelines, the same bytes for the same request.

    text = compile_pipeline(Request("training", Path("params.yaml"), ["train.max_iters=90000"]))

The parameter file becomes the default of the pipeline's parameter `params`, and overrides that of `overrides`, where a
run can change both. Only what a pod is made of is compiled in, so an override of `cluster.*` goes into `params`.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from google.protobuf.json_format import MessageToDict
from kfp.dsl.base_component import BaseComponent
from ruamel.yaml import YAML

from components.cluster.description import require_volume
from components.config import Config
from components.params import ConfigError, config_text, load_config
from components.pytorchjob import make_manifest
from pipelines import training
from pipelines.placement import Placement, on_cluster

_COMPILED_IN = ("cluster.", "stability.parallel=")
_NOT_ON_CLUSTER = "tracking.uri="  # pods take cluster.tracking_uri, and the URI of this machine may hold a password


@dataclass(frozen=True)
class Request:
    """A request for a pipeline, from the command line."""

    pipeline: str  # one of PIPELINES
    params: Path
    overrides: Sequence[str]  # section.key=value

    @property
    def config(self) -> Config:
        """The configuration with all overrides."""
        return load_config(self.params, self.overrides)

    def defaults(self) -> tuple[str, list[str]]:
        """The texts of `params` and `overrides`, as pods may see them."""
        compiled_in = [word for word in self.overrides if word.startswith(_COMPILED_IN)]
        rest = [word for word in self.overrides if not word.startswith((*_COMPILED_IN, _NOT_ON_CLUSTER))]
        config = load_config(self.params, compiled_in)
        tracking = config.tracking.model_copy(update={"uri": config.cluster.tracking_uri})
        cluster = config.cluster.model_copy(update={"context": ""})  # pods have no kubeconfig
        return config_text(config.model_copy(update={"tracking": tracking, "cluster": cluster})), rest


def output_dir(config: Config, pipeline: str) -> Path:
    """The folder of a pipeline's result."""
    return config.stability.output_dir if pipeline == "stability" else config.train.output_dir


def compile_pipeline(request: Request, *, with_overrides: bool = True) -> str:
    """The pipeline of a request, checked as far as that can be done before it runs.

    Args:
        with_overrides: make them the default of `overrides`; otherwise that is empty, and each run gives its own.

    Raises:
        ConfigError, ManifestError: if its steps or its training job could not run so.
    """
    config = request.config
    check(config, request.pipeline)
    params, overrides = request.defaults()
    defaults = overrides if with_overrides else []
    return _to_yaml(define(request.pipeline, on_cluster(config), params, defaults))


def define(pipeline: str, placement: Placement, params: str, overrides: list[str]) -> BaseComponent:
    """Define one of PIPELINES with the defaults of its two parameters."""
    function: Callable[..., BaseComponent] = getattr(training, pipeline)
    return function(placement, params, overrides)


def _to_yaml(pipeline: BaseComponent) -> str:
    """The documents that kfp's compiler writes, without its opening comment, which a multi-line default breaks."""
    yaml, stream = YAML(typ="safe", pure=True), io.StringIO()
    yaml.default_flow_style = False
    yaml.width = 4096
    yaml.dump_all([MessageToDict(pipeline.pipeline_spec), MessageToDict(pipeline.platform_spec)], stream)
    return stream.getvalue()


def check(config: Config, pipeline: str) -> None:
    """Refuse what would end as a failed pod.

    Raises:
        ConfigError, ManifestError: with what to change.
    """
    make_manifest(config)
    written = {"data.raw_dir": config.data.raw_dir}
    if pipeline == "stability":
        written["stability.output_dir"] = config.stability.output_dir
    for key, path in written.items():
        require_volume(key, path, config.cluster)
    for key, value in config.flat().items():
        if key != "tracking.uri" and isinstance(value, str) and "://" in value and urlsplit(value).password is not None:
            raise ConfigError(
                f"{key}: must hold no password, since all who see the pipeline see it; use cluster.secrets"
            )
