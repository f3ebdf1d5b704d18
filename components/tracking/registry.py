"""MLflow's model registry: versions of one name, each with files, run and scores, and an alias for the best.

The files of a version are a pyfunc model: components/tracking/pyfunc.py, the packages `model` and `cuda_ops`, and a
checkpoint with weights only. They load wherever the packages in REQUIREMENTS are installed, without unpickling.
"""

import base64
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from numpy.random import default_rng
from PIL import Image

import cuda_ops
import model
from components.config import PredictConfig
from components.tracking.client import TrackingError, make_client, without_password
from components.tracking.reason import reason
from model.config import ShapesConfig
from model.data.synthetic import draw_scene

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import ModelSignature

CHAMPION = "champion"
REQUIREMENTS = ("torch", "torchvision", "numpy", "pillow", "simplejpeg", "pycocotools", "pydantic", "pandas")
_CODE = Path(__file__).with_name("pyfunc.py")


@dataclass(frozen=True)
class Version:
    """Version of a registered model."""

    number: str
    tags: dict[str, str]


class Registry:
    """Versions of one name; errors of the server raise MlflowException."""

    def __init__(self, uri: str, name: str) -> None:
        self._name = name
        self._client = make_client(uri)

    def champion(self) -> Version | None:
        """Return the version with the alias, if any."""
        from mlflow.exceptions import MlflowException

        try:
            return _version(self._client.get_model_version_by_alias(self._name, CHAMPION))
        except MlflowException as error:
            # The model or its alias does not exist.
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            return None

    def set_champion(self, chosen: Version) -> None:
        """Set the alias to a version."""
        self._client.set_registered_model_alias(self._name, CHAMPION, chosen.number)

    def find(self, tags: Mapping[str, str]) -> Version | None:
        """Find the newest version with these tags."""
        found = self._client.search_model_versions(f"name = '{self._name}'", order_by=["version_number DESC"])
        return next((_version(v) for v in found if tags.items() <= v.tags.items()), None)

    def retag(self, known: Version, tags: Mapping[str, str]) -> Version:
        """Add or replace tags of a version."""
        for key, value in tags.items():
            if known.tags.get(key) != value:
                self._client.set_model_version_tag(self._name, known.number, key, value)
        return Version(known.number, {**known.tags, **tags})

    def add(self, run_id: str, files: Path, *, step: int, tags: Mapping[str, str]) -> Version:
        """Upload a model's files as an output of its run, and create a version of them.

        Args:
            files: folder written by `write_model`.
            step: training step of the checkpoint.
            tags: tags of the version.
        """
        from mlflow.entities import LoggedModelOutput

        run = self._client.get_run(run_id)
        logged = self._client.create_logged_model(run.info.experiment_id, self._name, run_id, model_type="pyfunc")
        self._client.log_model_artifacts(logged.model_id, str(files))
        self._client.finalize_logged_model(logged.model_id, "READY")
        self._client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step)])
        self._make_name()
        source = f"models:/{logged.model_id}"
        made = self._client.create_model_version(self._name, source, run_id, tags=dict(tags), model_id=logged.model_id)
        return _version(made)

    def _make_name(self) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(self._name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise


@contextmanager
def answers(uri: str) -> Iterator[None]:
    """Convert MLflow's errors within the context to user errors.

    Raises:
        TrackingError: if MLflow answers with an error, or not at all.
    """
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    try:
        yield
    except (MlflowException, RequestException) as error:
        raise TrackingError(f"MLflow at {without_password(uri)}: {reason(error)}") from error


def write_model(checkpoint: Path, folder: Path, predict: PredictConfig, extra: Mapping[str, Path]) -> None:
    """Write a model for `mlflow.pyfunc.load_model` and `mlflow models serve` into a new folder.

    Args:
        checkpoint: file with weights, configuration and classes; see `save_weights`.
        predict: default parameters of requests.
        extra: further files by name, kept beside the checkpoint in artifacts/.
    """
    from mlflow.pyfunc import save_model

    with TemporaryDirectory() as scratch:
        code = [_copy_of_package(package.__path__[0], Path(scratch)) for package in (cuda_ops, model)]
        settings = {"score_threshold": predict.score_threshold, "batch_size": predict.batch_size}
        save_model(
            folder,
            python_model=str(_CODE),
            artifacts={"checkpoint": str(checkpoint)} | {name: str(path) for name, path in extra.items()},
            code_paths=code,
            signature=_signature(predict),
            input_example=([base64.b64encode(_example()).decode()], settings),
            # Local versions, such as 2.11.0+cu130, are not on package indexes.
            pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in REQUIREMENTS],
        )


def _copy_of_package(folder: str, scratch: Path) -> str:
    """Copy a package without the sources of its operators, which are not compiled there."""
    target = scratch / Path(folder).name
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("__pycache__", "csrc"))
    return str(target)


def _signature(predict: PredictConfig) -> "ModelSignature":
    from mlflow.models import ModelSignature
    from mlflow.types.schema import AnyType, Array, ColSpec, DataType, Object, ParamSchema, ParamSpec, Property, Schema

    rle = Object([Property("size", Array(DataType.long)), Property("counts", DataType.string)])
    found = Object(
        [
            Property("label", DataType.long),
            Property("category_id", DataType.long),
            Property("class", DataType.string),
            Property("score", DataType.double),
            Property("bbox", Array(DataType.double)),
            Property("segmentation", rle, required=False),
        ]
    )
    return ModelSignature(
        # Bytes, or text; for a column of bytes, MLflow's server would decode text itself, but no data URLs.
        inputs=Schema([ColSpec(AnyType())]),
        outputs=Schema([ColSpec(Array(DataType.long), "size"), ColSpec(Array(found), "detections")]),
        params=ParamSchema(
            [
                ParamSpec("score_threshold", DataType.double, predict.score_threshold),
                ParamSpec("batch_size", DataType.long, predict.batch_size),
            ]
        ),
    )


def _example() -> bytes:
    """Make a PNG of generated shapes."""
    pixels, _ = draw_scene(ShapesConfig(), default_rng(0))
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _version(found: "ModelVersion") -> Version:
    return Version(str(found.version), dict(found.tags))
