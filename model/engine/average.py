"""Exponential moving average of a network's weights, which is evaluated when `train.ema_decay` is set.

Statistics of batch norms are averaged like weights: averaged weights make other activations than the latest ones.
Source: Polyak & Juditsky, Acceleration of stochastic approximation by averaging (1992); the decay of early steps is
TensorFlow's ExponentialMovingAverage, so that a short training does not evaluate its random beginning.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from model.network.batch_norm import learned_statistics


class WeightAverage:
    """Averages of the trainable parameters and the statistics of batch norms that learn. Never waits for the device."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._weights = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
        statistics = learned_statistics(model)
        self._weights |= statistics
        self._averages = {name: weight.clone() for name, weight in self._weights.items()}
        self.statistics = [self._averages[name] for name in statistics]  # averages of those of batch norms

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after step 1, 2, … to the average."""
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self._averages.values()), list(self._weights.values()), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Swap the averages into the network within the context, then restore its own weights."""
        own = {name: weight.clone() for name, weight in self._weights.items()}
        self._fill(self._averages)
        try:
            yield
        finally:
            self._fill(own)

    def state_dict(self) -> dict[str, Tensor]:
        """Averages by name of parameter or buffer."""
        return self._averages

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the averages of a checkpoint; those that it lacks, of an earlier version, start at the values now."""
        for name, average in self._averages.items():
            average.copy_(state.get(name, self._weights[name]))

    def _fill(self, values: Mapping[str, Tensor]) -> None:
        for name, weight in self._weights.items():
            weight.copy_(values[name])
