"""The launcher against an API server on loopback, by the real client: how a job ends, what is reported, and what
remains.
"""

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from components import pytorchjob
from components.cluster import watch
from components.cluster.api import ClusterError
from components.cluster.resources import LOOKING, launching
from components.cluster.watch import JobFailedError, JobGivenUpError, JobTimeoutError
from components.config import Config
from components.params import load_config

pytest.importorskip("kubernetes", reason="needs kubernetes, of the extra `pipelines`")
# Waits of parts of a second, which no parameter file may set: see `config`.
pytestmark = pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
ROOT = Path(__file__).resolve().parents[2]
NAME = "maskrcnn-try-1"
Cluster = Any  # of cluster/kubernetes_stub.py
Make = Callable[..., Cluster]


def config(*overrides: str, **seconds: float) -> Config:
    """The default parameters with waits of `cluster` that are shorter than a parameter file may set."""
    loaded = load_config(ROOT / "params.yaml", ["cluster.image=registry/maskrcnn:1", *overrides])
    cluster = loaded.cluster.model_copy(update={"poll_s": 0.1, "api_timeout_s": 10, "grace_s": 30, **seconds})
    return loaded.model_copy(update={"cluster": cluster})


def launch(*overrides: str, **seconds: float) -> tuple[pytorchjob.PyTorchJobResult, str]:
    """The result, and what was written."""
    out = io.StringIO()
    return pytorchjob.run(config(*overrides, **seconds), run_id="try-1", out=out), out.getvalue()


def failure(*, kind: type[Exception] = JobFailedError, **seconds: float) -> tuple[str, str]:
    """The message of the error, and what was written before."""
    out = io.StringIO()
    with pytest.raises(kind) as error:
        pytorchjob.run(config(**seconds), run_id="try-1", out=out)
    return str(error.value), out.getvalue()


def log_lines(output: str) -> list[str]:
    """The lines of rank 0's log, without those of the launcher."""
    return [line for line in output.splitlines() if not line.startswith("[")]


def succeed(cluster: Cluster, job: str) -> None:
    """What the operator does with a job that trains well."""
    cluster.pod(job, phase="Pending", containerStatuses=[])
    pod = cluster.running(job)
    cluster.log(pod, "step 1", "step 2")
    cluster.ended(job, 0)
    cluster.set_condition(job, "Succeeded")


def test_success_prints_the_log_and_leaves_the_job(make_cluster: Make):
    cluster = make_cluster(succeed)
    result, said = launch()
    assert (result.name, result.namespace, result.run_id, result.was_adopted) == (NAME, "maskrcnn", "try-1", False)
    assert log_lines(said) == ["step 1", "step 2"]
    assert f"[PyTorchJob] {NAME} succeeded" in said
    assert "could not be read" not in said
    assert NAME in cluster.jobs
    assert cluster.deletions == []


def test_the_launchers_role_is_what_it_does_and_no_more(make_cluster: Make, kubernetes_stub: ModuleType):
    def operator(cluster: Cluster, job: str) -> None:
        cluster.pod(job, phase="Pending")
        cluster.wait_for_a_look()
        cluster.log(cluster.running(job), "step 1")

    used, listed = set(), {(one.group, one.resource, one.verb) for one in LOOKING}
    for api, limit in (("pytorchjob", "run_timeout_s"), ("trainjob", "pending_timeout_s")):  # whose pods have no labels
        words = (f"cluster.api={api}", "cluster.scheduler=kueue", "cluster.queue=team")
        cluster = make_cluster(operator)
        cluster.objects["/apis/kueue.x-k8s.io"] = {"versions": [{"version": "v1beta2"}]}
        with pytest.raises(JobTimeoutError):
            launch(*words, **{limit: 0.5})
        pytorchjob.check(config(*words), run_id="try-2")
        used |= cluster.used
        listed |= {(one.group, one.resource, one.verb) for one in launching(config(*words).cluster)}
    assert used == kubernetes_stub.granted()
    assert listed == kubernetes_stub.granted()


