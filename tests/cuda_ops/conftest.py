"""Random boxes for the tests of the operators."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

RandomBoxes = Callable[..., Tensor]


@pytest.fixture(scope="session")
def random_boxes() -> RandomBoxes:
    """random_boxes(*shape, seed=…, extent=…, whole=…): [*shape, 4] boxes; whole pixels give ties and boxes without area."""

    def draw(*shape: int, seed: int, extent: float = 100.0, whole: bool = False) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        start = torch.rand(*shape, 2, generator=generator) * extent
        side = torch.rand(*shape, 2, generator=generator) ** 2 * extent * 0.6
        boxes = torch.cat((start, start + side), dim=-1)
        return (boxes / 8).round() * 8 if whole else boxes

    return draw
