"""Every test of an operator runs twice: compiled, and in plain torch. And random boxes for them."""

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import cuda_ops
from cuda_ops import library

RandomBoxes = Callable[..., Tensor]


@pytest.fixture(params=library.BACKENDS, autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[library.Backend]:
    """The implementation under test; in CI both must be there."""
    if request.param == "compiled" and not library.HAS_CPU and not os.environ.get("CI"):
        pytest.skip("needs the compiled operators; `python -m cuda_ops` tells why there are none")
    with cuda_ops.backend(request.param):
        yield request.param


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
