"""SGD or AdamW, and the learning rate schedule.

Both are functions of the configuration and the step number, so there is no scheduler state to save.
Source: Accurate, Large Minibatch SGD (arXiv:1706.02677) for linear scaling and warm-up; Detectron's bias factor and
decay; AdamW (arXiv:1711.05101); cosine: SGDR (arXiv:1608.03983), without restarts; layer-wise rates: BEiT
(arXiv:2106.08254).
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from model.config import TrainConfig
from model.errors import UserError

NORMS = (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)
LIKE_NORMS = ("layer_scale", "relative_position_bias_table")  # ConvNeXt's and Swin's, which do not decay there either


def make_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """SGD with momentum, or AdamW, over groups of one rate and decay: weights, biases, norm layers.

    Each group has an `lr_factor`, its rate relative to `learning_rate`. The optimizer is torch's fused SGD or AdamW or,
    as `train.apex` says, apex's SGD: all can skip a step on the device; see `step_unless`.

    Raises:
        UserError: if apex is required and cannot be used.
    """
    groups, rate = _groups(model, train), learning_rate(train, 1)
    optimizer: torch.optim.Optimizer
    fused_sgd = _apex_sgd(train, groups)
    if fused_sgd is not None:
        optimizer = fused_sgd(groups, lr=rate, momentum=train.momentum, set_grad_none=True)
    elif train.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=rate, fused=True, capturable=train.cuda_graph)
        # torch would warn at the steps before the first capture.
        optimizer._warned_capturable_if_run_uncaptured = True
    else:
        optimizer = torch.optim.SGD(groups, lr=rate, momentum=train.momentum, fused=True)
    if train.cuda_graph:  # a graph can only read a tensor
        for group in optimizer.param_groups:
            group["lr"] = torch.full((), rate, device=group["params"][0].device)
    if train.optimizer == "sgd" and train.momentum:  # torch leaves the buffers of a skipped first step uninitialised
        for parameter in itertools.chain(*(group["params"] for group in groups)):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _groups(model: nn.Module, train: TrainConfig) -> list[dict[str, Any]]:
    """Group the parameters that learn by rate and decay."""
    of_layer = _layer_factors(model, train.layer_decay)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            if isinstance(module, NORMS) or name in LIKE_NORMS:
                factor, decay = 1.0, train.weight_decay_norm
            elif name == "bias":
                factor, decay = train.bias_lr_factor, train.weight_decay_bias
            else:
                factor, decay = 1.0, train.weight_decay
            factor *= of_layer.get(parameter, 1.0)
            groups.setdefault((factor, decay), []).append(parameter)
    return [
        {"params": params, "lr_factor": factor, "weight_decay": decay} for (factor, decay), params in groups.items()
    ]


def _layer_factors(model: nn.Module, layer_decay: float) -> dict[nn.Parameter, float]:
    """Rates of the body's parameters relative to those of pyramid and heads, which are one layer after its last."""
    if layer_decay == 1.0:
        return {}
    layers = model.get_submodule("backbone.body").layers()  # type: ignore[operator]
    return {
        parameter: layer_decay ** (len(layers) - number)
        for number, layer in enumerate(layers)
        for module in layer
        for parameter in module.parameters()
    }


def _apex_sgd(train: TrainConfig, groups: list[dict[str, Any]]) -> Callable[..., torch.optim.Optimizer] | None:
    """Return apex.optimizers.FusedSGD if it is to be used: it needs parameters on a GPU and apex's CUDA extensions.

    Raises:
        UserError: if apex is required and cannot be used.
    """
    if train.apex == "off" or (train.optimizer != "sgd" and train.apex != "required"):
        return None
    if train.optimizer != "sgd":
        raise UserError(
            f"train.apex=required: needs train.optimizer=sgd, since it is for apex's FusedSGD, got {train.optimizer}; "
            "set train.apex to auto or off"
        )
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
    """Learning rate of step 1, 2, …: base_lr scaled to batch_size, warmed up, then lowered by `train.schedule`."""
    left = max(train.warmup_iters - (step - 1), 0)  # remaining steps of warm-up
    rate = train.peak_lr
    if left and train.warmup_method == "mlperf_linear":
        rate = max(rate - left * train.warmup_factor, 0.0)
    elif left:
        done = 1 - left / train.warmup_iters if train.warmup_method == "linear" else 0.0
        rate *= train.warmup_factor * (1 - done) + done
    if train.schedule == "cosine":
        done = max(step - 1 - train.warmup_iters, 0) / max(train.max_iters - train.warmup_iters, 1)
        return rate * (1 + math.cos(math.pi * min(done, 1.0))) / 2
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
    if isinstance(optimizer, torch.optim.SGD | torch.optim.AdamW):
        optimizer.found_inf = skipped  # type: ignore[union-attr]  # the switch that GradScaler uses
    else:
        optimizer._dummy_overflow_buf.copy_(skipped)  # type: ignore[attr-defined]  # its kernel returns at once
    optimizer.step()
    optimizer.zero_grad()
