"""Values that are read late: the host waits for nothing that was begun since."""

from typing import Any

import pytest
import torch

from cuda_ops import library
from model.engine.late import LateValue


def test_on_the_cpu_it_is_the_value() -> None:
    assert LateValue(torch.tensor(3.0)).item() == 3.0


@pytest.mark.skipif(not library.HAS_CPU, reason="needs g++, which compiles the operators")
def test_reading_waits_for_the_copy_and_not_for_what_follows(fake_gpu: Any) -> None:
    with fake_gpu() as gpu:
        value, later = (gpu.fake(torch.ones(())) for _ in range(2))
        late = LateValue(value)
        for _ in range(5):
            later = later * 2
        late.item()
        assert gpu.waits == [5]


@pytest.mark.gpu
def test_the_value_is_there_while_the_gpu_still_works_on_what_followed() -> None:
    value, done = torch.full((), 3.0, device="cuda"), torch.cuda.Event()
    late = LateValue(value.add_(1))
    torch.cuda._sleep(2_000_000_000)  # cycles, about a second
    done.record()
    assert late.item() == 4.0
    assert not done.query(), "it waited for what followed"
