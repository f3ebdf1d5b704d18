"""One measurement in a separate process: `python -m components.benchmarks.case CASE` prints its result as JSON.

Both networks have the same weights and the same images: noise with seven polygons each, as outlines for ours and as
dense masks for torchvision's. Weights are random, but cause the work of trained ones: see `calibrate`. A training step
is forward, backward and the optimizer's step; inference goes from images to boxes and 28 × 28 masks. Neither includes
loading images or writing results.
"""

import itertools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import cuda_ops
from components.benchmarks.twin import torchvision_images, torchvision_targets, torchvision_twin
from model.config import ModelConfig, Section, TrainConfig
from model.data.collate import collate
from model.data.dataset import Sample
from model.data.index import CocoInstances
from model.distributed import data_parallel, is_main, pick_device, process_group
from model.engine.compilation import compile_parts
from model.engine.optim import make_optimizer
from model.engine.precision import LossScaler, autocast, set_float32_products, without_kernel_search
from model.engine.steps import set_determinism, train_steps
from model.network.mask_rcnn import MaskRCNN
from model.network.resnet import BasicBlock, Bottleneck
from model.structures import Batch

NUM_CLASSES = 80  # COCO's
_OBJECTS = 7  # per image, COCO's average
_MIN_SIDE_PX = 12
_POSITIVES = 64  # per image: half of the limit for 512 samples; they determine the work on masks
_CANDIDATES = 300  # per image, above the score threshold

# torchvision's network is measured in both memory formats (NHWC: channels-last); the faster depends on device and
# dtype.
Name = Literal["ours", "torchvision", "torchvision NHWC"]
MEMORY_FORMATS: dict[Name, torch.memory_format] = {
    "torchvision": torch.contiguous_format,
    "torchvision NHWC": torch.channels_last,
}
Boxes = NDArray[np.float32]


class Case(Section):
    """Settings of one measurement."""

    mode: Literal["train", "inference"]
    networks: tuple[Name, ...]  # they take steps in turn
    dtype: Literal["float32", "tf32", "bfloat16", "float16"]
    batch: int
    height: int
    width: int
    warmup: int
    steps: int
    steps_per_wait: int = 1
    device: str
    model: ModelConfig
    compile: bool = False  # train.compile, for our network
    cuda_graph: bool = False  # train.cuda_graph, for our network
    deterministic: bool = False  # train.deterministic, for our network's training
    processes: int = 1  # number of processes that train together, each on its own batch


class Measurement(Section):
    """Result of one measurement."""

    step_s: dict[str, list[float]]  # network → times, each the mean of steps_per_wait steps
    peak_memory_mib: float | None  # see PeakMemory


def measure(case: Case) -> Measurement:
    """Build the networks and time their steps."""
    device = pick_device(case.device)
    memory = PeakMemory(device)
    return take_turns(build_steps(case, device), case, device, memory)


def take_turns(
    steps: Mapping[Name, Callable[[], object]], case: Case, device: torch.device, memory: "PeakMemory"
) -> Measurement:
    """Warm up, then step the networks in turn, so that disturbances affect all. Peak memory excludes the warm-up."""
    step_s: dict[str, list[float]] = {name: [] for name in case.networks}
    for number in range(case.warmup + case.steps):
        if number == case.warmup:
            memory.forget_peak()
        for name in case.networks:
            duration_s = _timed(steps[name], device, 1 if number < case.warmup else case.steps_per_wait)
            if number >= case.warmup:
                step_s[name].append(duration_s)
    return Measurement(step_s=step_s, peak_memory_mib=memory.peak_mib())


def build_steps(case: Case, device: torch.device) -> dict[Name, Callable[[], object]]:
    """Make a callable per network that takes one step; sets the case's precision for the whole process."""
    set_float32_products(device, case.dtype)
    set_determinism(False)
    torch.manual_seed(0)
    ours = MaskRCNN(case.model, NUM_CLASSES).to_device(device)
    return _steps(case, ours, calibrate(ours, case, device))


def _steps(case: Case, ours: MaskRCNN, batch: Batch) -> dict[Name, Callable[[], object]]:
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


