"""A stage in several processes of this machine, by torchrun: what `train.processes` asks for.

On several machines torchrun is called by hand, or by the training operator: `torchrun --nnodes=2 --nproc-per-node=8 … -m components.train`.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

# 128 + 15, as shells have it; the training operator takes statuses over 127 as worth another try.
STATUS_OF_SIGTERM = 143


def relaunch(stage: str, processes: int, argv: Sequence[str] | None) -> bool:
    """Run `components.<stage>` again in `processes` processes, wait for their end, and leave with their status unless it is 0.

    Args:
        processes: 0 is one for each GPU.
        argv: the stage's command line; None is this process's.

    Returns:
        False where this process should do the work itself: it is the only one wanted, or one of many already.
    """
    import torch  # more than a second, which who asks for a constant of this file need not pay

    wanted = processes or max(1, torch.cuda.device_count())
    if wanted == 1 or "WORLD_SIZE" in os.environ:
        return False
    words = sys.argv[1:] if argv is None else argv
    options = ["--standalone", f"--nproc-per-node={wanted}", "-m", f"components.{stage}"]
    status = _run([sys.executable, "-m", "torch.distributed.run", *options, *words])
    if status:
        sys.exit(status)
    return True


def _run(command: Sequence[str]) -> int:
    """Run a command that is told of SIGTERM too; torchrun gives its processes 30 s to end, then status 1 whatever the cause."""
    process = subprocess.Popen(command)
    was_told = False

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal was_told
        was_told = True
        process.send_signal(number)

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        status = process.wait()
    except KeyboardInterrupt:  # the terminal has told torchrun as well
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    return STATUS_OF_SIGTERM if was_told and status else status
