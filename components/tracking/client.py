"""Connections to an MLflow server or database: where it is, and how long its answers may take."""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from filelock import FileLock

from components.config import TrackingConfig
from components.runs.experiment import in_working_tree
from model.errors import UserError
from model.files import real

if TYPE_CHECKING:
    from mlflow import MlflowClient

SQLITE = "sqlite:///"


class TrackingError(UserError):
    """MLflow cannot be used as configured."""


@contextmanager
def allowed(uri: str) -> Iterator[None]:
    """Raise TrackingError within the context if MLflow denies access."""
    try:
        yield
    except Exception as error:
        if getattr(error, "error_code", "") not in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
            raise
        raise TrackingError(
            f"MLflow at {uri}: access must be allowed, but is denied; set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD"
        ) from error


@contextmanager
def locked(uri: str) -> Iterator[None]:
    """Lock a local database within the context, since its first user creates or migrates the tables."""
    if not uri.startswith(SQLITE):
        yield
        return
    path = Path(uri.removeprefix(SQLITE))
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(path.name + ".lock")):
        yield


def tracking_uri(tracking: TrackingConfig) -> str:
    """URI of MLflow: MLFLOW_TRACKING_URI if set, else tracking.uri; that of a server without a slash at the end."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or tracking.uri
    return uri.rstrip("/") if uri.startswith("http") else uri


def in_users_tree(uri: str) -> str:
    """The URI of a local database that outlasts a DVC experiment: a relative path starts in the user's tree."""
    path = uri.removeprefix(SQLITE)
    return uri if path == uri else f"{SQLITE}{in_working_tree(Path(path))}"


def experiment_name(tracking: TrackingConfig) -> str:
    """Name of the experiment: MLFLOW_EXPERIMENT_NAME if set, else tracking.experiment."""
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or tracking.experiment


def make_client(uri: str) -> "MlflowClient":
    """Make a client that fails fast and logs little; mlflow is imported only here, since that takes a second."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT", "300")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from mlflow.store.db.db_types import DATABASE_ENGINES

    from components.tracking import uploads

    for name in ("mlflow.pyfunc", "mlflow.store", "alembic", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.ERROR)
    uploads.register()
    if uri.partition("://")[0].partition("+")[0] in DATABASE_ENGINES:
        _check_schema(uri)
    try:
        return MlflowClient(tracking_uri=uri)
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        raise TrackingError(
            f"tracking.uri: must be sqlite:///FILE or http(s)://HOST, got {without_password(uri)!r}: {error.message}"
        ) from error


def _check_schema(uri: str) -> None:
    """Refuse a database with tables of another version, since MLflow would migrate them silently."""
    from alembic.runtime.migration import MigrationContext
    from mlflow.version import VERSION
    from sqlalchemy import create_engine

    engine = create_engine(uri)
    try:
        with engine.connect() as connection:
            schema = MigrationContext.configure(connection).get_current_revision()
    finally:
        engine.dispose()
    known = _schemas()
    if schema in (None, known[-1]):  # None: no tables, or not all
        return
    what = (
        f"tracking.uri: the database {without_password(uri)} must have the tables of MLflow {VERSION}, installed here"
    )
    if schema in known:
        raise TrackingError(
            f"{what}, but has those of an earlier version (schema {schema}); programs of that version could not "
            "use it once migrated. Set another tracking.uri or MLFLOW_TRACKING_URI, or back it up and migrate it: "
            f"mlflow db upgrade {without_password(uri)}"
        )
    raise TrackingError(
        f"{what}, but has those of a later version (schema {schema}); upgrade MLflow here: pip install --upgrade mlflow"
    )


@cache
def _schemas() -> list[str]:
    """Revisions of MLflow's tables, the installed one last."""
    from alembic.script import ScriptDirectory
    from mlflow.store import db_migrations

    assert db_migrations.__file__ is not None
    scripts = ScriptDirectory(Path(db_migrations.__file__).parent)
    return [script.revision for script in scripts.walk_revisions()][::-1]


def check_server(uri: str, least: int, purpose: str) -> None:
    """Refuse a server of an earlier major version; one that does not say its version passes.

    Raises:
        TrackingError: if the server is too old.
    """
    if not uri.startswith("http"):
        return
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    try:
        answer = http_request(get_default_host_creds(uri), "/version", "GET", max_retries=0, raise_on_status=False)
    except MlflowException:
        return
    version = re.fullmatch(r"(\d+)\.\d+[\w.+-]*", answer.text.strip(), re.ASCII)
    if version and int(version[1]) < least:
        raise TrackingError(
            f"MLflow at {without_password(uri)}: must be of version {least}.0 or later {purpose}, got {version[0]}; "
            "upgrade the server, or set tracking.uri or MLFLOW_TRACKING_URI to another one"
        )


def artifacts_beside(uri: str) -> str | None:
    """Folder `mlartifacts` beside a local database; None for a server, which has its own location."""
    path = uri.removeprefix(SQLITE)
    return None if path == uri else (real(Path(path)).parent / "mlartifacts").as_uri()


def without_password(uri: str) -> str:
    """Mask the password in a URI."""
    parts = urlsplit(uri)
    return uri if parts.password is None else uri.replace(f":{parts.password}@", ":***@")
