"""Precisions of a step: float16's loss scale, what autocast leaves alone, what a device refuses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from model.config import ModelConfig, TrainConfig
from model.engine.optim import make_optimizer
from model.engine.precision import LossScaler, set_float32_products
from model.engine.steps import Step, train_steps
from model.errors import UserError
from model.network.mask_rcnn import MaskRCNN
from model.structures import Batch

CPU = torch.device("cpu")


class Run:
    """A small network in training, its steps taken one by one."""

    def __init__(self, config: ModelConfig, batch: Batch, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = MaskRCNN(config, 3)
        train = TrainConfig(batch_size=2, lr_batch_size=2, base_lr=0.01, warmup_iters=0, **options)
        self.scaler = LossScaler(CPU, train.dtype)
        self._steps = train_steps(self.model, iter([batch] * 99), make_optimizer(self.model, train), train, self.scaler)

    def step(self) -> Step:
        return next(self._steps)

    def step_with_infinite_gradient(self) -> Step:
        weight = self.model.rpn.head.cls_logits.weight
        hook = weight.register_hook(lambda grad: torch.full_like(grad, torch.inf))
        step = self.step()
        hook.remove()
        return step

    def weights(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.model.parameters()]


@pytest.fixture
def run(tiny_config: Callable[..., ModelConfig], shapes_batch: Callable[..., Batch]) -> Callable[..., Run]:
    return lambda **options: Run(tiny_config(), shapes_batch(images=2), **options)


def test_an_overflow_halves_the_scale_and_leaves_the_weights_alone(run: Callable[..., Run]) -> None:
    half = run(dtype="float16")
    half.step()
    scale, weights = half.scaler.state_dict()["scale"], half.weights()
    step = half.step_with_infinite_gradient()
    assert (step.skipped, step.diverged) == (1, 0), "the scale may have been too large, which is no divergence"
    assert half.scaler.state_dict()["scale"] == scale / 2
    assert all(torch.equal(now, before) for now, before in zip(half.weights(), weights, strict=True))
    assert half.step().skipped == 0
    assert all(torch.isfinite(weight).all() for weight in half.weights())


def test_an_overflow_that_no_scale_can_mend_is_divergence(run: Callable[..., Run]) -> None:
    half = run(dtype="float16")
    half.scaler.load_state_dict({**half.scaler.state_dict(), "scale": 1.0})
    assert half.step_with_infinite_gradient().diverged == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_infinite_gradient_without_a_scale_is_divergence(dtype: str, run: Callable[..., Run]) -> None:
    full = run(dtype=dtype)
    weights = full.weights()
    step = full.step_with_infinite_gradient()
    assert (step.skipped, step.diverged) == (1, 1)
    assert all(torch.equal(now, before) for now, before in zip(full.weights(), weights, strict=True))
    assert full.scaler.state_dict() == {}


def test_the_scale_doubles_after_2000_steps_without_overflow(run: Callable[..., Run]) -> None:
    half = run(dtype="float16")
    half.scaler.load_state_dict({**half.scaler.state_dict(), "scale": 1024.0, "_growth_tracker": 1998})
    half.step()
    assert half.scaler.state_dict()["scale"] == 1024
    half.step()
    assert half.scaler.state_dict()["scale"] == 2048


def test_the_scale_cancels_out(run: Callable[..., Run]) -> None:
    """Powers of two change no bit but of what underflows, so two scales give one update."""
    large, small = run(dtype="float16"), run(dtype="float16")
    small.scaler.load_state_dict({**small.scaler.state_dict(), "scale": 2.0**12})
    large.step(), small.step()
    for one, other in zip(large.weights(), small.weights(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_losses_of_a_first_step_are_those_of_float32(dtype: str, tolerance: float, run: Callable[..., Run]) -> None:
    expected, got = run(dtype="float32").step().losses, run(dtype=dtype).step().losses
    total = sum(loss.item() for loss in expected.values())
    for name, loss in expected.items():
        assert got[name].item() == pytest.approx(loss.item(), abs=tolerance * total)
    assert any(got[name] != loss for name, loss in expected.items()), "nothing ran in low precision"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_stay_float32(dtype: str, run: Callable[..., Run]) -> None:
    low = run(dtype=dtype)
    low.step()
    assert {parameter.dtype for parameter in low.model.parameters()} == {torch.float32}


def test_tf32_is_refused_where_there_is_none() -> None:
    with pytest.raises(UserError, match=r"tf32.*8\.0 or later, got cpu; set train\.dtype to float32"):
        set_float32_products(CPU, "tf32")


def test_apex_that_is_required_but_cannot_serve_is_an_error() -> None:
    with pytest.raises(UserError, match=r"train\.apex=required: needs NVIDIA's apex, but .*set train\.apex to auto"):
        make_optimizer(nn.Linear(2, 1), TrainConfig(apex="required"))


@pytest.mark.parametrize("apex", ["auto", "off"])
def test_torch_serves_where_apex_cannot(apex: str) -> None:
    assert isinstance(make_optimizer(nn.Linear(2, 1), TrainConfig(apex=apex)), torch.optim.SGD)
