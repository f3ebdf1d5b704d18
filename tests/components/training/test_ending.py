"""Early end of a training: two ranks end after the same step, whatever ends one of them, and none waits for ever."""

import multiprocessing
import signal
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from components.training.ending import Ending, Preempted
from model.distributed import process_group
from model.errors import UserError

CPU = torch.device("cpu")
CASES = list(product((False, True), (1, 2), ("fails", "is asked while it waits", "is asked in step 2"), (1, 2, 3, 4)))


def source(ending: Ending, what: str, last: int) -> Iterator[Any]:
    """Data of rank 1, which end at a batch; those of rank 0 do not."""
    for number in range(1, 100):
        if dist.get_rank() == 1 and number == last:
            if what == "fails":
                raise UserError(f"batch {number}")
            if what == "is asked while it waits":
                ending.ask(signal.SIGTERM)
        yield number


def one_ahead(batches: Iterator[Any]) -> Iterator[Any]:
    """As model.data.prefetch has them on a GPU."""
    ahead = next(batches, None)
    while ahead is not None:
        current, ahead = ahead, next(batches, None)
        yield current


def train(reads_late: bool, per_step: int, what: str, last: int) -> tuple[int, str, signal.Signals | None]:
    """The number of complete steps of a training, and the reasons for its end that this rank has."""
    ending = Ending(CPU, per_step, reads_late=reads_late)
    batches, steps = ending.batches(source(ending, what, last)), 0
    batches = one_ahead(batches) if reads_late else batches
    while len(list(islice(batches, per_step))) == per_step:
        dist.all_reduce(torch.ones(7))  # of another size than what is agreed on: neither takes the other's place
        steps += 1
        if what == "is asked in step 2" and steps == 2 and dist.get_rank() == 1:
            ending.ask(signal.SIGTERM)
        if ending.is_agreed():
            break
    return steps, str(ending.failure), ending.signal


def run(rank: int, folder: Path, results: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    with process_group(CPU, 60):
        results.send([train(*case) for case in CASES])


def test_all_ranks_end_after_the_last_step_that_all_can_begin(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    pipes = [fork.Pipe(duplex=False) for _ in range(2)]
    ranks = [fork.Process(target=run, args=(rank, tmp_path, pipe[1])) for rank, pipe in enumerate(pipes)]
    for rank in ranks:
        rank.start()
    try:
        assert all(pipe.poll(60) for pipe, _ in pipes), "a rank waits for ever"
        of_ranks = [pipe.recv() for pipe, _ in pipes]
    finally:
        for rank in ranks:
            rank.kill()
    for (reads_late, per_step, what, last), *got in zip(CASES, *of_ranks, strict=True):
        steps = 2 + reads_late if what == "is asked in step 2" else (last - 1) // per_step
        failure = f"batch {last}" if what == "fails" else "None"
        number = None if what == "fails" else signal.SIGTERM
        assert got == [(steps, "None", None), (steps, failure, number)], (reads_late, per_step, what, last)


def test_a_signal_is_raised_only_while_data_are_awaited() -> None:
    ending = Ending(CPU, 1, reads_late=False)
    ending.ask(signal.SIGTERM)
    assert list(ending.batches(iter([1]))) == []
    waiting = Ending(CPU, 1, reads_late=False)

    def signalled() -> Iterator[Any]:
        with pytest.raises(Preempted):
            waiting.ask(signal.SIGTERM)
        waiting.ask(signal.SIGTERM)  # the second does nothing
        yield 1

    assert list(islice(waiting.batches(signalled()), 1)) == [1]
