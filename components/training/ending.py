"""Early end of a training, by a signal or because a rank has no more data: all ranks end after the same step."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import torch

from model.distributed import any_rank, world_size
from model.engine.late import LateValue
from model.structures import Batch


class Preempted(SystemExit):
    """Training was ended early by a signal, after saving a checkpoint; the status is 128 + the signal's number."""


def reason_of(end: Exception | SystemExit) -> str:
    """Reason of an end in words, whichever rank it came from."""
    by_status: dict[object, str] = {128 + signal.SIGTERM: "ended by SIGTERM", 128 + signal.SIGINT: "interrupted"}
    return by_status.get(getattr(end, "code", None), "ended by an error")


class Ending:
    """Agreement of all ranks, before each step, to begin it: each has its batches, and none was asked to end.

    On a GPU batches are fetched one ahead, so the agreement on a step is reached before the step before it begins, and
    is read once that is under way: the host waits for steps that were begun earlier, the device for nothing.
    """

    def __init__(self, device: torch.device, batches_per_step: int, *, reads_late: bool) -> None:
        """Begin without a reason to end.

        Args:
            batches_per_step: batches that a rank needs for a step.
            reads_late: batches are fetched one ahead, and `is_agreed` is called after each step.
        """
        self.signal: signal.Signals | None = None  # the one that asked this rank to end
        self.failure: Exception | None = None  # the reason why this rank has no more data
        self._device, self._batches_per_step, self._reads_late = device, batches_per_step, reads_late
        self._is_ending = LateValue(torch.zeros(()))
        self._is_at_once = False

    @property
    def preempted(self) -> Preempted | None:
        """The end of this rank, if it was asked to end."""
        return None if self.signal is None else Preempted(128 + self.signal)

    def ask(self, number: int) -> None:
        """Handle a signal: end after this step, or at once within `at_once`.

        Raises:
            Preempted: within `at_once`.
        """
        if self.signal is not None:
            return
        self.signal = signal.Signals(number)
        is_alone = world_size() == 1 and "WORLD_SIZE" not in os.environ  # torchrun sends its own SIGINT, too
        if number == signal.SIGINT and is_alone:
            signal.signal(number, signal.SIG_DFL)
            os.write(2, b"\ninterrupted: ending once this step is saved; Ctrl-C again ends training at once\n")
        if self._is_at_once:
            self._is_at_once = False
            raise Preempted(128 + number)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within the context nothing is lost if a signal ends it: it raises Preempted, also if it came before."""
        try:
            self._is_at_once = True
            if self.preempted is not None:
                raise self.preempted
            yield
        except RuntimeError as error:
            if self.preempted is None:
                raise
            raise self.preempted from error  # another rank, which was asked too, has ended while this one waited for it
        finally:
            self._is_at_once = False

    def batches(self, source: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches of each step that all ranks begin."""
        is_first = True
        while True:
            step = self._next_step(source)
            self._is_ending = LateValue(any_rank(not step, self._device))
            if is_first or not self._reads_late:  # no step is under way
                if self.is_agreed():
                    return
            elif not step:
                return
            is_first = False
            yield from step

    def is_agreed(self) -> bool:
        """True if the next step is not begun; the same in all ranks."""
        return bool(self._is_ending.item())

    def _next_step(self, source: Iterator[Batch]) -> list[Batch]:
        """Return the batches of a step: none if this rank was asked to end, or does not get all of them."""
        step: list[Batch] = []
        try:
            with self.at_once():
                step = list(islice(source, self._batches_per_step))
        except Preempted:
            return []
        except Exception as error:
            self.failure = error
        return step
