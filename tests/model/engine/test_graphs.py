"""CUDA graphs of steps with stand-ins of torch's graphs, and what they rest on; test_steps_gpu.py has them on a GPU."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from model.config import ModelConfig, TrainConfig
from model.engine.graphs import GraphCaptureError, GraphedUpdates, TargetSizes, graph_obstacle, pad_targets
from model.engine.optim import learning_rate, make_optimizer, set_learning_rate
from model.engine.precision import LossScaler
from model.engine.steps import train_steps, update_weights
from model.network.mask_rcnn import MaskRCNN
from model.structures import Batch, Outcome

CPU = torch.device("cpu")
SMALL = TargetSizes(rows=8, parts=16, vertices=64, max_vertices=4, max_parts=1)
LARGE = TargetSizes(rows=64, parts=256, vertices=4096, max_vertices=128, max_parts=16)
ONE_MASK = {
    "roi_batch_size": 8,
    "roi_positive_fraction": 0.125,
}  # an image: on a CPU their number depends on the data, else


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
    five = pad_targets(targets, TargetSizes(rows=16, parts=8, vertices=32, max_vertices=8, max_parts=4))
    sizes = TargetSizes().to_hold(five)
    assert sizes == TargetSizes(rows=16, parts=8, vertices=32, max_vertices=8, max_parts=4)
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


def test_the_reason_against_graphs_is_given() -> None:
    assert graph_obstacle(TrainConfig(), CPU) == "the device is cpu"
    cuda = torch.device("cuda")
    assert graph_obstacle(TrainConfig(), cuda) is None
    assert "micro-batches" in (graph_obstacle(TrainConfig(accumulation_steps=2), cuda) or "")


def with_targets(batch: Batch, sizes: TargetSizes) -> Batch:
    assert batch.targets is not None
    return replace(batch, targets=pad_targets(batch.targets, sizes))


def train(
    config: ModelConfig, batches: Iterable[Batch], dtype: str = "float32", *, graphed: bool = True
) -> tuple[MaskRCNN, list[Outcome]]:
    """The model and what became of each step, on the CPU, graphed by stand-ins or plain. The learning rate changes each
    time.
    """
    torch.manual_seed(0)
    model = MaskRCNN(config, 3).train()
    settings = TrainConfig(batch_size=1, lr_batch_size=1, base_lr=1e-3, dtype=dtype, cuda_graph=True)
    optimizer, scaler = make_optimizer(model, settings), LossScaler(CPU, dtype)

    def update(batch: Batch) -> Outcome:
        return update_weights(model, [batch], optimizer, settings, scaler)

    take, outcomes = GraphedUpdates(update, CPU) if graphed else update, []
    for number, batch in enumerate(batches, start=1):
        set_learning_rate(optimizer, learning_rate(settings, number))
        outcomes.append(take(batch))
    return model, outcomes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_graphs_of_two_buckets_train_as_plain_steps_do(
    dtype: str, tiny_config: Callable[..., ModelConfig], shapes_batch: Callable[..., Batch], cuda_stand_ins: Any
) -> None:
    batches = [
        with_targets(shapes_batch(images=1, size=size, seed=seed), SMALL) for seed in range(5) for size in (64, 96)
    ]
    _, plain = train(tiny_config(**ONE_MASK), batches, dtype, graphed=False)
    _, replayed = train(tiny_config(**ONE_MASK), batches, dtype)
    assert [outcome.is_replayed for outcome in replayed] == [False] * 6 + [True] * 4
    for expected, got in zip(plain, replayed, strict=True):
        assert {**got.losses, "norm": got.grad_norm} == {**expected.losses, "norm": expected.grad_norm}


def test_more_ground_truth_makes_new_graphs_in_memory_of_their_own(
    tiny_config: Callable[..., ModelConfig], shapes_batch: Callable[..., Batch], cuda_stand_ins: Any
) -> None:
    batch = shapes_batch(images=1)
    few, many = (with_targets(batch, replace(SMALL, parts=parts, vertices=4 * parts)) for parts in (16, 32))
    batches = [few] * 6 + [many] * 4 + [few]
    alive = []

    def noted() -> Iterator[Batch]:
        for batch in batches:
            alive.append(len(cuda_stand_ins.graphs))
            yield batch

    _, outcomes = train(tiny_config(**ONE_MASK), noted())
    assert [outcome.is_replayed for outcome in outcomes] == [False] * 3 + [True] * 3 + [False] * 3 + [True] * 2
    assert alive == [0] * 4 + [1] * 3 + [0] * 3 + [1], "a graph that is not met again is still there"


def test_a_graph_skips_a_step_that_is_not_finite(
    tiny_config: Callable[..., ModelConfig], shapes_batch: Callable[..., Batch], cuda_stand_ins: Any
) -> None:
    good = with_targets(shapes_batch(images=1), SMALL)
    assert good.targets is not None
    bad = replace(good, targets=replace(good.targets, gt_boxes=good.targets.gt_boxes * torch.nan))
    model, outcomes = train(tiny_config(**ONE_MASK), [good] * 4 + [bad, good])
    assert [outcome.skipped.item() for outcome in outcomes] == [0, 0, 0, 0, 1, 0]
    assert [outcome.is_replayed for outcome in outcomes] == [False] * 3 + [True] * 3
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize("refused", ["convolution_backward", "_fused_sgd_"])
def test_a_capture_that_fails_ends_training_and_tells_what_to_set(
    refused: str, tiny_config: Callable[..., ModelConfig], shapes_batch: Callable[..., Batch], cuda_stand_ins: Any
) -> None:
    """Its gradients would be added to those of the next step, and float16's scaler would refuse to unscale again."""
    cuda_stand_ins.refused = refused
    reason = (
        r"train\.cuda_graph=true: .* \(CUDA error: operation not permitted when stream "
        r"is capturing; then .+\); set train\.cuda_graph=false"
    )
    with pytest.raises(GraphCaptureError, match=reason):
        train(tiny_config(**ONE_MASK), [shapes_batch(images=1)] * 4)
