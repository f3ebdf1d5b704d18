"""Failures of one process of several: all of them end, one reports."""

import errno
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from model.distributed import available_cores, on_main, raise_together
from model.errors import UserError

USER, DISK, BUG = UserError("an image is gone"), OSError(errno.ENOSPC, "full"), RuntimeError("a bug")
ASKED = SystemExit(143)
PEER = "EndedByPeer: "
CASES: list[tuple[tuple[Exception | SystemExit | None, Exception | SystemExit | None], tuple[str, str]]] = [
    ((None, None), ("", "")),
    ((None, USER), ("UserError: an image is gone", f"{PEER}2")),
    ((DISK, None), ("OSError: [Errno 28] full", f"{PEER}2")),
    ((DISK, USER), ("OSError: [Errno 28] full", f"{PEER}2")),
    ((None, BUG), (f"{PEER}1", "RuntimeError: a bug")),
    ((USER, BUG), (f"{PEER}1", "RuntimeError: a bug")),
    ((None, ASKED), (f"{PEER}143", "SystemExit: 143")),
    ((ASKED, USER), ("UserError: an image is gone", f"{PEER}2")),
    ((ASKED, BUG), (f"{PEER}1", "RuntimeError: a bug")),
]


def caught(work: Any) -> str:
    try:
        work()
    except (Exception, SystemExit) as error:
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
        assert dispositions == [signal.SIG_DFL] + 8 * [signal.SIG_IGN], "torchrun's SIGTERM must not end rank 0 early"
        assert of_main == 0
        assert failure_of_main == ("OSError: [Errno 28] full", f"{PEER}2")[rank]


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000\n"}, 2),  # rounded up
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({"cpu.max": "6400000 100000\n"}, 8),  # more than there are
        ({}, 8),
    ],
)
def test_a_container_has_the_cores_of_its_limit(
    files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_cores(tmp_path) == cores
