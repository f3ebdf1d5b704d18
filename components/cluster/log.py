"""Live log of rank 0, line by line, while the pod runs; after a cut it resumes without losing or repeating a line.

    log = LogFollower(api.read_log, write=print)
    log.offer(pods)       # whenever the pods are polled
    log.finish(30)        # when the job has ended

Kubernetes stamps each line with nanoseconds. After a cut, lines are requested again from before it; those already
written are dropped by their stamps, and by their number if several share a stamp. Lost are lines of a container that
was restarted while nobody was connected, and the first lines of a replacement pod on a node whose clock lags behind by
more than the replacement took.
"""

import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any, Protocol

Json = dict[str, Any]
_MARGIN_S = 60  # overlap requested after a cut, for clocks that disagree
_GONE = "unable to retrieve container logs for "  # the kubelet's words in place of the log, with status 200
_LAST_TRIES = 3  # attempts to read the log of an ended pod, which may be gone


class LogCutError(Exception):
    """The stream broke; its last line is incomplete."""


class ReadLog(Protocol):
    """Function that streams a pod's log; raises LogCutError if it breaks. Without `follow` it ends at the last line."""

    def __call__(self, pod: str, container: str, *, since_s: int | None, follow: bool) -> Iterator[bytes]: ...


class LogFollower:
    """Thread that writes the log of one pod at a time."""

    def __init__(self, read: ReadLog, write: Callable[[str], None], *, pause_s: float = 1.0, max_pause_s: float = 15.0):
        self._read, self._write = read, write
        self._pause_s, self._max_pause_s = min(pause_s, max_pause_s), max_pause_s
        self._filter = LineFilter()
        self._target: tuple[str, str] | None = None  # pod, container
        self._has_target, self._is_ending, self._is_whole = threading.Event(), threading.Event(), True
        self._thread = threading.Thread(target=self._run, name="log of rank 0", daemon=True)
        self._thread.start()

    def offer(self, pods: list[Json]) -> None:
        """Pass the current pods; that of rank 0 is followed once its container has started."""
        ranked = [pod for pod in pods if is_rank_0(pod)]
        for pod in sorted(ranked, key=lambda pod: pod["metadata"].get("creationTimestamp", ""), reverse=True):
            for status in pod.get("status", {}).get("containerStatuses", []):
                has_begun = status.get("state", {}).keys() & {"running", "terminated"} or status.get("restartCount")
                if status["name"] in ("pytorch", "node") and has_begun:
                    self._target = (pod["metadata"]["name"], status["name"])
                    self._has_target.set()
                    return

    def finish(self, timeout_s: float) -> bool:
        """Read the rest of the log; return False if that fails or takes too long."""
        self._is_ending.set()
        self._has_target.set()
        self._thread.join(timeout_s)
        return self._is_whole and not self._thread.is_alive()

    def _run(self) -> None:
        self._has_target.wait()
        pause_s, tries = self._pause_s, 0
        while self._target:
            is_last = self._is_ending.is_set()  # set before reading, so that all lines until now are read
            written = self._read_once(*self._target, follow=not is_last)
            tries += is_last
            if is_last and (self._is_whole or tries == _LAST_TRIES):
                return
            pause_s = self._pause_s if written else min(2 * pause_s, self._max_pause_s)
            time.sleep(self._pause_s) if is_last else self._is_ending.wait(pause_s)

    def _read_once(self, pod: str, container: str, *, follow: bool) -> int:
        """Write new lines until the stream ends; return their number."""
        since_s, written, rest = self._filter.begin(), 0, b""
        self._is_whole = False
        try:
            for chunk in self._read(pod, container, since_s=since_s, follow=follow):
                *lines, rest = (rest + chunk).split(b"\n")
                written += sum(self._write_new(line) for line in lines)
        except LogCutError:
            return written  # a partial line is dropped; it is read again as a whole
        self._is_whole = True
        return written + self._write_new(rest) if rest else written

    def _write_new(self, line: bytes) -> int:
        text = self._filter.take(line.decode(errors="replace"))
        if text is None:
            return 0
        self._write(text)
        return 1


class LineFilter:
    """Filter that passes each stamped line once, however often the stream restarts."""

    def __init__(self) -> None:
        self._last_ns, self._at_last, self._to_skip = -1, 0, 0
        self._received_s = 0.0

    def begin(self) -> int | None:
        """Start a stream; return how many seconds back it must reach, None for all."""
        self._to_skip = self._at_last
        return int(time.monotonic() - self._received_s) + _MARGIN_S if self._at_last else None

    def take(self, line: str) -> str | None:
        """Return the line without its stamp, or None if it has passed before; a line without a stamp is unchanged."""
        stamp, _, text = line.partition(" ")
        now_ns = _nanoseconds(stamp)
        if now_ns is None:
            return None if line.startswith(_GONE) else line
        if now_ns < self._last_ns:
            return None
        if now_ns == self._last_ns and self._to_skip:
            self._to_skip -= 1
            return None
        self._at_last = self._at_last + 1 if now_ns == self._last_ns else 1
        self._last_ns, self._received_s = now_ns, time.monotonic()
        return text


def is_rank_0(pod: Json) -> bool:
    """True if torchrun gives this pod rank 0: the master, else worker or node 0, whose host name sorts first."""
    labels = pod["metadata"].get("labels", {})
    role, index = labels.get("training.kubeflow.org/replica-type"), labels.get("training.kubeflow.org/replica-index")
    if role is None:
        return labels.get("batch.kubernetes.io/job-completion-index") == "0"
    # There is also a worker 0, of rank 1, with form master_worker; the operator labels the leader.
    return index == "0" and labels.get("training.kubeflow.org/job-role") == "master"


def _nanoseconds(stamp: str) -> int | None:
    """Nanoseconds since 1970 of a time stamp, or None; datetime only has microseconds."""
    seconds, dot, rest = stamp.partition(".")
    digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
    try:
        whole = datetime.fromisoformat(seconds + rest[len(digits) :] if dot else stamp)
    except ValueError:
        return None
    return int(whole.timestamp()) * 10**9 + int((digits + "0" * 9)[:9]) if whole.tzinfo else None
