"""The overlays of k8s/, applied to a real API server: what they start becomes ready, and keeps what it is given."""

import json
import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.cluster
Kubectl = Any  # of conftest.py
SERVERS = ("statefulset/postgres", "statefulset/store", "deployment/mlflow")
IMAGE = "docker.io/library/maskrcnn:1-cpu"  # of images.py
LOG_A_RUN = """
import mlflow
mlflow.set_experiment("cluster")
with mlflow.start_run() as run:
    mlflow.log_param("train.base_lr", 0.02)
    mlflow.log_metric("ap/bbox", 0.25, step=850)
    mlflow.log_text("of a run", "evaluation.txt")
print(run.info.run_id)
"""
READ_A_RUN = """
import os
os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
import mlflow
run = mlflow.get_run("{run_id}")
print(run.data.params["train.base_lr"], run.data.metrics["ap/bbox"])
print(mlflow.artifacts.load_text(run.info.artifact_uri + "/evaluation.txt"), flush=True)
"""
LIST_THE_STORE = """
import boto3, os
client = boto3.client("s3", endpoint_url=os.environ["MLFLOW_S3_ENDPOINT_URL"])
print(*(entry["Key"] for entry in client.list_objects_v2(Bucket="mlflow").get("Contents", [])))
"""


def wait_ready(kubectl: Kubectl) -> None:
    for server in SERVERS:
        kubectl("rollout", "status", server, "--timeout=280s")


def as_trainer(kubectl: Kubectl, code: str) -> str:
    """What Python code prints in a pod that is as those of training jobs are, its account, labels and limits."""
    security = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    name = f"as-trainer-{time.monotonic_ns()}"
    container = {
        **{"name": "trainer", "image": IMAGE, "securityContext": security, "command": ["tini", "--", "python", "-c"]},
        "args": [code],
        "env": [{"name": "MLFLOW_TRACKING_URI", "value": "http://mlflow:5000"}],
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    spec = {
        **{"restartPolicy": "Never", "serviceAccountName": "trainer", "enableServiceLinks": False},
        **{"automountServiceAccountToken": False, "containers": [container]},
        "securityContext": {
            **{"runAsNonRoot": True, "runAsUser": 1000, "runAsGroup": 1000},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumes": [{"name": "tmp", "emptyDir": {}}],
    }
    labels = {"app.kubernetes.io/name": "maskrcnn", "app.kubernetes.io/component": "trainer"}
    kubectl.apply({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels}, "spec": spec})
    for _ in range(240):
        phase = kubectl("get", "pod", name, "-o", "jsonpath={.status.phase}")
        if phase in ("Succeeded", "Failed"):
            break
        time.sleep(1)
    said = kubectl("logs", name)
    assert phase == "Succeeded", said
    return said


def said_by(kubectl: Kubectl, *words: str) -> str:
    """What kubectl says on standard error, of a command that may fail."""
    command = ["kubectl", f"--kubeconfig={kubectl.kubeconfig}", f"--namespace={kubectl.namespace}", *words]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120).stderr


@pytest.fixture(scope="module")
def tracking(applied: Callable[..., Kubectl]) -> Kubectl:
    """A namespace with overlays/cpu-dev, its servers ready."""
    kubectl = applied("cpu-dev")
    wait_ready(kubectl)
    return kubectl


@pytest.fixture(scope="module")
def run_id(tracking: Kubectl) -> str:
    """A run with a parameter, a metric and an artifact, logged by a pod with the labels of training."""
    return as_trainer(tracking, LOG_A_RUN).split()[-1]


def test_servers_of_cpu_dev_become_ready(tracking: Kubectl):
    pods = tracking.json("get", "pods")["items"]
    statuses = {
        pod["metadata"]["labels"]["app.kubernetes.io/name"]: pod["status"]["containerStatuses"][0]
        for pod in pods
        if pod["metadata"]["labels"]["app.kubernetes.io/name"] != "maskrcnn"
    }
    assert set(statuses) == {"mlflow", "postgres", "store"}
    assert all(status["ready"] and status["restartCount"] == 0 for status in statuses.values())


