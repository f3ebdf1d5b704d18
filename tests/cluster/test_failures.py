"""What `maskrcnn pytorchjob` says when a job fails on a real cluster, how soon, and what is left there.

The pods are real, their training is a shell script (see operators.py), so each case takes seconds.
"""

import signal
import time
from typing import Any

import pytest

pytestmark = pytest.mark.cluster
Launcher = Any  # of conftest.py
FOREVER = "echo begun; sleep 600"


def test_success_prints_the_log_of_rank_0_and_keeps_the_pods(launcher: Launcher):
    ended = launcher.run("echo step 1; sleep 3; echo step 2")
    assert ended.status == 0
    assert "\nstep 1\nstep 2\n" in ended.said
    assert "maskrcnn-try succeeded" in ended.said
    assert "could not be read" not in ended.said
    assert launcher.jobs() == ["maskrcnn-try"]
    assert len(launcher.pods()) == 1


def test_a_second_command_finds_the_job(launcher: Launcher):
    launcher.run("true")
    ended = launcher.run("true")
    assert ended.status == 0
    assert "already exists; following it" in ended.said


def test_an_image_that_is_not_there(launcher: Launcher):
    ended = launcher.run("true", "cluster.image=localhost/none/maskrcnn:1", "cluster.stuck_timeout_s=10")
    assert ended.status == 2
    assert "could not start within cluster.stuck_timeout_s=10" in ended.error
    assert "check cluster.image, cluster.image_pull_secret" in ended.error
    assert ended.seconds < 60
    assert launcher.jobs() == launcher.pods() == []


def test_more_cores_than_any_node_has(launcher: Launcher):
    ended = launcher.run("true", "cluster.cpu=512", "cluster.pending_timeout_s=30")
    assert ended.status == 2
    assert "did not start within cluster.pending_timeout_s=30" in ended.error
    assert "unschedulable: " in ended.error
    assert "Insufficient cpu" in ended.error
    assert launcher.jobs() == launcher.pods() == []


def test_a_gpu_where_there_is_none(launcher: Launcher):
    ended = launcher.run("true", "cluster.gpus_per_node=1", "cluster.pending_timeout_s=30")
    assert ended.status == 2
    assert "Insufficient nvidia.com/gpu" in ended.error


def test_a_quota_that_is_exhausted(launcher: Launcher):
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "team"}, "spec": {"hard": {"pods": "0"}}}
    launcher.kubectl.apply(quota)
    launcher.kubectl.wait_until(
        lambda: launcher.kubectl.json("get", "resourcequota", "team").get("status", {}).get("hard")
    )
    ended = launcher.run("true", "cluster.pending_timeout_s=20")
    assert ended.status == 2
    assert "no pod was created: " in ended.error
    assert "exceeded quota: team" in ended.error


def test_a_secret_that_is_missing(launcher: Launcher):
    ended = launcher.run("true", "cluster.secrets=[KEY=store/access-key]", "cluster.stuck_timeout_s=10")
    assert ended.status == 2
    assert 'CreateContainerConfigError: secret "store" not found; check the secrets in cluster.secrets' in ended.error
    assert launcher.jobs() == launcher.pods() == []


def test_a_claim_that_is_missing(launcher: Launcher):
    volumes = "cluster.volumes=['data:/workspace/data', 'results:/workspace/runs']"
    ended = launcher.run("true", volumes, "cluster.pending_timeout_s=30")
    assert ended.status == 2
    assert 'persistentvolumeclaim "results" not found' in ended.error
    assert launcher.jobs() == launcher.pods() == []


