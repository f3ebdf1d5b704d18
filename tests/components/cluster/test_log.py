"""Stamped lines pass once; what ended a pod is read from every status that may say so."""

import time
from collections.abc import Iterator
from typing import Any

import pytest

from components.cluster.failures import find_failures
from components.cluster.log import LineFilter, LogCutError, LogFollower, is_rank_0


def passed(lines: LineFilter, *stream: str) -> list[str | None]:
    lines.begin()
    return [lines.take(line) for line in stream]


def test_a_second_stream_gives_only_what_is_new():
    lines = LineFilter()
    assert passed(lines, "2026-01-01T00:00:00.5Z a", "2026-01-01T00:00:00.6Z b") == ["a", "b"]
    assert passed(lines, "2026-01-01T00:00:00.6Z b", "2026-01-01T00:00:00.7Z c") == [None, "c"]


def test_lines_of_one_stamp_are_counted():
    lines, stamp = LineFilter(), "2026-01-01T00:00:00.123456789Z"
    assert passed(lines, f"{stamp} a", f"{stamp} b") == ["a", "b"]
    assert passed(lines, f"{stamp} a", f"{stamp} b", f"{stamp} c") == [None, None, "c"]
    assert passed(lines, f"{stamp} a", f"{stamp} b", f"{stamp} c") == [None, None, None]


def test_stamps_differ_by_nanoseconds_and_agree_over_time_zones():
    lines = LineFilter()
    assert passed(lines, "2026-01-01T02:00:00.000000001+02:00 a") == ["a"]
    assert passed(lines, "2026-01-01T00:00:00.000000001Z a", "2026-01-01T00:00:00.000000002Z b") == [None, "b"]
    assert passed(lines, "2026-01-01T00:00:01Z c", "2026-01-01T00:00:00.999Z old") == ["c", None]


def test_a_line_without_a_stamp_passes_as_it_is():
    assert passed(LineFilter(), "failed to open the log", "2026-01-01 no zone", "") == [
        "failed to open the log",
        "2026-01-01 no zone",
        "",
    ]


def test_only_a_stream_that_had_lines_is_requested_in_part():
    lines = LineFilter()
    assert lines.begin() is None
    lines.take("2026-01-01T00:00:00Z a")
    assert lines.begin() == 60


def test_a_log_is_requested_again_after_the_longest_pause_at_most():
    requests = []

    def read(pod: str, container: str, **_: Any) -> Iterator[bytes]:
        requests.append(pod)
        raise LogCutError

    leading = {"name": "p", "labels": {"batch.kubernetes.io/job-completion-index": "0"}}
    status = {"containerStatuses": [{"name": "node", "state": {"running": {}}}]}
    log, began_s = LogFollower(read, print, pause_s=60, max_pause_s=0.01), time.monotonic()
    log.offer([{"metadata": leading, "status": status}])
    assert not log.finish(30)
    assert requests[-3:] == ["p", "p", "p"]
    assert time.monotonic() - began_s < 20


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"training.kubeflow.org/replica-type": "worker", "training.kubeflow.org/replica-index": "0"}, False),
        (
            {
                "training.kubeflow.org/replica-type": "worker",
                "training.kubeflow.org/replica-index": "0",
                "training.kubeflow.org/job-role": "master",
            },
            True,
        ),
        ({"batch.kubernetes.io/job-completion-index": "0"}, True),
        ({"batch.kubernetes.io/job-completion-index": "1"}, False),
        ({}, False),
    ],
)
def test_the_pod_that_leads_has_rank_0(labels: dict[str, str], expected: bool):
    assert is_rank_0({"metadata": {"labels": labels}}) is expected


def pod(**status: Any) -> dict[str, Any]:
    return {"metadata": {"name": "p"}, "status": status}


def ended(code: int, reason: str = "Error", at: str = "2026-01-01T00:00:00Z") -> dict[str, Any]:
    return {"terminated": {"exitCode": code, "reason": reason, "finishedAt": at}}


@pytest.mark.parametrize(
    ("status", "kind", "reason"),
    [
        ({"containerStatuses": [{"name": "pytorch", "state": ended(137, "OOMKilled")}]}, "killed", "OOMKilled"),
        ({"containerStatuses": [{"name": "pytorch", "lastState": ended(143)}]}, "killed", "143, ended by SIGTERM"),
        ({"containerStatuses": [{"name": "pytorch", "state": ended(77)}]}, "killed", "exit code 77"),
        ({"initContainerStatuses": [{"name": "init-pytorch", "state": ended(1)}]}, "killed", "container init-pytorch"),
        ({"phase": "Failed", "reason": "Evicted", "message": "disk"}, "evicted", "evicted: disk"),
        (
            {"conditions": [{
                "type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI", "message": "drain",
            }]},
            "evicted",
            "evicted (EvictionByEvictionAPI): drain",
        ),
        (
            {"containerStatuses": [
                {"name": "pytorch", "state": {"waiting": {"reason": "CreateContainerConfigError"}}},
            ]},
            "stuck",
            "the secrets in cluster.secrets",
        ),
        (
            {"conditions": [{"type": "PodScheduled", "status": "False", "message": "0/1 nodes"}]},
            "unschedulable",
            "unschedulable: 0/1 nodes",
        ),
    ],
)  # fmt: skip
def test_every_failure_is_reported(status: dict[str, Any], kind: str, reason: str):
    (failure,) = find_failures("j", [pod(**status)], [])
    assert failure.kind == kind
    assert reason in failure.text


@pytest.mark.parametrize(
    "status",
    [
        {"containerStatuses": [{"name": "pytorch", "state": ended(0)}]},
        {"containerStatuses": [{"name": "pytorch", "state": {"waiting": {"reason": "ContainerCreating"}}}]},
        {"conditions": [{"type": "PodScheduled", "status": "True"}]},
        {},
    ],
)
def test_what_goes_well_is_no_failure(status: dict[str, Any]):
    assert find_failures("j", [pod(**status)], []) == []


def test_the_kubelets_words_about_a_log_that_is_gone_are_not_the_logs():
    lines = LineFilter()
    lines.begin()
    assert lines.take("unable to retrieve container logs for containerd://f993") is None
    assert lines.take("2026-01-01T00:00:00Z unable to retrieve container logs for once") is not None
    assert lines.take("another line without a stamp") == "another line without a stamp"
