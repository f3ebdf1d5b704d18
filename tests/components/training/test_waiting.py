"""On a GPU the loop reads values of earlier steps alone, while a later one is under way: the device never idles."""

import time
from collections.abc import Iterator, Mapping
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from components.config import Config
from components.tracking.tracker import NullTracker
from components.training.ending import Ending
from components.training.loop import Training
from cuda_ops import library
from model.engine.graphs import GraphCaptureError
from model.engine.late import LateValue
from model.engine.steps import Step
from model.errors import UserError

CUDA = torch.device("cuda", 0)
STEPS, LAUNCHES = 5, 7  # of a step


class Times(NullTracker):
    """Keeps the times of steps."""

    def __init__(self) -> None:
        self.of_steps: list[float] = []

    def log_metrics(self, metrics: Mapping[str, float | None], step: int) -> None:
        self.of_steps.append(metrics["time/step_s"] or 0.0)


@pytest.fixture
def training(trained_run: Config, tmp_path: Path) -> Training:
    period = {"max_iters": 100, "log_period": 100, "checkpoint_period": 100, "output_dir": tmp_path / "run"}
    config = trained_run.model_copy(update={"train": trained_run.train.model_copy(update=period)})
    return Training(config, torch.device("cpu"), Console(quiet=True))


def step(number: int, value: torch.Tensor) -> Step:
    """A step whose launches took no time."""
    return Step(
        losses={"mask": value}, grad_norm=value, skipped=value, diverged=value,
        number=number, image_ids=[], learning_rate=0.1, data_s=0.0, step_s=0.0,
    )  # fmt: skip


def steps(gpu: Any, ending: Ending) -> Iterator[Step]:
    """Steps of which each launches something; their batches are fetched one ahead, as on a GPU."""
    batches: Iterator[Any] = ending.batches(repeat(None))  # type: ignore[arg-type]
    next(batches)
    for number in range(1, STEPS + 1):
        next(batches)
        value = gpu.fake(torch.zeros(()))
        for _ in range(LAUNCHES):
            value = value + 1
        yield step(number, value)
    raise GraphCaptureError("the end")


@pytest.mark.skipif(not library.HAS_CPU, reason="needs g++, which compiles the operators")
def test_the_host_waits_for_no_step_before_the_next_is_under_way(training: Training, fake_gpu: Any) -> None:
    with fake_gpu() as gpu:
        training.ending = Ending(CUDA, 1, reads_late=True)
        with pytest.raises(GraphCaptureError, match="the end"):
            training._run(steps(gpu, training.ending), NullTracker())
    before_the_first, *waits = gpu.waits
    assert before_the_first < LAUNCHES
    assert len(waits) == STEPS + STEPS - 1, "once a step for the agreement, and for whether the step before was skipped"
    assert min(waits) >= LAUNCHES


def test_the_wait_for_the_device_counts_in_the_time_of_a_step(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(late: LateValue) -> float:
        time.sleep(0.02)
        return item(late)

    def broken() -> Iterator[Step]:
        yield from (step(number, torch.zeros(())) for number in range(1, STEPS + 1))
        raise UserError("the end")

    item, times = LateValue.item, Times()
    monkeypatch.setattr(LateValue, "item", slow)
    with pytest.raises(UserError, match="the end"):
        training._run(broken(), times)
    assert len(times.of_steps) == STEPS
    assert min(times.of_steps) >= 0.02
