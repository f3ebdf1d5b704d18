"""Benchmark of the phases of a training step, `maskrcnn benchmark phases`, with a lower bound of the step's time.

The floor is the step's floating-point operations (of convolutions and matrix products, as counted by torch) divided by
the device's speed on one large matrix product. Images and weights come from workload.py.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from components.benchmarks.case import NUM_CLASSES
from components.benchmarks.network_steps import training_of
from components.benchmarks.steps import first_case
from components.benchmarks.workload import calibrate
from components.config import Config
from model.distributed import pick_device
from model.engine.optim import make_optimizer
from model.engine.precision import LossScaler, autocast, set_float32_products
from model.engine.steps import set_determinism, train_steps
from model.network.mask_rcnn import MaskRCNN

# Parts of the forward pass and their modules; the rest of RPN and RoI heads lies between these.
PARTS = {
    "body": ("backbone.body",),
    "fpn": ("backbone.fpn",),
    "rpn": ("rpn",),
    "box head": ("roi_heads.box_head", "roi_heads.box_predictor"),
    "res5": ("roi_heads.res5",),
    "mask head": ("roi_heads.mask_head", "roi_heads.mask_predictor"),
    "roi heads": ("roi_heads",),
    "forward": ("",),
}
_PEAK_SIDE = {"cpu": 2048, "cuda": 8192}  # side of the square matrices that measure the device's peak


class Stopwatch:
    """Stopwatch for spans between marks; on CUDA it uses the device's clock, since the host runs ahead."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self.spans: list[tuple[str, Any, Any]] = []

    def mark(self) -> Any:
        """Return a mark of the current time."""
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> dict[str, float]:
        """Return the sum of spans per name, and clear them."""
        if self._on_cuda:
            torch.cuda.synchronize()
        sums: dict[str, float] = {}
        for name, start, end in self.spans:
            span_s = start.elapsed_time(end) / 1e3 if self._on_cuda else end - start
            sums[name] = sums.get(name, 0.0) + span_s
        self.spans = []
        return sums


def measure(config: Config) -> dict[str, Any]:
    """Measure the median seconds of each phase of a training step, and the step's floor.

    Returns:
        {"phases": {name: seconds}, "step_s", "flops", "peak_flops_per_s", "floor_s", …}, without torchvision.
    """
    # A compiled or graphed step has no separate phases.
    case = first_case(config).model_copy(update={"compile": False, "cuda_graph": False})
    device = pick_device(case.device)
    set_float32_products(device, case.dtype)
    set_determinism(case.deterministic)
    torch.manual_seed(0)
    model = MaskRCNN(case.model, NUM_CLASSES).to_device(device)
    batch = calibrate(model, case, device)
    train, scaler = training_of(case), LossScaler(device, case.dtype)
    optimizer = make_optimizer(model, train)
    steps = train_steps(model, itertools.repeat(batch), optimizer, train, scaler)
    with FlopCounterMode(display=False) as counter:
        next(steps)
    watch, rows = Stopwatch(device), []
    with _timed(model, optimizer, watch):
        for number in range(case.warmup + case.steps):
            start = watch.mark()
            next(steps)
            watch.spans.append(("step", start, watch.mark()))
            row = _phases(watch.seconds())
            rows += [row] if number >= case.warmup else []
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    peak = peak_flops_per_s(device, case.dtype)
    return {
        "dtype": case.dtype, "batch": case.batch, "height": case.height, "width": case.width,
        "phases": {name: seconds for name, seconds in medians.items() if name != "step"},
        "step_s": medians["step"],
        "flops": counter.get_total_flops(),
        "peak_flops_per_s": peak,
        "floor_s": counter.get_total_flops() / peak,
    }  # fmt: skip


def peak_flops_per_s(device: torch.device, dtype: str) -> float:
    """Peak speed of the device: the fastest of ten products of large square matrices."""
    side = _PEAK_SIDE[device.type]
    one, two = (torch.randn(side, side, device=device) for _ in range(2))
    best_s = float("inf")
    with torch.no_grad(), autocast(device, dtype):
        if torch.is_autocast_enabled(device.type):  # do not time the cast
            low = torch.get_autocast_dtype(device.type)
            one, two = one.to(low), two.to(low)
        for _ in range(10):
            watch = Stopwatch(device)
            start = watch.mark()
            one @ two
            watch.spans.append(("product", start, watch.mark()))
            best_s = min(best_s, watch.seconds()["product"])
    return 2 * side**3 / best_s


@contextmanager
def _timed(model: nn.Module, optimizer: torch.optim.Optimizer, watch: Stopwatch) -> Iterator[None]:
    """Record the spans of PARTS, of the backward pass and of the optimizer within the context."""
    starts: dict[str, list[Any]] = {}

    def begin(name: str) -> Callable[..., None]:
        return lambda *_: starts.setdefault(name, []).append(watch.mark())

    def end(name: str) -> Callable[..., None]:
        return lambda *_: watch.spans.append((name, starts[name].pop(), watch.mark()))

    hooks: list[Any] = []
    modules = dict(model.named_modules())
    for part, paths in PARTS.items():
        for module in (modules[path] for path in paths if path in modules):
            hooks += [module.register_forward_pre_hook(begin(part)), module.register_forward_hook(end(part))]
    hooks.append(model.register_forward_hook(begin("backward")))
    hooks.append(optimizer.register_step_pre_hook(end("backward")))
    hooks.append(optimizer.register_step_pre_hook(begin("optimizer")))
    hooks.append(optimizer.register_step_post_hook(end("optimizer")))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _phases(spans: dict[str, float]) -> dict[str, float]:
    """Seconds of disjoint phases that add up to the step."""
    forward, heads = spans["forward"], spans.get("roi heads", 0.0)
    inner: dict[str, float] = {
        name: spans[name] for name in ("body", "fpn", "rpn", "res5", "box head", "mask head") if name in spans
    }
    sampling = heads - sum(inner.get(name, 0.0) for name in ("res5", "box head", "mask head"))
    return {
        "normalise": forward - sum(inner.get(name, 0.0) for name in ("body", "fpn", "rpn")) - heads,
        **inner,
        "RoIs, losses": sampling,
        "backward": spans["backward"],
        "optimizer": spans["optimizer"],
        "rest": spans["step"] - forward - spans["backward"] - spans["optimizer"],
        "step": spans["step"],
    }


def metrics(report: dict[str, Any]) -> dict[str, float | None]:
    """Figures by MLflow name, such as `time/phase_backward_s`."""
    names = {name: name.replace(", ", "_").replace(" ", "_").lower() for name in report["phases"]}
    return {f"time/phase_{names[name]}_s": seconds for name, seconds in report["phases"].items()} | {
        "ratio/step_to_floor": report["step_s"] / report["floor_s"]
    }


def table(report: dict[str, Any]) -> Table:
    """Format each phase, its share, and the floor."""
    result = Table(box=box.SIMPLE, pad_edge=False)
    for column in (f"train {report['dtype']} ×{report['batch']}", "s", "%"):
        result.add_column(column, justify="left" if column.startswith("train") else "right")
    for name, seconds in report["phases"].items():
        result.add_row(name, f"{seconds:.3g}", f"{100 * seconds / report['step_s']:.0f}")
    result.add_row("step", f"{report['step_s']:.3g}", "100", style="bold")
    floor = f"floor: {report['flops'] / 1e12:.3g} TFLOP at {report['peak_flops_per_s'] / 1e12:.3g} TFLOP/s"
    result.add_row(floor, f"{report['floor_s']:.3g}", f"{100 * report['floor_s'] / report['step_s']:.0f}")
    return result
