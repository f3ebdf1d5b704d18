"""Artifact stores with a time limit of their own, since they may take minutes over a file; see `make_client`.

The limit is MLflow's MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT, which MLflow itself keeps for Google's store only. A
server is sent nothing twice here, since that would be a whole file: the outbox counts its tries.
"""

import os
import posixpath
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlflow.entities.multipart_upload import MultipartUploadCredential, MultipartUploadPart
from mlflow.environment_variables import MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT, MLFLOW_S3_IGNORE_TLS
from mlflow.exceptions import _UnsupportedMultipartUploadException
from mlflow.store.artifact.artifact_repo import ArtifactRepository, verify_artifact_path
from mlflow.store.artifact.artifact_repository_registry import _artifact_repository_registry
from mlflow.store.artifact.http_artifact_repo import HttpArtifactRepository
from mlflow.store.artifact.mlflow_artifacts_repo import MlflowArtifactsRepository
from mlflow.store.artifact.s3_artifact_repo import S3ArtifactRepository
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.file_utils import read_chunk
from mlflow.utils.mime_type_utils import _guess_mime_type
from mlflow.utils.request_utils import augmented_raise_for_status, cloud_storage_http_request
from mlflow.utils.rest_utils import http_request


class PatientHttpRepository(HttpArtifactRepository):
    """Store behind a server's HTTP API."""

    def log_artifact(self, local_file: str, artifact_path: str | None = None) -> None:
        verify_artifact_path(artifact_path)
        if self._should_multipart_upload(local_file):
            with suppress(_UnsupportedMultipartUploadException):
                self._try_multipart_upload(local_file, artifact_path)
                return
        name = Path(local_file).name
        with Path(local_file).open("rb") as file:
            _ask(
                *(self._host_creds, posixpath.join("/", artifact_path or "", name), "PUT"),
                data=file,
                extra_headers={"Content-Type": _guess_mime_type(name)},
            )

    def complete_multipart_upload(
        self, local_file: str, upload_id: str, parts: Any = None, artifact_path: str | None = None
    ) -> None:
        uri, endpoint = self._construct_artifact_uri_and_path("/mlflow-artifacts/mpu/complete", artifact_path)
        body = {"path": local_file, "upload_id": upload_id, "parts": [part.to_dict() for part in parts]}
        _ask(get_default_host_creds(uri), endpoint, "POST", json=body)

    @staticmethod
    def _upload_part(
        credential: MultipartUploadCredential, local_file: str, size: int, start_byte: int
    ) -> MultipartUploadPart:
        """Send a part of a large file straight to the store behind the server, for which MLflow has no limit at all."""
        answer = cloud_storage_http_request(
            *("put", credential.url),
            max_retries=0,
            timeout=_limit_s(),
            data=read_chunk(Path(local_file), size, start_byte),
            headers=credential.headers,
            verify=not MLFLOW_S3_IGNORE_TLS.get(),
        )
        augmented_raise_for_status(answer)
        return MultipartUploadPart(credential.part_number, answer.headers.get("ETag", ""), credential.url)


class PatientRepository(PatientHttpRepository, MlflowArtifactsRepository):
    """Store behind a tracking server (mlflow-artifacts:)."""


def s3_repository(artifact_uri: str, **uris: Any) -> ArtifactRepository:
    """Make MLflow's repository of S3, whose client takes its limits from boto3's default session.

    By default, boto3 waits 60 s for each answer, and sends a file (above 8 MB, a part of it) up to three times (five in
    earlier versions). A second
    time is of use here: without it, one part that fails would cost a try of the whole file.
    """
    import boto3
    import botocore.session
    from botocore.config import Config

    # The variable also goes before what the configuration of AWS says.
    retries = {} if os.environ.get("AWS_MAX_ATTEMPTS") else {"retries": {"total_max_attempts": 2}}
    session = botocore.session.get_session()
    session.set_default_client_config(Config(read_timeout=_limit_s(), **retries))
    boto3.setup_default_session(botocore_session=session)
    return S3ArtifactRepository(artifact_uri, **uris)


def register() -> None:
    """Make MLflow's clients in this process use these repositories."""
    for scheme, repository in (
        ("mlflow-artifacts", PatientRepository),
        ("http", PatientHttpRepository),
        ("https", PatientHttpRepository),
        ("s3", s3_repository),
    ):
        _artifact_repository_registry.register(scheme, repository)


def _limit_s() -> int | None:
    return MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT.get()


def _ask(creds: Any, endpoint: str, method: str, **content: Any) -> None:
    augmented_raise_for_status(http_request(creds, endpoint, method, timeout=_limit_s(), max_retries=0, **content))
