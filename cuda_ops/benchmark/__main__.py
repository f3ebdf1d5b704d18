"""`python -m cuda_ops.benchmark`: each operator at its real size, beside its reference and a rival.

Contestants take turns in one process, so that a slow moment of the machine hits all; the median counts. Sizes are those
of a batch of 800 × 1344 images: 268,569 anchors, 512 RoIs an image, 100 detections. Boxes are (x1, y1, x2, y2) in
pixels.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence

import torch

import cuda_ops
from cuda_ops import operators
from cuda_ops.benchmark import Call, Case, cases_of, multilevel_roi_align


def measure(case: Case, device: torch.device, repetitions: int) -> dict[str, float]:
    """Median seconds of each contestant."""

    def referee() -> object:
        with cuda_ops.backend("reference"):
            return case.ours()

    contestants = {"compiled": case.ours, "reference": referee, "rival": case.rival}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for repetition in range(repetitions + 1):
        for name, call in contestants.items():
            duration_s = timed(call, device)
            if repetition:  # the first warms up
                seconds[name].append(duration_s)
    return {name: statistics.median(values) for name, values in seconds.items()}


def timed(call: Call, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table, or JSON lines."""
    parser = argparse.ArgumentParser(prog="python -m cuda_ops.benchmark", description=__doc__)
    names = [operator.name for operator in operators.ALL]
    parser.add_argument("operators", nargs="*", metavar="OPERATOR", help=f"some of {', '.join(names)} (all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument(
        "--rois", type=int, default=512, help="RoIs an image (512), whose plain-torch RoIAlign needs 13 GB on a CPU"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line, times in seconds")
    args = parser.parse_args(argv)
    if unknown := set(args.operators) - set(names):
        parser.error(f"OPERATOR must be some of {', '.join(names)}, got {', '.join(sorted(unknown))}")
    device, multilevel_roi_align.rois = torch.device(args.device), args.rois
    with cuda_ops.backend("compiled"):
        for case in (case for name in args.operators or names for case in cases_of(name, device)):
            result = measure(case, device, args.repetitions)
            if args.json:
                print(json.dumps({"case": case.name, "rival_name": case.rival_name, **result}), flush=True)
                continue
            compiled, reference, rival = (result[name] * 1e3 for name in ("compiled", "reference", "rival"))
            print(
                f"{case.name:58} {compiled:9.3f} ms   reference {reference:9.3f} ms, {reference / compiled:6.1f}×"
                f"   {case.rival_name} {rival:9.3f} ms, {rival / compiled:6.1f}×",
                flush=True,
            )


if __name__ == "__main__":
    main()
