"""Failures of a job's pods, found in their status and events: why they do not run, or why they ended.

    for failure in find_failures(name, pods, events): print(failure.text)

Pods and events are the API's JSON. The cause comes first: when one pod dies, the others follow within seconds.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

Json = dict[str, Any]
FailureKind = Literal["killed", "evicted", "stuck", "unschedulable"]

# Reasons of waiting containers that do not resolve by themselves, and what to check.
_STUCK = {
    "ErrImagePull": "cluster.image, cluster.image_pull_secret",
    "ImagePullBackOff": "cluster.image, cluster.image_pull_secret",
    "InvalidImageName": "cluster.image",
    "ErrImageNeverPull": "cluster.image",
    "CreateContainerConfigError": "the secrets in cluster.secrets",
    "CreateContainerError": "cluster.volumes, and that the image has python",
    "RunContainerError": "cluster.volumes, and that the image has python",
}
_HINTS = {
    1: "one of torchrun's processes failed; the log says which and why",
    2: "the configuration is invalid; the log says which value",
    126: "the command cannot be run in this image",
    127: "the image has no python",
    137: "killed by SIGKILL",
    143: "ended by SIGTERM, after a checkpoint was saved",
}


@dataclass(frozen=True)
class Failure:
    """One current or past failure of a pod."""

    kind: FailureKind
    pod: str
    text: str
    at: str = ""  # RFC 3339 time; empty for a current failure


def find_failures(job: str, pods: list[Json], events: list[Json]) -> list[Failure]:
    """Find all failures of a job's pods: past ones in order of time, then current ones."""
    found = [failure for pod in pods for failure in _of_pod(pod, events)]
    if not pods:
        found += _no_pod(job, events)
    return sorted(found, key=lambda failure: (not failure.at, failure.at))


def _no_pod(job: str, events: list[Json]) -> list[Failure]:
    """Reason why no pod was created, such as a quota or a pod-security level, from events of the job and its parts."""
    message = _latest(events, lambda about: f"{about}-".startswith(f"{job}-"))
    return [Failure("unschedulable", "", f"no pod was created: {message}")] if message else []


def _of_pod(pod: Json, events: list[Json]) -> Iterator[Failure]:
    name, status = pod["metadata"]["name"], pod.get("status", {})
    yield from _eviction(name, status)
    for container in [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]:
        yield from _ends(name, container)
        waiting = container.get("state", {}).get("waiting", {})
        if waiting.get("reason") in _STUCK:
            reason = waiting["reason"]
            message = waiting.get("message", "no message")
            yield Failure("stuck", name, f"pod {name}: {reason}: {message}; check {_STUCK[reason]}")
    for condition in status.get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            message = _latest(events, name.__eq__, "FailedScheduling") or condition.get("message", "")
            text = (
                f"pod {name}: unschedulable: {message}; "
                "check cluster.gpus_per_node, cpu, memory, node_selector and tolerations"
            )
            yield Failure("unschedulable", name, text)


def _eviction(name: str, status: Json) -> Iterator[Failure]:
    """Eviction by the kubelet (a reason in the status) or by another component (a condition)."""
    target = next(
        (c for c in status.get("conditions", []) if c["type"] == "DisruptionTarget" and c["status"] == "True"), None
    )
    if status.get("phase") == "Failed" and status.get("reason"):  # Evicted, Preempting, NodeLost, Terminated, …
        at = (target or {}).get("lastTransitionTime") or status.get("startTime", "")
        yield Failure("evicted", name, f"pod {name}: {status['reason'].lower()}: {status.get('message', '')}", at)
    elif target:
        text = f"pod {name}: evicted ({target.get('reason', '')}): {target.get('message', '')}"
        yield Failure("evicted", name, text, target.get("lastTransitionTime", ""))


def _ends(name: str, container: Json) -> Iterator[Failure]:
    for state in (container.get("lastState", {}), container.get("state", {})):
        end = state.get("terminated")
        if not end or end["exitCode"] == 0:
            continue
        at = end.get("finishedAt", "")
        if end.get("reason") == "OOMKilled":
            text = (
                f"pod {name}: OOMKilled: it needed more than cluster.memory, /dev/shm included; raise cluster.memory, "
                "or lower train.batch_size or data.workers"
            )
        else:
            hint = f", {_HINTS[end['exitCode']]}" if end["exitCode"] in _HINTS else ""
            text = f"pod {name}: container {container['name']} ended with exit code {end['exitCode']}{hint}"
            text += f": {end['message'].strip()}" if end.get("message") else ""
        yield Failure("killed", name, text, at)


def _latest(events: list[Json], is_about: Callable[[str], bool], reason: str = "") -> str:
    """Message of the last event about this object; empty if there is none."""
    found = [
        event
        for event in events
        if reason in ("", event.get("reason")) and is_about(event.get("involvedObject", {}).get("name", ""))
    ]
    return max(found, key=lambda event: event.get("lastTimestamp") or event.get("eventTime") or "", default={}).get(
        "message", ""
    )
