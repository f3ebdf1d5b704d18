"""Follow a job to its end and report why it waits, that it runs, and how and why it ended, within time limits.

The job is watched from a resource version, and read anew whenever the watch ends: by its time limit, an expired version
(410), a cut or a refusal. A watch that never works therefore only costs `cluster.poll_s` of delay. Failures of pods are
kept, because a failed job's pods may be deleted with it.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from components.cluster.failures import Failure, find_failures
from components.config import ClusterConfig
from model.errors import UserError

Json = dict[str, Any]


class JobFailedError(UserError):
    """The job failed or was deleted; the message says why. Its remains are kept for inspection."""


class JobTimeoutError(JobFailedError):
    """The job did not start or end within its time limit; it must be deleted."""


class WatchEndedError(Exception):
    """The watch broke or was refused; the job must be read anew."""


class Source(Protocol):
    """Part of the API client used here. All but `watch` wait up to `cluster.api_timeout_s` for an answer."""

    def get(self, name: str) -> Json | None: ...

    def watch(self, name: str, version: str, seconds: int) -> Iterator[tuple[str, Json]]: ...

    def pods(self, name: str) -> list[Json]: ...

    def events(self) -> list[Json]: ...


class Follower:
    """State of a job that is being followed."""

    def __init__(self, source: Source, cluster: ClusterConfig, say: Callable[[str], None]) -> None:
        self._source, self._cluster, self._say = source, cluster, say
        self._began_s = time.monotonic()
        self._running_since_s: float | None = None
        self._stuck_since_s: float | None = None
        self._reported: dict[str, Failure] = {}

    def follow(self, name: str, on_pods: Callable[[list[Json]], None]) -> None:
        """Wait for the job's success.

        Args:
            on_pods: called with the job's pods whenever they are polled.

        Raises:
            JobFailedError: if it failed or was deleted.
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
        failures = self._report(name, pods)
        if condition(job, "Succeeded", "Complete"):
            return True
        failed = condition(job, "Failed")
        if failed:
            message = f"{failed.get('reason', '')}: {failed.get('message', '')}"
            raise JobFailedError(self._with_reasons(f"{job['kind']} {name} failed: {message}"))
        is_running = any(pod.get("status", {}).get("phase") == "Running" for pod in pods)
        self._check_times(name, is_running, [failure for failure in failures if failure.kind == "stuck"])
        if condition(job, "Suspended"):
            self._report_once(f"{name} is suspended: it waits for resources in a queue")
        return False

    def _report(self, name: str, pods: list[Json]) -> list[Failure]:
        waits = not pods or any(pod.get("status", {}).get("phase") == "Pending" for pod in pods)
        failures = find_failures(name, pods, self._source.events() if waits else [])
        for failure in failures:
            if failure.text not in self._reported:
                self._reported[failure.text] = failure
                self._say(failure.text)
        return failures

    def _report_once(self, text: str) -> None:
        if text not in self._reported:
            self._reported[text] = Failure("unschedulable", "", text)
            self._say(text)

    def _check_times(self, name: str, is_running: bool, stuck: list[Failure]) -> None:
        now_s, cluster = time.monotonic(), self._cluster
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
                if not self._reported:
                    text += "; no reason is known: check that Kubeflow's operator runs and watches this namespace"
                raise JobTimeoutError(self._with_reasons(text))
        elif now_s - self._running_since_s > cluster.run_timeout_s:
            text = (
                f"{name} did not end within cluster.run_timeout_s={cluster.run_timeout_s}; "
                "run the same command to continue from its last checkpoint"
            )
            raise JobTimeoutError(self._with_reasons(text))

    def _with_reasons(self, text: str) -> str:
        known = list(self._reported.values())
        ends = sorted((failure for failure in known if failure.at), key=lambda failure: failure.at)
        reasons = ends or known[-1:]  # earlier reasons for waiting do not matter once a pod has died
        return "\n".join([text, *(f"  {failure.text}" for failure in reasons)])

    def _deleted(self, name: str) -> JobFailedError:
        return JobFailedError(
            self._with_reasons(
                f"{name} was deleted by someone else before it ended; run the same command to start it again"
            )
        )


def condition(job: Json, *kinds: str) -> Json | None:
    """Return the job's condition of one of these kinds, if it is true."""
    conditions = job.get("status", {}).get("conditions") or []
    return next((c for c in conditions if c["type"] in kinds and c["status"] == "True"), None)
