"""Queues for jobs: whether Kueue's or Volcano's queue is there, takes jobs, and is large enough.

Sources: kueue.x-k8s.io/v1beta2, scheduling.volcano.sh/v1beta1.
"""

from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from components.cluster.api import JobApi
from components.cluster.capacity import Demand, Parse, show
from components.cluster.findings import Finding, served, unseen
from components.cluster.resources import KUEUE, KUEUE_VERSIONS

Json = dict[str, Any]
_VOLCANO = "scheduling.volcano.sh/v1beta1"


def kueue(api: JobApi, demand: Demand, labels: dict[str, str] | None) -> Iterator[Finding]:
    """Look at the LocalQueue `cluster.queue` and its ClusterQueue.

    Args:
        labels: of the job's namespace; None if they are not known.
    """
    name, namespace = api.cluster.queue, api.cluster.namespace
    versions = {version["version"] for version in api.request("GET", f"/apis/{KUEUE}").body.get("versions", [])}
    version = next((version for version in KUEUE_VERSIONS if version in versions), None)
    if version is None:
        needed, got = " or ".join(KUEUE_VERSIONS), ", ".join(sorted(versions)) or "none"
        yield Finding("fault", "queue", f"{KUEUE} must be served as {needed}, got {got}; install Kueue 0.17 or later")
        return
    subject = f"queue {name}"
    found = api.request("GET", f"/apis/{KUEUE}/{version}/namespaces/{namespace}/localqueues/{name}")
    if found.status == 404:
        text = f"the LocalQueue must exist in {namespace}, but does not; apply k8s/overlays/kueue, or set cluster.queue"
        yield Finding("fault", subject, text)
        return
    if found.status != 200:
        yield unseen(subject, found, "get localqueues")
        return
    of = found.body["spec"]["clusterQueue"]
    if reason := inactive(found.body):
        advice = f"kubectl -n {namespace} describe localqueue {name}"
        yield Finding("fault", subject, f"must be active, got: {reason}; {advice}")
    else:
        yield Finding("ok", subject, f"is active, in the ClusterQueue {of}")
    whole = api.request("GET", f"/apis/{KUEUE}/{version}/clusterqueues/{of}")
    if whole.status == 200:
        yield cluster_queue(whole.body, demand, labels, api.quantity)
    elif whole.status != 404:  # of which the LocalQueue's condition has the reason
        yield unseen(f"queue {of} (ClusterQueue)", whole, "get clusterqueues")


def volcano(api: JobApi) -> Iterator[Finding]:
    """Look at the queue `cluster.queue` of Volcano."""
    name, api_of_queues = api.cluster.queue, served(api, _VOLCANO, "queues", "install Volcano")
    if api_of_queues.level == "fault":
        yield api_of_queues
        return
    found = api.request("GET", f"/apis/{_VOLCANO}/queues/{name}")
    if found.status == 404:
        text = "must exist, but does not; apply k8s/overlays/volcano, or set cluster.queue"
        yield Finding("fault", f"queue {name}", text)
    else:
        yield volcano_queue(found.body) if found.status == 200 else unseen(f"queue {name}", found, "get queues")


def inactive(queue: Json) -> str:
    """Reason why a LocalQueue or a ClusterQueue admits no jobs; empty if it does, or does not say."""
    if policy := queue["spec"].get("stopPolicy", "None").replace("None", ""):
        return f"it is stopped (stopPolicy {policy})"
    conditions = queue.get("status", {}).get("conditions", [])
    active = next((one for one in conditions if one["type"] == "Active"), None)
    return "" if active is None or active["status"] == "True" else active.get("message") or active["reason"]


def cluster_queue(queue: Json, demand: Demand, labels: dict[str, str] | None, parse: Parse) -> Finding:
    """Judge a ClusterQueue.

    Args:
        labels: of the job's namespace; None if they are not known.
    """
    subject = f"queue {queue['metadata']['name']} (ClusterQueue)"
    if reason := inactive(queue):
        return Finding("fault", subject, f"must be active, got: {reason}; kubectl describe clusterqueue")
    selector = queue["spec"].get("namespaceSelector")
    if labels is not None and not (selector is not None and selects(selector, labels)):
        text = f"must select the namespace, got namespaceSelector {selector or 'none, which selects no namespace'}"
        return Finding("fault", subject, f"{text}; change the ClusterQueue, or cluster.namespace")
    faults = [fault for name in demand.each if (fault := _too_small(queue["spec"], name, demand, parse))]
    if faults:
        return Finding("fault", subject, f"{'; '.join(faults)}; request less, or have its quota raised")
    return Finding("ok", subject, f"is active, and its quota is large enough for {demand.pods} × {demand}")


def _too_small(spec: Json, resource: str, demand: Demand, parse: Parse) -> str:
    """Reason why the queue could never admit the job; empty if there is none."""
    most: list[Decimal] = []
    for flavor in (flavor for group in spec.get("resourceGroups", []) for flavor in group["flavors"]):
        for quota in (quota for quota in flavor["resources"] if quota["name"] == resource):
            if "borrowingLimit" not in quota and (spec.get("cohortName") or spec.get("cohort")):
                return ""  # what a cohort lends is not known here
            most.append(parse(quota["nominalQuota"]) + parse(quota.get("borrowingLimit", "0")))
    needed = demand.each[resource] * demand.pods
    if not most:
        return f"{resource} must be among its coveredResources, but is not"
    if needed > sum(most):
        return f"{resource} {show(resource, needed)} is more than its quota of {show(resource, Decimal(sum(most)))}"
    return ""


def selects(selector: Json, labels: dict[str, str]) -> bool:
    """Tell whether a label selector of Kubernetes selects these labels."""
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    return all(_matches(rule, labels) for rule in selector.get("matchExpressions", []))


def _matches(rule: Json, labels: dict[str, str]) -> bool:
    key, values = rule["key"], rule.get("values", [])
    return {
        "In": labels.get(key) in values,
        "NotIn": labels.get(key) not in values,
        "Exists": key in labels,
        "DoesNotExist": key not in labels,
    }[rule["operator"]]


def volcano_queue(queue: Json) -> Finding:
    """Judge a queue of Volcano."""
    subject, state = f"queue {queue['metadata']['name']}", queue.get("status", {}).get("state", "Open")
    if state != "Open":
        return Finding("fault", subject, f"must be Open, got {state}; vcctl queue operate -a open")
    return Finding("ok", subject, "is open")
