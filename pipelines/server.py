"""The API of Kubeflow Pipelines (v2beta1), as far as a pipeline is uploaded, run and followed.

Why a pod failed and its log are asked of older versions of the API. Every call has a time limit. A server that is away
is waited for where that can do no harm; a refusal says what to do.
Source: kfp-server-api 2.17, the client that kfp generates from the API's own description.
"""

import json
import os
import re
import ssl
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import kfp_server_api
from requests.utils import get_auth_from_url, get_environ_proxies, prepend_scheme_if_needed, select_proxy
from urllib3 import Retry, make_headers
from urllib3.exceptions import HTTPError

from model.errors import UserError

T = TypeVar("T")
_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)
ENDPOINT = "KF_PIPELINES_ENDPOINT"  # kfp's own names, but for TOKEN
UI_ENDPOINT = "KF_PIPELINES_UI_ENDPOINT"  # for browsers, where that is another
TOKEN = "KF_PIPELINES_TOKEN"
TOKEN_FILE = "KF_PIPELINES_SA_TOKEN_PATH"
# Other programs' names; the first that is set counts.
CA_VARIABLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR")
_TIMES_S = (5, 30)  # to connect, and to answer
_PAUSE_S = 5.0  # before a call is repeated


class PipelinesError(UserError):
    """Kubeflow Pipelines cannot be reached, or refuses what is asked of it."""


class ConflictError(PipelinesError):
    """The server has such a thing already."""


class Server:
    """One server, one user."""

    def __init__(self, endpoint: str, token_file: Path | None, namespace: str, *, ca_file: Path | None = None) -> None:
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
        # `ask` retries what may be retried. With False, TLS errors would come as such, which the client cannot handle.
        connection.retries = Retry(total=0, redirect=False)
        authorities = _authorities(ca_file, self.endpoint)
        connection.proxy, connection.proxy_headers = _proxy(self.endpoint)
        connection.api_key_prefix["authorization"] = "Bearer"
        connection.refresh_api_key_hook = self._set_token  # before each call, since a mounted token is renewed
        self._set_token(connection)
        self._client = client = kfp_server_api.ApiClient(connection)
        if authorities:  # kfp's configuration takes a file only, and urllib3's text too
            client.rest_client.pool_manager.connection_pool_kw |= {"ca_certs": None, "ca_cert_data": authorities}
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
            ConflictError: if it has such a thing already.
            PipelinesError: if it refuses, or gives no answer in time.
        """
        until_s = time.monotonic() + patience_s
        while True:
            try:
                answer = call(*arguments, **options, _request_timeout=_TIMES_S)
                self._check_json(what)
                return answer
            except kfp_server_api.ApiException as error:
                if error.status == 409 or "already exist" in _message(error):
                    raise ConflictError(self._refusal(what, error)) from error
                if error.status < 500 and error.status != 429:
                    raise PipelinesError(self._refusal(what, error)) from error
                last = f"{error.status} {error.reason} {_message(error)}".strip()
            except UnicodeDecodeError as error:  # the client decodes what the server refuses with
                last = f"text that is not UTF-8 ({error})"
            except (HTTPError, OSError) as error:
                cause = getattr(error, "reason", error)
                if "CERTIFICATE_VERIFY_FAILED" in str(cause):  # waiting would change nothing
                    raise PipelinesError(
                        f"{self.endpoint}: {what}: {cause}; if a private CA signed the server's certificate, name the "
                        f"file of the CA's certificate by --ca-file or SSL_CERT_FILE"
                    ) from error
                last = str(cause)
            if time.monotonic() >= until_s:
                raise PipelinesError(
                    f"{self.endpoint}: must answer ({what}), got {last}; is it the URL of Kubeflow Pipelines, and is "
                    "it up?"
                )
            time.sleep(min(_PAUSE_S, max(0.0, until_s - time.monotonic())))

    def _check_json(self, what: str) -> None:
        """Refuse a page that a login or the user interface answers with, which the client takes for an empty answer."""
        text = self._client.last_response.data
        try:
            json.loads(text)
        except ValueError:
            raise PipelinesError(
                f"{self.endpoint}: {what}: must answer with JSON, got a page that begins with {str(text)[:40]!r}; "
                f"--endpoint must be the root of Kubeflow Pipelines, and a login in front of it needs {TOKEN} or "
                "--token-file"
            ) from None

    def find(self, what: str, call: Callable[..., Any], field: str, name: str, **options: Any) -> Any | None:
        """The one thing of a display name, out of those that a call lists."""
        wanted = {"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]}
        answer = self.ask(what, call, filter=json.dumps(wanted), page_size=100, **options)
        same = [item for item in getattr(answer, field) or [] if item.display_name == name]
        return same[0] if same else None

    def nodes(self, run_id: str) -> dict[str, Any]:
        """The nodes of a run's workflow in Argo's words, and its namespace, by id; none if the server has none."""
        try:
            manifest = json.loads(self._older(f"/apis/v1beta1/runs/{run_id}"))["pipeline_runtime"]["workflow_manifest"]
            workflow = json.loads(manifest)
            own = {"namespace": workflow.get("metadata", {}).get("namespace", "")}
            nodes = workflow["status"]["nodes"]
            wanted = {"id", "displayName", "templateName"}
            return {name: {**node, **own} for name, node in nodes.items() if wanted <= node.keys()}
        except (ValueError, KeyError, TypeError, AttributeError):
            return {}

    def log(self, run_id: str, pod: str, namespace: str) -> str:
        """The log of a pod's component; empty if neither the API server nor, in front of it, the UI serves it."""
        text = self._older(f"/apis/v1alpha1/runs/{run_id}/nodes/{pod}/log")
        if not text:
            query = {"podname": pod, "podnamespace": namespace, "runid": run_id}
            text = self._older("/k8s/pod/logs", query)
        return "" if text.startswith('{"error_message"') else text

    def _older(self, path: str, query: Mapping[str, str] | None = None) -> str:
        """The answer to a request that the client does not know, of an older API or the UI; empty if there is none."""
        try:
            self._client.call_api(
                *(path, "GET"), query_params=[*(query or {}).items()], response_type="str",
                auth_settings=["Bearer"], _request_timeout=_TIMES_S,
            )  # fmt: skip
            return str(self._client.last_response.data)
        except (kfp_server_api.ApiException, HTTPError, OSError, ValueError):
            return ""

    def _set_token(self, connection: Any) -> None:
        token, source = os.environ.get(TOKEN, ""), TOKEN
        if self._token_file is not None:
            source = f"--token-file or {TOKEN_FILE}"
            try:
                token = self._token_file.read_text(encoding="utf-8-sig")
            except (OSError, UnicodeDecodeError) as error:
                raise PipelinesError(f"{source}: cannot be read: {self._token_file}: {error}") from error
        token = token.strip().removeprefix("Bearer ").strip()
        if not token and source == TOKEN:
            return
        if not token or not token.isascii() or not token.isprintable() or " " in token:
            got = "nothing" if not token else f"{len(token)} characters with others among them"
            raise PipelinesError(f"{source}: must hold a token, printable ASCII characters without a space, got {got}")
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


