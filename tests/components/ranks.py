"""Stages in processes that are forked with torch and the stages loaded: a fresh process takes six seconds to load them.

`Ranks(folder, 3, "evaluate", …)` starts a stage in three processes of one group, as torchrun would.
"""

import importlib
import multiprocessing
import os
import runpy
import sys
import traceback
from datetime import timedelta
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "torch._dynamo",
        "components.train",
        "components.training.tracked",
        "components.evaluation.checkpoint",
        "components.benchmarks.run_case",
    ]
)


class Ranks:
    """Processes of one group. Their output goes to files; what still runs at the end of a `with` is killed."""

    def __init__(self, folder: Path, count: int, *command: str, threads: int = 0) -> None:
        """Start them; `folder` must exist and be theirs alone. Of 0 threads each takes its share of the cores."""
        self.folder = folder
        known = {"RANKS": count, "FOLDER": str(folder), "THREADS": threads, "COMMAND": command}
        self.processes = [
            _CONTEXT.Process(target=runpy.run_path, args=(__file__, {**known, "RANK": rank}, "__rank__"))
            for rank in range(count)
        ]
        for process in self.processes:
            process.start()

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()

    def wait(self) -> list[int | None]:
        """Statuses, in order of rank; None for a process that has not ended in time."""
        for process in self.processes:
            process.join(120)
        return [process.exitcode for process in self.processes]

    def output(self, rank: int = 0) -> str:
        """What a rank has printed so far."""
        path = self.folder / f"rank_{rank}.log"
        return path.read_text() if path.exists() else ""


def _run(rank: int, ranks: int, folder: str, threads: int, command: tuple[str, ...]) -> None:
    import torch
    import torch.distributed as dist

    from model import distributed

    with (Path(folder) / f"rank_{rank}.log").open("wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ["LOCAL_WORLD_SIZE"] = str(ranks)
    if ranks > 1:
        distributed._share_cores()
        meeting = f"file://{folder}/meeting"  # no port that another could take
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    if threads:
        torch.set_num_threads(threads)
    status: object = 0
    try:
        importlib.import_module(f"components.{command[0]}").main(command[1:])
        if ranks > 1:
            dist.destroy_process_group()
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    # The exception is gone, and with it the loader, whose workers multiprocessing would wait for.
    sys.exit(status)


if __name__ == "__rank__":
    _run(RANK, RANKS, FOLDER, THREADS, COMMAND)  # type: ignore[name-defined]  # noqa: F821
