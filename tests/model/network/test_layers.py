"""Frozen batch norm: folded once, and anew when anything it was folded from has changed."""

import copy
import io
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from model.network.layers import FrozenBatchNorm2d, conv_norm


class Operators(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.calls[func._schema.name.split("::")[-1]] += 1
        return func(*args, **(kwargs or {}))


class Layer(nn.Module):
    def __init__(self, *, learns: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.conv.weight.requires_grad_(learns)
        self.norm = FrozenBatchNorm2d(4)
        for buffer in self.norm.buffers():
            buffer.uniform_(0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        return conv_norm(self.conv, self.norm, x)

    def unfolded(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = self.norm.buffers()
        return F.batch_norm(self.conv(x), mean, var, weight, bias, eps=self.norm.eps)


X = torch.linspace(-1, 1, 75).view(1, 3, 5, 5)
both = pytest.mark.parametrize("learns", [True, False])


@both
def test_the_second_time_only_what_learns_is_computed(learns: bool) -> None:
    layer = Layer(learns=learns)
    layer(X)
    with Operators() as second:
        found = layer(X)
    assert second.calls == {"convolution": 1, **({"mul": 1} if learns else {})}
    torch.testing.assert_close(found, layer.unfolded(X))


def test_in_bfloat16_only_what_learns_is_cast_again() -> None:
    for learns, casts in ((True, 2), (False, 1)):  # the input, and the kernel
        layer = Layer(learns=learns)
        with torch.autocast("cpu", torch.bfloat16):
            first = layer(X)
            with Operators() as second:
                assert torch.equal(layer(X), first)
        assert second.calls["_to_copy"] == casts
        scale, shift = layer.norm.scale_and_shift()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(first, F.conv2d(X, layer.conv.weight * scale[:, None, None, None], shift))
        torch.testing.assert_close(layer(X), layer.unfolded(X))  # float32 again


def replaced(layer: Layer) -> None:
    layer.norm.running_mean = torch.zeros(4)


def loaded(layer: Layer) -> None:
    layer.load_state_dict({name: value * 2 for name, value in layer.state_dict().items()})


def given_other_data(layer: Layer) -> None:
    layer.conv.weight.data = layer.conv.weight.data * 2


CHANGES: dict[str, Callable[[Layer], object]] = {
    "a buffer is changed in place": lambda layer: layer.norm.weight.mul_(2),
    "a buffer is replaced": replaced,
    "weights are loaded": loaded,
    "the kernel is changed in place": lambda layer: layer.conv.weight.detach().mul_(2),
    "the kernel gets other data": given_other_data,
    "the network is made double": lambda layer: layer.double(),
    "the kernel learns from now on": lambda layer: layer.requires_grad_(True),
    "the kernel learns no more": lambda layer: layer.requires_grad_(False),
}


@both
@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_folded_anew(change: str, learns: bool) -> None:
    layer = Layer(learns=learns)
    layer(X)
    CHANGES[change](layer)
    x = X.to(layer.conv.weight.dtype)
    found = layer(x)
    torch.testing.assert_close(found, layer.unfolded(x))
    assert found.requires_grad == layer.conv.weight.requires_grad


@both
def test_what_inference_folded_serves_training(learns: bool) -> None:
    layer = Layer(learns=learns)
    with torch.inference_mode():
        layer(X)
    x = X.clone().requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    assert (layer.conv.weight.grad is not None) == learns


def test_a_network_made_in_inference_mode_works() -> None:
    with torch.inference_mode():
        layer = Layer(learns=False)
        torch.testing.assert_close(layer(X), layer.unfolded(X))


def test_copies_and_files_hold_nothing_that_was_folded() -> None:
    layer = Layer(learns=False)
    names, empty, used = set(layer.state_dict()), io.BytesIO(), io.BytesIO()
    torch.save(layer, empty)
    layer(X)
    torch.save(layer, used)
    assert set(layer.state_dict()) == names
    assert len(used.getvalue()) == len(empty.getvalue())
    twin = copy.deepcopy(layer)
    twin.norm.bias.add_(1)
    torch.testing.assert_close(twin(X), twin.unfolded(X))
    torch.testing.assert_close(layer(X), layer.unfolded(X))


@pytest.mark.parametrize("learns", [True, False])
def test_a_compiled_layer_computes_the_same(learns: bool) -> None:
    layer = Layer(learns=learns)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), layer.unfolded(X))
    with torch.no_grad():
        layer.norm.weight.mul_(2)
    torch.testing.assert_close(compiled(X), layer.unfolded(X))
