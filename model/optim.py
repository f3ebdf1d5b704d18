"""SGD and its schedule.

Both are functions of the configuration and the step number: there is no scheduler state to save or to lose.
Source: Accurate, Large Minibatch SGD (arXiv:1706.02677) for linear scaling and warm-up; Detectron's bias factor and decay.
"""

import itertools

import torch
from torch import nn

from model.config import TrainConfig

NORMS = (nn.BatchNorm2d, nn.GroupNorm)


def make_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.SGD:
    """SGD with momentum over three groups: weights, biases (own rate and decay), norm layers (own decay).

    Each group carries `lr_factor`, its rate relative to `learning_rate`. The fused kernel can skip a step on the device.
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
    optimizer = torch.optim.SGD(
        [{"params": params, "lr_factor": factor, "weight_decay": decay} for (factor, decay), params in groups.items()],
        lr=learning_rate(train, 1),
        momentum=train.momentum,
        fused=True,
    )
    if train.momentum:  # torch leaves the buffers of a skipped first step uninitialised
        for parameter in itertools.chain(*groups.values()):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def learning_rate(train: TrainConfig, step: int) -> float:
    """The rate of step 1, 2, … : base_lr scaled to the batch size, warmed up, then divided at each of lr_steps."""
    rate = train.base_lr * train.batch_size / train.lr_batch_size
    rate *= train.lr_gamma ** sum(step > boundary for boundary in train.lr_steps)
    if step <= train.warmup_iters:
        done = (step - 1) / train.warmup_iters if train.warmup_method == "linear" else 0.0
        rate *= train.warmup_factor * (1 - done) + done
    return rate


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give each group `rate` times its factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_factor"]
