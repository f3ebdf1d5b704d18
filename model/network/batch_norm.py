"""Batch norms that learn: over one process's cells or those of all processes, and over the real rows of a padded batch.

Shapes: R rows (images or RoIs), C channels. Modules carry the names and buffers of torch.nn.BatchNorm2d.
Sources: Batch Normalization (arXiv:1502.03167); MegDet (arXiv:1711.07240) for statistics over processes.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.distributed import sum_over_ranks, world_size


class BatchNorm2d(nn.BatchNorm2d):
    """torch's batch norm, whose statistics in training can leave out rows that are padding."""

    is_synchronised = False

    def forward(self, x: Tensor, is_real: Tensor | None = None) -> Tensor:
        """Normalise [R, C, H, W]; in training only rows with `is_real` [R] bool count, or all if it is None."""
        synchronises = self.is_synchronised and world_size() > 1
        if not self.training or (is_real is None and not synchronises):
            return super().forward(x)
        return self._normalize(x, is_real, synchronises)

    def _normalize(self, x: Tensor, is_real: Tensor | None, synchronises: bool) -> Tensor:
        weight, bias, running_mean, running_var = self.weight, self.bias, self.running_mean, self.running_var
        assert running_mean is not None
        assert running_var is not None
        assert self.momentum is not None
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        found = _moments(x, is_real, synchronises)
        has_rows = found.cells > 0
        mean = torch.where(has_rows, found.mean, running_mean)
        var = torch.where(has_rows, found.var, running_var)
        with torch.no_grad():
            unbiased = torch.where(has_rows, var * (found.cells / (found.cells - 1).clamp(min=1)), running_var)
            running_mean.lerp_(mean, self.momentum)
            running_var.lerp_(unbiased, self.momentum)
        rows = torch.ones(x.shape[0], dtype=torch.bool, device=x.device) if is_real is None else is_real
        scale = (var + self.eps).rsqrt()
        normalized: Tensor = _Normalize.apply(
            x, weight, bias, _Statistics(mean, scale, found.cells.clamp(min=1), rows), synchronises
        )
        return normalized


class SyncBatchNorm2d(BatchNorm2d):
    """Batch norm over the cells of all processes; with one process, torch's.

    Unlike torch.nn.SyncBatchNorm it also runs on CPUs, leaves out padding, and never waits for the device.
    """

    is_synchronised = True


def exclude_from_compilation(model: nn.Module) -> None:
    """Let torch.compile leave out norms that learn: they communicate, and have a backward pass written by hand.

    `torch.compiler.disable` as a decorator would import the compiler, which takes more than a second, with the network.
    """
    for module in model.modules():
        if isinstance(module, BatchNorm2d):
            module._normalize = torch.compiler.disable(module._normalize)  # type: ignore[method-assign]


def learned_statistics(module: nn.Module) -> dict[str, Tensor]:
    """Running means and variances of the batch norms that learn, by name; those of frozen stages never change."""
    return {
        f"{name}.{statistic}": getattr(norm, statistic)
        for name, norm in module.named_modules()
        if isinstance(norm, BatchNorm2d) and norm.weight.requires_grad
        for statistic in ("running_mean", "running_var")
    }


class _Moments(NamedTuple):
    """Statistics of real cells over all processes that take part."""

    mean: Tensor  # [C]
    var: Tensor  # [C], biased
    cells: Tensor  # scalar: their number


class _Statistics(NamedTuple):
    """Values that normalise, and those that the backward pass needs."""

    mean: Tensor  # [C]
    scale: Tensor  # [C]: 1 / standard deviation
    cells: Tensor  # scalar: number of real cells, at least 1
    is_real: Tensor  # [R] bool


@torch.no_grad()
def _moments(x: Tensor, is_real: Tensor | None, synchronises: bool) -> _Moments:
    """Mean and variance in two passes over x; sums over processes are float64, whose squares cancel harmlessly."""
    x, cells = _wide(x), x.shape[2] * x.shape[3]
    if is_real is None:
        count = torch.full((), float(x.shape[0] * cells), dtype=x.dtype, device=x.device)
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    else:
        weights = is_real[:, None, None, None]
        count = is_real.sum().to(x.dtype) * cells
        mean = (x * weights).sum((0, 2, 3)) / count.clamp(min=1)
        var = ((x - _channels(mean)).square_() * weights).sum((0, 2, 3)) / count.clamp(min=1)
    if not synchronises:
        return _Moments(mean, var, count)
    mean, var, count = mean.double(), var.double(), count.double()
    sums = sum_over_ranks(torch.cat([count * mean, count * (var + mean.square()), count[None]]))
    total = sums[-1]
    mean, square = (sums[:-1] / total.clamp(min=1)).chunk(2)
    var = (square - mean.square()).clamp(min=0)
    return _Moments(mean.to(x.dtype), var.to(x.dtype), total.to(x.dtype))


class _Normalize(torch.autograd.Function):
    """(x - mean) · scale · weight + bias, where mean and scale are functions of the real rows of x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, statistics: _Statistics, synchronises: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight, *statistics)
        ctx.synchronises = synchronises
        factor = statistics.scale * weight
        return torch.addcmul(_channels(bias - statistics.mean * factor), _wide(x), _channels(factor)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale, count, is_real = ctx.saved_tensors
        normalized = (_wide(x) - _channels(mean)).mul_(_channels(scale))
        grad = _wide(grad)
        grad_weight, grad_bias = (grad * normalized).sum((0, 2, 3)), grad.sum((0, 2, 3))
        sums = torch.cat([grad_weight, grad_bias])
        along, constant = ((sum_over_ranks(sums) if ctx.synchronises else sums) / count).chunk(2)
        # The statistics pass a gradient to real rows only.
        indirect = normalized.mul_(_channels(along)).add_(_channels(constant)).mul_(is_real[:, None, None, None])
        grad_x = (grad - indirect).mul_(_channels(scale * weight)).to(x.dtype)
        return grad_x, grad_weight, grad_bias, None, None


def _wide(x: Tensor) -> Tensor:
    """Cast bfloat16 and float16, in which sums lose too much, to float32."""
    return x.float() if x.itemsize == 2 else x


def _channels(values: Tensor) -> Tensor:
    return values[:, None, None]
