"""Profile a training step; write a table of the longest kernels.

python .ci/gpu/profile_step.py cuda bfloat16 profile.md
"""

import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from components.benchmarks.case import Case
from components.benchmarks.network_steps import build_steps
from components.runs.recipes import load_recipe

ROWS = 30


def main() -> None:
    """Profile one step of R50-FPN at 800 × 1344, batch 16, after four warm-up steps; on a CPU, a small one."""
    device, dtype, path = torch.device(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    on_cuda = device.type == "cuda"
    overrides = ["model.weights=none", "model.freeze_stages=2", *([] if on_cuda else ["model.backbone=resnet18"])]
    model = load_recipe("coco2017_r50_fpn_1x", overrides).model
    batch, height, width = (16, 800, 1344) if on_cuda else (1, 96, 128)
    case = Case(
        mode="train", networks=("ours",), dtype=dtype, batch=batch, height=height, width=width, warmup=0, steps=1,
        device=str(device), model=model,
    )  # fmt: skip
    step = build_steps(case, device)["ours"]
    for _ in range(4 if on_cuda else 1):
        step()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]) as profiler:
        step()
        if on_cuda:
            torch.cuda.synchronize()
    name = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    events = [event for event in profiler.key_averages() if not on_cuda or str(event.device_type).endswith("CUDA")]
    events.sort(key=lambda event: -getattr(event, name))
    total = sum(getattr(event, name) for event in events) or 1
    lines = [
        f"{dtype}, batch {batch}, {height} × {width}: {total / 1e3:.2f} ms in {sum(e.count for e in events)} calls",
        "",
    ]
    lines += ["| kernel | ms | % | calls |", "|---|---:|---:|---:|"]
    for event in events[:ROWS]:
        time_us = getattr(event, name)
        kernel = event.key[:110].replace("|", "\\|")
        lines.append(f"| `{kernel}` | {time_us / 1e3:.3f} | {100 * time_us / total:.1f} | {event.count} |")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
