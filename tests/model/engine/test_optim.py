"""The optimizers' groups and steps, and the learning rate schedules."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from model.config import ModelConfig, TrainConfig
from model.engine.optim import learning_rate, make_optimizer, set_learning_rate, step_unless
from model.errors import UserError
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_steps_are_those_of_torchs_own_adamw_and_a_skipped_one_leaves_no_trace(
    dtype: torch.dtype, cuda_graph: bool
) -> None:
    """Weights decay; biases and norms do not. The second step is not finite, and is skipped."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (6, 1)), nn.GroupNorm(2, 6)).to(dtype)
    twin = copy.deepcopy(network)
    train = TrainConfig(
        optimizer="adamw", base_lr=0.005, weight_decay=0.05, bias_lr_factor=2.0, cuda_graph=cuda_graph, warmup_iters=0
    )
    optimizer = make_optimizer(network, train)
    linear, _, norm = twin
    undecayed = {"params": [norm.weight, norm.bias], "weight_decay": 0.0}
    groups = [{"params": [linear.weight]}, {"params": [linear.bias], "lr": 0.01, "weight_decay": 0.0}, undecayed]
    plain = torch.optim.AdamW(groups, lr=0.005, weight_decay=0.05, fused=False, foreach=False)
    set_learning_rate(optimizer, 0.005)
    for number, x in enumerate(torch.randn(6, 5, 4, dtype=dtype)):
        is_bad = number == 1
        network(x * math.inf if is_bad else x).square().sum().backward()
        step_unless(optimizer, torch.tensor(float(is_bad)))
        assert all(parameter.grad is None for parameter in network.parameters())
        if not is_bad:
            twin(x).square().sum().backward()
            plain.step()
            plain.zero_grad()
    tolerance = 1e-12 if dtype == torch.float64 and not cuda_graph else 1e-6  # a rate in a tensor is a float32
    torch.testing.assert_close(list(network.parameters()), list(twin.parameters()), rtol=tolerance, atol=tolerance)
    assert {float(state["step"]) for state in optimizer.state.values()} == {5.0}


@pytest.mark.parametrize("backbone", ["convnext_tiny", "swin_t"])
def test_norms_scales_and_position_biases_do_not_decay(backbone: str, tiny_config: Callable[..., ModelConfig]) -> None:
    with torch.device("meta"):
        model = MaskRCNN(tiny_config(backbone=backbone), 3)
    optimizer = make_optimizer(model, TrainConfig(optimizer="adamw", base_lr=1e-4, weight_decay=0.05, layer_decay=0.9))
    decays = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() > 1 and not name.endswith(("layer_scale", "relative_position_bias_table"))
        assert decays[parameter] == (0.05 if is_matrix else 0.0), name


def test_each_layer_of_the_body_is_slower_than_the_one_after_it(tiny_config: Callable[..., ModelConfig]) -> None:
    """ResNet-18 has nine layers: the stem and eight blocks. The pyramid and the heads are as with 1."""
    model = MaskRCNN(tiny_config(), 3)
    optimizer = make_optimizer(model, TrainConfig(optimizer="adamw", base_lr=1e-4, layer_decay=0.5, bias_lr_factor=1.0))
    factors = {p: group["lr_factor"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: factors[parameter] for name, parameter in model.named_parameters()}
    body = {name.removeprefix("backbone.body."): factor for name, factor in found.items() if ".body." in name}
    assert body["conv1.weight"] == body["bn1.bias"] == 0.5**9
    assert body["layer1.0.conv1.weight"] == 0.5**8
    assert body["layer2.0.downsample.0.weight"] == 0.5**6
    assert body["layer4.1.bn2.weight"] == 0.5
    assert {factor for name, factor in found.items() if ".body." not in name} == {1.0}


def test_a_rate_for_sgd_is_refused_with_adamw() -> None:
    assert TrainConfig(optimizer="adamw", base_lr=0.02, batch_size=4).peak_lr == 0.005
    with pytest.raises(ValueError, match=r"base_lr must be below 0\.01 with adamw.*got 0\.02, a rate for sgd"):
        TrainConfig(optimizer="adamw")


def test_apexs_sgd_cannot_be_required_with_adamw() -> None:
    with pytest.raises(UserError, match=r"train.apex=required: needs train.optimizer=sgd.*got adamw"):
        make_optimizer(nn.Linear(2, 1), TrainConfig(optimizer="adamw", base_lr=1e-4, apex="required"))


def test_rates_are_those_of_torchs_schedulers_at_every_step() -> None:
    factor, warmup, steps = 0.1, 10, 60
    for schedule in ("multistep", "cosine"):
        for method in ("linear", "constant"):
            train = TrainConfig(
                base_lr=0.02, max_iters=steps, schedule=schedule, lr_steps=(30, 45), lr_gamma=0.2,
                warmup_method=method, warmup_iters=warmup, warmup_factor=factor,
            )  # fmt: skip
            optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=train.peak_lr)
            warm_up = (
                lr_scheduler.LinearLR(optimizer, factor, total_iters=warmup)
                if method == "linear"
                else lr_scheduler.ConstantLR(optimizer, factor, total_iters=warmup)
            )
            if schedule == "cosine":
                rest = lr_scheduler.CosineAnnealingLR(optimizer, steps - warmup)
                scheduler = lr_scheduler.SequentialLR(optimizer, [warm_up, rest], [warmup])
            else:
                scheduler = lr_scheduler.ChainedScheduler([warm_up, lr_scheduler.MultiStepLR(optimizer, [30, 45], 0.2)])
            theirs = []
            for _ in range(steps):
                theirs.append(optimizer.param_groups[0]["lr"])
                optimizer.step()
                scheduler.step()
            ours = [learning_rate(train, step) for step in range(1, steps + 1)]
            assert ours == pytest.approx(theirs, rel=1e-9), (schedule, method)


def test_the_cosine_is_at_half_its_height_half_way_and_at_0_after_the_end() -> None:
    train = TrainConfig(base_lr=1.0, batch_size=16, schedule="cosine", warmup_iters=20, max_iters=120)
    rates = [learning_rate(train, step) for step in (21, 71, 121, 200)]
    assert rates == pytest.approx([1.0, 0.5, 0.0, 0.0], abs=1e-12)


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