def test_memory_that_runs_out_is_reported(make_cluster: Make):
    def operator(cluster: Cluster, job: str) -> None:
        cluster.running(job)
        cluster.running(job, index=1)
        cluster.ended(job, 1, at=9)  # which died of the other's death, and is not the cause
        cluster.ended(job, 137, "OOMKilled", index=1, at=5)
        cluster.set_condition(job, "Failed", "has reached the specified backoff limit")

    cluster = make_cluster(operator)
    message, _ = failure()
    first, second, third = message.splitlines()
    assert first == f"PyTorchJob {NAME} failed: JobFailed: has reached the specified backoff limit"
    assert second.startswith(f"  pod {NAME}-worker-1: OOMKilled")
    assert "raise cluster.memory" in second
    assert "exit code 1" in third
    assert NAME in cluster.jobs, "it stays to be looked at"
    assert cluster.deletions == []


def test_the_exit_code_is_reported_and_the_log_before_it(make_cluster: Make):
    def operator(cluster: Cluster, job: str) -> None:
        cluster.log(cluster.running(job), "error: train.base_lr")
        cluster.ended(job, 2)
        cluster.set_condition(job, "Failed", "1 Worker replica(s) failed")

    make_cluster(operator)
    message, said = failure()
    assert "container pytorch ended with exit code 2, an error of the configuration or the data" in message
    assert "error: train.base_lr" in said.splitlines()


def test_reasons_are_known_after_the_pods_are_gone(make_cluster: Make):
    def operator(cluster: Cluster, job: str) -> None:
        cluster.running(job, lastState={"terminated": {"exitCode": 137, "reason": "OOMKilled"}}, restartCount=1)
        cluster.wait_for_a_look()
        cluster.pods.clear()
        cluster.set_condition(job, "Failed", "was active longer than specified deadline")

    make_cluster(operator)
    assert "OOMKilled" in failure()[0]


def test_an_image_that_cannot_be_pulled_ends_the_wait_and_the_job(make_cluster: Make):
    def operator(cluster: Cluster, job: str) -> None:
        waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "manifest unknown"}}
        cluster.pod(job, phase="Pending", containerStatuses=[{"name": "pytorch", "state": waiting}])

    cluster = make_cluster(operator)
    message, said = failure(kind=JobTimeoutError, stuck_timeout_s=0.5)
    assert "ImagePullBackOff: manifest unknown; check cluster.image" in message
    assert said.count("ImagePullBackOff") == 1, "reported once, not each time it is seen"
    assert cluster.jobs == {}
    assert cluster.deletions[0]["propagationPolicy"] == "Background"


def test_an_unschedulable_pod_is_reported_with_its_event_and_has_its_time(make_cluster: Make):
    def operator(cluster: Cluster, job: str) -> None:
        unscheduled = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no nodes"}
        pod = cluster.pod(job, phase="Pending", conditions=[unscheduled])
        about = {"reason": "FailedScheduling", "involvedObject": {"name": pod}}
        cluster.events += [
            {
                **about,
                "lastTimestamp": "2026-01-01T00:00:01Z",
                "message": "0/3 nodes are available: 3 Insufficient cpu.",
            },
            {**about, "lastTimestamp": "2026-01-01T00:00:02Z", "message": "0/3 nodes: 3 Insufficient nvidia.com/gpu."},
        ]

    cluster = make_cluster(operator)
    message, _ = failure(kind=JobTimeoutError, pending_timeout_s=0.5)
    assert "did not start within cluster.pending_timeout_s=0.5" in message
    assert "unschedulable: 0/3 nodes: 3 Insufficient nvidia.com/gpu." in message
    assert cluster.jobs == {}


