"""How much longer a training step takes when MLflow answers in 2 s: `python tests/components/measure_slow_server.py`, on a quiet machine.

Trains the demo for a while without MLflow and with it behind a slow proxy, in turn, and compares the medians of `time/step_s`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from mlflow_server import Proxy, Server  # beside this file

REPOSITORY = Path(__file__).resolve().parents[2]
WARMUP_STEPS = 20


def stage(name: str, overrides: list[str]) -> None:
    """Run a stage on the demo's parameters."""
    command = [sys.executable, "-m", f"components.{name}", *overrides]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, stdout=subprocess.DEVNULL)


def step_s(root: Path, name: str, steps: int, tracking: list[str]) -> float:
    """The median step of a new run, in seconds."""
    run_dir = root / name
    data = [f"data.raw_dir={root}/raw", f"data.prepared_dir={root}/prepared"]
    if not (root / "prepared").is_dir():
        stage("download", data)
        stage("prepare", data)
    stage("train", ["--skip-test", *data, f"train.output_dir={run_dir}", f"train.max_iters={steps}", *tracking])
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return statistics.median(line["metrics"]["time/step_s"] for line in lines[WARMUP_STEPS:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--delay-s", type=float, default=2.0)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    growths = []
    with (
        tempfile.TemporaryDirectory() as folder,
        Server(Path(folder)) as server,
        Proxy(server.url, delay_s=args.delay_s) as slow,
    ):
        for i in range(args.pairs):
            alone = step_s(Path(folder), f"alone{i}", args.steps, ["tracking.enabled=false"])
            tracked = step_s(Path(folder), f"tracked{i}", args.steps, [f"tracking.uri={slow.url}"])
            growths.append(tracked / alone - 1)
            print(
                f"without MLflow {alone * 1000:.2f} ms, answers in {args.delay_s:g} s {tracked * 1000:.2f} ms: {growths[-1]:+.2%}"
            )
    print(
        f"median growth of {args.pairs} pairs: {statistics.median(growths):+.2%} ({min(growths):+.2%} to {max(growths):+.2%})"
    )


if __name__ == "__main__":
    main()
