"""Training on a real cluster, in the image that the Dockerfile makes: two pods learn what two processes here learn, to
the last bit, whatever happens to them in between.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).resolve().parents[2]
IMAGE = "maskrcnn:1-cpu"  # of images.py
Launcher = Any  # of conftest.py
# The demo, with fewer and smaller images, and time to interfere.
SMALL = (
    *("data.shapes.train_images=32", "data.shapes.val_images=16", "data.workers=0"),
    *("train.max_iters=16", "train.lr_steps=[12]", "train.warmup_iters=4", "train.checkpoint_period=4"),
    *("train.log_period=1", "train.batch_size=4", "train.deterministic=true", "evaluate.batch_size=4"),
    *("tracking.enabled=false",),
)
POD = (
    f"cluster.image={IMAGE}",
    "cluster.cpu=1",
    "cluster.memory=3Gi",
    "cluster.shm=512Mi",
    "cluster.env=[OMP_NUM_THREADS=2]",
)
TWO = (*POD, "cluster.nodes=2")


def maskrcnn(launcher: Launcher, *words: str) -> None:
    """Run a stage on this machine, with the folders that the pods see."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-m", "pipelines.cli", *words, *SMALL]
    subprocess.run(command, cwd=launcher.folder, env=environment, check=True, timeout=600)


@pytest.fixture
def prepared(launcher: Launcher) -> Launcher:
    """The launcher, and data that are prepared on the claim."""
    maskrcnn(launcher, "download")
    maskrcnn(launcher, "prepare")
    for path in (launcher.folder / "data").rglob("*"):
        path.chmod(path.stat().st_mode | 0o066 | (0o011 if path.is_dir() else 0))
    return launcher


def losses(launcher: Launcher, run: str) -> list[tuple[int, float]]:
    """Step and total loss of each line of a run's journal."""
    lines = (launcher.folder / "runs" / run / "log.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    return [(entry["step"], entry["metrics"]["loss/total"]) for entry in entries if "loss/total" in entry["metrics"]]


def ap(launcher: Launcher, run: str) -> Any:
    """Figures of a run's evaluation."""
    evaluation = json.loads((launcher.folder / "runs" / run / "evaluation.json").read_text())
    return evaluation["bbox"], evaluation["segm"]


def train_here(launcher: Launcher, processes: int) -> None:
    maskrcnn(launcher, "train", f"train.processes={processes}", "train.output_dir=runs/here")
    maskrcnn(launcher, "evaluate", "train.output_dir=runs/here")


def test_two_pods_learn_what_two_processes_learn(prepared: Launcher):
    ended = prepared.run("", *SMALL, *TWO, "train.output_dir=runs/there", timeout_s=600)
    assert ended.status == 0
    train_here(prepared, 2)
    assert len(losses(prepared, "there")) == 16
    assert losses(prepared, "there") == losses(prepared, "here")
    assert ap(prepared, "there") == ap(prepared, "here")


def test_a_killed_pod_goes_on_bit_for_bit(prepared: Launcher):
    process = prepared.start("", *SMALL, *TWO, "train.output_dir=runs/there")
    until_s = time.monotonic() + 300
    while not (prepared.folder / "runs/there/checkpoints/step_0000008.pt").exists():
        assert process.poll() is None
        assert time.monotonic() < until_s, "waited in vain"
        time.sleep(0.2)
    prepared.kubectl("delete", "pod", prepared.pods()[-1], "--grace-period=0", "--force")
    ended = prepared.finish(process, timeout_s=600)
    assert ended.status == 0
    train_here(prepared, 2)
    assert losses(prepared, "there") == losses(prepared, "here")
