"""Progress of a TrainJob on a real cluster: what training sends reaches the job through Trainer's status server, with
the network policies in force.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).resolve().parents[2]
IMAGE = "maskrcnn:1-cpu"  # of images.py
Launcher = Any  # of conftest.py
SMALL = (
    *("data.shapes.train_images=16", "data.shapes.val_images=8", "data.workers=0", "evaluate.batch_size=4"),
    *("train.max_iters=8", "train.lr_steps=[6]", "train.warmup_iters=2", "train.batch_size=4", "train.log_period=1"),
    "tracking.enabled=false",
)
POD = (f"cluster.image={IMAGE}", "cluster.cpu=1", "cluster.memory=3Gi", "cluster.shm=512Mi", "cluster.env=[]")


@pytest.mark.parametrize("launcher", ["trainjob"], indirect=True)
def test_a_trainjob_has_the_progress_of_its_training(launcher: Launcher):
    launcher.kubectl("apply", "--server-side", "-f", str(ROOT / "k8s" / "base" / "network.yaml"))
    for stage in ("download", "prepare"):
        command = [sys.executable, "-m", "pipelines.cli", stage, *SMALL]
        subprocess.run(command, cwd=launcher.folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    for path in (launcher.folder / "data").rglob("*"):
        path.chmod(path.stat().st_mode | 0o066 | (0o011 if path.is_dir() else 0))
    ended = launcher.run("", *SMALL, *POD, timeout_s=600)
    assert ended.status == 0
    assert "the status server" not in ended.said, "a warning of training"
    (job,) = launcher.kubectl.json("get", "trainjobs")["items"]
    assert "trainerStatus" in job["status"], "the feature gate TrainJobStatus of Trainer must be on"
    status = job["status"]["trainerStatus"]
    metrics = {metric["name"]: metric["value"] for metric in status["metrics"]}
    assert (status["progressPercentage"], status["estimatedRemainingSeconds"], metrics["step"]) == (100, 0, "8")
    assert float(metrics["loss/total"]) > 0
