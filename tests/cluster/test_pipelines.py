"""The pipelines on a real Kubeflow Pipelines, at the address that KF_PIPELINES_ENDPOINT names.

`make cluster` cannot install it, because its programs are in no package registry. Install it in the namespace
`kubeflow` of the cluster as docs/kubeflow.md says, with k8s/overlays/pipelines; the image is that of images.py.
"""

import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import kfp_server_api
import pytest

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).resolve().parents[2]
Kubectl = Any  # of conftest.py
STEPS = ("download", "prepare", "train", "evaluate", "predict", "benchmark", "register", "finish")
SMALL = (
    *("cluster.image=maskrcnn:1-cpu", "cluster.namespace=kubeflow", "cluster.gpus_per_node=0", "cluster.cpu=1"),
    *("cluster.memory=3Gi", "cluster.shm=256Mi", "cluster.poll_s=2", "data.shapes.train_images=32"),
    *("data.shapes.val_images=16", "data.workers=0", "train.warmup_iters=4", "train.checkpoint_period=4"),
    *("train.lr_steps=[12]", "train.batch_size=4", "benchmark.steps=2", "benchmark.warmup=1"),
)


@pytest.fixture
def kubeflow(cluster: Kubectl) -> Kubectl:
    """kubectl with all rights, in the namespace of Kubeflow Pipelines."""
    if not os.environ.get("KF_PIPELINES_ENDPOINT"):
        pytest.skip("needs Kubeflow Pipelines on the cluster; name its URL by KF_PIPELINES_ENDPOINT")
    return replace(cluster, namespace="kubeflow")


@pytest.fixture
def start(kubeflow: Kubectl, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """`maskrcnn pipeline submit` of the small recipe, with more words."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    cli = [sys.executable, "-m", "pipelines.cli"]
    recipe = [*cli, "recipe", "shapes_demo", *SMALL]
    subprocess.run(recipe, cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=60)

    def start(*words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*cli, "pipeline", "submit", *words, f"train.output_dir=runs/{uuid.uuid4().hex[:8]}"],
            **{"cwd": tmp_path, "env": environment, "text": True},
            **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT},
        )

    return start


def run_id(process: subprocess.Popen[str]) -> str:
    """Id of the run that a `submit` says it started."""
    assert process.stdout
    for line in process.stdout:
        if match := re.match(r"run: .*/runs/details/(\S+)", line):
            return match[1]
    pytest.fail(f"submit ended with status {process.wait()} and started no run")


def terminate(run: str) -> None:
    endpoint = os.environ["KF_PIPELINES_ENDPOINT"]
    client = kfp_server_api.ApiClient(kfp_server_api.Configuration(host=endpoint))
    kfp_server_api.RunServiceApi(client).run_service_terminate_run(run)


def wait_for(what: str, look: Callable[[], Any], timeout_s: float) -> Any:
    until_s = time.monotonic() + timeout_s
    while not (found := look()):
        assert time.monotonic() < until_s, f"{what}: did not come within {timeout_s} s"
        time.sleep(2)
    return found


@pytest.mark.parametrize("pipeline", ["training", "stability"])
def test_the_server_takes_a_pipeline_and_makes_its_workflow(start: Any, kubeflow: Kubectl, pipeline: str):
    run = run_id(start("--pipeline", pipeline))
    try:
        found = wait_for("workflow", lambda: kubeflow.names("workflows", "-l", f"pipeline/runid={run}"), 60)
        assert found[0].startswith(f"maskrcnn-{pipeline}-")
    finally:
        terminate(run)


def test_training_ends_with_each_step_done_and_a_finished_mlflow_run(start: Any, kubeflow: Kubectl):
    """Also if Kubeflow Pipelines' own server is replaced meanwhile."""
    process = start("--wait", "train.max_iters=16")
    run = run_id(process)
    wait_for("first pod", lambda: kubeflow.names("pods", "-l", f"pipeline/runid={run}"), 120)
    kubeflow("delete", "pods", "-l", "app=ml-pipeline", "--wait=false")
    said, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, said
    assert [step for step in STEPS if f"{step}: SUCCEEDED\n" not in said] == []
    assert "driver" not in said
    pods = kubeflow.names("pods", "-l", f"pipeline/runid={run}")
    logs = "".join(kubeflow("logs", pod, "-c", "main") for pod in pods)
    assert re.search(r"MLflow run \w+ is FINISHED", logs)


def test_a_step_that_fails_is_reported_with_its_own_message(start: Any):
    process = start("--wait", "data.source=custom", "data.train_images=/workspace/data/nowhere")
    said, _ = process.communicate(timeout=1200)
    assert process.returncode == 1, said
    assert "the run has ended: FAILED\ndownload failed: " in said
    assert "  error: " in said
    assert "/workspace/data/nowhere" in said


def test_a_cancelled_run_leaves_no_training_job(start: Any, kubeflow: Kubectl):
    process = start("--wait", "train.max_iters=100000")
    run = run_id(process)

    def jobs() -> list[str]:
        return [name for name in kubeflow.names("pytorchjobs,trainjobs") if run[:8] in name]

    try:
        wait_for("training job", jobs, 1200)
    finally:
        terminate(run)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "(it was cancelled)" in said
    wait_for("end of the training job", lambda: not jobs(), 120)
