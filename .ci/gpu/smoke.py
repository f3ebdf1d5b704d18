"""Smoke test of a device: compare each operator with its reference, and at full size with the CPU; then train a little.

    python .ci/gpu/smoke.py cuda    # cpu: to try the script itself

The training is a small step in each dtype. A failure is printed and does not stop the other checks; the exit status is
the number of failures. Each check ends with a synchronisation, so that an error is attributed to the right kernel.
"""

import sys
import time
import traceback
from collections.abc import Callable

import torch
from torch import Tensor

import cuda_ops
from components.benchmarks.case import Case
from components.benchmarks.network_steps import build_steps
from components.runs.recipes import load_recipe
from cuda_ops import benchmark, library, operators
from cuda_ops.selfcheck import differences

CPU, DEVICE = torch.device("cpu"), torch.device(sys.argv[1])
LOST = (
    "illegal",
    "misaligned",
    "device-side",
    "unspecified launch",
)  # words of errors after which the CUDA context is unusable
Check = Callable[[], str | None]  # returns the fault, or None
failures: list[str] = []


def check(name: str, call: Check) -> None:
    """Run one check and print its result; end the program if the CUDA context is lost."""
    began = time.perf_counter()
    try:
        reason = call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        traceback.print_exc(limit=3)
    print(f"{'FAIL' if reason else 'ok  '} {name:52} {time.perf_counter() - began:6.2f} s {reason or ''}", flush=True)
    if reason:
        failures.append(name)
        if DEVICE.type == "cuda" and any(word in reason for word in LOST):
            print("FAIL the CUDA context is lost: the rest cannot be tried in this process", flush=True)
            sys.exit(len(failures))


def difference(
    got: Tensor | tuple[Tensor, ...], want: Tensor | tuple[Tensor, ...], tolerance: float = 1e-4
) -> str | None:
    """Describe how two results differ, or return None."""
    pairs = zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]
    for one, other in pairs:
        try:
            torch.testing.assert_close(one.cpu().float(), other.cpu().float(), rtol=tolerance, atol=tolerance)
        except AssertionError as error:
            return " ".join(str(error).split())[:250]
    return None


def full_size(operator: str) -> str | None:
    """Compare an operator's benchmark cases on the device with the CPU; describe the first that differs."""
    rows = (benchmark.cases_of(operator, device) for device in (DEVICE, CPU))
    for ours, theirs in zip(*rows, strict=False):  # a device may have none
        got, want = ours.ours(), theirs.ours()
        if isinstance(want, list):
            differing = sum(a != b for a, b in zip(got, want, strict=True))
            reason = f"{differing} of {len(want)} differ" if differing else None
        else:
            reason = difference(got, want)
        if reason:
            return f"{ours.name}: {reason}"
    return None


def roi_align(dtype: torch.dtype, deterministic: bool) -> str | None:
    """Compare forward and backward on the device, in its dtype, with the CPU in float32."""
    torch.manual_seed(0)
    levels = [torch.randn(2, 64, height, width) for height, width in benchmark.LEVEL_SHAPES[:4]]
    boxes = benchmark.random_boxes(2, 40, device=CPU)
    results = []
    for device, kind in ((CPU, torch.float32), (DEVICE, dtype)):
        features = [level.to(device, kind, memory_format=torch.channels_last).requires_grad_() for level in levels]
        torch.use_deterministic_algorithms(deterministic and device == DEVICE)
        out = cuda_ops.multilevel_roi_align(
            features, boxes.to(device), image_size=benchmark.IMAGE_SIZE, output_size=7, sampling_ratio=0, aligned=True
        )
        results.append((out.detach(), *torch.autograd.grad(out, features, torch.ones_like(out))))
        torch.use_deterministic_algorithms(False)
    return difference(results[1], results[0], {torch.bfloat16: 0.15, torch.float16: 0.05}.get(dtype, 1e-3))


def training_step(dtype: str) -> str | None:
    """Run two steps of a small network; report values that are not finite, and skipped updates."""
    overrides = ["model.weights=none", "model.freeze_stages=2", "model.backbone=resnet18"]
    model = load_recipe("coco2017_r50_fpn_1x", overrides).model
    case = Case(
        mode="train", networks=("ours",), dtype=dtype, batch=2, height=128, width=160, warmup=0, steps=1,
        device=str(DEVICE), model=model,
    )  # fmt: skip
    step = build_steps(case, DEVICE)["ours"]
    outcomes = [step(), step()]
    losses = {name: value.item() for outcome in outcomes for name, value in outcome.losses.items()}
    print("     ", dtype, losses, flush=True)
    if any(value != value for value in losses.values()):
        return "a loss is nan"
    return (
        "skipped" if outcomes[1].skipped.item() and dtype != "float16" else None
    )  # float16 skips: its first loss scales overflow


def main() -> None:
    """Run all checks, from the smallest to the largest."""
    print(library.PATH, torch.ops.cuda_ops.build_info() if library.HAS_CPU else "not compiled", torch.__version__)
    if DEVICE.type == "cuda" and not library.HAS_CUDA:
        sys.exit("FAIL the library has no CUDA kernels")
    for operator in operators.ALL:
        check(operator.name, lambda operator=operator: differences(operator, DEVICE))
    for name in (operator.name for operator in operators.ALL if operator.name != "multilevel_roi_align"):  # see below
        check(f"{name}, full size, beside the CPU's", lambda name=name: full_size(name))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for deterministic in (False, True):
            name = f"multilevel_roi_align {dtype}{', deterministic' if deterministic else ''}"
            check(name, lambda dtype=dtype, deterministic=deterministic: roi_align(dtype, deterministic))
    for dtype in ("float32", "bfloat16", *(["float16"] if DEVICE.type == "cuda" else [])):  # it takes minutes on a CPU
        check(f"training step {dtype}", lambda dtype=dtype: training_step(dtype))
    print(f"{len(failures)} failures", flush=True)
    sys.exit(min(len(failures), 90))


if __name__ == "__main__":
    with cuda_ops.backend("compiled"):
        main()
