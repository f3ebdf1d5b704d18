"""The moving average of weights."""

import torch
from torch import nn

from model.engine.average import WeightAverage
from model.network.batch_norm import BatchNorm2d


def test_the_average_follows_its_recurrence_with_the_early_decay() -> None:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(layer.weight)
    average = WeightAverage(layer, 0.25)
    expected = 0.0
    for step, weight, decay in ((1, 1.0, 2 / 11), (2, 3.0, 0.25), (3, -1.0, 0.25)):
        layer.weight.data.fill_(weight)
        average.update(step)
        expected = decay * expected + (1 - decay) * weight
        torch.testing.assert_close(average.state_dict()["weight"].item(), expected)


def test_the_network_has_the_averages_for_a_while_and_then_its_own_weights_again() -> None:
    layer = nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    average = WeightAverage(layer, 0.9)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.weight.data.add_(1)
    own = layer.weight.detach().clone()
    with average.applied():
        assert torch.equal(layer.weight, before["weight"])
    assert torch.equal(layer.weight, own)
    assert set(average.state_dict()) == {"weight"}  # what is frozen has no average


def test_a_loaded_average_goes_on_where_it_was() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 3)
    one, other = WeightAverage(layer, 0.5), WeightAverage(layer, 0.5)
    layer.weight.data.mul_(2)
    one.update(5)
    other.load_state_dict({name: value.clone() for name, value in one.state_dict().items()})
    layer.weight.data.mul_(2)
    for average in (one, other):
        average.update(6)
    assert torch.equal(one.state_dict()["weight"], other.state_dict()["weight"])


def test_statistics_of_batch_norms_that_learn_are_averaged_like_weights() -> None:
    layers = nn.Sequential(BatchNorm2d(2), BatchNorm2d(2))
    layers[1].requires_grad_(False)  # as in a frozen stage
    average = WeightAverage(layers, 0.25)
    assert set(average.state_dict()) == {f"0.{name}" for name in ("weight", "bias", "running_mean", "running_var")}
    own = layers[0].running_mean.fill_(11.0).clone()
    average.update(1)  # decay 2 / 11
    with average.applied():
        torch.testing.assert_close(layers[0].running_mean, torch.full((2,), 9.0))
    assert torch.equal(layers[0].running_mean, own)
    assert torch.equal(average.statistics[0], average.state_dict()["0.running_mean"])
    earlier = {name: value for name, value in average.state_dict().items() if "running" not in name}
    average.load_state_dict(earlier)  # a checkpoint of the time when there was no average of them
    assert torch.equal(average.state_dict()["0.running_mean"], own)


def test_an_update_does_not_wait_for_the_device(no_sync: type) -> None:
    layer = nn.Linear(3, 3)
    average, before = WeightAverage(layer, 0.5), layer.weight.detach().clone()
    layer.weight.data.mul_(2)
    with no_sync():
        average.update(1)  # decay 2 / 11
    torch.testing.assert_close(average.state_dict()["weight"], before * (2 + 2 * 9) / 11)
