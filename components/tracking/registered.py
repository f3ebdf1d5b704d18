"""Checkpoints in MLflow's model registry, as `maskrcnn register` puts them there."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from components.config import TrackingConfig
from components.tracking.client import TrackingError, in_users_tree, make_client, tracking_uri
from components.tracking.registry import answers

if TYPE_CHECKING:
    from mlflow import MlflowClient


@contextmanager
def fetched_checkpoint(tracking: TrackingConfig, uri: str) -> Iterator[Path]:
    """Fetch the checkpoint of a registered model; it is there within the context.

    Args:
        uri: models:/NAME@ALIAS or models:/NAME/VERSION.

    Raises:
        TrackingError: if MLflow cannot be reached, has no such model, or has one that is not of `maskrcnn register`.
    """
    server = in_users_tree(tracking_uri(tracking))
    client = make_client(server)
    import mlflow
    from mlflow.models import Model

    with TemporaryDirectory() as scratch:
        with answers(server):
            source = _source(client, uri)
            fetched = mlflow.artifacts.download_artifacts(artifact_uri=source, dst_path=scratch, tracking_uri=server)
        folder = Path(fetched)
        artifacts = Model.load(folder).flavors.get("python_function", {}).get("artifacts", {})
        path = folder / artifacts.get("checkpoint", {}).get("path", "")
        if not path.is_file():
            raise TrackingError(f"{uri}: must be a model of `maskrcnn register`, but has no checkpoint")
        yield path


def _source(client: "MlflowClient", uri: str) -> str:
    """The place of a version's files; MLflow would look for the name in the registry of the environment."""
    name, _, alias = uri.removeprefix("models:/").partition("@")
    if alias:
        version = client.get_model_version_by_alias(name, alias).version
    else:
        name, _, version = name.partition("/")
    return str(client.get_model_version_download_uri(name, str(version)))
