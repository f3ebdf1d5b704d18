"""Distributed training: rank and number of processes, their group, and communication between them.

torchrun (and the PyTorchJob operator through it) sets RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE. Without them
there is one process, and nothing here communicates. Every process must call every communicating function of this
module, in the same order.
"""

import math
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model.errors import UserError

T = TypeVar("T")
_STATUS_OF_ERROR = 2  # see components.cli.user_errors


class EndedByPeer(SystemExit):
    """Another process of the job ends all of them, and reports why; the status is that of its failure or signal."""


def rank() -> int:
    """Rank of this process, 0 … world_size() - 1. Rank 0 prints, tracks and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """True for rank 0, the process that prints, tracks and writes."""
    return rank() == 0


def pick_device(name: str) -> torch.device:
    """Device for `train.device`: `auto` is CUDA if available, else the CPU; each process of a machine gets its own GPU.

    The GPU also becomes the process's current CUDA device.

    Raises:
        UserError: if one GPU is named for several processes, there are fewer GPUs than processes, or no GPU has that
            number.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device, processes = torch.device(name), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device.type != "cuda":
        _share_cores()
        return device
    if device.index is not None and processes > 1:
        raise UserError(
            f"train.device: {processes} processes need one GPU each, got {name} for all; set train.device=cuda"
        )
    if processes > torch.cuda.device_count():
        raise UserError(
            f"train.device: {processes} processes need one GPU each, got {torch.cuda.device_count()}; lower "
            "--nproc-per-node, or set train.device=cpu"
        )
    index = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise UserError(
            f"train.device: must be one of this machine's {torch.cuda.device_count()} GPUs, numbered from 0, got {name}"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


@contextmanager
def process_group(device: torch.device, timeout_s: float) -> Iterator[None]:
    """Join the process group within the context; does nothing with one process or if the group exists already.

    Args:
        timeout_s: a process that waits this long for another raises an error.
    """
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    # Results and decisions, which are not GPU tensors, use gloo, which needs no GPU memory.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    try:
        yield
    finally:
        dist.destroy_process_group()


def available_cores(control_groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this process may use: those of its affinity, at most the CPU limit of its container, rounded up.

    Args:
        control_groups: where a container sees its own control group, of version 2 or 1.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # ValueError: the quota is `max`
        quota, period = (control_groups / "cpu.max").read_text().split()
        return min(cores, math.ceil(int(quota) / int(period)))
    with suppress(OSError):
        quota, period = ((control_groups / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return min(cores, math.ceil(int(quota) / int(period))) if int(quota) > 0 else cores
    return cores


def _share_cores() -> None:
    """Divide the available cores among this machine's processes, unless OMP_NUM_THREADS is set.

    torch looks at the machine's cores alone: in a container that may use two of 64, 64 threads would wait for each
    other. torchrun sets OMP_NUM_THREADS to 1 for several processes, which is not a wish.
    """
    processes, wish = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), os.environ.get("OMP_NUM_THREADS", "")
    if wish and (processes == 1 or wish != "1"):
        return
    share = max(1, available_cores() // processes)
    torch.set_num_threads(share if processes > 1 else min(share, torch.get_num_threads()))


def data_parallel(model: nn.Module) -> nn.Module:
    """Wrap the model so that backward averages gradients over all processes; one process gets the model itself.

    Every parameter takes part in every step, so the graph is static. Buffers are not synchronised: those of batch norms
    that are not are averaged before an evaluation and a checkpoint.
    """
    if world_size() == 1:
        return model
    # 1×1 kernels are applied as matrices; the strides of their gradients differ only nominally.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    warnings.filterwarnings(
        "ignore", message="`broadcast_buffers` is deprecated"
    )  # torch 2.11 does not know its successor
    return DistributedDataParallel(model, broadcast_buffers=False, static_graph=True, gradient_as_bucket_view=True)


def without_reduction(model: nn.Module) -> AbstractContextManager[None]:
    """Context for a backward pass that only accumulates gradients; a later pass averages them."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def average_over_ranks_(tensors: Iterable[Tensor]) -> None:
    """Set each tensor to its mean over all processes, for statistics of which each saw only its own images."""
    if world_size() > 1:
        for tensor in tensors:
            tensor.copy_(mean_over_ranks(tensor))


def mean_over_ranks(values: Tensor) -> Tensor:
    """Mean of each value over the processes. Does not wait for the device."""
    return sum_over_ranks(values) / world_size() if world_size() > 1 else values


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum of each value over the processes. Does not wait for the device."""
    if world_size() == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values


def any_rank(flag: bool, device: torch.device) -> Tensor:
    """Scalar above 0 if any process passed True, the same in all processes. Does not wait for the device."""
    return mean_over_ranks(torch.full((), float(flag), device=device))


def from_main(value: T) -> T:
    """Broadcast rank 0's value to all processes; the other values are ignored."""
    if world_size() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box)
    return box[0]


def gather_on_main(value: T) -> list[T]:
    """Gather the values of all processes on rank 0, in order of rank; the other processes get an empty list."""
    if world_size() == 1:
        return [value]
    values: list[Any] | None = [None] * world_size() if is_main() else None
    dist.gather_object(value, values)
    return values or []


def on_main(work: Callable[[], T]) -> T:
    """Do something on rank 0 alone; its result, or its failure, is that of all processes."""
    failure: Exception | SystemExit | None = None
    result: Any = None
    if is_main():
        try:
            result = work()
        except (Exception, SystemExit) as error:
            failure = error
    raise_together(failure)
    return from_main(result)


def raise_together(failure: Exception | SystemExit | None) -> None:
    """Raise the failure of any process in all of them, so that they end together; return if none has one.

    A crash counts more than an error that a user can fix, which rank 0 reports, and that counts more than a signal.
    Others than rank 0's errors are raised where they happened, a crash with its traceback.

    Raises:
        EndedByPeer: if another process reports the failure.
    """
    if world_size() == 1:
        if failure is not None:
            raise failure
        return
    own = None if failure is None else (_status(failure), str(failure))
    try:
        of_ranks = from_main(gather_on_main(own))
    except RuntimeError as error:  # a process is gone
        raise failure or error from error
    failures = [of_rank for of_rank in of_ranks if of_rank is not None]
    if not failures:
        return
    _end_undisturbed()
    worst, text = min(failures, key=lambda of_rank: of_rank[0])
    is_worst = own is not None and own[0] == worst
    if not (is_main() if worst == _STATUS_OF_ERROR else is_worst):
        raise EndedByPeer(worst)
    raise failure if failure is not None and is_worst else UserError(text)


def _status(failure: Exception | SystemExit) -> int:
    """Status that a process ends with: 1 after a crash, 2 after an error that a user can fix, above 128 by a signal."""
    if isinstance(failure, SystemExit):
        return failure.code if isinstance(failure.code, int) else 1
    return _STATUS_OF_ERROR if isinstance(failure, UserError | OSError) else 1


def _end_undisturbed() -> None:
    """Ignore SIGTERM from now on: torchrun sends it to all other processes as soon as the first has ended."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