def test_pods_that_are_refused_are_reported_with_the_reason(make_cluster: Make):
    def operator(cluster: Cluster, job: str) -> None:
        message = 'pods "a" is forbidden: violates PodSecurity "restricted:latest"'
        about = {"reason": "FailedCreatePod", "involvedObject": {"name": job}, "message": message}
        other = {"involvedObject": {"name": f"{job}0"}, "lastTimestamp": "2026-01-01T00:00:09Z", "message": "another's"}
        cluster.events += [{**about, "lastTimestamp": "2026-01-01T00:00:01Z"}, other]

    cluster = make_cluster(operator)
    message, _ = failure(kind=JobTimeoutError, pending_timeout_s=0.5)
    assert "no pod was created: pods" in message
    assert 'violates PodSecurity "restricted:latest"' in message
    assert "another's" not in message
    assert cluster.jobs == {}


def test_an_operator_that_does_nothing_is_suspected(make_cluster: Make):
    cluster = make_cluster()
    message, _ = failure(kind=JobTimeoutError, pending_timeout_s=0.5)
    assert "check that Kubeflow's operator runs" in message
    assert cluster.jobs == {}


def test_a_suspended_job_waits_in_its_queue(make_cluster: Make):
    def operator(cluster: Cluster, job: str) -> None:
        cluster.set_condition(job, "Suspended")
        cluster.wait_for_a_look()
        cluster.jobs[job]["status"]["conditions"].clear()
        succeed(cluster, job)

    make_cluster(operator)
    assert "is suspended: it waits for resources" in launch("cluster.scheduler=kueue", "cluster.queue=team")[1]


def test_a_job_that_its_queue_keeps_is_deleted_after_its_time(make_cluster: Make):
    def operator(cluster: Cluster, job: str) -> None:
        inactive = {"type": "QuotaReserved", "status": "False", "message": "LocalQueue team doesn't exist"}
        cluster.workloads = [{"status": {"conditions": [inactive]}}]
        cluster.set_condition(job, "Suspended")

    make_cluster(operator)
    out = io.StringIO()
    waits = config("cluster.scheduler=kueue", "cluster.queue=team", pending_timeout_s=0.5)
    with pytest.raises(JobTimeoutError) as error:
        pytorchjob.run(waits, run_id="try-1", out=out)
    because = "it is suspended; the queue has not admitted it: LocalQueue team doesn't exist"
    assert str(error.value).endswith(f"cluster.pending_timeout_s=0.5: {because}")


def test_each_suspension_is_reported_and_its_end(make_cluster: Make):
    def operator(cluster: Cluster, job: str) -> None:
        for number in range(3):  # the third follows on the second before anyone looked
            if number < 2:
                cluster.running(job)
                cluster.jobs[job].setdefault("status", {})["conditions"] = []
                cluster.wait_for_a_look()
                cluster.wait_for_a_look()
            condition = {"type": "Suspended", "status": "True", "lastTransitionTime": f"2026-01-01T00:00:0{number}Z"}
            with cluster.changed:
                cluster.pods.clear()
                cluster.jobs[job]["status"] = {"conditions": [{**condition, "message": f"preempted {number}"}]}
                cluster.change(job)
            cluster.wait_for_a_look()
        cluster.jobs[job]["status"]["conditions"].clear()
        succeed(cluster, job)

    make_cluster(operator)
    said = launch("cluster.scheduler=kueue", "cluster.queue=team")[1]
    assert [said.count(f"it waits for resources in a queue (preempted {number})") for number in range(3)] == [1, 1, 1]
    assert said.count("is no longer suspended") == 1, "before the second; the job succeeds at once after the third"