def _authorities(named: Path | None, endpoint: str) -> str:
    """Certificates of the CAs to trust, in PEM format, as named or by the environment; empty: those of public CAs.

    Of a folder, all files count that hold certificates.
    """
    given = {"--ca-file": str(named or ""), **{name: os.environ.get(name, "") for name in CA_VARIABLES}}
    source, path = next(((source, path) for source, path in given.items() if path), ("", ""))
    if not path or not endpoint.startswith("https:"):
        if named:
            raise PipelinesError(f"--ca-file: must go with an endpoint of https, got {endpoint}")
        return ""
    try:
        places = [Path(place) for place in (path.split(os.pathsep) if source == "SSL_CERT_DIR" else [path])]
        files = [file for place in places for file in (sorted(place.iterdir()) if place.is_dir() else [place])]
        found = b"\n".join(match for file in files if not file.is_dir() for match in _PEM.findall(file.read_bytes()))
        authorities = found.decode("ascii")
        ssl.create_default_context(cadata=authorities or "nothing")
    except (OSError, UnicodeDecodeError) as error:  # ssl's errors are of the first kind
        raise PipelinesError(
            f"{source}: must be a file or folder of certificates in PEM format, got {path}: {error}"
        ) from error
    return authorities


def _proxy(endpoint: str) -> tuple[str | None, dict[str, str] | None]:
    """Proxy for an endpoint by HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY, and the headers of its login."""
    if urlsplit(endpoint).hostname in ("localhost", "127.0.0.1", "::1"):  # a forwarded port
        return None, None
    url = select_proxy(endpoint, get_environ_proxies(endpoint))
    if not url:
        return None, None
    url = prepend_scheme_if_needed(url, "http")
    if not url.startswith(("http://", "https://")):
        raise PipelinesError(
            f"HTTPS_PROXY: must be the URL of an HTTP proxy, http(s)://…, got one of {url.partition(':')[0]}; set "
            f"NO_PROXY={urlsplit(endpoint).hostname} to use none"
        )
    user, password = get_auth_from_url(url)
    return url, make_headers(proxy_basic_auth=f"{user}:{password}") if user else None


def _message(error: Any) -> str:
    """The message in the server's JSON answer."""
    try:
        answer = json.loads(error.body)
        return str(answer.get("message") or answer.get("error") or answer)
    except (ValueError, TypeError, AttributeError):
        return str(error.body or "")[:500]
