"""How much longer a training step takes when MLflow answers in 2 s: `python
tests/components/tracking/measure_slow_server.py`, on a quiet machine.

One training of the demo tells its metrics to MLflow behind a slow proxy in every other window of steps, and to nobody
in between, so that what else the machine does falls on both alike. Tells the growth of the median step, and what
telling costs in processor time: of the training's own thread, and of the thread that sends. The server works on the
same processors.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from mlflow_server import Proxy, Server  # beside this file
from rich.console import Console

from components.params import load_config
from components.tracking.tracker import NullTracker, Tracker, open_tracker
from components.training.loop import Training

REPOSITORY = Path(__file__).resolve().parents[3]
TICK_S = 0.01  # in which Linux counts a thread's time


class EveryOther(NullTracker):
    """Passes on the metrics of every other window.

    Metrics come `log_period` steps at a time, a window is two such portions. Times count from the second portion alone:
    sent meanwhile is the first portion of the same window, and nothing of the window before.
    """

    def __init__(self, tracker: Tracker, log_period: int) -> None:
        self._tracker, self._log_period = tracker, log_period
        self.step_s: dict[bool, list[float]] = {True: [], False: []}
        self.told_s: list[float] = []

    def log_metrics(self, metrics: Mapping[str, float | None], step: int) -> None:
        portion = (step - 1) // self._log_period
        is_told = portion // 2 % 2 == 1
        if portion % 2 == 1 and portion > 1:  # the first window warms up
            self.step_s[is_told].append(metrics["time/step_s"] or 0.0)
        if is_told:
            began = time.thread_time()
            self._tracker.log_metrics(metrics, step)
            self.told_s.append(time.thread_time() - began)


def thread_s(name: str) -> float:
    """Processor time of the thread of a name, in seconds."""
    (thread,) = [thread for thread in threading.enumerate() if thread.name == name]
    fields = Path(f"/proc/self/task/{thread.native_id}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--delay-s", type=float, default=2.0)
    parser.add_argument("--steps", type=int, default=1000)
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        Server(Path(folder)) as server,
        Proxy(server.url, delay_s=args.delay_s) as slow,
    ):
        overrides = [f"data.raw_dir={folder}/raw", f"data.prepared_dir={folder}/prepared"]
        overrides += [f"train.output_dir={folder}/run", f"train.max_iters={args.steps}", f"tracking.uri={slow.url}"]
        for stage in ("download", "prepare"):
            command = [sys.executable, "-m", f"components.{stage}", *overrides]
            subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
        config = load_config(REPOSITORY / "params.yaml", overrides)
        training = Training(config, torch.device("cpu"), Console(quiet=True))
        with open_tracker(config, run_dir=training.run_dir) as tracker:
            windows = EveryOther(tracker, config.train.log_period)
            training.run(windows)
            sender_s = thread_s("outbox")
    told, alone = (statistics.median(windows.step_s[is_told]) for is_told in (True, False))
    counts = [len(windows.step_s[is_told]) for is_told in (True, False)]
    told_steps = len(windows.told_s)
    print(
        f"median step: told to a server that answers in {args.delay_s:g} s {told * 1000:.2f} ms ({counts[0]} steps), "
        f"to nobody {alone * 1000:.2f} ms ({counts[1]} steps): {told / alone - 1:+.2%}"
    )
    print(
        f"processor time of a told step: {sum(windows.told_s) / told_steps * 1000:.3f} ms of the training's thread "
        f"({sum(windows.told_s) / told_steps / alone:.3%} of a step), {sender_s / told_steps * 1000:.3f} "
        f"ms of the sender ({sender_s / told_steps / alone:.3%})"
    )


if __name__ == "__main__":
    main()