def test_the_reason_of_the_queue_is_reported_and_its_time_is_no_running_time(make_cluster: Make):
    """Kueue takes a running job's place; the job waits for longer than cluster.run_timeout_s, and goes on."""
    reason = "couldn't assign flavors: insufficient unused quota for nvidia.com/gpu, 1 more needed"

    def operator(cluster: Cluster, job: str) -> None:
        cluster.running(job)
        cluster.wait_for_a_look()
        cluster.wait_for_a_look()
        suspended = {"type": "Suspended", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}
        with cluster.changed:
            cluster.pods.clear()
            cluster.jobs[job]["status"] = {"conditions": [suspended]}
            pending = {"type": "QuotaReserved", "status": "False", "reason": "Pending", "message": reason}
            cluster.workloads = [{"status": {"conditions": [pending]}}]
            cluster.change(job)
        time.sleep(1.2)
        cluster.jobs[job]["status"]["conditions"].clear()
        cluster.running(job)
        cluster.change(job)
        cluster.wait_for_a_look()
        cluster.wait_for_a_look()
        succeed(cluster, job)

    words = ("cluster.api=pytorchjob", "cluster.scheduler=kueue", "cluster.queue=team")
    for version, status in (("v1beta2", 0), ("v1beta1", 0), ("v1beta2", 403)):
        cluster = make_cluster(operator)
        cluster.kueue_version = version
        cluster.faults = [("list", "workloads", status)] * 100 if status else []
        said = launch(*words, run_timeout_s=1)[1]
        assert said.count(f"] the queue has not admitted it: {reason}\n") == (not status), said
        assert said.count("started after") == 2


