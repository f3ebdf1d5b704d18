"""What CUDA graphs of steps rest on, as far as a CPU can tell; test_engine_gpu.py has the graphs themselves."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from model.config import ModelConfig, TrainConfig
from model.engine import train_steps
from model.graphs import TargetSizes, pad_targets, why_not_graphed
from model.mask_rcnn import MaskRCNN
from model.optim import make_optimizer, set_learning_rate
from model.precision import LossScaler
from model.structures import Batch

CPU = torch.device("cpu")
LARGE = TargetSizes(rows=64, parts=256, vertices=4096, max_vertices=128, max_parts=16)


def losses(model: MaskRCNN, batch: Batch) -> dict[str, float]:
    return {name: loss.item() for name, loss in model.train()(batch).items()}


def test_more_padding_of_the_ground_truth_changes_no_loss(
    tiny_config: Callable[..., ModelConfig], shapes_batch: Callable[..., Batch], no_sync: Any
) -> None:
    torch.manual_seed(0)
    model, batch = MaskRCNN(tiny_config(), 3), shapes_batch(images=3)
    assert batch.targets is not None
    with no_sync():
        padded = replace(batch, targets=pad_targets(batch.targets, LARGE))
    assert padded.targets.gt_boxes.shape == (3, 64, 4)
    assert padded.targets.polygons.instance_offsets.shape == (3 * 64 + 1,)
    assert losses(model, padded) == losses(model, batch)


def test_sizes_only_grow(shapes_batch: Callable[..., Batch]) -> None:
    targets = shapes_batch(images=2).targets
    assert targets is not None
    sizes = TargetSizes().to_hold(targets)
    assert sizes.rows == 8
    assert sizes.to_hold(targets) == sizes
    assert LARGE.to_hold(targets) == LARGE


def test_a_learning_rate_in_a_tensor_trains_as_one_in_a_number(
    tiny_config: Callable[..., ModelConfig], shapes_batch: Callable[..., Batch]
) -> None:
    batches = [shapes_batch(images=2, seed=seed) for seed in range(3)]
    found = []
    for cuda_graph in (False, True):
        torch.manual_seed(0)
        model = MaskRCNN(tiny_config(), 3)
        train = TrainConfig(
            batch_size=2, lr_batch_size=2, warmup_iters=2, lr_steps=(2,), max_iters=3, cuda_graph=cuda_graph
        )
        optimizer = make_optimizer(model, train)
        assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor) == cuda_graph
        steps = list(train_steps(model, iter(batches), optimizer, train, LossScaler(CPU, "float32")))
        found.append([{name: loss.item() for name, loss in step.losses.items()} for step in steps])
    for number, tensor in zip(*found, strict=True):
        assert tensor == pytest.approx(number, rel=1e-5)


def test_each_group_has_a_learning_rate_of_its_own(tiny_config: Callable[..., ModelConfig]) -> None:
    optimizer = make_optimizer(MaskRCNN(tiny_config(), 3), TrainConfig(cuda_graph=True, bias_lr_factor=2.0))
    set_learning_rate(optimizer, 0.5)
    rates = {float(group["lr"]) / group["lr_factor"] for group in optimizer.param_groups}
    assert rates == {0.5}


def test_the_reason_against_graphs_is_told() -> None:
    assert why_not_graphed(TrainConfig(), CPU) == "the device is cpu"
    cuda = torch.device("cuda")
    assert why_not_graphed(TrainConfig(), cuda) is None
    assert "micro-batches" in (why_not_graphed(TrainConfig(accumulation_steps=2), cuda) or "")
