"""Training steps: accumulation, skipping, exactness."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import cuda_ops
from model.config import ModelConfig, TrainConfig
from model.engine.optim import make_optimizer
from model.engine.precision import LossScaler
from model.engine.steps import train_steps
from model.network.mask_rcnn import LOSSES, MaskRCNN
from model.structures import Batch

CPU = torch.device("cpu")


def train(config: ModelConfig, batches: list[Batch], **options: Any) -> tuple[MaskRCNN, list[dict[str, float]]]:
    """The model and its losses after training on these micro-batches, each step's in order."""
    torch.manual_seed(0)
    model = MaskRCNN(config, 3)
    settings = TrainConfig(**({"base_lr": 0.01, "lr_batch_size": 4, "batch_size": 4, "warmup_iters": 0} | options))
    steps = train_steps(
        model, iter(batches), make_optimizer(model, settings), settings, LossScaler(CPU, settings.dtype)
    )
    return model, [{name: loss.item() for name, loss in step.losses.items()} for step in steps]


def test_accumulated_micro_batches_equal_the_large_batch(
    tiny_config: Callable[..., ModelConfig], shapes_batch: Callable[..., Batch]
) -> None:
    large = [shapes_batch(images=4, seed=seed, first_seed=10 * seed) for seed in range(3)]
    small = [part for batch in large for part in split(batch)]
    _whole_model, whole = train(tiny_config(), large, max_iters=3)
    _parts_model, parts = train(tiny_config(), small, max_iters=3, accumulation_steps=2)
    assert parts[0] == pytest.approx(whole[0], rel=1e-6)
    for expected, got in zip(whole, parts, strict=True):
        assert got == pytest.approx(
            expected, rel=1e-4
        )  # two updates let float32 drift; a wrong mean would show in per cents


def split(batch: Batch) -> list[Batch]:
    """A batch of four as two of two; the polygons' packing is shared, rows are picked by offset."""
    assert batch.targets is not None
    rows = batch.targets.gt_labels.shape[1]
    parts = []
    for first in (0, 2):
        pick = slice(first, first + 2)
        offsets = batch.targets.polygons.instance_offsets[first * rows : (first + 2) * rows + 1]
        targets = replace(
            batch.targets,
            gt_boxes=batch.targets.gt_boxes[pick],
            gt_labels=batch.targets.gt_labels[pick],
            num_gt=batch.targets.num_gt[pick],
            polygons=replace(batch.targets.polygons, instance_offsets=offsets),
        )
        fields = ("images", "image_sizes", "original_sizes", "image_ids", "seeds")
        parts.append(replace(batch, targets=targets, **{name: getattr(batch, name)[pick] for name in fields}))
    return parts


def test_the_same_seed_gives_the_same_losses_bit_for_bit(
    tiny_config: Callable[..., ModelConfig], shapes_batch: Callable[..., Batch]
) -> None:
    batches = [shapes_batch(images=2, seed=seed) for seed in range(3)]
    first = train(tiny_config(), batches, max_iters=3, batch_size=2)[1]
    again = train(tiny_config(), batches, max_iters=3, batch_size=2)[1]
    assert first == again
    assert set(first[0]) == set(LOSSES["mask"])


