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


class Pixel(nn.Module):
    """A network of one convolution and one loss: as good as Mask R-CNN for the scale, and quick in float16 on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {"mean": self.conv(batch.images.float() / 255).float().square().mean()}


class Run:
    """A network in training, its steps taken one by one."""

    def __init__(self, model: nn.Module, batch: Batch, **options: Any) -> None:
        self.model = model
        train = TrainConfig(batch_size=2, lr_batch_size=2, base_lr=0.01, warmup_iters=0, **options)
        self.scaler = LossScaler(CPU, train.dtype)
        self._steps = train_steps(model, iter([batch] * 99), make_optimizer(model, train), train, self.scaler)

    def step(self) -> Step:
        return next(self._steps)

    def step_with_infinite_gradient(self) -> Step:
        hook = next(self.model.parameters()).register_hook(lambda grad: torch.full_like(grad, torch.inf))
        step = self.step()
        hook.remove()
        return step

    def weights(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.model.parameters()]


@pytest.fixture
def run(shapes_batch: Callable[..., Batch]) -> Callable[..., Run]:
    def start(**options: Any) -> Run:
        torch.manual_seed(0)
        return Run(Pixel(), shapes_batch(images=2, size=32), **options)

    return start


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
    assert not any(torch.equal(now, before) for now, before in zip(half.weights(), weights, strict=True))


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


def test_a_first_step_has_the_losses_of_float32_and_leaves_the_weights_in_it_whatever_the_scale(
    tiny_config: Callable[..., ModelConfig], shapes_batch: Callable[..., Batch]
) -> None:
    """Mask R-CNN itself. Powers of two change no bit but of what underflows, so two scales give one update."""

    def first_step(dtype: str, scale: float | None = None) -> tuple[dict[str, float], list[torch.Tensor]]:
        torch.manual_seed(0)
        taken = Run(MaskRCNN(tiny_config(), 3), shapes_batch(images=2, size=32), dtype=dtype)  # float16 is slow here
        if scale is not None:
            taken.scaler.load_state_dict({**taken.scaler.state_dict(), "scale": scale})
        losses = {name: loss.item() for name, loss in taken.step().losses.items()}
        assert {parameter.dtype for parameter in taken.model.parameters()} == {torch.float32}
        return losses, taken.weights()

    expected, _ = first_step("float32")
    total, seen = sum(expected.values()), [expected]
    for dtype, tolerance in (("bfloat16", 0.05), ("float16", 0.01)):
        losses, weights = first_step(dtype)
        assert losses == pytest.approx(expected, abs=tolerance * total), dtype
        assert losses not in seen, f"{dtype}: nothing ran in it"
        seen.append(losses)
    _, others = first_step("float16", scale=2.0**12)
    for one, other in zip(weights, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_tf32_is_refused_where_there_is_none() -> None:
    with pytest.raises(UserError, match=r"tf32.*8\.0 or later, got cpu; set train\.dtype or predict\.dtype to float32"):
        set_float32_products(CPU, "tf32")


def test_apex_that_is_required_but_cannot_serve_is_an_error() -> None:
    with pytest.raises(UserError, match=r"train\.apex=required: needs NVIDIA's apex, but .*set train\.apex to auto"):
        make_optimizer(nn.Linear(2, 1), TrainConfig(apex="required"))


@pytest.mark.parametrize("apex", ["auto", "off"])
def test_torch_serves_where_apex_cannot(apex: str) -> None:
    assert isinstance(make_optimizer(nn.Linear(2, 1), TrainConfig(apex=apex)), torch.optim.SGD)
