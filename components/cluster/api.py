"""Kubernetes API client for jobs: create, get, delete, watch, pods, events, logs.

Only this module imports `kubernetes`; k8s/base/launcher.yaml grants the permissions that it needs.
"""

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from typing import Any

from urllib3.exceptions import HTTPError

from components.cluster.failures import not_admitted
from components.cluster.log import LogCutError
from components.cluster.manifest import Manifest
from components.cluster.resources import JOB_KINDS, KUEUE, KUEUE_VERSIONS
from components.cluster.watch import WatchEndedError
from components.config import ClusterConfig
from model.errors import UserError

Json = dict[str, Any]
_TIMES: dict[str, Any] = {"_request_timeout": (5, 30)}  # seconds to connect, and to answer
_RAW: dict[str, Any] = {"_preload_content": False, **_TIMES}
_AWAY = "A job that has started continues; run the same command to follow it again"
_AUTHENTICATED: dict[str, Any] = {"auth_settings": ["BearerToken"], "_return_http_data_only": True, **_RAW}
_RULES_S = 30  # after its start, an API server refuses what is allowed until it has loaded the Roles: some seconds
_LOG_READ_S = 60  # without a line, the log is requested again after this time: the connection may be dead


class ClusterError(UserError):
    """The API server cannot be used as configured, or refuses a request."""


@dataclass(frozen=True)
class Answer:
    """Answer of the API server to a request; a status of 400 or more is a refusal."""

    status: int
    body: Json
    warnings: tuple[str, ...] = ()

    @property
    def message(self) -> str:
        """The server's words in a refusal."""
        return str(self.body.get("message", ""))


