"""A stage as processes: several of this machine by torchrun, as `train.processes` asks, and what signals do to them.

On several machines torchrun is called by hand, or by the training operator: `torchrun --nnodes=2 --nproc-per-node=8 … -m components.train`.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

# 128 + 15, as shells have it; the training operator takes statuses over 127 as worth another try.
STATUS_OF_SIGTERM = 143


@contextmanager
def handled(numbers: Iterable[int], handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Have signals handled within the block. One that was ignored before, as SIGHUP under nohup, stays ignored.

    Signals are the main thread's alone: in another thread the block runs without.
    """
    is_main_thread = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in numbers if is_main_thread}
    before = {number: present for number, present in before.items() if present is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, present in before.items():
            signal.signal(number, present)


def relaunch(stage: str, processes: int, argv: Sequence[str] | None) -> bool:
    """Run `components.<stage>` again in `processes` processes, wait for their end, and leave with their status unless it is 0.

    Args:
        processes: 0 is one for each GPU.
        argv: the stage's command line; None is this process's.

    Returns:
        False where this process should do the work itself: it is the only one wanted, or one of many already.
    """
    wanted = processes or _visible_gpus()
    if wanted == 1 or "WORLD_SIZE" in os.environ:
        return False
    words = sys.argv[1:] if argv is None else argv
    options = ["--standalone", f"--nproc-per-node={wanted}", "-m", f"components.{stage}"]
    status = _run([sys.executable, "-m", "torch.distributed.run", *options, *words])
    if status:
        sys.exit(status)
    return True


def _visible_gpus() -> int:
    """GPUs of this machine, 1 where there is none."""
    import torch  # more than a second of importing, which who names a number need not pay

    return max(1, torch.cuda.device_count())


def _run(command: Sequence[str]) -> int:
    """Run a command that is told of SIGTERM too; torchrun gives its processes 30 s to end, then status 1 whatever the cause."""
    process = subprocess.Popen(command)
    was_told = False

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal was_told
        was_told = True
        process.send_signal(number)

    with handled([signal.SIGTERM], pass_on):
        try:
            status = process.wait()
        except KeyboardInterrupt:  # the terminal has told torchrun as well
            process.wait()
            raise
    return STATUS_OF_SIGTERM if was_told and status else status