def test_a_run_is_in_the_database_and_its_artifact_in_the_store(tracking: Kubectl, run_id: str):
    query = f"select key, value from params where run_uuid = '{run_id}'"
    psql = ("psql", "-U", "mlflow", "-d", "mlflow", "--tuples-only", "--no-align", "--command", query)
    assert tracking("exec", "postgres-0", "--", *psql).split() == ["train.base_lr|0.02"]
    keys = tracking("exec", "deployment/mlflow", "--", "python", "-c", LIST_THE_STORE).split()
    assert [key for key in keys if key.endswith(f"{run_id}/artifacts/evaluation.txt")]


def test_a_pod_of_training_has_no_key_of_the_store(tracking: Kubectl, run_id: str):
    code = "import os; print(*sorted(name for name in os.environ if 'KEY' in name or 'PASSWORD' in name), sep=',')"
    assert as_trainer(tracking, code).strip() == ""


@pytest.mark.parametrize("server", SERVERS)
def test_a_run_outlives_a_restart_of_each_server(tracking: Kubectl, run_id: str, server: str):
    label = f"app.kubernetes.io/name={server.partition('/')[2]}"
    uids = ("get", "pods", "-l", label, "-o", "jsonpath={.items[*].metadata.uid}")
    before = tracking(*uids)
    tracking("delete", "pods", "-l", label, "--timeout=120s")
    wait_ready(tracking)
    assert tracking(*uids) != before
    said = as_trainer(tracking, READ_A_RUN.format(run_id=run_id)).splitlines()
    assert {"0.02 0.25", "of a run"} <= set(said)  # beside the progress of the download


def test_servers_become_ready_where_restricted_is_enforced(applied: Callable[..., Kubectl]):
    kubectl = applied("restricted")
    labels = kubectl.json("get", "namespace", kubectl.namespace)["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    wait_ready(kubectl)


def test_no_pod_of_cpu_dev_would_violate_the_level_restricted(tracking: Kubectl, run_id: str):
    level = "pod-security.kubernetes.io/enforce=restricted"
    said = said_by(tracking, "label", "--dry-run=server", "--overwrite", "namespace", tracking.namespace, level)
    assert said == ""


def test_claims_of_gpu_say_which_class_of_storage_is_missing(applied: Callable[..., Kubectl]):
    kubectl = applied("gpu", without=["Deployment", "StatefulSet"])
    said = ""
    for _ in range(30):
        said = kubectl("get", "events", "-o", "jsonpath={.items[*].message}")
        if 'storageclass.storage.k8s.io "shared-ssd" not found' in said:
            break
        time.sleep(1)
    assert 'storageclass.storage.k8s.io "shared-ssd" not found' in said


def gpu_pod(gpus: int) -> dict[str, Any]:
    limits = {"nvidia.com/gpu": str(gpus)}
    container = {"name": "gpu", "image": IMAGE, "resources": {"limits": limits, "requests": limits}}
    return {
        **{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"gpus-{gpus}"}},
        "spec": {"containers": [container]},
    }


def test_the_quota_of_gpu_is_enforced_and_a_pod_waits_for_a_gpu(applied: Callable[..., Kubectl], tmp_path: Any):
    kubectl = applied("gpu", without=["Deployment", "StatefulSet"])
    (tmp_path / "pod.json").write_text(json.dumps(gpu_pod(17)))
    said = said_by(kubectl, "create", "-f", str(tmp_path / "pod.json"))
    assert "exceeded quota: gpus" in said
    kubectl.apply(gpu_pod(1))
    kubectl("wait", "--for=condition=PodScheduled=false", "pod/gpus-1", "--timeout=30s")
    conditions = kubectl.json("get", "pod", "gpus-1")["status"]["conditions"]
    assert any("Insufficient nvidia.com/gpu" in condition.get("message", "") for condition in conditions)


def test_the_queue_of_kueue_is_active(applied: Callable[..., Kubectl]):
    kubectl = applied("kueue", without=["Deployment", "StatefulSet"])
    try:
        for what in ("clusterqueue/maskrcnn", "localqueue/training"):
            assert "condition met" in kubectl("wait", "--for=condition=Active", what, "--timeout=60s")
    finally:
        kubectl("delete", "clusterqueue/maskrcnn", "resourceflavor/gpu", "--wait=false")


def test_without_volcano_its_queue_alone_is_refused(applied: Callable[..., Kubectl], cluster: Kubectl):
    said = said_by(cluster, "apply", "--server-side", "--dry-run=server", "-k", "k8s/overlays/volcano")
    assert 'no matches for kind "Queue" in version "scheduling.volcano.sh/v1beta1"' in said
    assert "ensure CRDs are installed first" in said
