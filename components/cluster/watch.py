"""Follow a job to its end and report why it waits, that it runs, and how and why it ended, within time limits.

The job is watched from a resource version, and read anew whenever the watch ends: by its time limit, an expired version
(410), a cut or a refusal. A watch that never works therefore only costs `cluster.poll_s` of delay. Failures of pods are
kept, because a failed job's pods may be deleted with it.
"""

import time
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any, Protocol

from components.cluster.failures import Failure, find_failures, since, waiting_reason
from components.config import ClusterConfig
from model.errors import UserError

Json = dict[str, Any]
_REMIND_S = 300  # until the first reminder that a job still waits; the pause doubles, up to an hour
_MAX_REMIND_S = 3600


class JobFailedError(UserError):
    """The job failed or was deleted; the message says why. Its remains are kept for inspection."""


class JobGivenUpError(JobFailedError):
    """The job would go on, but is not to; it must be deleted."""


class JobTimeoutError(JobGivenUpError):
    """The job did not start or end within its time limit; it must be deleted."""


class WatchEndedError(Exception):
    """The watch broke or was refused; the job must be read anew."""


class Source(Protocol):
    """Part of the API client used here. All but `watch` wait up to `cluster.api_timeout_s` for an answer."""

    def get(self, name: str) -> Json | None: ...

    def watch(self, name: str, version: str, seconds: int) -> Iterator[tuple[str, Json]]: ...

    def pods(self, name: str) -> list[Json]: ...

    def events(self) -> list[Json]: ...

    def queue_message(self, job: Json) -> str: ...