def _timed(step: Callable[[], object], device: torch.device, steps: int) -> float:
    """Mean seconds of some steps; waits for the device before and after them."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / steps


class PeakMemory:
    """Peak memory: on CUDA, the memory that torch reserved on the device, graphs included; else the resident memory of
    the process in excess of that when this object was made.
    """

    _STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before_mib = self._resident_mib("VmRSS") or 0.0

    def forget_peak(self) -> None:
        """Reset the peak to the current use."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
        elif self._CLEAR.exists():
            self._CLEAR.write_text("5")  # Linux: resets the peak to the resident memory

    def peak_mib(self) -> float | None:
        """Peak in MiB; None if the system does not report it."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_reserved(self._device) / 2**20
        peak_mib = self._resident_mib("VmHWM")
        return None if peak_mib is None else peak_mib - self._before_mib

    def _resident_mib(self, name: str) -> float | None:
        lines = self._STATUS.read_text().splitlines() if self._STATUS.is_file() else []
        values = [float(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:")]
        return values[0] if values else None


def calibrate(model: MaskRCNN, case: Case, device: torch.device) -> Batch:
    """Make random weights cause the load of trained ones, and return the batch to use.

    Activations stay finite. In inference, _CANDIDATES per image reach NMS. In training, the ground truth is where the
    network proposes boxes, so that about _POSITIVES per image can be sampled, as after training.
    """
    batch = synthetic_batch(case, random_boxes(case)).to(device)
    with torch.no_grad():
        for block in model.backbone.body.modules():
            if isinstance(block, BasicBlock | Bottleneck):
                last_norm = block.bn3 if isinstance(block, Bottleneck) else block.bn2
                cast(Tensor, last_norm.weight).mul_(0.2)  # otherwise sums over many blocks grow without bound
        if case.mode == "train":
            return synthetic_batch(case, _proposed_boxes(model, batch, case)).to(device)
        _calibrate_scores(model.eval(), batch, case)
    return batch


def _proposed_boxes(model: MaskRCNN, batch: Batch, case: Case) -> list[Boxes]:
    """Choose _OBJECTS proposals per image, those with the right number of overlapping proposals."""
    proposals, _ = model.rpn(model.backbone(model.normalize(batch)), batch)
    chosen = []
    for boxes, count in zip(proposals.boxes, proposals.num_proposals.tolist(), strict=True):
        boxes = boxes[:count]
        around = (cuda_ops.box_iou(boxes, boxes) >= case.model.roi_fg_iou).sum(1)
        is_thin = (boxes[:, 2:] - boxes[:, :2]).amin(1) < _MIN_SIDE_PX
        misfit = (around - _POSITIVES / _OBJECTS).abs().masked_fill(is_thin, torch.inf)
        chosen.append(boxes[misfit.argsort(stable=True)[:_OBJECTS]].cpu().numpy())
    return chosen


def _calibrate_scores(model: MaskRCNN, batch: Batch, case: Case) -> None:
    """Spread each class's logits over the proposals, then raise the background logit until few candidates are left."""
    if model.roi_heads is None:  # the number of proposals does not depend on scores
        return
    seen: list[Tensor] = []
    hook = model.roi_heads.box_predictor.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    model(batch)
    hook.remove()
    logits = seen[0].flatten(0, -2)  # [N·P, 1 + C]
    mean, factor = logits.mean(0), 3.0 / logits.std(0)
    logits = (logits - mean) * factor
    low, high = 0.0, 50.0
    for _ in range(20):
        bias = (low + high) / 2
        shifted = torch.cat([logits[:, :1] + bias, logits[:, 1:]], 1)
        is_crowded = (shifted.softmax(1)[:, 1:] > case.model.score_threshold).sum() > _CANDIDATES * case.batch
        low, high = (bias, high) if is_crowded else (low, bias)
    cls_score = model.roi_heads.box_predictor.cls_score
    cls_score.weight.mul_(factor[:, None])
    cls_score.bias.copy_(-mean * factor)
    cls_score.bias[0] += high


def synthetic_batch(case: Case, boxes: Sequence[Boxes]) -> Batch:
    """Make noise images, padded to whole strides, with a polygon in each of an image's boxes [n, 4]."""
    rng = np.random.default_rng(0)
    bucket = (-(-case.height // 32) * 32, -(-case.width // 32) * 32)
    samples = [
        Sample(
            image=rng.integers(0, 256, (case.height, case.width, 3), dtype=np.uint8),
            image_id=n,
            original_size=(case.height, case.width),
            seed=n,
            instances=_instances(rng, of_image) if case.mode == "train" else None,
        )
        for n, of_image in enumerate(boxes)
    ]
    return collate(samples, (bucket,))


def random_boxes(case: Case) -> list[Boxes]:
    """Draw boxes anywhere in each image, with sides from a twelfth to half of the image's."""
    rng = np.random.default_rng(1)
    frame = np.array([case.width, case.height])
    sides = rng.uniform(1 / 12, 1 / 2, (case.batch, _OBJECTS, 2)) * frame
    corners = rng.uniform(0, 1, sides.shape) * (frame - sides)
    return list(np.concatenate([corners, corners + sides], 2).astype(np.float32))


def _instances(rng: np.random.Generator, boxes: Boxes) -> CocoInstances:
    """Make a star-shaped outline of 8 to 32 vertices that fills each box."""
    outlines = []
    for (x1, y1, x2, y2), vertices in zip(boxes, rng.integers(8, 33, len(boxes)), strict=True):
        angles = np.sort(rng.uniform(0, 2 * np.pi, vertices))
        star = rng.uniform(0.6, 1.0, (vertices, 1)) * np.stack([np.cos(angles), np.sin(angles)], 1)
        unit = (star - star.min(0)) / np.ptp(star, axis=0)
        outlines.append(np.array([x1, y1]) + unit * np.array([x2 - x1, y2 - y1]))
    return CocoInstances(
        boxes=boxes,
        labels=rng.integers(1, NUM_CLASSES + 1, len(boxes)),
        is_crowd=np.zeros(len(boxes), dtype=bool),
        xy=np.concatenate(outlines).astype(np.float32),
        part_offsets=np.concatenate([[0], np.cumsum([len(outline) for outline in outlines])]),
        instance_offsets=np.arange(len(boxes) + 1),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Read a Case as JSON from the command line, print its Measurement as JSON."""
    (text,) = sys.argv[1:] if argv is None else argv
    case = Case.model_validate_json(text)
    with process_group(pick_device(case.device), timeout_s=600):
        measurement = measure(case)
        if is_main():
            print(measurement.model_dump_json())


if __name__ == "__main__":
    main()
