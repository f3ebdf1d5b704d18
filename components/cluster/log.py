"""Rank 0's log, line by line into the log of this step, while the pod runs: resumed after a cut, no line lost or told twice.

    log = LogFollower(api.read_log, write=print)
    log.offer(pods)       # whenever they are looked at
    log.finish(30)        # when the job has ended

Kubernetes stamps each line with nanoseconds. After a cut, lines are asked for again from before it, and those already told are
dropped by their stamps, and by their number where a stamp stands on several. What a container said while nobody was connected and
that a restart has replaced since is lost; so are the first lines of a pod that replaces another on a node whose clock lags behind by more than
the replacing took.
"""

import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any, Protocol

Json = dict[str, Any]
_MARGIN_S = 60  # asked for again after a cut, for clocks that disagree
_LAST_TRIES = 3  # to read the log of a pod that has ended, and may be gone


class LogCutError(Exception):
    """The stream broke off; what is on its last line is not all of it."""


class ReadLog(Protocol):
    """Opens a pod's log; raises LogCutError where it breaks off. Ends at once without `follow`."""

    def __call__(self, pod: str, container: str, *, since_s: int | None, follow: bool) -> Iterator[bytes]: ...


class LogFollower:
    """A thread that tells one pod's log at a time."""

    def __init__(self, read: ReadLog, write: Callable[[str], None], *, pause_s: float = 1.0, max_pause_s: float = 15.0):
        self._read, self._write = read, write
        self._pause_s, self._max_pause_s = pause_s, max_pause_s
        self._filter = LineFilter()
        self._target: tuple[str, str] | None = None  # pod, container
        self._has_target, self._is_ending, self._is_whole = threading.Event(), threading.Event(), True
        self._thread = threading.Thread(target=self._run, name="log of rank 0", daemon=True)
        self._thread.start()

    def offer(self, pods: list[Json]) -> None:
        """Tell which pods there are; the one of rank 0 is followed once its container has begun."""
        ranked = [pod for pod in pods if is_rank_0(pod)]
        for pod in sorted(ranked, key=lambda pod: pod["metadata"].get("creationTimestamp", ""), reverse=True):
            for status in pod.get("status", {}).get("containerStatuses", []):
                has_begun = status.get("state", {}).keys() & {"running", "terminated"} or status.get("restartCount")
                if status["name"] in ("pytorch", "node") and has_begun:
                    self._target = (pod["metadata"]["name"], status["name"])
                    self._has_target.set()
                    return

    def finish(self, timeout_s: float) -> bool:
        """Read what is left; False if that was not possible, or not in the time."""
        self._is_ending.set()
        self._has_target.set()
        self._thread.join(timeout_s)
        return self._is_whole and not self._thread.is_alive()

    def _run(self) -> None:
        self._has_target.wait()
        pause_s, tries = self._pause_s, 0
        while self._target:
            is_last = self._is_ending.is_set()  # before reading: what is said until now is then read
            told = self._read_once(*self._target, follow=not is_last)
            tries += is_last
            if is_last and (self._is_whole or tries == _LAST_TRIES):
                return
            pause_s = self._pause_s if told else min(2 * pause_s, self._max_pause_s)
            time.sleep(self._pause_s) if is_last else self._is_ending.wait(pause_s)

    def _read_once(self, pod: str, container: str, *, follow: bool) -> int:
        """How many new lines there were until the stream ended."""
        since_s, told, rest = self._filter.begin(), 0, b""
        self._is_whole = False
        try:
            for chunk in self._read(pod, container, since_s=since_s, follow=follow):
                *lines, rest = (rest + chunk).split(b"\n")
                told += sum(self._tell(line) for line in lines)
        except LogCutError:
            return told  # half a line is dropped; it comes whole the next time
        self._is_whole = True
        return told + self._tell(rest) if rest else told

    def _tell(self, line: bytes) -> int:
        text = self._filter.take(line.decode(errors="replace"))
        if text is None:
            return 0
        self._write(text)
        return 1


class LineFilter:
    """Lets each stamped line through once, however often streams begin anew."""

    def __init__(self) -> None:
        self._last_ns, self._at_last, self._to_skip = -1, 0, 0
        self._received_s = 0.0

    def begin(self) -> int | None:
        """A stream begins; returns how many seconds back it must reach, None for all."""
        self._to_skip = self._at_last
        return int(time.monotonic() - self._received_s) + _MARGIN_S if self._at_last else None

    def take(self, line: str) -> str | None:
        """The line without its stamp, or None if it was let through before. A line without a stamp passes as it is."""
        stamp, _, text = line.partition(" ")
        now_ns = _nanoseconds(stamp)
        if now_ns is None:
            return line
        if now_ns < self._last_ns:
            return None
        if now_ns == self._last_ns and self._to_skip:
            self._to_skip -= 1
            return None
        self._at_last = self._at_last + 1 if now_ns == self._last_ns else 1
        self._last_ns, self._received_s = now_ns, time.monotonic()
        return text


def is_rank_0(pod: Json) -> bool:
    """Whether torchrun gives this pod rank 0: a master, else worker or node 0, whose host name sorts first."""
    labels = pod["metadata"].get("labels", {})
    role, index = labels.get("training.kubeflow.org/replica-type"), labels.get("training.kubeflow.org/replica-index")
    if role is None:
        return labels.get("batch.kubernetes.io/job-completion-index") == "0"
    # In the form master_worker there is a worker 0 besides the master, of rank 1; the operator marks the one that leads.
    return index == "0" and labels.get("training.kubeflow.org/job-role") == "master"


def _nanoseconds(stamp: str) -> int | None:
    """Since 1970; datetime alone has microseconds."""
    seconds, dot, rest = stamp.partition(".")
    digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
    try:
        whole = datetime.fromisoformat(seconds + rest[len(digits) :] if dot else stamp)
    except ValueError:
        return None
    return int(whole.timestamp()) * 10**9 + int((digits + "0" * 9)[:9]) if whole.tzinfo else None
