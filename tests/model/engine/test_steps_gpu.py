"""Whole training steps on a GPU: the CPU's losses, no wait of the host, every precision, repeated bits, graphs."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from model.config import ModelConfig, TrainConfig
from model.engine.graphs import TargetSizes, pad_targets
from model.engine.optim import make_optimizer
from model.engine.precision import LossScaler, set_float32_products
from model.engine.steps import Step, set_determinism, train_steps
from model.network.mask_rcnn import MaskRCNN
from model.structures import Batch

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
STEPS = 3
SMALL = TargetSizes(rows=8, parts=16, vertices=64, max_vertices=4, max_parts=1)
LARGE = TargetSizes(rows=64, parts=256, vertices=4096, max_vertices=128, max_parts=16)


@pytest.fixture
def batch(shapes_batch: Callable[..., Batch]) -> Batch:
    return shapes_batch(images=2, size=128)


def run(
    config: ModelConfig, batch: Batch, device: str, dtype: str = "float32", *, debug_sync: bool = False
) -> list[Step]:
    """Steps on one batch; with debug_sync, all but the first (in which cuDNN tries its kernels) must not make the host
    wait.
    """
    torch.manual_seed(0)
    model = MaskRCNN(config, 3).to_device(torch.device(device))
    train = TrainConfig(batch_size=2, lr_batch_size=2, base_lr=1e-3, warmup_iters=0, max_iters=STEPS, dtype=dtype)
    set_float32_products(torch.device(device), dtype)
    scaler = LossScaler(torch.device(device), dtype)
    pinned = batch.pin_memory() if device == "cuda" else batch
    steps = train_steps(model, iter([pinned] * STEPS), make_optimizer(model, train), train, scaler)
    taken = [next(steps)]
    try:
        torch.cuda.set_sync_debug_mode("error" if debug_sync else "default")
        taken += list(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return taken


def losses(steps: list[Step]) -> list[dict[str, float]]:
    return [{name: loss.item() for name, loss in step.losses.items()} for step in steps]


def test_first_losses_are_those_of_the_cpu(tiny_config: Callable[..., ModelConfig], batch: Batch) -> None:
    on_gpu, on_cpu = (losses(run(tiny_config(), batch, device))[0] for device in ("cuda", "cpu"))
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "tf32", "bfloat16", "float16"])
def test_the_host_never_waits_in_a_whole_step(
    dtype: str, tiny_config: Callable[..., ModelConfig], batch: Batch
) -> None:
    steps = run(tiny_config(), batch, "cuda", dtype, debug_sync=True)
    assert all(value == value for step in losses(steps) for value in step.values()), "no loss is nan"
    assert [step.diverged.item() for step in steps] == [0] * STEPS


@pytest.mark.parametrize("dtype", ["tf32", "bfloat16", "float16"])
def test_low_precision_is_near_float32(dtype: str, tiny_config: Callable[..., ModelConfig], batch: Batch) -> None:
    low, full = (losses(run(tiny_config(), batch, "cuda", name))[0] for name in (dtype, "float32"))
    assert sum(low.values()) == pytest.approx(sum(full.values()), rel=0.05)


def test_deterministic_steps_repeat_in_every_bit(tiny_config: Callable[..., ModelConfig], batch: Batch) -> None:
    try:
        set_determinism(True)
        first, again = (losses(run(tiny_config(), replace(batch), "cuda")) for _ in range(2))
    finally:
        set_determinism(False)
    assert first == again


def with_targets(batch: Batch, sizes: TargetSizes) -> Batch:
    assert batch.targets is not None
    return replace(batch, targets=pad_targets(batch.targets, sizes))


def graphed(
    config: ModelConfig,
    batches: list[Batch],
    dtype: str,
    *,
    cuda_graph: bool,
    debug_sync: bool = False,
    optimizer: str = "sgd",
) -> tuple[MaskRCNN, list[Step]]:
    """Steps whose learning rate changes each time; with debug_sync, the last two must not make the host wait."""
    torch.manual_seed(0)
    model = MaskRCNN(config, 3).to_device(CUDA)
    train = TrainConfig(
        batch_size=2, lr_batch_size=2, base_lr=1e-3, warmup_iters=20, max_iters=len(batches), dtype=dtype,
        cuda_graph=cuda_graph, apex="off", optimizer=optimizer,
    )  # fmt: skip
    set_float32_products(CUDA, dtype)
    pinned = iter([batch.pin_memory() for batch in batches])
    steps = train_steps(model, pinned, make_optimizer(model, train), train, LossScaler(CUDA, dtype))
    taken = [next(steps) for _ in range(len(batches) - 2)]
    try:
        torch.cuda.set_sync_debug_mode("error" if debug_sync else "default")
        taken += list(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return model, taken


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_graphs_of_two_buckets_train_as_plain_steps_do(
    dtype: str, tiny_config: Callable[..., ModelConfig], shapes_batch: Callable[..., Batch]
) -> None:
    batches = [
        with_targets(shapes_batch(images=2, size=size, seed=seed), SMALL) for seed in range(6) for size in (128, 192)
    ]
    _, plain = graphed(tiny_config(), batches, dtype, cuda_graph=False)
    _, replayed = graphed(tiny_config(), batches, dtype, cuda_graph=True, debug_sync=True)
    assert [step.is_replayed for step in plain + replayed] == [False] * 12 + [False] * 6 + [True] * 6
    for expected, got in zip(losses(plain), losses(replayed), strict=True):
        assert got == pytest.approx(expected, rel=0.02 if dtype != "float32" else 2e-3, abs=1e-4)
    assert [step.learning_rate for step in replayed] == [step.learning_rate for step in plain]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_graph_skips_a_step_that_is_not_finite(
    optimizer: str, tiny_config: Callable[..., ModelConfig], shapes_batch: Callable[..., Batch]
) -> None:
    good = shapes_batch(images=2, size=128)
    assert good.targets is not None
    boxes = good.targets.gt_boxes.clone()
    boxes[0, 0, 2] = float("nan")
    bad = replace(good, targets=replace(good.targets, gt_boxes=boxes))
    batches = [good] * 6 + [bad, good, bad, good]
    model, steps = graphed(tiny_config(), batches, "float32", cuda_graph=True, optimizer=optimizer)
    assert [step.skipped.item() for step in steps] == [0] * 6 + [1, 0, 1, 0]
    assert [step.is_replayed for step in steps] == [False] * 3 + [True] * 7
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_more_ground_truth_than_before_makes_a_new_graph(
    tiny_config: Callable[..., ModelConfig], shapes_batch: Callable[..., Batch]
) -> None:
    small, large = (with_targets(shapes_batch(images=2, size=128), sizes) for sizes in (SMALL, LARGE))
    batches = [small] * 6 + [large] * 6 + [small] * 3
    _, plain = graphed(tiny_config(), batches, "float32", cuda_graph=False)
    _, replayed = graphed(tiny_config(), batches, "float32", cuda_graph=True)
    assert [step.is_replayed for step in replayed] == ([False] * 3 + [True] * 3) * 2 + [True] * 3
    for expected, got in zip(losses(plain), losses(replayed), strict=True):
        assert got == pytest.approx(expected, rel=2e-3, abs=1e-4)
