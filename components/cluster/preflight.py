"""Preflight: asks a cluster whether it would run a job, before anything is submitted, and changes nothing.

    for finding in Preflight(JobApi(cluster), job).findings(): print(finding)

What the account may not look at (403) is said so and left out; k8s/base/launcher.yaml grants what the launcher's needs.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from typing import Any

from components.cluster import capacity, queues, trial
from components.cluster.api import Answer, ClusterError, JobApi
from components.cluster.capacity import Demand
from components.cluster.description import Description, secret_reference
from components.cluster.findings import Finding, Level, served, unseen
from components.cluster.manifest import DIGEST, digest, pod_template
from components.cluster.resources import JOB_KINDS, launching
from components.cluster.watch import condition

Json = dict[str, Any]
_OLDEST = (1, 28)  # Kubernetes
_PULL_SECRETS = ("kubernetes.io/dockerconfigjson", "kubernetes.io/dockercfg")
_MAX_NODES = 500  # looked at


class Preflight:
    """Questions about one job, and the answers that several of them share."""

    def __init__(self, api: JobApi, job: Description) -> None:
        self._api, self._job, self._cluster = api, job, job.cluster
        self._kind = JOB_KINDS[job.cluster.job_api]
        self._namespace = f"/api/v1/namespaces/{job.cluster.namespace}"
        self._jobs = (
            f"/apis/{self._kind.group}/{self._kind.version}/namespaces/{job.cluster.namespace}/{self._kind.plural}"
        )
        self._pod = pod_template(job)
        requests = self._pod["spec"]["containers"][0]["resources"]["requests"]
        each = {name: api.quantity(amount) for name, amount in requests.items()}
        self._demand = Demand(job.cluster.nodes, each, f"{self._kind.plural}.{self._kind.group}")
        self._user = ""
        self._fitting_nodes: int | None = None  # nodes that could hold a pod; None if they may not be listed

    def findings(self) -> Iterator[Finding]:
        """Ask everything, in the order in which a job would meet it."""
        server = self._server()
        yield server
        if server.level == "fault":
            return
        parts: tuple[tuple[str, Callable[[], Iterable[Finding]]], ...] = (
            ("api", self._apis),
            ("permissions", self._permissions),
            ("job", self._job_of_this_name),
            ("namespace", self._namespace_findings),
            ("accounts", self._accounts),
            ("nodes", self._nodes),
            ("claims", self._claims),
            ("quotas", self._limits),
            ("queue", self._queue),
            ("dry run", self._dry_runs),
        )
        for subject, part in parts:
            try:
                yield from part()
            except ClusterError as error:  # the server fails at this, or is away
                yield Finding("fault", subject, str(error))

    def _get(self, path: str) -> Answer:
        return self._api.request("GET", path)

    def _server(self) -> Finding:
        """Ask for the server's version, and as whom it knows this account."""
        subject, server = "server", self._api.server
        try:
            version = self._get("/version")
            if version.status == 200:
                review = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
                me = self._api.request("POST", "/apis/authentication.k8s.io/v1/selfsubjectreviews", review)
        except ClusterError as error:
            return Finding("fault", subject, str(error))
        if version.status != 200:
            advice = self._api.advice(version.status, version.message) or "is it the API server of a cluster?"
            return Finding("fault", subject, f"{server}: {version.status} {version.message}; {advice}")
        if me.status in (401, 403):  # every account that has logged in may ask who it is
            return Finding(
                "fault", subject, f"{server}: {me.message}; log in again, or mount a service account's token"
            )
        self._user = me.body.get("status", {}).get("userInfo", {}).get("username", "")
        text = f"Kubernetes {version.body['gitVersion']} at {server}{f', as {self._user}' if self._user else ''}"
        number = tuple(int("".join(filter(str.isdigit, version.body[part]))) for part in ("major", "minor"))
        if number < _OLDEST:
            return Finding("warning", subject, f"{text}; jobs are made for {_OLDEST[0]}.{_OLDEST[1]} or later")
        return Finding("ok", subject, text)

    def _apis(self) -> Iterator[Finding]:
        kind = self._kind
        yield served(self._api, f"{kind.group}/{kind.version}", kind.plural, f"install {kind.operator}")
        if self._cluster.job_api == "trainjob":
            yield self._runtime()

    def _runtime(self) -> Finding:
        name, subject = self._cluster.runtime, "runtime"
        found = self._get(f"/apis/{self._kind.group}/{self._kind.version}/clustertrainingruntimes/{name}")
        if found.status == 404:
            text = f"the ClusterTrainingRuntime {name} must exist, but does not; install Trainer's runtimes, or set "
            return Finding("fault", subject, f"{text}cluster.runtime")
        if found.status != 200:
            return unseen(subject, found, "get clustertrainingruntimes")
        return Finding("ok", subject, f"the ClusterTrainingRuntime {name} exists")

    @cached_property
    def _present(self) -> Json | None:
        """Job of this name, which the launcher would follow or replace."""
        found = self._get(f"{self._jobs}/{self._job.name}")
        return found.body if found.status == 200 else None

    def _job_of_this_name(self) -> Iterator[Finding]:
        if self._present is None:
            return
        metadata, subject = self._present["metadata"], f"job {self._job.name}"
        if condition(self._present, "Failed") or metadata.get("deletionTimestamp"):
            yield Finding("ok", subject, "exists, and has failed or is being deleted; launching replaces it")
        elif metadata.get("annotations", {}).get(DIGEST) == digest(self._job):
            yield Finding("ok", subject, "exists; launching follows it")
        else:
            text = "already exists with another image, command or resources; wait for its end, delete it, or set "
            yield Finding("fault", subject, f"{text}another --run-id")

    def _permissions(self) -> Iterator[Finding]:
        """Ask "may I" for everything that the launcher does."""
        lacking, losses, needed = [], [], launching(self._cluster)
        for permission in needed:
            if not self._may(permission.verb, permission.group, permission.resource):
                losses += [f"{permission}: without it, {permission.loss} is missing"] if permission.loss else []
                lacking += [] if permission.loss else [str(permission)]
        if lacking:
            text = f"must be allowed to {', '.join(lacking)}, but {self._user or 'this account'} is not"
            yield Finding("fault", "permissions", f"{text}; {self._bind()}")
        if losses:
            yield Finding("warning", "permissions", f"not allowed to {'; '.join(losses)}; {self._bind()}")
        if not lacking and not losses:
            yield Finding("ok", "permissions", f"all {len(needed)} that launching uses")

    def _may(self, verb: str, group: str, resource: str) -> bool:
        name, _, subresource = resource.partition("/")
        asked = {"verb": verb, "group": group, "resource": name, "namespace": self._cluster.namespace}
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": asked | ({"subresource": subresource} if subresource else {})},
        }
        answer = self._api.request("POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", review)
        return bool(answer.body.get("status", {}).get("allowed"))

    def _bind(self) -> str:
        """Command that gives this account the launcher's Role."""
        account = self._user.removeprefix("system:serviceaccount:")
        subject = f"--serviceaccount={account}" if account != self._user else f"--user={self._user or 'YOU'}"
        return f"kubectl -n {self._cluster.namespace} create rolebinding NAME --role=launcher {subject}"

    @cached_property
    def _namespace_answer(self) -> Answer:
        return self._get(self._namespace)

    def _namespace_findings(self) -> Iterator[Finding]:
        name, found = self._cluster.namespace, self._namespace_answer
        subject = f"namespace {name}"
        if found.status == 404:
            yield Finding("fault", subject, "must exist, but does not; kubectl apply -k k8s/base, or an overlay")
            return
        if found.status != 200:
            yield unseen(subject, found, "get namespaces")
            return
        if found.body.get("status", {}).get("phase") == "Terminating":
            yield Finding("fault", subject, "is being deleted; wait until it is gone, then create it again")
            return
        level = found.body["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce", "")
        text = f'pod security "{level}" is enforced' if level else "no level of pod security is enforced by a label"
        if level == "restricted" and self._has_init_container:
            text += ", which refuses the init container of cluster.form=master_worker; set cluster.form=elastic"
            yield Finding("fault", subject, text)
        else:
            yield Finding("ok", subject, text)

    @property
    def _has_init_container(self) -> bool:
        """True if the training operator adds its init container to the workers."""
        cluster = self._cluster
        return cluster.job_api == "pytorchjob" and cluster.form == "master_worker" and cluster.nodes > 1

    def _accounts(self) -> Iterator[Finding]:
        """Look at the service account, the secrets and their keys, and the pull secret."""
        cluster = self._cluster
        name = cluster.service_account
        subject, found = f"service account {name}", self._get(f"{self._namespace}/serviceaccounts/{name}")
        if found.status == 404:
            text = "must exist, or no pod is created; kubectl apply -k k8s/base, or set cluster.service_account"
            yield Finding("fault", subject, text)
        else:
            yield (
                Finding("ok", subject, "exists")
                if found.status == 200
                else unseen(subject, found, "get serviceaccounts")
            )
        keys: dict[str, list[str]] = {}
        for _, secret, key in map(secret_reference, cluster.secrets):
            keys.setdefault(secret, []).append(key)
        for secret, wanted in keys.items():
            yield self._secret(secret, "cluster.secrets", partial(_missing_keys, wanted=wanted))
        if cluster.image_pull_secret:
            yield self._secret(cluster.image_pull_secret, "cluster.image_pull_secret", _wrong_type)

    def _secret(self, name: str, key: str, judge: Callable[[Json], str]) -> Finding:
        subject, found = f"secret {name}", self._get(f"{self._namespace}/secrets/{name}")
        if found.status == 404:
            create = f"kubectl -n {self._cluster.namespace} create secret"
            return Finding("fault", subject, f"must exist ({key}), but does not; {create} …, or change {key}")
        if found.status != 200:
            return unseen(subject, found, "get secrets")
        fault = judge(found.body)
        return Finding("fault", subject, f"{fault}; change it, or {key}") if fault else Finding("ok", subject, "exists")

    def _nodes(self) -> Iterator[Finding]:
        found = self._api.request("GET", "/api/v1/nodes", query={"limit": str(_MAX_NODES)})
        if found.status != 200:
            yield unseen("nodes", found, "list nodes")
            return
        finding, self._fitting_nodes = capacity.nodes(
            found.body["items"], self._demand, self._pod["spec"], self._api.quantity
        )
        if finding.level == "fault" and (found.body["metadata"].get("continue") or self._cluster.scheduler == "kueue"):
            # There are more nodes; or the queue's flavor adds labels and tolerations.
            finding = Finding("warning", finding.subject, finding.text)
        yield finding

    def _claims(self) -> Iterator[Finding]:
        for volume in self._cluster.volumes:
            name, _, *mode = volume.split(":")
            subject, found = f"claim {name}", self._get(f"{self._namespace}/persistentvolumeclaims/{name}")
            if found.status == 404:
                text = "must exist (cluster.volumes), but does not; apply k8s/base or an overlay"
                yield Finding("fault", subject, text)
            elif found.status != 200:
                yield unseen(subject, found, "get persistentvolumeclaims")
            else:
                level, text = capacity.claim(
                    found.body,
                    read_only=bool(mode),
                    pods=self._cluster.nodes,
                    fitting_nodes=self._fitting_nodes,
                )
                yield (
                    Finding(level, subject, text) if level == "fault" else self._bound(subject, found.body, level, text)
                )

    def _bound(self, subject: str, claim: Json, level: Level, modes: str) -> Finding:
        """Judge whether a claim has a volume, or gets one with its first pod."""
        phase = claim.get("status", {}).get("phase")
        if phase == "Bound":
            return Finding(level, subject, f"Bound, {modes}")
        if phase == "Lost":
            return Finding("fault", subject, "its volume is gone; delete it, and apply k8s/base or an overlay")
        name = claim["spec"].get("storageClassName")
        found = self._get(f"/apis/storage.k8s.io/v1/storageclasses/{name}") if name else None
        if found is not None and found.status == 200 and found.body.get("volumeBindingMode") == "WaitForFirstConsumer":
            return Finding(level, subject, f"{phase} until its first pod is scheduled, as class {name} wants; {modes}")
        events = [
            event for event in self._api.events() if event["involvedObject"].get("name") == claim["metadata"]["name"]
        ]
        why = f": {events[-1].get('message', '').strip()}" if events else ""
        if name is None or (found is not None and found.status == 404):
            what = f"its storage class {name} does not exist" if name else "it has no storage class"
            return Finding("fault", subject, f"{phase}, since {what}{why}; kubectl get storageclass")
        text = f"{phase}: it must have a volume, or get one from class {name}{why}; kubectl describe pvc"
        return Finding("fault" if events else "warning", subject, text)

    def _limits(self) -> Iterator[Finding]:
        for kind, plural, judge in (
            ("quotas", "resourcequotas", capacity.quotas),
            ("limit ranges", "limitranges", capacity.limit_ranges),
        ):
            found = self._get(f"{self._namespace}/{plural}")
            if found.status == 200:
                for finding in judge(found.body["items"], self._demand, self._api.quantity):
                    yield self._without_itself(finding)
            else:
                yield unseen(kind, found, f"list {plural}")

    def _without_itself(self, finding: Finding) -> Finding:
        """Finding about a quota; a job of this name that is there already may hold a part of it."""
        if finding.level != "fault" or self._present is None:
            return finding
        return Finding("warning", finding.subject, f"{finding.text}; {self._job.name} may hold a part of it itself")

    def _dry_runs(self) -> Iterator[Finding]:
        yield trial.dry_run(self._api, self._job, self._jobs)
        if self._present is None:
            yield from trial.dry_run_of_a_pod(self._api, self._job, has_init_container=self._has_init_container)

    def _queue(self) -> Iterable[Finding]:
        namespace = self._namespace_answer
        labels = namespace.body["metadata"].get("labels", {}) if namespace.status == 200 else None
        if self._cluster.scheduler == "kueue":
            return queues.kueue(self._api, self._demand, labels)
        return queues.volcano(self._api) if self._cluster.scheduler == "volcano" else ()


def _missing_keys(secret: Json, wanted: list[str]) -> str:
    missing = sorted({*wanted} - (secret.get("data") or {}).keys())
    return (
        f"must have the key {', '.join(missing)} (cluster.secrets), got {', '.join(secret.get('data') or {}) or 'none'}"
        if missing
        else ""
    )


def _wrong_type(secret: Json) -> str:
    return (
        "" if secret.get("type") in _PULL_SECRETS else f"must be of type {_PULL_SECRETS[0]}, got {secret.get('type')}"
    )
