"""Why a job's pods do not run or did not end well, read from what the API server says of them.

    for trouble in find_troubles(name, pods, events): print(trouble.text)

Pods and events are the API's JSON. The cause comes first: when one pod dies, the others follow within seconds.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

Json = dict[str, Any]
Kind = Literal["killed", "evicted", "stuck", "unschedulable"]

# Reasons for which a container waits that do not pass by themselves, and what to look at.
_STUCK = {
    "ErrImagePull": "cluster.image, cluster.image_pull_secret",
    "ImagePullBackOff": "cluster.image, cluster.image_pull_secret",
    "InvalidImageName": "cluster.image",
    "ErrImageNeverPull": "cluster.image",
    "CreateContainerConfigError": "the secrets that cluster.secrets names",
    "CreateContainerError": "cluster.volumes, and that the image has python",
    "RunContainerError": "cluster.volumes, and that the image has python",
}
_HINTS = {
    1: "torchrun's own status when a process of it failed; the log says which and why",
    2: "the configuration cannot be used; the log says which value",
    126: "the command cannot be run in this image",
    127: "the image has no python",
    137: "killed by SIGKILL",
    143: "ended by SIGTERM, after a checkpoint was saved",
}


@dataclass(frozen=True)
class Trouble:
    """One thing that is or was wrong with one pod."""

    kind: Kind
    pod: str
    text: str
    at: str = ""  # RFC 3339, when it happened; empty: it still is so


def find_troubles(job: str, pods: list[Json], events: list[Json]) -> list[Trouble]:
    """All that is or was wrong with a job's pods: what ended them in order of time, then what they wait for."""
    found = [trouble for pod in pods for trouble in _of_pod(pod, events)]
    if not pods:
        found += _no_pod(job, events)
    return sorted(found, key=lambda trouble: (not trouble.at, trouble.at))


def _no_pod(job: str, events: list[Json]) -> list[Trouble]:
    """Why none was made: a quota, or a pod-security level, that refuses it. The events are the job's or its parts'."""
    told = _latest(events, lambda about: f"{about}-".startswith(f"{job}-"))
    return [Trouble("unschedulable", "", f"no pod was made: {told}")] if told else []


def _of_pod(pod: Json, events: list[Json]) -> Iterator[Trouble]:
    name, status = pod["metadata"]["name"], pod.get("status", {})
    yield from _eviction(name, status)
    for container in [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]:
        yield from _ends(name, container)
        waiting = container.get("state", {}).get("waiting", {})
        if waiting.get("reason") in _STUCK:
            reason = waiting["reason"]
            said = waiting.get("message", "no message")
            yield Trouble("stuck", name, f"pod {name}: {reason}: {said}; check {_STUCK[reason]}")
    for condition in status.get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            told = _latest(events, name.__eq__, "FailedScheduling") or condition.get("message", "")
            text = f"pod {name}: unschedulable: {told}; check cluster.gpus_per_node, cpu, memory, node_selector and tolerations"
            yield Trouble("unschedulable", name, text)


def _eviction(name: str, status: Json) -> Iterator[Trouble]:
    """By the kubelet (which names it in the status) or by anyone else (which leaves a condition)."""
    target = next(
        (c for c in status.get("conditions", []) if c["type"] == "DisruptionTarget" and c["status"] == "True"), None
    )
    if status.get("phase") == "Failed" and status.get("reason"):  # Evicted, Preempting, NodeLost, Terminated, …
        at = (target or {}).get("lastTransitionTime") or status.get("startTime", "")
        yield Trouble("evicted", name, f"pod {name}: {status['reason'].lower()}: {status.get('message', '')}", at)
    elif target:
        text = f"pod {name}: evicted ({target.get('reason', '')}): {target.get('message', '')}"
        yield Trouble("evicted", name, text, target.get("lastTransitionTime", ""))


def _ends(name: str, container: Json) -> Iterator[Trouble]:
    for state in (container.get("lastState", {}), container.get("state", {})):
        end = state.get("terminated")
        if not end or end["exitCode"] == 0:
            continue
        at = end.get("finishedAt", "")
        if end.get("reason") == "OOMKilled":
            text = (
                f"pod {name}: OOMKilled: it needed more than cluster.memory, /dev/shm within; raise cluster.memory, "
                "or lower train.batch_size or data.workers"
            )
        else:
            hint = f", {_HINTS[end['exitCode']]}" if end["exitCode"] in _HINTS else ""
            text = f"pod {name}: container {container['name']} ended with exit code {end['exitCode']}{hint}"
            text += f": {end['message'].strip()}" if end.get("message") else ""
        yield Trouble("killed", name, text, at)


def _latest(events: list[Json], is_about: Callable[[str], bool], reason: str = "") -> str:
    """What the last event says whose object's name is the one asked for."""
    found = [
        event
        for event in events
        if reason in ("", event.get("reason")) and is_about(event.get("involvedObject", {}).get("name", ""))
    ]
    return max(found, key=lambda event: event.get("lastTimestamp") or event.get("eventTime") or "", default={}).get(
        "message", ""
    )