class JobApi:
    """Client for jobs. Answers are plain JSON; requests are repeated while the server is unavailable."""

    def __init__(self, cluster: ClusterConfig) -> None:
        self.cluster = cluster
        self._kubernetes = _import_kubernetes()
        client = self._kubernetes.client.ApiClient(_connection(self._kubernetes, cluster.context))
        self._client, self.server = client, client.configuration.host
        self._refused = self._kubernetes.client.ApiException
        self._jobs = self._kubernetes.client.CustomObjectsApi(client)
        self._core = self._kubernetes.client.CoreV1Api(client)
        self._kind = kind = JOB_KINDS[cluster.job_api]
        self._was_allowed = False  # any request
        self._where = {
            "group": kind.group,
            "version": kind.version,
            "namespace": cluster.namespace,
            "plural": kind.plural,
        }

    def request(
        self, method: str, path: str, body: Json | None = None, *, query: Mapping[str, str] | None = None
    ) -> Answer:
        """Send any request and return its answer, a refusal too.

        Raises:
            ClusterError: if the server is unavailable for `cluster.api_timeout_s`.
        """

        def call() -> Answer:
            try:
                raw = self._client.call_api(
                    *(path, method), query_params=[*(query or {}).items()], body=body, **_AUTHENTICATED
                )
            except self._refused as error:
                if 400 <= error.status < 500 and error.status != 429:
                    return Answer(error.status, {"message": _message(error) or error.reason})
                raise
            words = (re.search(r'"(.*)"', value) for value in raw.headers.getlist("Warning"))  # 299 - "words"
            return Answer(raw.status, json.loads(raw.data), tuple(match[1] for match in words if match))

        return self._ask(f"{method} {path}", call, away="Check its address in the kubeconfig, and the network")

    def create(self, manifest: Manifest) -> bool:
        """Create the job; return False if one of this name exists."""
        answer = self._ask(
            "create",
            # Strict: an older operator's API would drop the fields that it does not know, and start another job.
            lambda: self._jobs.create_namespaced_custom_object(
                **self._where, body=manifest, field_validation="Strict", **_TIMES
            ),
            none_on=(409,),
        )
        return answer is not None

    def get(self, name: str) -> Json | None:
        """Return the job, or None if there is none."""
        return self._ask(
            "get", lambda: self._jobs.get_namespaced_custom_object(**self._where, name=name, **_TIMES), none_on=(404,)
        )

    def delete(self, *names: str) -> bool:
        """Delete jobs and their pods, and wait; return False if some still exist after `cluster.grace_s` plus 60 s.

        The job goes first: as long as a TrainJob is there, Trainer 2.3 creates what is deleted of it again.
        """
        for name in names:
            call = partial(
                self._jobs.delete_namespaced_custom_object,
                **self._where, name=name, propagation_policy="Background", **_TIMES,
            )  # fmt: skip
            self._ask("delete", call, none_on=(404,))
        until_s = time.monotonic() + self.cluster.grace_s + 60
        while any(self.get(name) is not None or self.pods(name) for name in names):
            if time.monotonic() > until_s:
                return False
            time.sleep(min(1, self.cluster.poll_s))
        return True

    def watch(self, name: str, version: str, seconds: int) -> Iterator[tuple[str, Json]]:
        """Yield the job's changes since a version, for some seconds: (ADDED | MODIFIED | DELETED, the job).

        Raises:
            WatchEndedError: if the stream breaks or is refused, or the version is too old.
        """
        try:
            stream = self._kubernetes.watch.Watch().stream(
                self._jobs.list_namespaced_custom_object,
                **self._where,
                field_selector=f"metadata.name={name}",
                resource_version=version,
                timeout_seconds=seconds,
                _request_timeout=(5, seconds + 10),
            )
            for event in stream:
                yield event["type"], event["raw_object"]
        except (self._refused, HTTPError, OSError, ValueError) as error:  # ValueError: half a line of JSON
            raise WatchEndedError(str(error)) from error

    def pods(self, name: str) -> list[Json]:
        """List the job's pods."""
        selector = f"{self._kind.pod_label}={name}"
        return self._items(
            "list pods", lambda: self._core.list_namespaced_pod(self.cluster.namespace, label_selector=selector, **_RAW)
        )

    def events(self) -> list[Json]:
        """List the namespace's warnings, such as why a pod was not scheduled or created."""
        selector = "type=Warning"
        return self._items(
            "list events",
            lambda: self._core.list_namespaced_event(self.cluster.namespace, field_selector=selector, **_RAW),
        )

    def queue_message(self, job: Json) -> str:
        """Return Kueue's reason why it has not admitted a job; empty if there is none, or it must not be read."""
        uid = job["metadata"].get("uid")
        if self.cluster.scheduler != "kueue" or not uid:
            return ""
        for version in KUEUE_VERSIONS:
            call = partial(
                self._jobs.list_namespaced_custom_object,
                *(KUEUE, version, self.cluster.namespace, "workloads"),
                label_selector=f"kueue.x-k8s.io/job-uid={uid}",
                **_TIMES,
            )
            found = self._ask("list Kueue's workloads", call, none_on=(403, 404))
            if found is not None:
                return not_admitted(found["items"])
        return ""

    def read_log(self, pod: str, container: str, *, since_s: int | None, follow: bool) -> Iterator[bytes]:
        """Yield the log of a pod's container, each line with a time stamp.

        Raises:
            LogCutError: if the stream breaks, or there is no log.
        """
        since = {} if since_s is None else {"since_seconds": since_s}
        options = {
            "timestamps": True,
            "follow": follow,
            "_preload_content": False,
            "_request_timeout": (5, _LOG_READ_S),
        }
        try:
            answer = self._core.read_namespaced_pod_log(
                pod, self.cluster.namespace, container=container, **since, **options
            )
            yield from answer.stream(decode_content=False)
        except (self._refused, HTTPError, OSError) as error:
            raise LogCutError(str(error)) from error

    def quantity(self, text: str) -> Decimal:
        """Value of a quantity of Kubernetes, such as 100m, 2 or 16Gi."""
        return self._kubernetes.utils.parse_quantity(text)

    def _items(self, what: str, call: Callable[[], Any]) -> list[Json]:
        return self._ask(what, lambda: json.loads(call().data))["items"]

    def _ask(self, what: str, call: Callable[[], Any], *, none_on: tuple[int, ...] = (), away: str = _AWAY) -> Any:
        """Return the answer to a call, or None on a status of `none_on`; repeat while the server is away or starting.

        Args:
            away: what to do if it remains unavailable.
        """
        until_s, pause_s = time.monotonic() + self.cluster.api_timeout_s, 0.25
        rules_until_s = 0.0
        while True:
            try:
                answer = call()
                self._was_allowed = True
                return answer
            except self._refused as error:
                if error.status in none_on:
                    return None
                if self._may_load_rules(error):
                    rules_until_s = rules_until_s or min(until_s, time.monotonic() + _RULES_S)
                if 0 < error.status < 500 and error.status != 429 and time.monotonic() >= rules_until_s:
                    raise ClusterError(self._refusal(what, error)) from error
                if "CERTIFICATE_VERIFY_FAILED" in str(error.reason):  # status 0; waiting would change nothing
                    raise ClusterError(
                        f"{self.server}: {what}: {error.reason}; the kubeconfig's certificate-authority must have "
                        "signed the server's certificate, and that must be valid for this address"
                    ) from error
                last = f"{error.status} {error.reason} {_message(error)}".strip()
            except (HTTPError, OSError) as error:
                last = str(error)
            if time.monotonic() > until_s:
                raise ClusterError(
                    f"{self.server}: must answer ({what}), got for "
                    f"cluster.api_timeout_s={self.cluster.api_timeout_s}: {last}. {away}"
                )
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, self.cluster.poll_s)

    def _may_load_rules(self, error: Any) -> bool:
        """Return whether the server seems to have been restarted: it refuses an account that it allowed something."""
        return self._was_allowed and error.status == 403 and bool(re.search(r"cannot \w+ resource", _message(error)))

    def _refusal(self, what: str, error: Any) -> str:
        namespace, message = self.cluster.namespace, _message(error)
        advice = self.advice(error.status, message)
        text = f"{self.server}: {what} {self._kind.plural} in {namespace}: {error.status} {error.reason}: {message}"
        return f"{text}; {advice}" if advice else text

    def advice(self, status: int, message: str) -> str:
        """Return what to do about a refusal of the job; empty if that is not known."""
        if "unknown field" in message:
            needs = f"cluster.api={self.cluster.job_api} needs {self._kind.operator}"
            return f"the operator of this cluster is too old: {needs}"
        return {
            401: "log in again, or mount a service account's token",
            403: self._advice_if_forbidden(message),
            404: f"create the namespace {self.cluster.namespace} with kubectl apply -k k8s/base; {self._kind.plural} "
            "need Kubeflow's operator (cluster.api)",
        }.get(status, "")

    def _advice_if_forbidden(self, message: str) -> str:
        """Advice by the cause in the API server's message: 403 is not only for missing permissions."""
        namespace = self.cluster.namespace
        causes = {  # patterns of the server's words; the first that fits
            r"system:anonymous": "log in: the request had neither token nor certificate",
            r" cannot \S+ resource ": f"bind the Role of k8s/base/launcher.yaml in {namespace} to the account that "
            "runs this",
            # Trainer's webhook, and Kueue's
            r"must be created before the TrainJob|runtime '\S+' not found": "cluster.runtime must name a runtime of "
            "this cluster: kubectl get clustertrainingruntimes",
            r"denied (the )?request": "an admission policy of the cluster refuses the job: change what the policy "
            "names, or ask the cluster's administrators",
            r"exceeded quota": "wait for other jobs to end, request less (section cluster), or have the quota raised: "
            f"kubectl -n {namespace} describe resourcequota",
            r"failed quota": "the quota wants requests or limits that the job has not: "
            f"kubectl -n {namespace} describe resourcequota",
            r"violates PodSecurity": "cluster.form=elastic satisfies every level, if no webhook adds containers",
            r"error looking up service account": "cluster.service_account must be in the namespace: kubectl apply -k "
            "k8s/base",
            r"being terminated": f"wait until the namespace {namespace} is gone, then create it again",
        }
        return next((advice for words, advice in causes.items() if re.search(words, message)), "")


