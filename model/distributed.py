"""Processes that train one model: their number, their group, and what they tell one another.

torchrun (and the PyTorchJob operator through it) sets RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE. Without them there is one process, and nothing
here communicates. Every process calls every function of this module that communicates, in the same order.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model.errors import UserError

T = TypeVar("T")


def rank() -> int:
    """This process's number, 0 … world_size() - 1. Rank 0 prints, tracks and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process is the one that prints, tracks and writes."""
    return rank() == 0


def pick_device(name: str) -> torch.device:
    """The device of `train.device`: `auto` is CUDA where there is one, else the CPU; each process of a machine takes a GPU of its own.

    A GPU becomes the process's current one, whose streams everything uses that names none.

    Raises:
        UserError: if one GPU is named for several processes, there are fewer GPUs than processes, or none of that number.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device, processes = torch.device(name), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device.type != "cuda":
        return device
    if device.index is not None and processes > 1:
        raise UserError(
            f"train.device: {processes} processes need a GPU each, got {name} for all; set train.device=cuda"
        )
    if processes > torch.cuda.device_count():
        raise UserError(
            f"train.device: {processes} processes need a GPU each, got {torch.cuda.device_count()}; lower --nproc-per-node, or set train.device=cpu"
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
    """Join the other processes for as long as the context lasts. One process, or one that has joined already, just goes on.

    Args:
        timeout_s: a process that has waited this long for another gives up with an error.
    """
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if device.type != "cuda":
        _share_cores()
    # What is not a tensor on a GPU (results, decisions) goes by gloo, which needs no GPU memory.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    try:
        yield
    finally:
        dist.destroy_process_group()


def _share_cores() -> None:
    """The processes of a machine use all of it between them, unless OMP_NUM_THREADS says otherwise: torchrun, left alone, sets it to 1."""
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def data_parallel(model: nn.Module) -> nn.Module:
    """The model, its gradients averaged over all processes during backward; the model itself where there is one process.

    Every parameter takes part in every step, so the graph is static. Buffers are left alone: see `average_batch_norms`.
    """
    if world_size() == 1:
        return model
    # Kernels of 1 × 1 are applied as matrices: their gradients' strides differ from their own in name only.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    warnings.filterwarnings(
        "ignore", message="`broadcast_buffers` is deprecated"
    )  # torch 2.11 does not know its successor
    return DistributedDataParallel(model, broadcast_buffers=False, static_graph=True, gradient_as_bucket_view=True)


def without_reduction(model: nn.Module) -> AbstractContextManager[None]:
    """The context of a backward pass whose gradients are accumulated, to be averaged by a later one."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def average_batch_norms(model: nn.Module) -> None:
    """Give batch norms the mean of all processes' running statistics: each has seen but its own images. Frozen ones have none."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.copy_(mean_over_ranks(module.running_mean))
            module.running_var.copy_(mean_over_ranks(module.running_var))


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of each value over the processes. Does not wait for the device."""
    if world_size() == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / world_size()


def any_rank(flag: bool, device: torch.device) -> Tensor:
    """Above 0 where a process gave True: the same scalar in all of them. Does not wait for the device."""
    return mean_over_ranks(torch.full((), float(flag), device=device))


def from_main(value: T) -> T:
    """Rank 0's value, in all processes; the others' is not looked at."""
    if world_size() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box)
    return box[0]


def gather_on_main(value: T) -> list[T]:
    """Each process's value in order of rank; empty in all but rank 0."""
    if world_size() == 1:
        return [value]
    values: list[Any] | None = [None] * world_size() if is_main() else None
    dist.gather_object(value, values)
    return values or []


def wait_for_all() -> None:
    """Return when every process has come here."""
    if world_size() > 1:
        dist.barrier()
