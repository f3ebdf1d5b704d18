"""The API of Kubeflow Pipelines (v2beta1), as far as a pipeline is uploaded, run and followed.

Every call has a time limit. A server that is away is waited for where that can do no harm; a refusal says what to do.
Source: kfp-server-api 2.17, the client that kfp generates from the API's own description.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import kfp_server_api
from urllib3.exceptions import HTTPError

from model.errors import UserError

T = TypeVar("T")
ENDPOINT = "KF_PIPELINES_ENDPOINT"  # kfp's own names, but for TOKEN
UI_ENDPOINT = "KF_PIPELINES_UI_ENDPOINT"  # for browsers, where that is another
TOKEN = "KF_PIPELINES_TOKEN"
TOKEN_FILE = "KF_PIPELINES_SA_TOKEN_PATH"
_TIMES_S = (5, 30)  # to connect, and to answer
_PAUSE_S = 5.0  # before a call is repeated


class PipelinesError(UserError):
    """Kubeflow Pipelines cannot be reached, or refuses what is asked of it."""


class Server:
    """One server, one user."""

    def __init__(self, endpoint: str, token_file: Path | None, namespace: str) -> None:
        self.endpoint = (endpoint or os.environ.get(ENDPOINT, "")).rstrip("/")
        self.namespace = namespace
        self.scope: dict[str, Any] = {"namespace": namespace} if namespace else {}  # argument of namespaced calls
        if not self.endpoint.startswith(("http://", "https://")):
            raise PipelinesError(
                f"--endpoint: must be the URL of Kubeflow Pipelines, http(s)://…, got {self.endpoint!r}; {ENDPOINT} "
                "serves too. From outside "
                "the cluster: kubectl -n kubeflow port-forward service/ml-pipeline-ui 8080:80, then --endpoint "
                "http://127.0.0.1:8080"
            )
        named = token_file or os.environ.get(TOKEN_FILE)
        self._token_file = Path(named) if named else None
        connection = kfp_server_api.Configuration(host=self.endpoint)
        connection.retries = False  # urllib3's; `ask` retries what may be retried
        connection.api_key_prefix["authorization"] = "Bearer"
        connection.refresh_api_key_hook = self._set_token  # before each call, since a mounted token is renewed
        self._set_token(connection)
        client = kfp_server_api.ApiClient(connection)
        self.runs = kfp_server_api.RunServiceApi(client)
        self.pipelines = kfp_server_api.PipelineServiceApi(client)
        self.uploads = kfp_server_api.PipelineUploadServiceApi(client)
        self.experiments = kfp_server_api.ExperimentServiceApi(client)

    def link(self, kind: str, name: str) -> str:
        """URL of an object in the web UI."""
        return f"{os.environ.get(UI_ENDPOINT, self.endpoint).rstrip('/')}/#/{kind}/details/{name}"

    def ask(self, what: str, call: Callable[..., T], *arguments: Any, patience_s: float = 0.0, **options: Any) -> T:
        """The answer to one call.

        Args:
            what: purpose of the call, for messages.
            patience_s: time for which to retry while the server is unreachable or fails.

        Raises:
            PipelinesError: if it refuses, or gives no answer in time.
        """
        until_s = time.monotonic() + patience_s
        while True:
            try:
                return call(*arguments, **options, _request_timeout=_TIMES_S)
            except kfp_server_api.ApiException as error:
                if 0 < error.status < 500 and error.status != 429:
                    raise PipelinesError(self._refusal(what, error)) from error
                last = f"{error.status} {error.reason} {_message(error)}".strip()
            except (HTTPError, OSError) as error:
                last = str(error)
            if time.monotonic() >= until_s:
                raise PipelinesError(
                    f"{self.endpoint}: must answer ({what}), got {last}; is it the URL of Kubeflow Pipelines, and is "
                    "it up?"
                )
            time.sleep(min(_PAUSE_S, max(0.0, until_s - time.monotonic())))

    def find(self, what: str, call: Callable[..., Any], field: str, name: str, **options: Any) -> Any | None:
        """The one thing of a display name, out of those that a call lists."""
        wanted = {"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]}
        answer = self.ask(what, call, filter=json.dumps(wanted), page_size=100, **options)
        same = [item for item in getattr(answer, field) or [] if item.display_name == name]
        return same[0] if same else None

    def _set_token(self, connection: Any) -> None:
        token = os.environ.get(TOKEN, "")
        if self._token_file is not None:
            try:
                token = self._token_file.read_text(encoding="utf-8").strip()
            except OSError as error:
                raise PipelinesError(f"--token-file or {TOKEN_FILE}: cannot be read: {error}") from error
        if token:
            connection.api_key["authorization"] = token

    def _refusal(self, what: str, error: Any) -> str:
        has_token = self._token_file is not None or TOKEN in os.environ
        advice = {
            401: f"the token is invalid or has expired; put a new one into {TOKEN} or --token-file"
            if has_token
            else f"give a token by {TOKEN} or --token-file",
            403: "the token's account must have the right to do so in the namespace "
            f"{self.namespace or 'of the server'} (--namespace)",
            404: "nothing is there: --endpoint must be the root of Kubeflow Pipelines, version 2, and --namespace "
            "must be there",
        }
        text = f"{self.endpoint}: {what}: {error.status} {error.reason} {_message(error)}".strip()
        return f"{text}; {advice[error.status]}" if error.status in advice else text


def _message(error: Any) -> str:
    """The message in the server's JSON answer."""
    try:
        answer = json.loads(error.body)
        return str(answer.get("message") or answer.get("error") or answer)
    except (ValueError, TypeError, AttributeError):
        return str(error.body or "")[:500]