def test_a_step_counts_its_wait_for_the_loader_and_all_of_its_time(
    tiny_config: Callable[..., ModelConfig], shapes_batch: Callable[..., Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock of seconds that pass while a batch is fetched (3 s), and in the first loss of a step (5 s)."""
    now = 1000.0
    monkeypatch.setattr("model.engine.steps.time.perf_counter", lambda: now)

    def pass_by(seconds: float) -> None:
        nonlocal now
        now += seconds

    def fetched() -> Iterator[Batch]:
        for batch in (shapes_batch(images=2), shapes_batch(images=2)):
            pass_by(3)
            yield batch

    model = MaskRCNN(tiny_config(), 3)
    model.register_forward_pre_hook(lambda *_: pass_by(5))
    settings = TrainConfig(batch_size=2, max_iters=2)
    steps = train_steps(model, fetched(), make_optimizer(model, settings), settings, LossScaler(CPU, settings.dtype))
    assert [(step.data_s, step.step_s) for step in steps] == [(3, 8), (3, 8)]


def test_losses_fall_on_one_batch(tiny_config: Callable[..., ModelConfig], shapes_batch: Callable[..., Batch]) -> None:
    batch = shapes_batch(images=2)
    _, losses = train(tiny_config(), [batch] * 15, max_iters=15, batch_size=2, base_lr=0.05)
    assert sum(losses[-1].values()) < 0.8 * sum(losses[0].values())


def test_a_step_that_is_not_finite_leaves_the_weights_alone(
    tiny_config: Callable[..., ModelConfig], shapes_batch: Callable[..., Batch]
) -> None:
    torch.manual_seed(0)
    model = MaskRCNN(tiny_config(norm="batch_norm", head_norm="batch_norm", box_head="conv", box_head_convs=1), 3)
    settings = TrainConfig(batch_size=2, max_iters=2)
    good = shapes_batch(images=2)
    assert good.targets is not None
    bad_boxes = good.targets.gt_boxes.clone()
    bad_boxes[0, 0, 2] = float("nan")
    bad = replace(good, targets=replace(good.targets, gt_boxes=bad_boxes))
    assert good.targets.num_gt[0] >= 1, "the box that is not finite is pooled, normalised and counted"

    def state() -> dict[str, torch.Tensor]:
        state = model.state_dict()
        return {name: value.clone() for name, value in state.items() if not name.endswith("num_batches_tracked")}

    before = state()
    steps = train_steps(
        model, iter([bad, good]), make_optimizer(model, settings), settings, LossScaler(CPU, settings.dtype)
    )
    assert next(steps).skipped == 1
    assert all(torch.equal(value, before[name]) for name, value in state().items())
    assert next(steps).skipped == 0
    moved = {name for name, value in state().items() if not torch.equal(value, before[name])}
    assert any(name.startswith("roi_heads.box_head") and name.endswith("running_var") for name in moved)
    assert any(name.endswith("weight") for name in moved)


class Linear(torch.nn.Module):
    """Two losses of one weight: the weight itself, and a constant, which has no gradient."""

    def __init__(self, constant: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.constant = constant

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {"slope": self.weight.sum(), "constant": 0 * self.weight.detach().sum() + self.constant}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("constant", [0.0, math.inf, -math.inf, math.nan])
def test_an_infinite_loss_with_finite_gradients_is_skipped_and_reported(
    shapes_batch: Callable[..., Batch], constant: float, dtype: str
) -> None:
    """In float16 too, where a gradient that overflows may be the scale's fault, but an infinite loss may not."""
    model, settings = Linear(constant), TrainConfig(batch_size=2, max_iters=1, dtype=dtype)
    (step,) = train_steps(
        model, iter([shapes_batch()]), make_optimizer(model, settings), settings, LossScaler(CPU, settings.dtype)
    )
    is_bad = not math.isfinite(constant)
    assert step.grad_norm == 1
    assert (step.skipped.item(), step.diverged.item()) == (is_bad, is_bad)
    assert (model.weight.item() == 1) is is_bad


def test_clipping_bounds_the_update(
    tiny_config: Callable[..., ModelConfig], shapes_batch: Callable[..., Batch]
) -> None:
    torch.manual_seed(0)
    model = MaskRCNN(tiny_config(), 3)
    before = [p.detach().clone() for p in model.parameters()]
    settings = TrainConfig(
        batch_size=2, lr_batch_size=2, max_iters=1, base_lr=1.0, warmup_iters=0, bias_lr_factor=1.0,
        clip_grad_norm=0.01, weight_decay=0.0,
    )  # fmt: skip
    step = next(
        train_steps(
            model, iter([shapes_batch()]), make_optimizer(model, settings), settings, LossScaler(CPU, settings.dtype)
        )
    )
    moved = torch.stack([(p.detach() - b).norm() for p, b in zip(model.parameters(), before, strict=True)]).norm()
    assert step.grad_norm > 0.01
    assert moved == pytest.approx(0.01, rel=1e-3)


def test_no_ground_truth_gives_finite_losses_and_gradients(
    tiny_config: Callable[..., ModelConfig], shapes_batch: Callable[..., Batch]
) -> None:
    batch = shapes_batch(images=2)
    assert batch.targets is not None
    empty = replace(batch, targets=replace(batch.targets, num_gt=torch.zeros(2, dtype=torch.int32)))
    model = MaskRCNN(tiny_config(), 3).train()
    losses = model(empty)
    sum(losses.values()).backward()
    assert losses["mask"] == 0
    assert losses["box_reg"] == 0
    assert losses["rpn_box_reg"] == 0
    assert losses["classifier"] > 0  # proposals learn the background
    assert losses["objectness"] > 0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_the_host_never_waits_between_batch_and_losses(
    tiny_config: Callable[..., ModelConfig], shapes_batch: Callable[..., Batch], no_sync: Any, losses_on_fake_cuda: Any
) -> None:
    model = MaskRCNN(tiny_config(), 3).train()
    with no_sync():
        losses = losses_on_fake_cuda(model, shapes_batch(images=2))
    assert set(losses) == set(LOSSES["mask"])
    assert {loss.device.type for loss in losses.values()} == {"cuda"}


def test_the_host_never_waits_in_the_backward_pass(
    tiny_config: Callable[..., ModelConfig], shapes_batch: Callable[..., Batch], no_sync: Any
) -> None:
    model = MaskRCNN(tiny_config(), 3).train()
    losses = model(shapes_batch(images=2))
    with no_sync():
        torch.stack(list(losses.values())).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_no_sync_check_notices_an_item(
    tiny_config: Callable[..., ModelConfig],
    shapes_batch: Callable[..., Batch],
    no_sync: Any,
    losses_on_fake_cuda: Any,
    monkeypatch: Any,
) -> None:
    model = MaskRCNN(tiny_config(), 3).train()
    normalize = model.normalize
    monkeypatch.setattr(model, "normalize", lambda batch: normalize(batch) * batch.images.max().item())
    with pytest.raises(AssertionError, match="_local_scalar_dense"), no_sync():
        losses_on_fake_cuda(model, shapes_batch(images=2))


def test_compiled_operators_learn_as_their_references_do(
    tiny_config: Callable[..., ModelConfig], shapes_batch: Callable[..., Batch]
) -> None:
    """Six steps. All that is proposed and sampled takes part, and the rate is low, so that rounding tips no choice,
    be it one pixel of a mask target, which is worth 1e-5.
    """
    everything = {"rpn_pre_nms_top_n_train": 2000, "rpn_post_nms_top_n_train": 2000, "rpn_nms_iou": 1.0}
    everything |= {
        "rpn_batch_size": 2048,
        "rpn_positive_fraction": 1.0,
        "roi_batch_size": 2048,
        "roi_positive_fraction": 1.0,
    }
    batches = [shapes_batch(images=1, seed=seed, first_seed=10 * seed) for seed in range(6)]
    losses = {}
    for backend in ("compiled", "reference"):
        with cuda_ops.backend(backend):
            options = {"max_iters": 6, "batch_size": 1, "lr_batch_size": 1, "base_lr": 1e-5}
            _, losses[backend] = train(tiny_config(**everything), batches, **options)
    for expected, got in zip(losses["reference"], losses["compiled"], strict=True):
        assert got == pytest.approx(expected, abs=1e-5)
