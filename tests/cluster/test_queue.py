"""Jobs in a queue of Kueue: they wait, run, make way for a job of a higher priority, and run again."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).resolve().parents[2]
Launcher = Any  # of conftest.py
Kubectl = Any
QUEUED = ("cluster.scheduler=kueue", "cluster.queue=training")
ONCE = "if [ -e /workspace/runs/here ]; then echo resumed; else echo begun >/workspace/runs/here; sleep 600; fi"


@pytest.fixture
def queue(kubectl: Kubectl) -> Iterator[Kubectl]:
    """A queue `training` of one core, whose jobs make way for others of a higher priority."""
    name, api = kubectl.namespace, "kueue.x-k8s.io/v1beta2"
    quota = [{"name": "cpu", "nominalQuota": "1"}, {"name": "memory", "nominalQuota": "1Gi"}]
    group = {"coveredResources": ["cpu", "memory"], "flavors": [{"name": name, "resources": quota}]}
    kubectl.apply(
        {"apiVersion": api, "kind": "ResourceFlavor", "metadata": {"name": name}},
        {
            **{"apiVersion": api, "kind": "ClusterQueue", "metadata": {"name": name}},
            "spec": {
                "namespaceSelector": {},
                "resourceGroups": [group],
                "preemption": {"withinClusterQueue": "LowerPriority"},
            },
        },
        {"apiVersion": api, "kind": "LocalQueue", "metadata": {"name": "training"}, "spec": {"clusterQueue": name}},
        {"apiVersion": api, "kind": "WorkloadPriorityClass", "metadata": {"name": name}, "value": 1000},
    )
    yield kubectl
    for kind in ("clusterqueue", "workloadpriorityclass", "resourceflavor"):
        kubectl("delete", kind, name, "--wait=false")


def other_job(kubectl: Kubectl, name: str, seconds: int, priority: str = "") -> None:
    """A job of someone else that takes the whole queue."""
    labels = {"kueue.x-k8s.io/queue-name": "training"}
    labels |= {"kueue.x-k8s.io/priority-class": priority} if priority else {}
    container = {
        "name": "sleep",
        "image": "localhost/maskrcnn-cluster/shell:1",
        "command": ["sh", "-c", f"trap exit TERM; sleep {seconds} & wait"],
        "resources": {"requests": {"cpu": "1", "memory": "16Mi"}},
    }
    pod = {"restartPolicy": "Never", "containers": [container]}
    kubectl.apply(
        {
            **{"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name, "labels": labels}},
            "spec": {"suspend": True, "template": {"spec": pod}},
        }
    )


def is_running(kubectl: Kubectl, name: str) -> bool:
    pods = json.loads(kubectl("get", "pods", "-o", "json"))["items"]
    return any(pod["metadata"]["name"].startswith(name) and pod["status"]["phase"] == "Running" for pod in pods)


def test_a_queued_job_runs(launcher: Launcher, queue: Kubectl):
    ended = launcher.run("echo done", *QUEUED)
    assert ended.status == 0
    assert "\ndone\n" in ended.said


def test_a_job_waits_for_its_turn(launcher: Launcher, queue: Kubectl):
    other_job(queue, "other", 15)
    queue.wait_until(lambda: is_running(queue, "other"))
    ended = launcher.run("echo done", *QUEUED)
    assert ended.status == 0
    assert "maskrcnn-try is suspended: it waits for resources in a queue" in ended.said
    assert "the queue has not admitted it: couldn't assign flavors" in ended.said
    assert "maskrcnn-try is no longer suspended" in ended.said


def test_a_job_larger_than_the_queue(launcher: Launcher, queue: Kubectl):
    ended = launcher.run("true", *QUEUED, "cluster.memory=2Gi", "cluster.pending_timeout_s=30")
    assert ended.status == 2
    assert "did not start within cluster.pending_timeout_s=30: it is suspended" in ended.error
    assert "insufficient" in ended.error
    assert launcher.jobs() == []


def test_a_job_makes_way_and_continues(launcher: Launcher, queue: Kubectl):
    process = launcher.start(ONCE, *QUEUED)
    queue.wait_until(lambda: is_running(queue, "maskrcnn-try"))
    time.sleep(3)
    other_job(queue, "urgent", 5, priority=queue.namespace)
    ended = launcher.finish(process)
    assert ended.status == 0
    assert ended.said.count("maskrcnn-try is suspended: it waits for resources in a queue") >= 1
    assert "maskrcnn-try is no longer suspended" in ended.said
    assert "\nresumed\n" in ended.said


@pytest.mark.parametrize("runtime", ["torch-distributed", "maskrcnn"])
def test_a_queued_pod_has_the_time_for_its_checkpoint(launcher: Launcher, queue: Kubectl, runtime: str):
    queue("apply", "--server-side", "-f", str(ROOT / "k8s" / "runtime.yaml"))
    process = launcher.start("sleep 600", *QUEUED, "cluster.grace_s=77", f"cluster.runtime={runtime}")
    queue.wait_until(launcher.pods)
    (pod,) = json.loads(queue("get", "pods", "-o", "json"))["items"]
    process.terminate()
    launcher.finish(process)
    # Of a queued TrainJob that is the runtime's to set: see components/cluster/manifest.py.
    of_runtime = {"torch-distributed": 30, "maskrcnn": 120}[runtime]
    assert pod["spec"]["terminationGracePeriodSeconds"] == {"pytorchjob": 77, "trainjob": of_runtime}[launcher.api]
