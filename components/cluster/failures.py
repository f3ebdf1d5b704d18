"""Failures of a job's pods, found in their status and events: why they do not run, or why they ended.

    for failure in find_failures(name, pods, events): print(failure.text)

Pods and events are the API's JSON. The cause comes first: when one pod dies, the others follow within seconds.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

Json = dict[str, Any]
# Numbers, such as ids of requests, and the ends of pods' names that Kubernetes generates, of consonants and digits.
_RANDOM = re.compile(r"-[bcdfghjklmnpqrstvwxz2456789]{5}\b|[0-9]+")
FailureKind = Literal["killed", "evicted", "stuck", "unschedulable", "waiting"]

# Reasons of waiting containers that do not resolve by themselves, and what to check.
_STUCK = {
    "ErrImagePull": "cluster.image, cluster.image_pull_secret",
    "ImagePullBackOff": "cluster.image, cluster.image_pull_secret",
    "InvalidImageName": "cluster.image",
    "ErrImageNeverPull": "cluster.image",
    "CreateContainerConfigError": "the secrets in cluster.secrets",
    "CreateContainerError": "cluster.volumes, and that the image has tini and python",
    "RunContainerError": "cluster.volumes, and that the image has tini and python",
}
_HINTS = {
    1: "one of torchrun's processes failed; the log says which and why",
    2: "an error of the configuration or the data; the log says which",
    126: "the command cannot be run in this image",
    127: "the image has no tini, or no python",
    # 128 and the number of a signal of Linux; `_hint` names the other ones
    129: "ended by SIGHUP",
    130: "ended by SIGINT",
    131: "ended by SIGQUIT",
    132: "ended by SIGILL: the image was built for processors with other instructions",
    134: "ended by SIGABRT: a library gave up, after a failed check or without memory; the end of the log says which",
    135: "ended by SIGBUS: /dev/shm or a volume was full; raise cluster.shm, or the size of the claim",
    136: "ended by SIGFPE: a division by zero in compiled code",
    137: "ended by SIGKILL: the node was out of memory or lost, or cluster.grace_s had passed since SIGTERM",
    139: "ended by SIGSEGV: a crash in compiled code; with PYTHONFAULTHANDLER=1 in cluster.env the log shows where",
    141: "ended by SIGPIPE",
    143: "ended by SIGTERM, after a checkpoint was saved",
    159: "ended by SIGSYS: a system call that the pod's seccomp profile forbids",
}
_OF_STUCK = ("Failed", "BackOff")  # reasons of the kubelet's warnings that a stuck container's state tells, too
_WAITING = {  # reasons of warnings about pods that wait, and what to check
    "FailedMount": "cluster.volumes, kubectl get pvc, and that the storage can be reached from the node",
    "FailedAttachVolume": "that no other node has the volume: claims that several nodes mount must be ReadWriteMany",
    "FailedCreatePodSandBox": "the network plugin of the node",
}


@dataclass(frozen=True)
class Failure:
    """One current or past failure of a pod."""

    kind: FailureKind
    pod: str
    text: str
    at: str = ""  # RFC 3339 time; empty for a current failure

    @property
    def key(self) -> str:
        """Text by which a failure is known again: warnings that are repeated differ by numbers and names of pods."""
        if self.kind not in ("waiting", "unschedulable"):
            return self.text
        return f"{self.pod}: {_RANDOM.sub('', self.text)}"


def find_failures(job: str, pods: list[Json], events: list[Json], nodes: int = 1) -> list[Failure]:
    """Find all failures of a job's pods: past ones in order of time, then current ones.

    Args:
        events: warnings of the job's namespace.
        nodes: number of pods that the job should have.
    """
    found = [failure for pod in pods for failure in _of_pod(pod, events)]
    if len(pods) < nodes:
        number = f"only {len(pods)} of {nodes} pods were created" if pods else "no pod was created"
        found += _missing_pods(job, number, events)
    return sorted(found, key=lambda failure: (not failure.at, failure.at))


def _missing_pods(job: str, number: str, events: list[Json]) -> list[Failure]:
    """Reason why pods were not created, such as a quota or a pod-security level: an event of the job or its parts."""
    about = _about(events, lambda name: f"{name}-".startswith(f"{job}-"))
    message = _message([event for event in about if event["involvedObject"].get("kind") != "Pod"])
    return [Failure("unschedulable", "", f"{number}: {message}")] if message else []


def _of_pod(pod: Json, events: list[Json]) -> Iterator[Failure]:
    name, status = pod["metadata"]["name"], pod.get("status", {})
    yield from _eviction(name, status)
    is_stuck = False
    for container in [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]:
        yield from _ends(name, container)
        waiting = container.get("state", {}).get("waiting", {})
        if waiting.get("reason") in _STUCK:
            is_stuck, reason = True, waiting["reason"]
            message = waiting.get("message", "no message")
            yield Failure("stuck", name, f"pod {name}: {reason}: {message}; check {_STUCK[reason]}")
    warnings = _of_this_pod(pod, _about(events, name.__eq__))
    scheduled = next((c for c in status.get("conditions", []) if c["type"] == "PodScheduled"), None)
    if status.get("phase") == "Pending":
        # Once the scheduler has set the condition, that is what counts.
        told = (*(("FailedScheduling",) if scheduled else ()), *(_OF_STUCK if is_stuck else ()))
        others = [event for event in warnings if event.get("reason") not in told]
        yield from (Failure("waiting", name, f"pod {name}: {_warning(event)}") for event in others)
        yield from _claims(pod, events)
    if scheduled and scheduled["status"] == "False":
        why = [event for event in warnings if event.get("reason") == "FailedScheduling"]
        message = _message(why) or scheduled.get("message", "")
        check = "cluster.gpus_per_node, cpu, memory, node_selector and tolerations"
        if "persistentvolumeclaim" in message.lower() or "volume node affinity" in message:
            check = "cluster.volumes, and kubectl get pvc"
        yield Failure("unschedulable", name, f"pod {name}: unschedulable: {message}; check {check}")


def _claims(pod: Json, events: list[Json]) -> Iterator[Failure]:
    """Warnings about the volume claims that a pod mounts, such as why one has no volume yet."""
    name = pod["metadata"]["name"]
    sources = [volume.get("persistentVolumeClaim", {}) for volume in pod.get("spec", {}).get("volumes", [])]
    for claim in (source["claimName"] for source in sources if source):
        for event in _about(events, claim.__eq__):
            if event["involvedObject"].get("kind") == "PersistentVolumeClaim":
                yield Failure("waiting", name, f"pod {name}: claim {claim}: {_warning(event)}")


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
            reason = f" ({end['reason']})" if end.get("reason", "Error") != "Error" else ""
            text = f"pod {name}: container {container['name']} ended with exit code {end['exitCode']}{reason}"
            text += _hint(end["exitCode"])
            text += f": {end['message'].strip()}" if end.get("message") else ""
        yield Failure("killed", name, text, at)


def _hint(code: int) -> str:
    """Meaning of an exit code, to be appended; empty if it has none."""
    hint = _HINTS.get(code, f"ended by signal {code - 128}" if 128 < code <= 128 + 64 else "")
    return f", {hint}" if hint else ""


def _warning(event: Json) -> str:
    reason = event.get("reason", "warning")
    text = f"{reason}: {event.get('message', 'no message').strip()}"
    return f"{text}; check {_WAITING[reason]}" if reason in _WAITING else text


def waiting_reason(pods: list[Json], nodes: int) -> str:
    """Reason why a job waits whose pods have no failure, as far as their number and status show it."""
    if len(pods) < nodes:
        return (
            f"no reason is known: {len(pods)} of {nodes} pods were created; check that Kubeflow's operator runs and "
            "watches this namespace"
        )
    pending = [pod for pod in pods if pod.get("status", {}).get("phase") == "Pending"]
    states = [
        f"pod {pod['metadata']['name']}: {container.get('state', {}).get('waiting', {}).get('reason', 'Pending')}"
        for pod in pending
        for container in [*pod["status"].get("initContainerStatuses", []), *pod["status"].get("containerStatuses", [])]
    ]
    return f"{(states or ['pods are Pending'])[0]}, and no warning says why"


def not_admitted(workloads: list[Json]) -> str:
    """Reason why Kueue has not admitted a job, as its workload states it; empty if it has, or states none."""
    for status in (workload.get("status", {}) for workload in workloads):
        conditions = {(one["type"], one["status"]): one.get("message", "") for one in status.get("conditions", [])}
        checks = [one.get("message", "") for one in status.get("admissionChecks", []) if one.get("state") != "Ready"]
        kinds = (("QuotaReserved", "False"), ("Evicted", "True"), ("Admitted", "False"))
        reasons = [conditions.get(kinds[0], ""), *checks, *(conditions.get(kind, "") for kind in kinds[1:])]
        if ("Admitted", "True") not in conditions and any(reasons):
            return next(filter(None, reasons)).strip()
    return ""


def since(events: list[Json], at: str) -> list[Json]:
    """Events not older than an RFC 3339 time: those of an earlier job have the same names."""
    # Objects' times are to the second. An event without a time is kept.
    return [event for event in events if not _time(event) or _time(event)[:19] >= at[:19]]


def _about(events: list[Json], is_about: Callable[[str], bool]) -> list[Json]:
    """Events about an object, in order of time."""
    return sorted((e for e in events if is_about(e.get("involvedObject", {}).get("name", ""))), key=_time)


def _of_this_pod(pod: Json, events: list[Json]) -> list[Json]:
    """Events without those about an earlier pod of the same name."""
    ids = {pod["metadata"].get("uid", ""), ""}
    return [event for event in events if ids == {""} or event["involvedObject"].get("uid", "") in ids]


def _time(event: Json) -> str:
    series = event.get("series") or {}
    return event.get("lastTimestamp") or series.get("lastObservedTime") or event.get("eventTime") or ""


def _message(events: list[Json]) -> str:
    """Message of the last event; empty if there is none."""
    return events[-1].get("message", "") if events else ""
