"""Waiting for a job, with a clock of the test's own; tests/components/test_pytorchjob.py has the rest."""

from types import SimpleNamespace
from typing import Any

import pytest

from components.cluster import watch
from components.config import ClusterConfig

JOB = {"metadata": {"name": "a"}, "spec": {"trainer": {"numNodes": 2}}}


def test_reminders_that_a_job_waits_become_rarer_and_end_with_the_wait(monkeypatch: pytest.MonkeyPatch):
    now_s, said, pods = 0.0, [], []
    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: now_s))
    source: Any = SimpleNamespace(pods=lambda _: pods, events=lambda: [], queue_message=lambda _: "")
    cluster = ClusterConfig(pending_timeout_s=10**6)
    follower = watch.Follower(source, cluster, lambda text: said.append((now_s / 60, text)))
    for minute in range(301):
        now_s = 60.0 * minute + 1
        follower._look(JOB, lambda _: None)
    assert [round(at) for at, _ in said] == [6, 11, 21, 41, 81, 141, 201, 261]
    assert all("a is still waiting since 20" in text for _, text in said)
    assert said[0][1].endswith(
        "(6 min) because: no reason is known: 0 of 2 pods were created; check that "
        "Kubeflow's operator runs and watches this namespace"
    )

    said.clear()
    pods[:] = [{"metadata": {"name": name}, "status": {"phase": "Running"}} for name in "bc"]
    for minute in range(301, 400):
        now_s = 60.0 * minute + 1
        pods[0]["status"]["phase"] = "Pending" if minute >= 390 else "Running"
        follower._look(JOB, lambda _: None)
    started, reminder = (text for _, text in said)
    assert "a started after" in started
    assert reminder.endswith("because: pods are Pending, and no warning says why")


def test_a_train_job_that_fails_again_and_again_is_given_up():
    waiting, ended = {"waiting": {"reason": "CrashLoopBackOff"}}, {"terminated": {"exitCode": 2}}
    running, done = {"running": {}}, {"terminated": {"exitCode": 0}}

    def look(restarts: int, *pods: tuple[str, int, dict[str, Any]], kind: str = "TrainJob") -> None:
        seen: Any = [
            {
                "metadata": {"name": f"a-node-0-{number}"},
                "status": {"phase": phase, "containerStatuses": [{"name": "node", "restartCount": n, "state": state}]},
            }
            for number, (phase, n, state) in enumerate(pods)
        ]
        source: Any = SimpleNamespace(pods=lambda _: seen, events=lambda: [], queue_message=lambda _: "")
        cluster = ClusterConfig(restarts=restarts, poll_s=1)
        watch.Follower(source, cluster, lambda _: None)._look({**JOB, "kind": kind}, lambda _: None)

    look(3, ("Running", 3, running), ("Running", 3, running))
    look(3, ("Running", 5, waiting), ("Running", 0, done))
    look(0, ("Failed", 0, ended), ("Running", 0, running))  # an evicted pod, and its successor
    look(0, ("Running", 9, running), kind="PyTorchJob")
    for restarts, pod in ((3, ("Running", 7, running)), (3, ("Running", 6, waiting)), (0, ("Running", 0, ended))):
        with pytest.raises(watch.JobGivenUpError, match=f"cluster.restarts × nodes = {restarts} × 2, got"):
            look(restarts, pod, ("Running", 0, running))


def test_a_reason_for_waiting_that_is_over_is_none_for_a_timeout(monkeypatch: pytest.MonkeyPatch):
    now_s = 0.0
    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: now_s))
    condition = {"type": "PodScheduled", "status": "False", "message": "1 Insufficient cpu"}
    pods = [{"metadata": {"name": "a-0"}, "status": {"phase": "Pending", "conditions": [condition]}}]
    said: list[str] = []
    source: Any = SimpleNamespace(pods=lambda _: pods, events=lambda: [], queue_message=lambda _: "")
    follower = watch.Follower(source, ClusterConfig(run_timeout_s=5), said.append)
    job = {**JOB, "spec": {"trainer": {"numNodes": 1}}}
    follower._look(job, lambda _: None)
    pods[0]["status"] = {"phase": "Running"}
    follower._look(job, lambda _: None)
    now_s = 6.0
    with pytest.raises(watch.JobTimeoutError) as error:
        follower._look(job, lambda _: None)
    assert "1 Insufficient cpu" in said[0]
    assert "Insufficient" not in str(error.value)
