"""SGD and its learning rate schedule.

Both are functions of the configuration and the step number, so there is no scheduler state to save.
Source: Accurate, Large Minibatch SGD (arXiv:1706.02677) for linear scaling and warm-up; Detectron's bias factor and
decay.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from model.config import TrainConfig
from model.errors import UserError

NORMS = (nn.BatchNorm2d, nn.GroupNorm)


def make_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """SGD with momentum over three groups: weights, biases (own rate and decay), norm layers (own decay).

    Each group has an `lr_factor`, its rate relative to `learning_rate`. The optimizer is torch's fused SGD or, as
    `train.apex` says, apex's: both can skip a step on the device; see `step_unless`.

    Raises:
        UserError: if apex is required and cannot be used.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            if isinstance(module, NORMS):
                key = (1.0, train.weight_decay_norm)
            elif name == "bias":
                key = (train.bias_lr_factor, train.weight_decay_bias)
            else:
                key = (1.0, train.weight_decay)
            groups.setdefault(key, []).append(parameter)
    groups_and_rates = [
        {"params": params, "lr_factor": factor, "weight_decay": decay} for (factor, decay), params in groups.items()
    ]
    fused_sgd = _apex_sgd(train, groups_and_rates)
    if fused_sgd is not None:
        optimizer = fused_sgd(groups_and_rates, lr=learning_rate(train, 1), momentum=train.momentum, set_grad_none=True)
    else:
        optimizer = torch.optim.SGD(groups_and_rates, lr=learning_rate(train, 1), momentum=train.momentum, fused=True)
    if train.cuda_graph:  # a graph can only read a tensor
        for group in optimizer.param_groups:
            group["lr"] = torch.full((), learning_rate(train, 1), device=group["params"][0].device)
    if train.momentum:  # torch leaves the buffers of a skipped first step uninitialised
        for parameter in itertools.chain(*groups.values()):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _apex_sgd(train: TrainConfig, groups: list[dict[str, Any]]) -> Callable[..., torch.optim.Optimizer] | None:
    """Return apex.optimizers.FusedSGD if it is to be used: it needs parameters on a GPU and apex's CUDA extensions."""
    if train.apex == "off":
        return None
    try:
        import amp_C  # noqa: F401  # FusedSGD needs it
        from apex.optimizers import FusedSGD
    except ImportError as error:
        reason = f"it cannot be imported ({error})"
    else:
        if groups[0]["params"][0].is_cuda and not train.cuda_graph:
            return FusedSGD
        reason = "its FusedSGD runs only on CUDA, and the weights are on the CPU"
        if train.cuda_graph:
            reason = "its FusedSGD reads the learning rate from the host, which train.cuda_graph does not allow"
    if train.apex == "required":
        raise UserError(
            f"train.apex=required: needs NVIDIA's apex, but {reason}; use NGC's PyTorch images, build it from "
            "github.com/NVIDIA/apex with "
            "its CUDA extensions (`apex` on the package index is another project), or set train.apex to auto or off"
        )
    return None


def learning_rate(train: TrainConfig, step: int) -> float:
    """Learning rate of step 1, 2, …: base_lr scaled to batch_size, warmed up, times lr_gamma after each lr_step."""
    left = max(train.warmup_iters - (step - 1), 0)  # remaining steps of warm-up
    rate = train.peak_lr
    if left and train.warmup_method == "mlperf_linear":
        rate = max(rate - left * train.warmup_factor, 0.0)
    elif left:
        done = 1 - left / train.warmup_iters if train.warmup_method == "linear" else 0.0
        rate *= train.warmup_factor * (1 - done) + done
    return rate * train.lr_gamma ** sum(step > boundary for boundary in train.lr_steps)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set each group's rate to `rate` times its factor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate * group["lr_factor"])
        else:
            group["lr"] = rate * group["lr_factor"]


def step_unless(optimizer: torch.optim.Optimizer, skipped: Tensor) -> None:
    """Update the weights if `skipped`, a scalar on their device, is 0; drop the gradients. Does not wait."""
    if isinstance(optimizer, torch.optim.SGD):
        optimizer.found_inf = skipped  # type: ignore[attr-defined]  # the switch that GradScaler uses
    else:
        optimizer._dummy_overflow_buf.copy_(skipped)  # type: ignore[attr-defined]  # its kernel returns at once
    optimizer.step()
    optimizer.zero_grad()
