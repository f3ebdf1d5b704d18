"""Training steps as a generator; the caller logs, saves and stops.

    for step in train_steps(model, batches, optimizer, train, scaler):
        ...

Nothing here waits for the device: a step yields tensors, which the caller reads only when it needs them.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from model.config import TrainConfig
from model.data.prefetch import prefetch
from model.distributed import mean_over_ranks, without_reduction
from model.engine.graphs import GraphedUpdates, graph_obstacle
from model.engine.optim import learning_rate, set_learning_rate, step_unless
from model.engine.precision import LossScaler, autocast
from model.network.batch_norm import learned_statistics
from model.structures import Batch, Outcome


@dataclass(frozen=True, kw_only=True)
class Step(Outcome):
    """One training step: an update of the weights, or none if a loss or a gradient was not finite."""

    number: int  # 1, 2, …
    image_ids: list[int]  # images of this process
    learning_rate: float
    data_s: float  # time spent waiting for the loader
    step_s: float  # time of the whole step, for which the caller adds its wait for the device


def set_determinism(deterministic: bool) -> None:
    """Apply `train.deterministic` to the whole process: bitwise reproducible kernels, or the fastest that cuDNN has.

    With it, torch raises RuntimeError at a CUDA operator that has no reproducible kernel.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # makes cuBLAS reproducible; read at its start
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # never read
    torch.backends.cudnn.benchmark = not deterministic  # shapes are few and fixed, so a kernel search pays


def train_steps(
    model: nn.Module,
    batches: Iterator[Batch],
    optimizer: torch.optim.Optimizer,
    train: TrainConfig,
    scaler: LossScaler,
    start_step: int = 0,
) -> Iterator[Step]:
    """Train from step start_step + 1 to max_iters, or until there are no more batches.

    Args:
        model: a MaskRCNN, or the return value of `data_parallel` for one.
        batches: micro-batches; train.accumulation_steps of them make a step, with the gradient of one large batch.
        optimizer: from `make_optimizer`, so that a step can be skipped on the device.
    """
    model.train()
    device = next(model.parameters()).device
    on_device = prefetch(batches, device)
    graphed = None
    if train.cuda_graph and not graph_obstacle(train, device):
        graphed = GraphedUpdates(lambda batch: update_weights(model, [batch], optimizer, train, scaler), device)
    for number in range(start_step + 1, train.max_iters + 1):
        began, rate = time.perf_counter(), learning_rate(train, number)
        set_learning_rate(optimizer, rate)
        micro_batches = list(islice(on_device, train.accumulation_steps))
        if len(micro_batches) < train.accumulation_steps:
            return
        data_s = time.perf_counter() - began
        if graphed:
            outcome = graphed(*micro_batches)
        else:
            outcome = update_weights(model, micro_batches, optimizer, train, scaler, is_first=number == start_step + 1)
        image_ids = torch.cat([batch.image_ids for batch in micro_batches]).tolist()
        step_s = time.perf_counter() - began
        yield Step(
            **vars(outcome), number=number, image_ids=image_ids, learning_rate=rate, data_s=data_s, step_s=step_s
        )


def update_weights(
    model: nn.Module,
    micro_batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    train: TrainConfig,
    scaler: LossScaler,
    *,
    is_first: bool = False,
) -> Outcome:
    """Update weights and batch norms unless a value is not finite; decided on the device, equally in all processes."""
    statistics = list(learned_statistics(model).values())
    before = [statistic.clone() for statistic in statistics]
    means = _gradients(model, micro_batches, train, scaler, is_first=is_first)
    scaler.unscale_(optimizer)
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if train.clip_grad_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, train.clip_grad_norm, grad_norm)
    is_loss_finite = torch.isfinite(torch.stack(list(means.values())).sum())
    skipped = ~(torch.isfinite(grad_norm) & is_loss_finite)
    diverged = skipped & (~is_loss_finite | scaler.is_exhausted)
    step_unless(optimizer, skipped.float())
    for statistic, value in zip(statistics, before, strict=True):
        statistic.copy_(torch.where(skipped, value, statistic))
    scaler.update()
    return Outcome(means, grad_norm, skipped.float(), diverged.float())


def _gradients(
    model: nn.Module, micro_batches: Sequence[Batch], train: TrainConfig, scaler: LossScaler, *, is_first: bool
) -> dict[str, Tensor]:
    """Run forward and backward of each micro-batch; return the mean losses over all of them and all processes."""
    totals: dict[str, Tensor] = {}
    for number, batch in enumerate(micro_batches, start=1):
        # DDP learns a static graph from a first backward that reduces; reducing a mean once more changes nothing.
        is_reduced = number == len(micro_batches) or is_first
        with nullcontext() if is_reduced else without_reduction(model):
            losses = _backward(model, batch, train, scaler)
        totals = {name: totals.get(name, 0) + loss.detach() for name, loss in losses.items()}
    means = mean_over_ranks(torch.stack(list(totals.values())))
    return dict(zip(totals, means, strict=True))


def _backward(model: nn.Module, batch: Batch, train: TrainConfig, scaler: LossScaler) -> dict[str, Tensor]:
    with autocast(batch.images.device, train.dtype):
        losses = model(batch)
    losses = {name: loss / train.accumulation_steps for name, loss in losses.items()}
    scaler.scale(torch.stack(list(losses.values())).sum()).backward()
    return losses
