"""Launch of a stage in several processes of this machine with torchrun (`train.processes`), and handling of signals.

`python -m components.launch` is torchrun with the statuses of stages: 2 after an error that a user can fix, which the
stage has printed, 143 and 130 after signals. On several machines it is called by hand, or by the training operator:
`python -m components.launch --nnodes=2 --nproc-per-node=8 … -m components.train`.
"""

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

# 128 + 15, as in shells; the training operator retries after statuses above 127.
STATUS_OF_SIGTERM = 143
_STATUS_OF_ERROR = 2  # see components.cli.user_errors


@contextmanager
def handled(numbers: Iterable[int], handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Handle signals within the context; those ignored before, such as SIGHUP under nohup, stay ignored.

    Only the main thread can handle signals; in another thread nothing is changed.
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
            if signal.getsignal(number) is not signal.SIG_IGN:  # ignored since, until the end of the process
                signal.signal(number, present)


def relaunch(stage: str, processes: int, argv: Sequence[str] | None) -> bool:
    """Run `components.<stage>` in `processes` processes, wait for their end, and exit with their status unless it is 0.

    Args:
        processes: number of processes; 0 is one per GPU.
        argv: command line of the stage; None is that of this process.

    Returns:
        False if this process should do the work itself: a single process is wanted, or it is one of several already.
    """
    wanted = processes or _one_per_gpu()
    if wanted == 1 or "WORLD_SIZE" in os.environ:
        return False
    words = sys.argv[1:] if argv is None else argv
    options = ["--standalone", f"--nproc-per-node={wanted}", "-m", f"components.{stage}"]
    status = _run([sys.executable, "-m", "components.launch", *options, *words])
    if status:
        sys.exit(status)
    return True


def _one_per_gpu() -> int:
    """Number of processes with a GPU each; 1 if there are no GPUs."""
    import torch  # imported here since it takes more than a second

    return max(1, torch.cuda.device_count())


def _run(command: Sequence[str]) -> int:
    """Run a command and pass SIGTERM on to it; torchrun gives its processes 30 s to end."""
    process = subprocess.Popen(command)
    was_terminated = False

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal was_terminated
        was_terminated = True
        process.send_signal(number)

    with handled([signal.SIGTERM], pass_on):
        try:
            status = process.wait()
        except KeyboardInterrupt:  # the terminal has sent it to torchrun as well
            process.wait()
            raise
    return STATUS_OF_SIGTERM if was_terminated and status else status


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of torchrun."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for name in ("agent.server.api", "multiprocessing.api"):  # they log what is reported below
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    # A warning of one thread per process: stages share the cores, see model/distributed.py.
    logging.getLogger(run.__name__).addFilter(lambda record: "OMP_NUM_THREADS" not in record.getMessage())
    try:
        run.run(run.parse_args(argv))
    except SignalException as end:
        sys.exit(128 + end.sigval)
    except ChildFailedError as error:
        status = status_of({failure.exitcode for failure in error.failures.values()})
        if status == 1:
            # A process that ended because of another one has neither a traceback nor a signal.
            telling = {
                rank: failure
                for rank, failure in error.failures.items()
                if failure.exitcode < 0 or isinstance(failure.message, dict)
            }
            print(ChildFailedError(error.name, telling or error.failures), file=sys.stderr)
        sys.exit(status)


def status_of(exit_codes: Collection[int]) -> int:
    """Status of a job by the exit codes of its processes, negative for signals, that have failed."""
    if _STATUS_OF_ERROR in exit_codes:
        return _STATUS_OF_ERROR
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGPIPE):
        if set(exit_codes) <= {-signal.SIGTERM, STATUS_OF_SIGTERM, -number, 128 + number}:
            return 128 + number
    return 1


if __name__ == "__main__":
    main()
