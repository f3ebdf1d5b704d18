"""Checkpoints in MLflow's model registry, as `maskrcnn register` puts them there."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from components.config import TrackingConfig
from components.runs.thresholds import Thresholds
from components.tracking.client import SQLITE, TrackingError, in_users_tree, make_client, tracking_uri
from components.tracking.registry import answers
from model.files import read_json

if TYPE_CHECKING:
    from mlflow import MlflowClient

_FILES = ("checkpoint", "thresholds")  # names in the model


class _Stored(BaseModel):
    """Content of thresholds.json."""

    of_all: float
    per_class: dict[str, float]
    test_time: dict[str, Any] = {}


@contextmanager
def fetched_model(tracking: TrackingConfig, uri: str) -> Iterator[tuple[Path, Thresholds | None]]:
    """Fetch the checkpoint of a registered model, which is there within the context, and its best thresholds, if any.

    Args:
        uri: models:/NAME@ALIAS or models:/NAME/VERSION.

    Raises:
        TrackingError: if MLflow cannot be reached, has no such model, or has one that is not of `maskrcnn register`.
    """
    server = in_users_tree(tracking_uri(tracking))
    if server.startswith(SQLITE) and not Path(server.removeprefix(SQLITE)).is_file():
        raise TrackingError(
            f"{uri}: must be in MLflow's registry, but {server} does not exist; set MLFLOW_TRACKING_URI, or "
            "tracking.uri, to the server or database that has it"
        )
    client = make_client(server)
    import mlflow
    from mlflow.models import Model

    with TemporaryDirectory() as scratch:
        with answers(server):
            source = _source(client, uri)
            fetched = mlflow.artifacts.download_artifacts(artifact_uri=source, dst_path=scratch, tracking_uri=server)
        folder = Path(fetched)
        artifacts = Model.load(folder).flavors.get("python_function", {}).get("artifacts", {})
        checkpoint, thresholds = (folder / artifacts.get(name, {}).get("path", "") for name in _FILES)
        if not checkpoint.is_file():
            raise TrackingError(f"{uri}: must be a model of `maskrcnn register`, but has no checkpoint")
        yield checkpoint, _read(thresholds, uri) if thresholds.is_file() else None


def _read(path: Path, uri: str) -> Thresholds:
    return Thresholds(**read_json(path, _Stored, f"register {uri} again", TrackingError))


def _source(client: "MlflowClient", uri: str) -> str:
    """The place of a version's files; MLflow would look for the name in the registry of the environment."""
    name, _, alias = uri.removeprefix("models:/").partition("@")
    if alias:
        version = client.get_model_version_by_alias(name, alias).version
    else:
        name, _, version = name.partition("/")
    return str(client.get_model_version_download_uri(name, str(version)))
