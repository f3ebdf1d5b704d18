"""Checkpoints in MLflow's model registry, as `maskrcnn register` puts them there."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from components.config import TrackingConfig
from components.tracking.client import TrackingError, in_users_tree, make_client, tracking_uri
from components.tracking.registry import answers


@contextmanager
def fetched_checkpoint(tracking: TrackingConfig, uri: str) -> Iterator[Path]:
    """Fetch the checkpoint of a registered model; it is there within the context.

    Args:
        uri: models:/NAME@ALIAS or models:/NAME/VERSION.

    Raises:
        TrackingError: if MLflow cannot be reached, has no such model, or has one that is not of `maskrcnn register`.
    """
    server = in_users_tree(tracking_uri(tracking))
    make_client(server)  # sets the limits of requests
    import mlflow
    from mlflow.models import Model

    with TemporaryDirectory() as scratch:
        with answers(server):
            fetched = mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=scratch, tracking_uri=server)
        folder = Path(fetched)
        artifacts = Model.load(folder).flavors.get("python_function", {}).get("artifacts", {})
        path = folder / artifacts.get("checkpoint", {}).get("path", "")
        if not path.is_file():
            raise TrackingError(f"{uri}: must be a model of `maskrcnn register`, but has no checkpoint")
        yield path
