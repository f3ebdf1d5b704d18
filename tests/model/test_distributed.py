"""Failures of one process of several: all of them end, one reports."""

import errno
import multiprocessing
import signal
from pathlib import Path
from typing import Any

import torch.distributed as dist

from model.distributed import EndedByPeer, on_main, raise_together
from model.errors import UserError

USER, DISK, BUG = UserError("an image is gone"), OSError(errno.ENOSPC, "full"), RuntimeError("a bug")
PEER = "EndedByPeer: "
CASES: list[tuple[tuple[Exception | None, Exception | None], tuple[str, str]]] = [
    ((None, None), ("", "")),
    ((None, USER), ("UserError: an image is gone", f"{PEER}2")),
    ((DISK, None), ("OSError: [Errno 28] full", f"{PEER}2")),
    ((DISK, USER), ("OSError: [Errno 28] full", f"{PEER}2")),
    ((None, BUG), (f"{PEER}1", "RuntimeError: a bug")),
    ((USER, BUG), (f"{PEER}1", "RuntimeError: a bug")),
]


def caught(work: Any) -> str:
    try:
        work()
    except (Exception, EndedByPeer) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def fail() -> None:
    raise DISK


def run(rank: int, folder: Path, results: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    dispositions, raised = [], []
    for of_ranks, _ in CASES:
        raised.append(caught(lambda failure=of_ranks[rank]: raise_together(failure)))
        dispositions.append(signal.getsignal(signal.SIGTERM))
    results.send((raised, dispositions, on_main(lambda: rank), caught(lambda: on_main(fail))))


def test_a_failure_of_one_rank_ends_all_and_is_reported_once(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    pipes = [fork.Pipe(duplex=False) for _ in range(2)]
    ranks = [fork.Process(target=run, args=(rank, tmp_path, pipe[1])) for rank, pipe in enumerate(pipes)]
    for process in ranks:
        process.start()
    try:
        assert all(pipe.poll(60) for pipe, _ in pipes), "a rank waits for ever"
        of_ranks = [pipe.recv() for pipe, _ in pipes]
    finally:
        for process in ranks:
            process.kill()
    for rank, (raised, dispositions, of_main, failure_of_main) in enumerate(of_ranks):
        assert raised == [expected[rank] for _, expected in CASES]
        assert dispositions == [signal.SIG_DFL] + 5 * [signal.SIG_IGN], "torchrun's SIGTERM must not end rank 0 early"
        assert of_main == 0
        assert failure_of_main == ("OSError: [Errno 28] full", f"{PEER}2")[rank]
