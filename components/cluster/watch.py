"""Follow a job to its end: what it waits for, that it runs, how it ended and why. Never for ever.

The job is watched from a resource version, and looked at anew whenever the watch ends: by its own time limit, an expired version (410), a cut
or a refusal. So a watch that never works costs `cluster.poll_s` of delay, and nothing else. What was wrong with a pod is kept,
because a job that fails takes its pods with it.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from components.cluster.troubles import Trouble, find_troubles
from components.config import ClusterConfig
from model.errors import UserError

Json = dict[str, Any]


class JobFailedError(UserError):
    """The job ended without success, or is gone; the message says why. What is left of it stays to be looked at."""


class JobTimeoutError(JobFailedError):
    """The job did not start or end in the time it is given; it must be deleted."""


class WatchEndedError(Exception):
    """A watch broke off or was refused; the job must be looked at anew."""


class Source(Protocol):
    """What is asked of the API server. All but `watch` wait for its answer as long as `cluster.api_timeout_s` says."""

    def get(self, name: str) -> Json | None: ...

    def watch(self, name: str, version: str, seconds: int) -> Iterator[tuple[str, Json]]: ...

    def pods(self, name: str) -> list[Json]: ...

    def events(self) -> list[Json]: ...


class Follower:
    """What is known of a job so far."""

    def __init__(self, source: Source, cluster: ClusterConfig, say: Callable[[str], None]) -> None:
        self._source, self._cluster, self._say = source, cluster, say
        self._began_s = time.monotonic()
        self._running_since_s: float | None = None
        self._stuck_since_s: float | None = None
        self._told: dict[str, Trouble] = {}

    def follow(self, name: str, on_pods: Callable[[list[Json]], None]) -> Json:
        """Wait for the job's success.

        Args:
            on_pods: is given the job's pods whenever they are looked at.

        Returns:
            The job as it was last seen.

        Raises:
            JobFailedError: if it failed, or was deleted.
            JobTimeoutError: if one of `cluster.…_timeout_s` passed.
        """
        pause_s = 0.0
        while True:
            time.sleep(pause_s)
            job = self._source.get(name)
            if job is None:
                raise self._deleted(name)
            if self._look(job, on_pods):
                return job
            began_s, has_told = time.monotonic(), False
            try:
                for kind, seen in self._source.watch(name, job["metadata"]["resourceVersion"], self._cluster.poll_s):
                    has_told = True
                    if kind == "DELETED":
                        raise self._deleted(name)
                    if self._look(seen, on_pods):
                        return seen
            except WatchEndedError:
                pass
            is_sound = has_told or time.monotonic() - began_s > 1
            pause_s = 0.0 if is_sound else min(max(2 * pause_s, 0.5), self._cluster.poll_s)

    def _look(self, job: Json, on_pods: Callable[[list[Json]], None]) -> bool:
        """Take in a state of the job; True if it succeeded."""
        name, pods = job["metadata"]["name"], self._source.pods(job["metadata"]["name"])
        on_pods(pods)
        troubles = self._tell(name, pods)
        if condition(job, "Succeeded", "Complete"):
            return True
        failed = condition(job, "Failed")
        if failed:
            said = f"{failed.get('reason', '')}: {failed.get('message', '')}"
            raise JobFailedError(self._with_reasons(f"{job['kind']} {name} failed: {said}"))
        is_running = any(pod.get("status", {}).get("phase") == "Running" for pod in pods)
        self._check_times(name, is_running, [trouble for trouble in troubles if trouble.kind == "stuck"])
        if condition(job, "Suspended"):
            self._tell_once(f"{name} is suspended, as a queue does until there is room")
        return False

    def _tell(self, name: str, pods: list[Json]) -> list[Trouble]:
        waits = not pods or any(pod.get("status", {}).get("phase") == "Pending" for pod in pods)
        troubles = find_troubles(name, pods, self._source.events() if waits else [])
        for trouble in troubles:
            if trouble.text not in self._told:
                self._told[trouble.text] = trouble
                self._say(trouble.text)
        return troubles

    def _tell_once(self, text: str) -> None:
        if text not in self._told:
            self._told[text] = Trouble("unschedulable", "", text)
            self._say(text)

    def _check_times(self, name: str, is_running: bool, stuck: list[Trouble]) -> None:
        now_s, cluster = time.monotonic(), self._cluster
        if is_running and self._running_since_s is None:
            self._running_since_s = now_s
            self._say(f"{name} runs after {now_s - self._began_s:.0f} s")
        self._stuck_since_s = (self._stuck_since_s or now_s) if stuck else None
        if self._stuck_since_s and now_s - self._stuck_since_s > cluster.stuck_timeout_s:
            raise JobTimeoutError(
                f"{name} could not start in cluster.stuck_timeout_s={cluster.stuck_timeout_s}: {stuck[0].text}"
            )
        if self._running_since_s is None:
            if now_s - self._began_s > cluster.pending_timeout_s:
                text = f"{name} did not start in cluster.pending_timeout_s={cluster.pending_timeout_s}"
                if not self._told:
                    text += "; nothing says why: see that Kubeflow's operator runs and serves this namespace"
                raise JobTimeoutError(self._with_reasons(text))
        elif now_s - self._running_since_s > cluster.run_timeout_s:
            text = f"{name} did not end in cluster.run_timeout_s={cluster.run_timeout_s}; the same command goes on from its last checkpoint"
            raise JobTimeoutError(self._with_reasons(text))

    def _with_reasons(self, text: str) -> str:
        known = list(self._told.values())
        ends = sorted((trouble for trouble in known if trouble.at), key=lambda trouble: trouble.at)
        reasons = ends or known[-1:]  # what a job waited for once does not matter when it ran and died
        return "\n".join([text, *(f"  {trouble.text}" for trouble in reasons)])

    def _deleted(self, name: str) -> JobFailedError:
        return JobFailedError(
            self._with_reasons(f"{name} was deleted by someone else before it ended; the same command begins it again")
        )


def condition(job: Json, *kinds: str) -> Json | None:
    """The job's condition of one of these kinds, if it holds."""
    conditions = job.get("status", {}).get("conditions") or []
    return next((c for c in conditions if c["type"] in kinds and c["status"] == "True"), None)