def test_a_volume_that_cannot_be_mounted(launcher: Launcher):
    name = f"{launcher.kubectl.namespace}-gone"
    volume = launcher.kubectl.json("get", "persistentvolume", f"{launcher.kubectl.namespace}-runs")["spec"]
    volume |= {"hostPath": {"path": "/nowhere", "type": "Directory"}}
    volume["claimRef"] = {"namespace": launcher.kubectl.namespace, "name": "gone"}
    claim = launcher.kubectl.json("get", "persistentvolumeclaim", "runs")["spec"] | {"volumeName": name}
    launcher.kubectl.apply(
        {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name}, "spec": volume},
        {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "gone"}, "spec": claim},
    )
    try:
        volumes = "cluster.volumes=['data:/workspace/data', 'gone:/workspace/runs']"
        ended = launcher.run("true", volumes, "cluster.pending_timeout_s=30")
    finally:
        launcher.kubectl("delete", "persistentvolume", name, "--wait=false")
    assert ended.status == 2
    assert "FailedMount: " in ended.error
    assert "hostPath type check failed: /nowhere is not a directory" in ended.error


def test_memory_that_runs_out(launcher: Launcher):
    ended = launcher.run("echo begun; tail /dev/zero", "cluster.restarts=0")
    assert ended.status == 2
    assert "OOMKilled: it needed more than cluster.memory" in ended.error
    if launcher.api == "pytorchjob":
        assert launcher.jobs() == ["maskrcnn-try"], "it stays to be looked at"


def test_an_error_of_the_configuration(launcher: Launcher):
    ended = launcher.run("echo error: train.base_lr; exit 2", "cluster.restarts=0")
    assert ended.status == 2
    assert "\nerror: train.base_lr\n" in ended.said
    assert "exit code 2, an error of the configuration or the data; the log says which" in ended.error
    assert launcher.jobs() == (["maskrcnn-try"] if launcher.api == "pytorchjob" else [])


@pytest.mark.parametrize("launcher", ["pytorchjob"], indirect=True)  # a TrainJob that fails so is deleted at once
def test_a_failed_job_is_replaced(launcher: Launcher):
    assert launcher.run("exit 1", "cluster.restarts=0").status == 2
    ended = launcher.run("echo again", "cluster.restarts=0")
    assert ended.status == 0
    assert "maskrcnn-try exists and has failed; replacing it" in ended.said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_deletes_the_job(launcher: Launcher, number: signal.Signals):
    process = launcher.start(FOREVER)
    launcher.kubectl.wait_until(lambda: "Running" in launcher.kubectl("get", "pods"))
    time.sleep(3)
    process.send_signal(number)
    ended = launcher.finish(process)
    assert ended.status == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert "maskrcnn-try is being deleted: cancelled" in ended.said
    assert "maskrcnn-try is deleted" in ended.said
    assert launcher.jobs() == launcher.pods() == []


def test_a_job_that_takes_too_long_is_deleted(launcher: Launcher):
    ended = launcher.run(FOREVER, "cluster.run_timeout_s=5")
    assert ended.status == 2
    assert "did not end within cluster.run_timeout_s=5" in ended.error
    assert launcher.jobs() == launcher.pods() == []


def test_a_job_that_someone_deletes(launcher: Launcher):
    process = launcher.start(FOREVER)
    launcher.kubectl.wait_until(lambda: "Running" in launcher.kubectl("get", "pods"))
    launcher.kubectl("delete", launcher.kind, "maskrcnn-try", "--wait=false")
    ended = launcher.finish(process)
    assert ended.status == 2
    assert "was deleted by someone else before it ended" in ended.error


def test_a_pod_that_is_deleted_is_replaced(launcher: Launcher):
    process = launcher.start(
        "if [ -e /workspace/runs/here ]; then echo resumed; else >/workspace/runs/here; sleep 600; fi"
    )
    launcher.kubectl.wait_until(lambda: "Running" in launcher.kubectl("get", "pods"))
    time.sleep(3)
    launcher.kubectl("delete", "pods", "--all", "--wait=false")
    ended = launcher.finish(process)
    assert ended.status == 0
    assert "\nresumed\n" in ended.said


@pytest.mark.parametrize("launcher", ["pytorchjob"], indirect=True)  # a TrainJob has no such time
def test_a_finished_job_goes_after_its_time(launcher: Launcher):
    assert launcher.run("true", "cluster.ttl_s=3").status == 0
    launcher.kubectl.wait_until(lambda: launcher.jobs() == launcher.pods() == [])
