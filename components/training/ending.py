"""Early end of a training, by a signal or because a rank has no more data: all ranks end after the same step."""

import os
import signal
from collections.abc import Iterator
from itertools import islice

import torch

from model.distributed import any_rank, world_size
from model.structures import Batch


class Preempted(SystemExit):
    """Training was ended early by a signal, after saving a checkpoint; the status is 128 + the signal's number."""


class Ending:
    """Agreement of all ranks, before each step, to begin it: each has its batches, and none was asked to end.

    On a GPU batches are fetched one ahead, so the agreement on a step is under way during the step before, and is read
    at its end: neither host nor device waits for it.
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
        self._is_ending = torch.zeros((), device=device)
        self._waits_for_data = False

    def ask(self, number: int) -> None:
        """Handle a signal: end after this step, or at once if data are awaited.

        Raises:
            Preempted: if data are awaited; `batches` catches it.
        """
        if self.signal is not None:
            return
        self.signal = signal.Signals(number)
        is_alone = world_size() == 1 and "WORLD_SIZE" not in os.environ  # torchrun sends its own SIGINT, too
        if number == signal.SIGINT and is_alone:
            signal.signal(number, signal.SIG_DFL)
            os.write(2, b"\ninterrupted: saving after this step; Ctrl-C again ends training at once, without saving\n")
        if self._waits_for_data:
            self._waits_for_data = False
            raise Preempted(128 + number)

    def batches(self, source: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches of each step that all ranks begin."""
        is_first = True
        while True:
            step = self._next_step(source)
            self._is_ending = any_rank(not step, self._device)
            if is_first or not self._reads_late:  # no step is under way
                if self.is_agreed():
                    return
            elif not step:
                return
            is_first = False
            yield from step

    def is_agreed(self) -> bool:
        """True if the next step is not begun; the same in all ranks."""
        return bool(self._is_ending)

    def _next_step(self, source: Iterator[Batch]) -> list[Batch]:
        """Return the batches of a step: none if this rank was asked to end, or does not get all of them."""
        step: list[Batch] = []
        try:
            try:
                self._waits_for_data = True
                if self.signal is None:
                    step = list(islice(source, self._batches_per_step))
            except Exception as error:
                self.failure = error
            self._waits_for_data = False
        except Preempted:
            step = []
        return step
