"""Steps of the networks that a benchmark compares: ours and torchvision's, with the same weights and images."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from components.benchmarks.case import MEMORY_FORMATS, NUM_CLASSES, Case, Name
from components.benchmarks.twin import torchvision_images, torchvision_targets, torchvision_twin
from components.benchmarks.workload import calibrate
from model.config import TrainConfig
from model.distributed import data_parallel
from model.engine.compilation import compile_parts
from model.engine.optim import make_optimizer
from model.engine.precision import LossScaler, autocast, set_float32_products, without_kernel_search
from model.engine.steps import set_determinism, train_steps
from model.network.mask_rcnn import MaskRCNN
from model.structures import Batch


def build_steps(case: Case, device: torch.device) -> dict[Name, Callable[[], object]]:
    """Make a callable per network that takes one step; sets the case's precision for the whole process."""
    set_float32_products(device, case.dtype)
    set_determinism(False)
    torch.manual_seed(0)
    ours = MaskRCNN(case.model, NUM_CLASSES).to_device(device)
    return network_steps(case, ours, calibrate(ours, case, device))


def network_steps(case: Case, ours: MaskRCNN, batch: Batch) -> dict[Name, Callable[[], object]]:
    """Make a callable per network that takes one step."""
    steps: dict[Name, Callable[[], object]] = {}
    for name in (name for name in case.networks if name in MEMORY_FORMATS):
        twin = torchvision_twin(case.model, NUM_CLASSES).to(batch.images.device)
        twin.load_state_dict(ours.state_dict())
        steps[name] = _torchvision_step(twin.to(memory_format=MEMORY_FORMATS[name]), batch, case)
    if "ours" in case.networks:
        steps["ours"] = _our_step(ours, batch, case)
    return steps


def _our_step(model: MaskRCNN, batch: Batch, case: Case) -> Callable[[], object]:
    device = batch.images.device
    if case.compile:
        compile_parts(model, device)
    if case.mode == "train":
        train, scaler = training_of(case), LossScaler(device, case.dtype)
        optimizer = make_optimizer(model, train)
        steps = train_steps(data_parallel(model), itertools.repeat(batch), optimizer, train, scaler)

        def learn() -> object:
            set_determinism(case.deterministic)  # torchvision's network has operators that refuse it
            return next(steps)

        return learn
    model.eval().requires_grad_(False)  # like a network from a checkpoint

    def detect() -> object:
        with without_kernel_search():  # like `model.inference.predict`
            return _detect(model, batch, case.dtype)

    return detect


def _torchvision_step(model: nn.Module, batch: Batch, case: Case) -> Callable[[], object]:
    images = torchvision_images(batch)
    if case.mode == "inference":
        model.eval()
        return lambda: _detect(model, images, case.dtype)
    targets = torchvision_targets(batch)
    targets = [{name: value.to(batch.images.device) for name, value in target.items()} for target in targets]
    optimizer = make_optimizer(model, training_of(case))
    model.train()

    device = batch.images.device
    scaler = torch.amp.GradScaler(device.type, enabled=case.dtype == "float16")

    def step() -> None:
        set_determinism(False)
        with autocast(device, case.dtype):
            losses = model(images, targets)
        scaler.scale(torch.stack(list(losses.values())).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


def _detect(model: nn.Module, inputs: Batch | list[Tensor], dtype: str) -> object:
    with torch.inference_mode(), autocast(next(model.parameters()).device, dtype):
        return model(inputs)


def training_of(case: Case) -> TrainConfig:
    """Training settings with a negligible learning rate, so that random weights do not diverge."""
    return TrainConfig(
        batch_size=case.batch, base_lr=1e-9, warmup_iters=0, dtype=case.dtype, cuda_graph=case.cuda_graph
    )
