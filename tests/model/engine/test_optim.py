"""The optimizer's groups and the schedule of the 1x recipe."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from model.config import ModelConfig, TrainConfig
from model.engine.optim import learning_rate, make_optimizer, set_learning_rate
from model.network.mask_rcnn import MaskRCNN

ONE_X = TrainConfig()


@pytest.mark.parametrize(
    ("step", "rate"),
    [(1, 0.02 / 3), (251, 0.02 * (1 / 3 + 2 / 3 * 0.5)), (501, 0.02), (60000, 0.02), (60001, 0.002), (80001, 0.0002)],
)
def test_rate_of_the_1x_schedule(step: int, rate: float) -> None:
    assert learning_rate(ONE_X, step) == pytest.approx(rate, rel=1e-12)


def test_constant_warmup_stays_at_its_factor() -> None:
    train = TrainConfig(warmup_method="constant", warmup_iters=10, warmup_factor=0.5)
    assert [learning_rate(train, step) for step in (1, 10, 11)] == [0.01, 0.01, 0.02]


def test_rate_scales_with_the_batch() -> None:
    assert learning_rate(TrainConfig(batch_size=64), 1000) == pytest.approx(0.08)


def test_groups_carry_the_bias_factor_and_the_decays(tiny_config: Callable[..., ModelConfig]) -> None:
    model = MaskRCNN(tiny_config(), 3)
    optimizer = make_optimizer(model, TrainConfig(weight_decay_norm=0.5))
    set_learning_rate(optimizer, 0.01)
    of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    conv = of[id(model.rpn.head.cls_logits.weight)]
    bias = of[id(model.rpn.head.cls_logits.bias)]
    norm = of[id(model.backbone.body.bn1.weight)]
    assert (conv["lr"], conv["weight_decay"]) == (0.01, 1e-4)
    assert (bias["lr"], bias["weight_decay"]) == (0.02, 0.0)
    assert (norm["lr"], norm["weight_decay"]) == (0.01, 0.5)
    assert len(of) == len(list(model.parameters()))


def test_frozen_parameters_are_left_out(tiny_config: Callable[..., ModelConfig]) -> None:
    model = MaskRCNN(tiny_config(freeze_stages=2), 3)
    ids = {id(p) for group in make_optimizer(model, ONE_X).param_groups for p in group["params"]}
    assert id(model.backbone.body.conv1.weight) not in ids
    assert id(model.backbone.body.layer2[0].conv1.weight) in ids  # type: ignore[index, union-attr]
    layer = nn.Linear(2, 3)
    layer.weight.requires_grad_(False)
    assert [p is layer.bias for group in make_optimizer(layer, ONE_X).param_groups for p in group["params"]] == [True]


def test_a_skipped_first_step_leaves_no_trace() -> None:
    """What `engine._update` builds on: with `found_inf` set, the fused kernel touches neither weights nor momentum."""
    layer = nn.Linear(2, 1)
    optimizer = make_optimizer(layer, TrainConfig(weight_decay=0.0))
    set_learning_rate(optimizer, 1.0)
    before = layer.weight.detach().clone()
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    optimizer.step()
    assert torch.equal(layer.weight, before)
    assert torch.equal(optimizer.state[layer.weight]["momentum_buffer"], torch.zeros(1, 2))
    optimizer.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]
    optimizer.step()
    assert torch.equal(layer.weight, before - 1)


def test_steps_are_those_of_torchs_own_sgd() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(2, 1)
    twin = copy.deepcopy(layer)
    optimizer = make_optimizer(layer, TrainConfig(weight_decay=0.01, weight_decay_bias=0.01, bias_lr_factor=1.0))
    set_learning_rate(optimizer, 0.1)
    plain = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for x in torch.randn(5, 4, 2):
        for network, its in ((layer, optimizer), (twin, plain)):
            network(x).square().sum().backward()
            its.step()
            its.zero_grad()
    torch.testing.assert_close(list(layer.parameters()), list(twin.parameters()))


def test_mlperf_warmup_adds_its_factor_each_step_up_to_the_rate() -> None:
    """MLPerf's batch of 96: the rate 0.12 over 625 steps of 0.000192."""
    train = TrainConfig(
        batch_size=96, base_lr=0.02, warmup_method="mlperf_linear", warmup_iters=625, warmup_factor=0.000192
    )
    rates = {1: 0.0, 2: 0.000192, 313: 312 * 0.000192, 625: 624 * 0.000192, 626: 0.12, 60001: 0.012}
    assert {step: learning_rate(train, step) for step in rates} == pytest.approx(rates, abs=1e-12)


def test_mlperf_warmup_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"warmup_factor must be at most 0\.0002 with mlperf_linear"):
        TrainConfig(base_lr=0.02, warmup_method="mlperf_linear", warmup_iters=100, warmup_factor=0.001)