def test_a_pod_that_waits_is_reported_with_each_warning_and_now_and_then_again(
    make_cluster: Make, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(watch, "_REMIND_S", 0.3)

    def operator(cluster: Cluster, job: str) -> None:
        waiting = {"name": "pytorch", "state": {"waiting": {"reason": "ContainerCreating"}}}
        pod = cluster.pod(job, phase="Pending", containerStatuses=[waiting])
        cluster.wait_for_a_look()
        about = {"involvedObject": {"name": pod}, "lastTimestamp": "2099-01-01T00:00:01Z"}
        earlier = {**about, "lastTimestamp": "2025-01-01T00:00:01Z"}
        cluster.events += [{**earlier, "reason": "FailedMount", "message": "of an earlier job of this name"}]
        mount = {**about, "reason": "FailedMount"}
        cluster.events += [{**mount, "message": f"timed out waiting for the condition, request {n}"} for n in (17, 18)]
        cluster.wait_for_a_look()
        later = {**about, "lastTimestamp": "2099-01-01T00:00:02Z"}
        cluster.events += [{**later, "reason": "FailedAttachVolume", "message": "Multi-Attach error"}]

    cluster = make_cluster(operator)
    message, said = failure(kind=JobTimeoutError, pending_timeout_s=1.5)
    assert said.count(f"] pod {NAME}-worker-0: FailedMount: timed out waiting for the condition") == 1
    assert said.count(f"] pod {NAME}-worker-0: FailedAttachVolume: Multi-Attach error") == 1
    reminders = [line for line in said.splitlines() if "is still waiting since 20" in line]
    assert reminders
    assert f"because: pod {NAME}-worker-0: FailedAttachVolume" in reminders[-1]
    assert "of an earlier job" not in said
    assert f"cluster.pending_timeout_s=1.5: pod {NAME}-worker-0: FailedAttachVolume: Multi-Attach error" in message
    assert "operator runs" not in message
    assert cluster.jobs == {}


def test_an_evicted_pod_is_reported_and_its_successors_log_follows(make_cluster: Make):
    def operator(cluster: Cluster, job: str) -> None:
        pod = cluster.running(job)
        cluster.log(pod, "step 1", "saved step 1")
        cluster.wait(lambda: cluster.lines_sent == 2)
        cluster.pod(job, phase="Failed", reason="Evicted", message="The node was low on resource: memory.")
        cluster.set_condition(job, "Restarting")
        cluster.wait_for_a_look()
        cluster.logs[pod] = []
        cluster.running(job)
        cluster.log(pod, "continuing from step 1", "step 2")
        cluster.wait(lambda: cluster.lines_sent >= 4)
        cluster.ended(job, 0)
        cluster.set_condition(job, "Succeeded")

    cluster = make_cluster(operator)
    _, said = launch()
    assert "evicted: The node was low on resource: memory." in said
    lines = log_lines(said)
    assert lines == ["step 1", "saved step 1", "continuing from step 1", "step 2"]
    assert NAME in cluster.jobs


def test_a_job_of_the_same_name_is_adopted(make_cluster: Make):
    cluster = make_cluster()
    cluster.jobs[NAME] = pytorchjob.make_manifest(config(), run_id="try-1")
    cluster.change(NAME, "ADDED")
    succeed(cluster, NAME)
    result, said = launch(pending_timeout_s=7)  # how long one waits makes no other job
    assert result.was_adopted
    assert "step 2" in said
    assert [call for call in cluster.calls if call[0] == "create"] == [("create", "pytorchjobs")]


def test_another_job_of_the_same_name_is_left_alone(make_cluster: Make):
    cluster = make_cluster()
    cluster.jobs[NAME] = pytorchjob.make_manifest(config("train.base_lr=0.5"), run_id="try-1")
    cluster.change(NAME, "ADDED")
    message, _ = failure(kind=ClusterError)
    assert "already exists with another image, command or resources" in message
    assert NAME in cluster.jobs
    assert cluster.deletions == []


def test_a_failed_job_of_the_same_name_is_replaced(make_cluster: Make):
    cluster = make_cluster(succeed)
    cluster.jobs[NAME] = pytorchjob.make_manifest(config(), run_id="try-1")
    cluster.change(NAME, "ADDED")
    cluster.set_condition(NAME, "Failed")
    cluster.deletion_s = 0.3
    result, said = launch()
    assert "has failed; replacing it" in said
    assert not result.was_adopted
    assert len(cluster.deletions) == 1


def test_an_expired_version_is_looked_up_anew(make_cluster: Make):
    def operator(cluster: Cluster, job: str) -> None:
        cluster.wait_for_a_look()
        cluster.oldest = 10**9
        cluster.running(job)
        cluster.wait(lambda: cluster.calls.count(("get", "pytorchjobs")) >= 3)
        cluster.ended(job, 0)
        cluster.set_condition(job, "Succeeded")

    cluster = make_cluster(operator)
    assert "succeeded" in launch()[1]
    assert cluster.calls.count(("get", "pytorchjobs")) >= 3


@pytest.mark.parametrize("status", [0, 410, 500, 503, 403])
def test_a_watch_that_never_works_costs_only_time(make_cluster: Make, status: int):
    cluster = make_cluster(succeed)
    cluster.faults += [("watch", "pytorchjobs", status)] * 1000
    began = time.monotonic()
    _, said = launch()
    assert "step 2" in said
    assert time.monotonic() - began < 10


def test_errors_and_cut_connections_are_survived(make_cluster: Make):
    def operator(cluster: Cluster, job: str) -> None:
        cluster.log(cluster.running(job), "step 1")
        cluster.wait(lambda: not cluster.faults)
        succeed(cluster, job)

    cluster = make_cluster(operator)
    cluster.faults += [
        ("list", "pods", 500),
        ("list", "pods", 0),
        ("get", "pytorchjobs", 503),
        ("get", "pytorchjobs", 0),
    ]
    cluster.faults += [("list", "pods", 429), ("watch", "pytorchjobs", 0), ("get", "pods/log", 500)]
    _, said = launch()
    assert log_lines(said) == ["step 1", "step 1", "step 2"]
    assert cluster.faults == []


def test_a_cut_log_loses_and_doubles_no_line(make_cluster: Make):
    lines, read = [f"step {number}" for number in range(40)], ("get", "pods/log")

    def operator(cluster: Cluster, job: str) -> None:
        pod = cluster.running(job)
        cluster.log(pod, *lines[:10])
        cluster.log(pod, *lines[10:20], at_once=True)  # of one stamp, which a cut goes through
        cluster.wait(lambda: cluster.calls.count(read) == 3)  # after two cuts
        cluster.log(pod, *lines[20:])
        cluster.wait(lambda: cluster.calls.count(read) == 4)
        cluster.ended(job, 0)
        cluster.set_condition(job, "Succeeded")

    cluster = make_cluster(operator)
    cluster.log_cuts = [38 * 5 + 20, 38 * 15 + 7, 38 * 30]
    _, said = launch()
    assert log_lines(said) == lines
    assert cluster.log_cuts == []


def test_a_log_that_is_cut_at_the_very_end_is_read_again(make_cluster: Make):
    cluster = make_cluster(succeed)
    cluster.log_cuts = [10, 45]
    _, said = launch()
    assert log_lines(said) == ["step 1", "step 2"]
    assert cluster.log_cuts == []


def test_a_log_that_cannot_be_had_is_admitted(make_cluster: Make):
    cluster = make_cluster(succeed)
    cluster.faults += [("get", "pods/log", 500)] * 100
    result, said = launch()
    assert result.name == NAME, "a success is none the less one"
    assert "the end of rank 0's log could not be read" in said


def test_a_job_deleted_behind_its_back_is_reported(make_cluster: Make):
    def operator(cluster: Cluster, job: str) -> None:
        cluster.running(job)
        cluster.wait_for_a_look()
        cluster.remove(job)

    cluster = make_cluster(operator)
    assert "was deleted by someone else" in failure()[0]
    assert cluster.jobs == {}
    assert ("delete", "pytorchjobs") not in cluster.calls


def test_a_job_that_hangs_is_deleted_after_its_time(make_cluster: Make):
    cluster = make_cluster(lambda cluster, job: cluster.log(cluster.running(job), "step 1"))
    cluster.deletion_s = 0.3
    message, said = failure(kind=JobTimeoutError, run_timeout_s=0.5)
    assert "did not end within cluster.run_timeout_s=0.5" in message
    assert "step 1" in said
    assert f"{NAME} is deleted" in said
    assert (cluster.jobs, cluster.pods) == ({}, {})
    assert cluster.deletions[0]["propagationPolicy"] == "Background"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_cancelled_launcher_deletes_its_job_and_says_so(make_cluster: Make, number: int, status: int):
    cluster = make_cluster(lambda cluster, job: cluster.log(cluster.running(job), "step 1"))
    cluster.deletion_s = 0.5
    words = ["--params", str(ROOT / "params.yaml"), "--run-id", "try-1", "cluster.image=a", "cluster.poll_s=1"]
    command = [sys.executable, "-m", "components.pytorchjob", *words]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            said = ""
            while "step 1" not in said:
                line = process.stdout.readline()
                assert line, said
                said += line
            process.send_signal(number)
            cluster.wait(lambda: cluster.deletions)
            process.send_signal(signal.SIGTERM)  # a second one must not break off the deletion
            said += process.communicate(timeout=60)[0]
        finally:
            process.kill()
    assert process.returncode == status, said
    assert f"{NAME} is being deleted: cancelled" in said
    assert f"{NAME} is deleted" in said
    assert "Traceback" not in said
    assert (cluster.jobs, cluster.pods, len(cluster.deletions)) == ({}, {}, 1)


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_that_python_loses_is_not_lost(make_cluster: Make, number: int, error: type[BaseException]):
    """It comes while an object is finalised, such as an answer of the API server: Python drops its exception."""
    cluster = make_cluster(lambda cluster, job: cluster.running(job))

    class Answer(io.IOBase):
        def close(self) -> None:
            os.kill(os.getpid(), number)

    class Output(io.StringIO):
        def write(self, text: str) -> int:
            if "started after" in text:
                Answer()  # finalised at once
            return super().write(text)

    out = Output()
    with pytest.raises(error):
        pytorchjob.run(config(poll_s=1, run_timeout_s=20), run_id="try-1", out=out)
    assert f"{NAME} is being deleted: cancelled" in out.getvalue()
    assert (cluster.jobs, cluster.pods) == ({}, {})


def test_a_cancelled_job_is_deleted_though_nobody_reads_the_output(make_cluster: Make):
    """Kubeflow's launcher, which reads it, ends at SIGTERM before the step."""
    cluster = make_cluster(lambda cluster, job: cluster.running(job))

    class Output(io.StringIO):
        def write(self, text: str) -> int:
            if "delete" in text:
                raise BrokenPipeError
            if "started after" in text:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().write(text)

    with pytest.raises(SystemExit) as end:
        pytorchjob.run(config(poll_s=1, run_timeout_s=20), run_id="try-1", out=Output())
    assert end.value.code == 143
    assert (cluster.jobs, cluster.pods) == ({}, {})


def test_a_dry_run_prints_the_manifest_and_asks_nobody(make_cluster: Make, capsys: pytest.CaptureFixture[str]):
    cluster = make_cluster(succeed)
    words = ["--params", str(ROOT / "params.yaml"), "--run-id", "try-1", "--dry-run", "cluster.image=a"]
    pytorchjob.main(words)
    first = capsys.readouterr().out
    pytorchjob.main(words)
    assert capsys.readouterr().out == first
    assert first.startswith("apiVersion: kubeflow.org/v1\nkind: PyTorchJob\n")
    assert cluster.calls == []


def test_a_train_job_is_followed_the_same_way(make_cluster: Make):
    def operator(cluster: Cluster, job: str) -> None:
        pod = cluster.pod(job, "node-0", phase="Running")
        labels = {"jobset.sigs.k8s.io/jobset-name": job, "batch.kubernetes.io/job-completion-index": "0"}
        cluster.pods[pod]["metadata"]["labels"] = labels
        cluster.pods[pod]["status"]["containerStatuses"] = [{"name": "node", "state": {"terminated": {"exitCode": 0}}}]
        cluster.log(pod, "step 1")
        cluster.set_condition(job, "Complete")

    cluster = make_cluster(operator)
    result, said = launch("cluster.api=trainjob")
    assert "step 1" in said
    assert result.name == NAME
    assert cluster.calls[0] == ("create", "trainjobs")


def test_a_train_job_that_fails_more_often_than_it_may_is_deleted(make_cluster: Make):
    def operator(cluster: Cluster, job: str) -> None:
        pod = cluster.pod(job, "node-0", phase="Running")
        cluster.pods[pod]["metadata"]["labels"] = {
            "jobset.sigs.k8s.io/jobset-name": job,
            "batch.kubernetes.io/job-completion-index": "0",
        }
        cluster.log(pod, "error: train.base_lr")
        end = {"terminated": {"exitCode": 2, "reason": "Error", "finishedAt": "2026-01-01T00:00:01Z"}}
        status = {"name": "node", "restartCount": 1, "state": {"waiting": {"reason": "CrashLoopBackOff"}}}
        cluster.pods[pod]["status"]["containerStatuses"] = [{**status, "lastState": end}]
        cluster.change(job)

    cluster = make_cluster(operator)
    out = io.StringIO()
    with pytest.raises(JobGivenUpError) as error:
        pytorchjob.run(config("cluster.api=trainjob", restarts=1), run_id="try-1", out=out)
    assert "at most cluster.restarts × nodes = 1 × 1, got 2\n  pod maskrcnn-try-1-node-0-0: " in str(error.value)
    assert "exit code 2" in str(error.value)
    assert f"{NAME} is being deleted: it fails again and again" in out.getvalue()
    assert log_lines(out.getvalue()) == ["error: train.base_lr"]
    assert cluster.jobs == {}