def _import_kubernetes() -> Any:
    try:
        import kubernetes.client
        import kubernetes.config
        import kubernetes.watch
    except ImportError as error:
        raise ClusterError(
            "kubernetes: the Python client must be installed, but is not; run pip install 'maskrcnn-mlops[pipelines]'"
        ) from error
    return kubernetes


def _connection(kubernetes: Any, context: str) -> Any:
    """Configuration for the kubeconfig's context, or for the cluster that this pod runs in."""
    connection = kubernetes.client.Configuration()
    try:
        if not context and "KUBERNETES_SERVICE_HOST" in os.environ:
            kubernetes.config.load_incluster_config(client_configuration=connection)
        else:
            file = os.environ.get("KUBECONFIG")  # the client reads it only at import
            kubernetes.config.load_kube_config(file, context=context or None, client_configuration=connection)
    except (kubernetes.config.ConfigException, OSError) as error:
        raise ClusterError(
            f"cluster.context: {context or 'the current one'} cannot be used: {error}; see `kubectl config "
            "get-contexts`"
        ) from error
    connection.retries = False  # no retries by urllib3: `_ask` repeats requests itself
    renew = connection.refresh_api_key_hook

    def renew_and_strip(own: Any) -> None:  # called before each request; a line end in a header is an error
        if renew:
            renew(own)
        own.api_key = {name: key.strip() for name, key in own.api_key.items()}

    connection.refresh_api_key_hook = renew_and_strip
    return connection


def _message(error: Any) -> str:
    """Message in the JSON of an API error."""
    with suppress(ValueError, TypeError, AttributeError):
        return str(json.loads(error.body)["message"])
    return str(error.body or "")[:500]
