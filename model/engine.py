"""The engine computes: training steps as a generator, detections as a generator. Logging, saving and stopping stay outside.

    for step in train_steps(model, batches, optimizer, train, device):
        ...

Nothing here waits for the device: what a step yields are tensors, read only by who needs them.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import TrainConfig
from model.mask_rcnn import MaskRCNN
from model.optim import learning_rate, set_learning_rate
from model.structures import Batch, Detections


@dataclass(frozen=True)
class Step:
    """One update of the weights, or none where a loss or a gradient was not finite."""

    number: int  # 1, 2, …
    losses: dict[str, Tensor]  # scalars on the device, mean over the micro-batches
    grad_norm: Tensor  # scalar, before clipping
    skipped: Tensor  # scalar: 1 where the weights were left alone
    image_ids: list[int]
    learning_rate: float
    data_s: float  # waiting for the loader
    step_s: float  # in all


def pick_device(name: str) -> torch.device:
    """`auto` is the first CUDA device where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def train_steps(
    model: MaskRCNN,
    batches: Iterator[Batch],
    optimizer: torch.optim.Optimizer,
    train: TrainConfig,
    device: torch.device,
    start_step: int = 0,
) -> Iterator[Step]:
    """Train from step start_step + 1 to max_iters.

    Args:
        batches: micro-batches; train.accumulation_steps of them make a step, with the gradient of one large batch.
        optimizer: from `make_optimizer`: fused, so that a step can be skipped without asking the host.
    """
    model.train()
    for number in range(start_step + 1, train.max_iters + 1):
        began, data_s, image_ids = time.perf_counter(), 0.0, []
        totals: dict[str, Tensor] = {}
        set_learning_rate(optimizer, learning_rate(train, number))
        for _ in range(train.accumulation_steps):
            waited = time.perf_counter()
            batch = next(batches)
            data_s += time.perf_counter() - waited
            image_ids += batch.image_ids.tolist()
            losses = _backward(model, batch.to(device, non_blocking=True), train)
            totals = {name: totals.get(name, 0) + loss.detach() for name, loss in losses.items()}
        grad_norm, skipped = _update(model, optimizer, train, totals)
        step_s = time.perf_counter() - began
        yield Step(number, totals, grad_norm, skipped, image_ids, learning_rate(train, number), data_s, step_s)


def _backward(model: MaskRCNN, batch: Batch, train: TrainConfig) -> dict[str, Tensor]:
    with _precision(batch.images.device, train.dtype):
        losses = model(batch)
    assert isinstance(losses, dict)
    losses = {name: loss / train.accumulation_steps for name, loss in losses.items()}
    torch.stack(list(losses.values())).sum().backward()
    return losses


def _update(
    model: MaskRCNN, optimizer: torch.optim.Optimizer, train: TrainConfig, losses: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Change the weights unless something is not finite; the decision is made on the device."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if train.clip_grad_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, train.clip_grad_norm, grad_norm)
    skipped = (~torch.isfinite(grad_norm + torch.stack(list(losses.values())).sum())).float()
    optimizer.found_inf = skipped  # type: ignore[attr-defined]  # the fused kernel's own switch, GradScaler's way in
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return grad_norm, skipped


def predict(
    model: MaskRCNN, batches: Iterable[Batch], device: torch.device, dtype: str = "float32"
) -> Iterator[tuple[Batch, Detections]]:
    """Detections of each batch, the model in evaluation mode meanwhile; `dtype` is `train.dtype`."""
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            with torch.inference_mode(), _precision(device, dtype):
                detections = model(batch.to(device, non_blocking=True))
            assert isinstance(detections, Detections)
            yield batch, detections
    finally:
        model.train(was_training)


def _precision(device: torch.device, dtype: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")