class Follower:
    """State of a job that is being followed."""

    def __init__(self, source: Source, cluster: ClusterConfig, say: Callable[[str], None]) -> None:
        self._source, self._cluster, self._say = source, cluster, say
        self._began_s = time.monotonic()
        self._running_since_s: float | None = None
        self._ran_s = 0.0  # before the last suspension
        self._stuck_since_s: float | None = None
        self._suspended_at: str | None = None  # time of the present suspension
        self._waiting_since: tuple[float, str] | None = None  # monotonic, and as people read it
        self._remind_s: float = _REMIND_S
        self._reported: dict[str, Failure] = {}
        self._current: list[Failure] = []  # reasons for waiting, as of the last look

    def follow(self, name: str, on_pods: Callable[[list[Json]], None]) -> None:
        """Wait for the job's success.

        Args:
            on_pods: called with the job's pods whenever they are polled.

        Raises:
            JobFailedError: if it failed or was deleted.
            JobGivenUpError: if it is a TrainJob that failed more often than `cluster.restarts` allows.
            JobTimeoutError: if one of the limits `cluster.…_timeout_s` passed.
        """
        pause_s = 0.0
        while True:
            time.sleep(pause_s)
            job = self._source.get(name)
            if job is None:
                raise self._deleted(name)
            if self._look(job, on_pods):
                return
            began_s, has_changed = time.monotonic(), False
            try:
                for kind, seen in self._source.watch(name, job["metadata"]["resourceVersion"], self._cluster.poll_s):
                    has_changed = True
                    if kind == "DELETED":
                        raise self._deleted(name)
                    if self._look(seen, on_pods):
                        return
            except WatchEndedError:
                pass
            is_sound = has_changed or time.monotonic() - began_s > 1
            pause_s = 0.0 if is_sound else min(max(2 * pause_s, 0.5), self._cluster.poll_s)

    def _look(self, job: Json, on_pods: Callable[[list[Json]], None]) -> bool:
        """Process a state of the job; return True if it succeeded."""
        name, pods = job["metadata"]["name"], self._source.pods(job["metadata"]["name"])
        on_pods(pods)
        self._report(job, pods)
        if condition(job, "Succeeded", "Complete"):
            return True
        failed = condition(job, "Failed")
        if failed:
            message = f"{failed.get('reason', '')}: {failed.get('message', '')}"
            raise JobFailedError(self._with_reasons(f"{job['kind']} {name} failed: {message}"))
        self._report_suspension(job)
        self._check_restarts(job, pods)
        self._check_times(job, pods)
        self._remind(job, pods)
        return False

    def _report(self, job: Json, pods: list[Json]) -> None:
        """Say each failure once, and keep those that the job waits for now."""
        events: list[Json] = []
        if _waits(job, pods):
            events = since(self._source.events(), job["metadata"].get("creationTimestamp", ""))
        failures = find_failures(job["metadata"]["name"], pods, events, _nodes(job))
        if not pods and (message := self._source.queue_message(job)):
            failures.append(Failure("waiting", "", f"the queue has not admitted it: {message}"))
        self._current = [failure for failure in failures if failure.kind in ("stuck", "unschedulable", "waiting")]
        for failure in failures:
            if failure.key not in self._reported:
                self._reported[failure.key] = failure
                self._say(failure.text)

    def _report_suspension(self, job: Json) -> None:
        """Say each suspension and its end: a queue may suspend a job that runs, for one of a higher priority."""
        suspended, name = condition(job, "Suspended"), job["metadata"]["name"]
        at = suspended.get("lastTransitionTime", "") if suspended else None
        if suspended and at != self._suspended_at:
            message = suspended.get("message", "")
            self._say(f"{name} is suspended: it waits for resources in a queue{f' ({message})' if message else ''}")
        elif not suspended and self._suspended_at is not None:
            self._say(f"{name} is no longer suspended")
        self._suspended_at = at

    def _remind(self, job: Json, pods: list[Json]) -> None:
        """Say now and then that the job still waits, and why."""
        now_s = time.monotonic()
        if not _waits(job, pods):
            self._waiting_since, self._remind_s = None, _REMIND_S
        elif self._waiting_since is None:
            self._waiting_since = (now_s, datetime.now().astimezone().isoformat(" ", "seconds"))
        elif now_s - self._waiting_since[0] > self._remind_s:
            self._remind_s += min(self._remind_s, _MAX_REMIND_S)
            began_s, began = self._waiting_since
            self._say(
                f"{job['metadata']['name']} is still waiting since {began} ({(now_s - began_s) / 60:.0f} min) because: "
                f"{self._why(job, pods)}"
            )

    def _why(self, job: Json, pods: list[Json]) -> str:
        """Reason why the job waits, as far as it is known."""
        stuck = [failure for failure in self._current if failure.kind == "stuck"]
        last = (stuck or self._current)[-1:]
        if self._suspended_at is not None and not pods:
            return "; ".join(["it is suspended", *(failure.text for failure in last)])
        return last[0].text if last else waiting_reason(pods, _nodes(job))

    def _check_restarts(self, job: Json, pods: list[Json]) -> None:
        """Give up a TrainJob that fails again and again; a PyTorchJob's operator does so by itself.

        A TrainJob cannot set a limit, and its runtime has none: Kubernetes would restart it six times, 10 minutes long.
        """
        nodes, failed = _nodes(job), sum(map(_failures, pods))
        if job.get("kind") == "TrainJob" and failed > self._cluster.restarts * nodes:
            text = (
                f"TrainJob {job['metadata']['name']} failed: failures of its containers must be at most "
                f"cluster.restarts × nodes = {self._cluster.restarts} × {nodes}, got {failed}"
            )
            raise JobGivenUpError(self._with_reasons(text))

    def _check_times(self, job: Json, pods: list[Json]) -> None:
        name, now_s, cluster = job["metadata"]["name"], time.monotonic(), self._cluster
        is_running = any(pod.get("status", {}).get("phase") == "Running" for pod in pods)
        stuck = [failure for failure in self._current if failure.kind == "stuck"]
        if self._suspended_at is not None and not is_running and self._running_since_s is not None:
            # A queue has taken its place: from now on it waits for one, as at first.
            self._ran_s += now_s - self._running_since_s
            self._began_s, self._running_since_s = now_s, None
        if is_running and self._running_since_s is None:
            self._running_since_s = now_s
            self._say(f"{name} started after {now_s - self._began_s:.0f} s")
        self._stuck_since_s = (self._stuck_since_s or now_s) if stuck else None
        if self._stuck_since_s and now_s - self._stuck_since_s > cluster.stuck_timeout_s:
            raise JobTimeoutError(
                f"{name} could not start within cluster.stuck_timeout_s={cluster.stuck_timeout_s}: {stuck[0].text}"
            )
        if self._running_since_s is None:
            if now_s - self._began_s > cluster.pending_timeout_s:
                text = f"{name} did not start within cluster.pending_timeout_s={cluster.pending_timeout_s}"
                raise JobTimeoutError(self._with_reasons(f"{text}: {self._why(job, pods)}", is_explained=True))
        elif self._ran_s + now_s - self._running_since_s > cluster.run_timeout_s:
            text = (
                f"{name} did not end within cluster.run_timeout_s={cluster.run_timeout_s}; "
                "run the same command to continue from its last checkpoint"
            )
            raise JobTimeoutError(self._with_reasons(text))

    def _with_reasons(self, text: str, *, is_explained: bool = False) -> str:
        """Append the ends of pods; without any, what the job waits for now, unless the text has its reason."""
        ends = [failure for failure in self._reported.values() if failure.kind in ("killed", "evicted")]
        ends.sort(key=lambda failure: failure.at)
        # Earlier reasons for waiting do not matter once a pod has died.
        reasons = ends or ([] if is_explained else self._current[-1:])
        return "\n".join([text, *(f"  {failure.text}" for failure in reasons)])

    def _deleted(self, name: str) -> JobFailedError:
        return JobFailedError(
            self._with_reasons(
                f"{name} was deleted by someone else before it ended; run the same command to start it again"
            )
        )


def _nodes(job: Json) -> int:
    """Number of pods that the job should have."""
    spec = job.get("spec", {})
    replicas = sum(replica.get("replicas", 1) for replica in spec.get("pytorchReplicaSpecs", {}).values())
    return replicas or spec.get("trainer", {}).get("numNodes", 1)


def _failures(pod: Json) -> int:
    """Number of times that a pod's containers ended with an error; none if the pod itself is over, and replaced."""
    status = pod.get("status", {})
    containers = status.get("containerStatuses", []) if status.get("phase") != "Failed" else []
    restarts = sum(container.get("restartCount", 0) for container in containers)
    states = [container.get("state", {}) for container in containers]
    ended = [state for state in states if state.get("terminated", {}).get("exitCode")]
    return restarts + len(ended) + sum(s.get("waiting", {}).get("reason") == "CrashLoopBackOff" for s in states)


def _waits(job: Json, pods: list[Json]) -> bool:
    return len(pods) < _nodes(job) or any(pod.get("status", {}).get("phase") == "Pending" for pod in pods)


def condition(job: Json, *kinds: str) -> Json | None:
    """Return the job's condition of one of these kinds, if it is true."""
    conditions = job.get("status", {}).get("conditions") or []
    return next((c for c in conditions if c["type"] in kinds and c["status"] == "True"), None)
